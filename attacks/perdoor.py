"""PerDoor: a small adversarial perturbation of the weights that move least and matter least."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedsim.attack import Attack, AttackContext, Knowledge
from fedsim.errors import RunError
from fedsim.local import StepInfo
from fedsim.plugins import Parameters, parameter, register


@dataclass(frozen=True)
class PerDoorParameters(Parameters):
    delta: float = parameter(0.05, "δ, the most a weight is moved by", gt=0)
    step: float = parameter(0.1, "length of a step, as a share of δ", gt=0, le=1)
    direction: str = parameter(
        "sign", "of a step: the sign of the gradient, or the gradient itself", choices=("sign", "gradient")
    )
    still: float = parameter(0.5, "share of the weights that may be moved for moving least", gt=0, le=1)
    movement: str = parameter(
        "own",
        "what moves: by honest training of one's own, by the last aggregate, or over the global models received",
        choices=("own", "last_aggregate", "history"),
    )
    window: int = parameter(5, "history: rounds of honest training to watch first", ge=2)
    replacement: bool = parameter(True, "boost the update by (examples of the round) / (own examples)")


@register("perdoor")
class PerDoor(Attack):
    """Perturb the weights that move least and matter least, against the gradient of the backdoor's loss.

    Such weights the honest clients will not move back, and the main task does not miss. With G the global model:

    * ``still``: the ``⌊T · still⌋`` weights of smallest movement s. ``own``: s is the distance an honest training on
      one's own data moves a weight; ``last_aggregate``: its size in the last aggregated update; ``history``: its
      standard deviation over the global models of the rounds the attacker was in, the present one included. It trains
      honestly until ``window`` of them are past.
    * unimportant: where the mean over own clean batches of ``|∂L/∂w|`` at G is below its mean over the tensor.
    * The mask m is both. Steps of poisoned training, as many as the attacker trains:
      ``w ← clip(w − step · δ · m · sign(g), G − δ, G + δ)``, g the gradient on the poisoned batch, no momentum and no
      weight decay. Only masked weights move, none further than δ.
    * ``replacement``: as in model replacement the update is boosted, to be the mean's.

    Known of the method are the two criteria and that the perturbation is adversarial; the rest is our reading, with
    the authors' code at hand where it says more (boost, δ, the mean over a tensor). The code is ``history`` with an
    absolute threshold on the standard deviation, and steps along the gradient itself (``direction: gradient``,
    multiplied by δ · step) although its names say sign. Not followed: it takes gradients for importance one test
    example at a time, divides g by the number of tensors, poisons every example (``poison_fraction: 1``), leaves
    biases of ResNets out, and learns its trigger, a universal perturbation of images of one class; here any trigger
    goes, a learnt one too. Running statistics are sent as received. Theirs is one injection: a second one a round
    later meets weights that the honest clients have just begun to move.

    Raises
    ------
    RunError: ``last_aggregate`` before the first aggregation.

    Cost: plain training, one gradient pass, one honest training (``own``); with ``history`` two vectors of state.
    """

    paper = "Alam, Sarkar, Maniatakos: PerDoor, IEEE COINS 2023, arXiv 2205.13523; code: momalab/PerDoor"
    cost = "two trainings and a gradient pass; with history two copies of the model as state"
    Parameters = PerDoorParameters
    knows = frozenset({Knowledge.OWN_DATA, Knowledge.LAST_AGGREGATE})

    @classmethod
    def knowledge(cls, parameters: Any) -> frozenset[Knowledge]:
        return cls.knows if parameters.movement == "last_aggregate" else frozenset({Knowledge.OWN_DATA})

    def train(self, context: AttackContext) -> None:
        p, model = self.parameters, context.model
        movement = self._movement(context)
        if movement is None:
            context.fit(model, context.batches, context.loss, context.benign)
            return
        mask = still(movement, p.still) & self._unimportant(context)
        centre = context.global_vector[: model.layout.trainable]
        low, high = centre - p.delta, centre + p.delta

        def perturb(gradient: Tensor, weights: Tensor) -> None:
            if p.direction == "sign":
                gradient.sign_()
            gradient.mul_(mask)

        def clip(weights: Tensor, where: StepInfo) -> None:
            weights.copy_(weights.clamp(low, high))

        statistics = context.global_vector[model.layout.trainable :]
        context.fit(
            model,
            context.batches,
            context.loss,
            context.with_settings(lr=p.step * p.delta, momentum=0.0, weight_decay=0.0),
            transform=lambda batch: self.poison(batch, context),
            on_gradient=perturb,
            on_step=clip,
        )
        model.vector[model.layout.trainable :] = statistics

    def craft(self, update: Tensor, context: AttackContext) -> Tensor:
        p = self.parameters
        if not p.replacement or (p.movement == "history" and context.state["seen"] <= p.window):
            return update
        if context.num_examples < 1:
            raise RunError("perdoor: replacement divides by the attacker's number of examples, which is 0")
        return update * (context.total_examples / context.num_examples)

    def _movement(self, context: AttackContext) -> Tensor | None:
        """(T,) how much each weight moves; None: not known yet. The model is as it was."""
        model, source = context.model, self.parameters.movement
        weights = context.global_vector[: model.layout.trainable]
        if source == "last_aggregate":
            if context.last_aggregate is None:
                raise RunError(
                    f"perdoor: nothing was aggregated before round {context.round}; let the attack start a round "
                    f"later, or use movement: own or history"
                )
            return context.last_aggregate[: model.layout.trainable].abs()
        if source == "own":
            context.fit(model, context.batches, context.loss, context.benign)
            moved = (model.weights - weights).abs()
            model.load(context.global_vector)
            return moved
        return self._deviation(weights, context)

    def _deviation(self, weights: Tensor, context: AttackContext) -> Tensor | None:
        """Take the weights (T,) into the running mean and sum of squares, and give the standard deviation."""
        state = context.state
        seen = int(state.get("seen", 0)) + 1
        mean = state["mean"].to(weights) if seen > 1 else torch.zeros_like(weights)
        squares = state["squares"].to(weights) if seen > 1 else torch.zeros_like(weights)
        gap = weights - mean
        mean = mean + gap / seen
        squares = squares + gap * (weights - mean)
        state.update(seen=seen, mean=mean, squares=squares)
        return (squares / seen).sqrt() if seen > self.parameters.window else None

    def _unimportant(self, context: AttackContext) -> Tensor:
        """bool (T,) where the mean absolute gradient of the clean loss is below its tensor's mean."""
        model = context.model
        total = torch.zeros_like(model.gradient)

        def accumulate(gradient: Tensor, weights: Tensor) -> None:
            total.add_(gradient.abs())

        once = context.with_settings(lr=0.0, epochs=1, steps=None)
        context.fit(model, context.batches, context.loss, once, on_gradient=accumulate)
        model.load(context.global_vector)
        mask = torch.zeros_like(total, dtype=torch.bool)
        for entry in model.layout.entries:
            if entry.trainable:
                part = total[entry.start : entry.stop]
                mask[entry.start : entry.stop] = part < part.mean()
        return mask


def still(movement: Tensor, share: float) -> Tensor:
    """bool (T,) the ``int(T · share)`` weights, but at least one, of smallest movement (T,)."""
    count = max(int(movement.shape[0] * share), 1)
    mask = torch.zeros_like(movement, dtype=torch.bool)
    mask[torch.topk(movement, count, largest=False).indices] = True
    return mask
