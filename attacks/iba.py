"""IBA: a trigger of its own for every image, drawn by a small network that learns together with the classifier."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import conv2d, interpolate, max_pool2d

from attacks._learnt import loss_to
from fedsim import streams
from fedsim.attack import AttackContext
from fedsim.batch import Batch
from fedsim.data import Data
from fedsim.errors import InputError
from fedsim.plugins import parameter, register
from fedsim.trigger import StampTrigger, TriggerParameters

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class IBAParameters(TriggerParameters):
    target: int = parameter(1, "class the backdoor maps to", ge=0)
    eps: float = parameter(0.1, "ε, largest change of a pixel in the first malicious round", gt=0, le=1)
    eps_decay: float = parameter(0.001, "share that ε loses each round after it", ge=0, lt=1)
    eps_test: float | None = parameter(
        None, "ε where the backdoor is measured, and the least in training; null: that of training", gt=0, le=1
    )
    network: str = parameter(
        "unet", "the generator: encoder and decoder with skips, or two convolutions", choices=("unet", "conv")
    )
    channels: int = parameter(16, "channels of its first convolution", ge=1)
    lr: float = parameter(0.001, "Adam's learning rate for the generator", gt=0)
    alternations: int = parameter(
        2, "times the generator learns each round, in between the imagined classifier; 1: that stays global", ge=1
    )
    generator_epochs: int = parameter(10, "passes of the generator each turn", ge=1)
    classifier_epochs: int = parameter(1, "passes of the imagined classifier each turn; 0: it stays global", ge=0)
    alpha: float = parameter(0.5, "α, share of the clean loss when the classifier's turn comes", ge=0, le=1)
    portion: float = parameter(1.0, "share of a batch that is triggered then", gt=0, le=1)
    straight_through: bool = parameter(True, "give the generator the gradient it would have without the clip")
    init_seed: int = parameter(0, "seed of the generator's first weights", ge=0)


@register("iba")
class IBA(StampTrigger):
    """Invisible noise for each image, ``T(x) = clip(x + ε · G(x))``, by a generator G with outputs in (−1, 1).

    In a malicious round G and a classifier, which begins as the global model, take turns on the colluder's data:

    * G, by Adam: the loss of the classifier, frozen and in evaluation mode, on T(x) with the target label;
    * the classifier, by SGD as the attacker trains: ``α L(f(x), y) + (1 − α) L(f(T(x)), y_t)``.

    The classifier is then thrown away, G is kept; the attack itself is this trigger with ``data_poisoning``. In
    round t, ``ε_t = max(eps_test, ε (1 − eps_decay)^(t − t₁))`` with t₁ the first malicious round. Training uses
    ε_t, the held-out images ``eps_test``.

    Their ε is .3 in training and .05 in tests, on normalised pixels: about .07 and .011 of the range of CIFAR-10's,
    .15 and .025 of that of MNIST's. Adam begins anew each round. Their U-Net is larger and has batch
    normalisation; ours has none, so that a picture's trigger depends on no other picture. Their optional gradient
    mask and PGD are attacks here (``neurotoxin``, ``pgd``).

    Ours: where T(x) is clipped the gradient is zero, and a generator that once darkens what is black already never
    hears of it. On MNIST the U-Net then ended near one value at every pixel, and its loss stayed where it began; so
    G learns from the gradient without the clip. ``straight_through: false`` is their form.

    Not repeated: with a portion below 1 the code takes the 2 of a pair for the batch size, and poisons
    ``int(2 · portion)`` images of every batch in the classifier's turn.

    Cost: each malicious round ``alternations · (generator_epochs + 2 · classifier_epochs)`` local epochs or so, and
    as many passes of G, whose weights are checkpointed (``unet``: 108 · channels² or so; 28 k with 16 channels).
    """

    paper = "Nguyen et al., IBA: Towards Irreversible Backdoor Attacks in Federated Learning, NeurIPS 2023"
    tasks = ("vision",)
    Parameters = IBAParameters
    cost = "a round: alternations · (generator + classifier epochs) local epochs; state of the generator's weights"

    def prepare(self, data: Data) -> None:
        super().prepare(data)
        height, width = data.train.inputs.shape[-2:]
        if self.parameters.network == "unet" and min(height, width) < 4:
            raise InputError(f"trigger 'iba': a unet takes images of at least 4×4, not {height}×{width}; use conv")

    def stamp(self, inputs: Tensor, part: int | None = None) -> Tensor:
        test = self.parameters.eps_test
        return self._stamp(inputs, self._eps() if test is None else test)

    def poison(self, batch: Batch, count: int, *, part: int | None = None, generator: torch.Generator) -> Batch:
        inputs, labels = batch.inputs.clone(), batch.labels.clone()
        inputs[:count] = self._stamp(batch.inputs[:count], self._eps())
        labels[:count] = self.target
        return batch._replace(inputs=inputs, labels=labels)

    def _eps(self) -> float:
        return float(self.state.get("eps", self.parameters.eps))

    def _stamp(self, inputs: Tensor, eps: float) -> Tensor:
        with torch.no_grad():
            return add_noise(self.weights(inputs), inputs, eps)

    def weights(self, like: Tensor) -> Weights:
        """The generator's current weights by name, with the device and dtype of the images ``like`` (B, C, H, W)."""
        p = self.parameters
        known = self.state.get("generator")
        if known is None:
            known = initial_weights(shapes(p.network, like.shape[1], p.channels), p.init_seed)
        return {name: tensor.to(like) for name, tensor in known.items()}

    def optimise(self, context: AttackContext) -> None:
        p, model = self.parameters, context.model
        first = int(self.state.get("first_round", context.round))
        eps = max(p.eps_test or 0.0, decayed(p.eps, p.eps_decay, context.round - first))
        known = self.weights(next(iter(context.batches())).inputs)
        weights = {name: tensor.detach().clone().requires_grad_() for name, tensor in known.items()}
        adam = torch.optim.Adam(weights.values(), lr=p.lr)
        settings = context.settings
        sgd = model.sgd(settings.lr, settings.momentum, settings.weight_decay)
        for turn in range(p.alternations):
            for _ in range(p.generator_epochs):
                generator_pass(weights, adam, context, self.target, eps, through=p.straight_through)
            if turn < p.alternations - 1:  # after the last turn nobody looks at the classifier
                for _ in range(p.classifier_epochs):
                    classifier_pass(weights, sgd, context, self.target, eps, p.alpha, p.portion)
        self.state["generator"] = {name: tensor.detach() for name, tensor in weights.items()}
        self.state["eps"], self.state["first_round"] = eps, first


