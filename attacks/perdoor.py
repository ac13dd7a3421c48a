"""PerDoor: a small adversarial perturbation of the weights that move least and matter least."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attacks._local import honest_model, sum_of_gradients, undoing_the_mean
from fedsim.attack import Attack, AttackContext, Knowledge
from fedsim.errors import Problem, RunError
from fedsim.plugins import Parameters, parameter, register


@dataclass(frozen=True)
class PerDoorParameters(Parameters):
    delta: float = parameter(0.1, "δ, the most a weight is moved by", gt=0)
    iterations: int = parameter(40, "steps of the perturbation, each along the gradient of a whole pass", ge=1)
    step: float = parameter(0.05, "length of a step, as a share of δ", gt=0, le=1)
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

    Such weights, the paper says, honest clients do not move back and the main task does not miss. G: the global model.

    * ``still``: the ``⌊T · still⌋`` weights of smallest movement s. ``own``: s is the distance an honest training on
      one's own data moves a weight; ``last_aggregate``: its size in the last aggregated update; ``history``: its
      standard deviation over the global models of the rounds the attacker was in, the present one included. It trains
      honestly until ``window`` of them are past.
    * unimportant: where the mean over own clean batches of ``|∂L/∂w|`` at G is below its mean over the tensor.
    * The mask m is both. From w = G, ``iterations`` times ``w ← clip(w − step · δ · m · sign(g), G − δ, G + δ)``, g the
      sum over the own poisoned batches of the gradient at w. Only masked weights move, none further than δ. The
      attacker's learning rate, epochs, momentum and weight decay play no part.
    * ``replacement``: as in model replacement the update is boosted, to be the mean's.

    Known of the method are the two criteria and that the perturbation is adversarial; the rest is our reading, with
    the authors' code at hand where it says more (ten iterations over all images, clip, boost, the mean over a tensor).
    The code is ``history`` with an absolute threshold on the standard deviation, and steps along the gradient itself
    (``direction: gradient``, multiplied by δ · step, its step is 1) although its names say sign. Not followed: it never
    sets gradients back to zero, divides g by the number of tensors, takes importance from test examples, one at a time,
    poisons every example (``poison_fraction: 1``), leaves biases of ResNets out, and learns its trigger, a universal
    perturbation of images of one class; here any trigger goes, a learnt one too. Running statistics are sent as
    received. Theirs is one injection: a second one a round later meets weights that the honest clients have just begun
    to move.

    δ, step and iterations are ours: many short steps, so that a sign can turn, twice δ long in all. Which δ does
    something depends on network and trigger: the authors' command has 1e-5, for a VGG11 and a trigger that nearly fools
    it as it is. One injection into a cnn of 29,000 weights, by six clients of 110 to 380 MNIST digits each, with a
    pixel pattern: an ASR of 1 to 53 % with δ = 0.05, of 28 to 83 % with 0.1, at a main accuracy of 53 to 82 % (96 %
    before). In two runs an honest round later next to nothing was left of it.

    Raises
    ------
    RunError: ``last_aggregate`` before the first aggregation, or no weight is still and unimportant.

    Cost: ``iterations`` gradient passes, one more, and an honest training (``own``); with ``history`` two vectors of
    state. Recorded: ``perdoor_weights``, how many weights were moved.
    """

    paper = "Alam, Sarkar, Maniatakos: PerDoor, IEEE COINS 2023, arXiv 2205.13523; code: momalab/PerDoor"
    cost = "an honest round and iterations + 1 gradient passes; with history two copies of the model as state"
    Parameters = PerDoorParameters
    knows = frozenset({Knowledge.OWN_DATA, Knowledge.LAST_AGGREGATE})

    @classmethod
    def knowledge(cls, parameters: Any) -> frozenset[Knowledge]:
        return cls.knows if parameters.movement == "last_aggregate" else frozenset({Knowledge.OWN_DATA})

    @classmethod
    def problems(cls, parameters: Any, experiment: Any) -> list[Problem]:
        found, reach = [], parameters.iterations * parameters.step
        if parameters.direction == "sign" and reach < 1 - 1e-9:
            enough = math.ceil(1 / parameters.step - 1e-9)
            found.append(Problem("iterations", f"these steps end at {reach:g} δ and never reach it; write {enough}"))
        if parameters.movement == "history":
            federation = experiment.federation
            plan = experiment.attack.schedule.create().attackers(federation.rounds, federation.clients, experiment.seed)
            if plan.population is None and len(plan.rounds) <= parameters.window:
                message = (
                    f"the schedule has {len(plan.rounds)} attack rounds, all of them are watched; use a smaller one"
                )
                found.append(Problem("window", message))
        return found

    def train(self, context: AttackContext) -> None:
        p, model = self.parameters, context.model
        movement = self._movement(context)
        if movement is None:
            context.fit(model, context.batches, context.loss, context.benign)
            return
        mask = still(movement, p.still) & self._unimportant(context)
        if not bool(mask.any()):
            raise RunError("perdoor: none of the weights that move least is unimportant; use a larger share, still")
        low, high = context.global_weights - p.delta, context.global_weights + p.delta
        for _ in range(p.iterations):
            slope = sum_of_gradients(context, context.batches, transform=lambda batch: self.poison(batch, context))
            slope = slope.sign() if p.direction == "sign" else slope
            model.weights.sub_(slope * mask, alpha=p.step * p.delta).clamp_(low, high)
        context.metrics["perdoor_weights"] = float(mask.sum())

    def craft(self, update: Tensor, context: AttackContext) -> Tensor:
        p = self.parameters
        if not p.replacement or (p.movement == "history" and context.state["seen"] <= p.window):
            return update
        return update * undoing_the_mean(context, self.name)

    def _movement(self, context: AttackContext) -> Tensor | None:
        """(T,) how much each weight moves; None: not known yet. The model is as it was."""
        weights = context.global_weights
        if self.parameters.movement == "last_aggregate":
            if context.last_aggregate is None:
                raise RunError(
                    f"perdoor: nothing was aggregated before round {context.round}; let the attack start a round "
                    f"later, or use movement: own or history"
                )
            return context.last_aggregate[: len(weights)].abs()
        if self.parameters.movement == "own":
            return (honest_model(context)[: len(weights)] - weights).abs()
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
        total = sum_of_gradients(context, context.batches, absolute=True)
        mask = torch.zeros_like(total, dtype=torch.bool)
        for entry in context.model.layout.entries:
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
