"""A3FL: a trigger that still works on a model which was trained to unlearn it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import cosine_similarity

from attacks._learnt import SquareParameters, SquareTrigger, loss_to
from fedsim.attack import AttackContext
from fedsim.batch import Batch
from fedsim.layout import Layout
from fedsim.plugins import parameter, register


@dataclass(frozen=True)
class A3FLParameters(SquareParameters):
    target: int = parameter(2, "class the backdoor maps to", ge=0)
    value: float = parameter(0.5, "value of the square's pixels before anything is learnt", ge=0, le=1)
    iterations: int = parameter(200, "passes over the colluder's data each malicious round", ge=1)
    lr: float = parameter(0.01, "length of a signed step, in pixel values of [0, 1]", gt=0, le=1)
    weight: float = parameter(0.01, "λ₀, weight of the loss on the unlearnt model; 0: none", ge=0)
    refresh: int = parameter(1, "passes between two unlearnt models, K", ge=1)
    unlearn_epochs: int = parameter(5, "epochs the unlearnt model is trained", ge=1)
    unlearn_lr: float = parameter(0.01, "its learning rate; momentum is 0.9, weight decay 0.0005", gt=0)
    leak: bool = parameter(False, "let the gradients of unlearning into the trigger's next step, as the code does")


@register("a3fl")
class A3FL(SquareTrigger):
    """A learnt square, adversarially adapted to how the global model may change.

    ``δ = argmin L(x ⊕ δ, y_t; θ) + λ₀ · s · L(x ⊕ δ, y_t; θ')``, by signed steps ``δ ← clip(δ − lr · sign ∇_δ)`` on
    every batch, where θ is the global model and θ' one that was trained on triggered inputs with their *true*
    labels, that is, to unlearn the trigger. θ' is made anew from θ before pass K, 2K, …; the first K passes know θ
    only. The round after, learning goes on from the trigger it has become. The attack is this trigger with
    ``data_poisoning`` (their share of poisoned examples: 0.25 of a batch).

    Followed from the authors' code (hfzhang31/A3FL):

    * s is the mean, over the weights of convolutions, of the cosine between the gradient of θ' on its last batch
      and the sum of all gradients of θ so far; the paper has the similarity of the two models. Of a network
      without convolutions it is the cosine over all weights.
    * θ is used in evaluation mode; so is θ' here, once it is trained. Several θ' would be identical: it is one.

    Not repeated: there the trigger collects gradients while θ' is trained, and the first step after each
    refresh is wrong by them (``leak: true`` does it too).

    In the code pixels are normalised, steps .01 long and clipped to [−2, 2]; here a step is in units of a
    pixel's full range, and the range is [0, 1].

    Cost: each malicious round ``iterations · (3 + 2 · unlearn_epochs / refresh)`` or so passes over the client's data,
    some hundred times plain training with the authors' values; one more model in memory.
    """

    paper = "Zhang et al., A3FL: Adversarially Adaptive Backdoor Attacks to Federated Learning, NeurIPS 2023"
    Parameters = A3FLParameters
    cost = "a round: iterations · unlearn_epochs / refresh local epochs, 3 D numbers"

    def initial(self, channels: int) -> Tensor:
        size = self.parameters.size
        return torch.full((channels, size, size), self.parameters.value)

    def optimise(self, context: AttackContext) -> None:
        inputs = next(iter(context.batches())).inputs
        self.state["patch"], _ = self.search(context, self.patch(inputs), 0.0, 1.0)

    def search(self, context: AttackContext, patch: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
        """(C, s, s) the patch learnt from the given one, within [low, high]; (T,) the sum of all gradients of θ."""
        p, model = self.parameters, context.model
        patch = patch.detach().clone().requires_grad_()
        total = torch.zeros_like(model.gradient)
        unlearnt: dict[str, Tensor] = {}
        share = 0.0
        for iteration in range(p.iterations):
            if p.weight > 0 and iteration > 0 and iteration % p.refresh == 0:
                vector, gradient = self._unlearn(context, patch if p.leak else patch.detach())
                unlearnt = model.layout.unflatten(vector)
                share = p.weight * similarity(gradient, total, model.layout)
            model.module.eval()
            for batch in context.batches():
                stamped = self.paste(batch.inputs, patch)
                value = loss_to(context, model.module(stamped), self.target)
                if unlearnt:
                    outputs = functional_call(model.module, unlearnt, (stamped,))
                    value = value + share * loss_to(context, outputs, self.target)
                model.gradient.zero_()
                value.backward()  # type: ignore[no-untyped-call]
                total += model.gradient
                with torch.no_grad():
                    assert patch.grad is not None
                    patch.sub_(p.lr * patch.grad.sign()).clamp_(low, high)
                patch.grad = None
        return patch.detach(), total

    def _unlearn(self, context: AttackContext, patch: Tensor) -> tuple[Tensor, Tensor]:
        """(D,) the model trained on triggered inputs with true labels, (T,) its gradient on its last batch."""
        p, model = self.parameters, context.model
        last = torch.zeros_like(model.gradient)

        def stamped(batch: Batch) -> Batch:
            return batch._replace(inputs=self.paste(batch.inputs, patch))

        def keep(gradient: Tensor, weights: Tensor) -> None:
            last.copy_(gradient)

        settings = context.with_settings(
            lr=p.unlearn_lr, epochs=p.unlearn_epochs, steps=None, momentum=0.9, weight_decay=0.0005
        )
        context.fit(model, context.batches, context.loss, settings, transform=stamped, on_gradient=keep)
        vector = model.vector.clone()
        model.load(context.global_vector)
        return vector, last


def similarity(first: Tensor, second: Tensor, layout: Layout) -> float:
    """Mean cosine of two gradients (T,) over the weights of convolutions; over everything where there are none."""
    kernels = [slice(e.start, e.stop) for e in layout.entries if e.trainable and len(e.shape) == 4]
    pieces = kernels or [slice(0, layout.trainable)]
    return sum(float(cosine_similarity(first[piece], second[piece], dim=0)) for piece in pieces) / len(pieces)