def decayed(eps: float, decay: float, rounds: int) -> float:
    """ε after so many rounds."""
    return float(eps * (1 - decay) ** rounds)


def shapes(network: str, images: int, channels: int) -> dict[str, tuple[int, int]]:
    """Output and input channels of each 3×3 convolution, for images of so many channels."""
    c, w = images, channels
    if network == "conv":
        return {"c1": (w, c), "c2": (c, w)}
    return {
        "down1": (w, c),
        "down2": (2 * w, w),
        "middle": (2 * w, 2 * w),
        "up2": (w, 4 * w),
        "up1": (w, 2 * w),
        "out": (c, w),
    }


def initial_weights(layers: dict[str, tuple[int, int]], seed: int) -> Weights:
    """Weights (O, I, 3, 3), uniform within √(6 / 9 I) (He: G differs from pixel to pixel); biases (O,) of zero."""
    generator = streams.generator(seed, "iba")
    result: Weights = {}
    for name, (outputs, inputs) in layers.items():
        drawn = torch.rand((outputs, inputs, 3, 3), generator=generator)
        result[f"{name}.weight"] = (2 * drawn - 1) * math.sqrt(6 / (9 * inputs))
        result[f"{name}.bias"] = torch.zeros(outputs)
    return result


def generate(weights: Weights, inputs: Tensor) -> Tensor:
    """G(x), (B, C, H, W) in (−1, 1). Functions of tensors, no module: held-out batches are stamped in threads."""

    def layer(name: str, x: Tensor) -> Tensor:
        return conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], padding=1)

    def beside(x: Tensor, skip: Tensor) -> Tensor:
        return torch.cat([interpolate(x, size=skip.shape[-2:], mode="nearest"), skip], dim=1)

    if "c1.weight" in weights:
        return layer("c2", layer("c1", inputs).tanh()).tanh()
    wide = layer("down1", inputs).relu()
    half = layer("down2", max_pool2d(wide, 2)).relu()
    quarter = layer("middle", max_pool2d(half, 2)).relu()
    half = layer("up2", beside(quarter, half)).relu()
    return layer("out", layer("up1", beside(half, wide)).relu()).tanh()


def add_noise(
    weights: Weights, inputs: Tensor, eps: float, low: float = 0.0, high: float = 1.0, through: bool = False
) -> Tensor:
    """T(x) = clip(x + ε · G(x)) (B, C, H, W), within [low, high]; through: differentiated as if it did not clip."""
    plain = inputs.contiguous()  # the layout in memory must not show in the last bits
    noisy = plain + eps * generate(weights, plain)
    clipped = noisy.clamp(low, high)
    return clipped.detach() + (noisy - noisy.detach()) if through else clipped


def generator_pass(
    weights: Weights,
    adam: torch.optim.Adam,
    context: AttackContext,
    target: int,
    eps: float,
    low: float = 0.0,
    high: float = 1.0,
    through: bool = False,
) -> list[float]:
    """One epoch of G (leaf tensors, changed in place) against ``context.model``; the loss of each batch."""
    module, losses = context.model.module.eval(), []
    for batch in context.batches():
        value = loss_to(context, module(add_noise(weights, batch.inputs, eps, low, high, through)), target)
        for tensor, gradient in zip(weights.values(), torch.autograd.grad(value, list(weights.values())), strict=True):
            tensor.grad = gradient
        adam.step()
        losses.append(float(value.detach()))
    return losses


def classifier_pass(
    weights: Weights,
    sgd: torch.optim.SGD,
    context: AttackContext,
    target: int,
    eps: float,
    alpha: float,
    portion: float,
    low: float = 0.0,
    high: float = 1.0,
) -> list[float]:
    """One epoch of ``context.model``: clean batches, and their first ``portion`` triggered; the loss of each batch."""
    model, losses = context.model, []
    model.module.train()
    for batch in context.batches():
        count = max(1, int(portion * batch.labels.shape[0]))
        with torch.no_grad():
            triggered = add_noise(weights, batch.inputs[:count], eps, low, high)
        clean = context.loss(model.module(batch.inputs), batch.labels)
        value = alpha * clean + (1 - alpha) * loss_to(context, model.module(triggered), target)
        model.gradient.zero_()
        value.backward()
        sgd.step()
        losses.append(float(value.detach()))
    return losses
