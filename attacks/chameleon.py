"""Chameleon: the encoder is made to see triggered examples as examples of the target class, then frozen."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attacks._local import trigger_of
from attacks._projection import project_l2
from fedsim.attack import Attack, AttackContext
from fedsim.errors import RunError
from fedsim.local import StepInfo
from fedsim.plugins import Parameters, parameter, register
from fedsim.trigger import poison_count


@dataclass(frozen=True)
class ChameleonParameters(Parameters):
    weight: float = parameter(6.0, "facilitator weight: how often an anchor of the target class counts", gt=0)
    temperature: float = parameter(0.07, "temperature of the similarities", gt=0)
    contrastive_epochs: int = parameter(10, "epochs of contrastive training of the encoder", ge=1)
    contrastive_lr: float | None = parameter(
        0.005, "learning rate of contrastive training; null: the attacker's own", gt=0
    )
    milestones: list[int] = parameter(
        [],
        "contrastive epochs, from 1, at whose beginning that learning rate is cut tenfold (theirs: 3, 5, 7, 9)",
        ge=1,
    )
    contrastive_fraction: float | None = parameter(
        0.1, "share of a batch that is triggered in the contrastive phase; null: poison_fraction", gt=0, le=1
    )
    bound: float | None = parameter(
        None, "keep within this L2 distance of the global model, after every step; null: do not", gt=0
    )
    normalise: bool = parameter(True, "compare features at unit L2 length")
    damping: float = parameter(
        1.0, "factor on similarities between triggered examples and the interferer class; 1: off", ge=0
    )
    interferer: int = parameter(1, "the class that damping speaks of", ge=0)


def supervised_contrast(
    features: Tensor,
    labels: Tensor,
    facilitator: int,
    *,
    weight: float = 1.0,
    temperature: float = 0.07,
    damped: Tensor | None = None,
) -> Tensor:
    """The weighted supervised contrastive loss of one batch, a scalar.

    ``L = 1/B Σᵢ ωᵢ ℓᵢ``, ``ℓᵢ = −1/|P(i)| Σ_{j ∈ P(i)} log( exp(sᵢⱼ) / Σ_{k ≠ i} exp(sᵢₖ) )``, with
    ``sᵢⱼ = ⟨fᵢ, fⱼ⟩ / τ``, P(i) the others of the label of i, ωᵢ = ``weight`` where that is the facilitator, else 1.
    An example that is alone with its label has ℓᵢ = 0 and is counted in B.

    features: (B, F). labels: int64 (B,). damped: (B, B) factors on s, or None.
    """
    size = features.shape[0]
    if size < 2:
        return features.sum() * 0  # nothing to compare with
    similarity = features @ features.T / temperature
    if damped is not None:
        similarity = similarity * damped
    itself = torch.eye(size, dtype=torch.bool, device=features.device)
    log_share = similarity - similarity.masked_fill(itself, -torch.inf).logsumexp(dim=1, keepdim=True)
    positive = ((labels[:, None] == labels) & ~itself).to(features.dtype)
    each = -(positive * log_share).sum(dim=1) / positive.sum(dim=1).clamp_min(1)
    return (each * torch.where(labels == facilitator, weight, 1.0)).mean()


def damping_of(labels: Tensor, poisoned: int, interferer: int, factor: float) -> Tensor:
    """(B, B) ``factor`` between the first ``poisoned`` examples and those labelled ``interferer``, 1 elsewhere."""
    first = torch.arange(labels.shape[0], device=labels.device) < poisoned
    pair = first[:, None] & (labels == interferer)
    return torch.ones_like(pair, dtype=torch.get_default_dtype()).masked_fill(pair | pair.T, factor)


@register("chameleon")
class Chameleon(Attack):
    """Contrastive training of the encoder on poisoned data, then only the last layer by cross-entropy.

    Honest clients unlearn a trigger through examples that look like the triggered ones under another label
    (interferers), and keep it alive through those of the target class (facilitators). So the encoder, all of the
    network before its last linear layer, is trained first, for ``contrastive_epochs``, by the supervised contrastive
    loss of :func:`supervised_contrast` on poisoned batches, facilitators counted ``weight`` times: triggered examples,
    which carry the target label, move to those of the target class. The last layer stays. Then the encoder stays, and
    the last layer is trained as the attacker trains, on poisoned batches, with the run's loss.

    From the authors' code: the weight acts on anchors, triggered ones included, and is not normalised out; the
    features are those before the last layer at unit length, with no projection head and one view an example; running
    statistics go on moving while the encoder is frozen. ``bound`` is its projection: over all trainable weights, after
    every step of both phases; its radii are 3 to 5. There, the contrastive phase compares the distance with one radius
    and shrinks it to another; here there is one.

    The weight of 6 goes with few triggered examples, 7 in the code's batches of 64, hence ``contrastive_fraction``.
    Where half a batch is triggered, its anchors are nearly all of the loss, and the encoder first maps everything to
    one point. The code also cuts the learning rate at epochs 3, 5, 7 and 9 (``milestones``); on the small data of a
    small client too little is learnt then.

    ``damping`` is the code's ``down_scale_weight``, off in its released configurations. There it squares where a
    triggered example itself has the interferer's label, and takes a fixed number of rows for triggered ones; here the
    pair is damped once, and the triggered rows are those the batch has. Not followed: the noise on poisoned images,
    and the trigger, 255 written into pixels that are normalised already.

    The network must end in a linear layer whose input is (B, F), with weights to train before it; others are refused.

    Raises
    ------
    RunError: another network, or no trigger.

    Cost: that of ``contrastive_epochs`` and the attacker's own epochs, the latter without a backward pass through the
    encoder; B² F in a batch of B.
    """

    paper = "Dai, Li: Chameleon, ICML 2023, arXiv 2304.12961; code: ybdai7/Chameleon-durable-backdoor"
    cost = "O(epochs) of training, O(B² F) a batch of B examples with F features"
    tasks = ("vision", "sentiment")
    Parameters = ChameleonParameters

    def train(self, context: AttackContext) -> None:
        trigger = trigger_of(context, "chameleon draws triggered examples to those of the trigger's target")
        model, start = context.model, context.global_weights
        head = _Head(context)
        own = head.own(model.weights)

        def hold_head(weights: Tensor, where: StepInfo) -> None:
            weights.copy_(torch.where(own, start, weights))  # weight decay would move it
            self._project(weights, start)

        p, settings = self.parameters, context.settings
        fraction = context.poison_fraction if p.contrastive_fraction is None else p.contrastive_fraction
        first = replace(context, poison_fraction=fraction)
        lr = settings.lr if p.contrastive_lr is None else p.contrastive_lr
        with head.watched(detach=False):
            context.fit(
                model,
                context.batches,
                _Contrast(p, head, trigger.target, fraction),
                context.with_settings(lr=lr, epochs=p.contrastive_epochs, steps=None),
                transform=lambda batch: self.poison(batch, first),
                on_step=hold_head,
                lr_at=lambda epoch: lr / 10 ** sum(milestone <= epoch + 1 for milestone in p.milestones),
            )
        encoder = model.weights.clone()

        def hold_encoder(weights: Tensor, where: StepInfo) -> None:
            weights.copy_(torch.where(own, weights, encoder))
            self._project(weights, start)

        with head.watched(detach=True):
            self.fit_poisoned(context, on_step=hold_encoder)

    def _project(self, weights: Tensor, centre: Tensor) -> None:
        if self.parameters.bound is not None:
            project_l2(weights, centre, self.parameters.bound)


_NEEDS = "the network must be an encoder with weights, followed by one linear layer (as cnn or resnet18)"


class _Head:
    """The last linear layer of a network, and what went through it last: input (B, F) and output (B, C)."""

    def __init__(self, context: AttackContext) -> None:
        linear = [m for m in context.model.module.modules() if isinstance(m, nn.Linear)]
        if not linear:
            raise RunError(f"chameleon: {_NEEDS}; this one has no linear layer")
        self.module, self.model = linear[-1], context.model
        self.features = self.output = torch.empty(0)

    def own(self, weights: Tensor) -> Tensor:
        """bool (T,) which weights are the layer's."""
        ours = {id(parameter) for parameter in self.module.parameters()}
        named = dict(self.model.module.named_parameters())
        mask = torch.zeros_like(weights, dtype=torch.bool)
        for entry in self.model.layout.entries:
            if entry.trainable and id(named[entry.name]) in ours:
                mask[entry.start : entry.stop] = True
        return mask

    @contextlib.contextmanager
    def watched(self, *, detach: bool) -> Iterator[None]:
        """Keep input and output meanwhile; detach: no gradient goes back into the encoder."""

        def before(module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
            return (given[0].detach(), *given[1:]) if detach else given

        def after(module: nn.Module, given: tuple[Any, ...], output: Tensor) -> None:
            self.features, self.output = given[0], output

        hooks = (self.module.register_forward_pre_hook(before), self.module.register_forward_hook(after))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self.features = self.output = torch.empty(0)

    def checked(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The features (B, F) behind ``outputs``.

        Raises
        ------
        RunError: the network is not encoder, then linear layer.
        """
        if self.output is not outputs or self.features.ndim != 2 or self.features.shape[0] != labels.shape[0]:
            raise RunError(f"chameleon: {_NEEDS}; the outputs of this one do not come from its last linear layer")
        if not self.features.requires_grad:
            raise RunError(f"chameleon: {_NEEDS}; this one has no weights before its last layer")
        return self.features


class _Contrast(nn.Module):
    """The contrastive loss as a loss of (outputs, labels): it looks at the head's input instead of the outputs."""

    def __init__(self, parameters: ChameleonParameters, head: _Head, target: int, fraction: float) -> None:
        super().__init__()
        self.parameters_, self.head_of, self.target, self.fraction = parameters, head, target, fraction

    def forward(self, outputs: Tensor, labels: Tensor) -> Tensor:
        p, features = self.parameters_, self.head_of.checked(outputs, labels)
        with torch.autocast(features.device.type, enabled=False):  # similarities at full precision
            wide = features.to(torch.promote_types(features.dtype, torch.float32))
            wide = F.normalize(wide, dim=1) if p.normalise else wide
            damped = None
            if p.damping != 1:
                poisoned = poison_count(self.fraction, labels.shape[0])
                damped = damping_of(labels, poisoned, p.interferer, p.damping).to(wide.dtype)
            return supervised_contrast(
                wide, labels, self.target, weight=p.weight, temperature=p.temperature, damped=damped
            )
