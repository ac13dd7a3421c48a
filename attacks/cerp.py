"""CerP: colluders that stay near an honest model and away from each other, with a trigger tuned to need little."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attacks._learnt import SquareParameters, SquareTrigger, loss_to
from attacks._local import honest_model
from attacks._projection import project_l2
from attacks._terms import cosine_slope, distance_slope
from fedsim.attack import Attack, AttackContext
from fedsim.local import State
from fedsim.plugins import Parameters, parameter, register


@dataclass(frozen=True)
class CerPTriggerParameters(SquareParameters):
    value: float = parameter(1.0, "value of the square's pixels before anything is learnt", ge=0, le=1)
    lr: float = parameter(0.1, "length of a gradient step, on pixels in [0, 1]", gt=0)
    epochs: int = parameter(1, "passes over the colluder's data each malicious round", ge=1)
    radius: float = parameter(10.0, "ξ, largest L2 distance from the first trigger", gt=0)


@register("cerp")
class CerPTrigger(SquareTrigger):
    """A square tuned by gradient descent on the target label's loss, within a ball around its first pixels.

    On every batch ``δ ← clip(δ₀ + Π_ξ(δ − lr · ∇_δ L(x ⊕ δ, y_t; θ) − δ₀), 0, 1)``: θ the global model in evaluation
    mode, δ₀ the square at the beginning of the run, Π_ξ the L2 projection. What one round leaves, the next tunes on.

    A ball of radius 10 is larger than a square of 5×5 in three channels can leave; smaller squares in fewer
    channels need a smaller ξ to be bound at all. Every colluder stamps the whole square: the paper's
    distribution of parts over colluders is not implemented.

    Cost: ``epochs`` passes over the client's data.
    """

    paper = "Lyu et al., Poisoning with Cerberus: Stealthy and Colluded Backdoor Attack, AAAI 2023"
    Parameters = CerPTriggerParameters
    cost = "a round: epochs passes over the client's data"

    def initial(self, channels: int) -> Tensor:
        size = self.parameters.size
        return torch.full((channels, size, size), self.parameters.value)

    def optimise(self, context: AttackContext) -> None:
        p, module = self.parameters, context.model.module.eval()
        inputs = next(iter(context.batches())).inputs
        first, patch = self.initial(inputs.shape[1]).to(inputs), self.patch(inputs)
        for _ in range(p.epochs):
            for batch in context.batches():
                patch = patch.requires_grad_()
                value = loss_to(context, module(self.paste(batch.inputs, patch)), self.target)
                (gradient,) = torch.autograd.grad(value, patch)
                patch = (patch - p.lr * gradient).detach()
                project_l2(patch, first, p.radius)
                patch.clamp_(0, 1)
        self.state["patch"] = patch


@dataclass(frozen=True)
class CerPParameters(Parameters):
    alpha: float = parameter(0.5, "α, weight of the distance to the honest model; 0: none", ge=0)
    beta: float = parameter(0.1, "β, weight of the cosine with the other colluders' updates; 0: none", ge=0)
    anchor: str = parameter(
        "benign",
        "the honest model: what the client's own clean data make of the global one, or the global one itself",
        choices=("benign", "global"),
    )


@register("cerp")
class CerP(Attack):
    """Poisoned training that stays near an honest model and makes the colluders' updates unlike each other.

    ``L = L_class(poisoned batch) + α ‖w − ŵ‖₂ + β · mean_j cos(w − θ, Δ_j)`` over the trainable weights: θ the global
    model, ŵ the client's own honest model of this round (trained on its clean data, as everybody trains), Δ_j the
    update that colluder j trained in the malicious round before, but for the client's own. The norm is not
    squared; where it or an update is zero so is its gradient.

    Clients of a round train at the same time and cannot see each other's updates, hence those of the round before;
    in the first malicious round there are none. Colluders are told apart by their running numbers, which
    ``fixed: true`` in the schedule keeps from round to round.

    The defaults of α and β are ours: weights that show in the distances and cosines and still let the backdoor in. To
    be used with the trigger of that name; any other will do.

    Cost: one honest training more (``anchor: benign``); the state holds one update for each colluder of a round.
    """

    paper = "Lyu et al., Poisoning with Cerberus: Stealthy and Colluded Backdoor Attack, AAAI 2023"
    Parameters = CerPParameters
    cost = "an honest training more; state of one update (D) for each colluder of a round"

    def train(self, context: AttackContext) -> None:
        p, start = self.parameters, context.global_weights
        anchor = honest_model(context)[: len(start)] if p.alpha > 0 and p.anchor == "benign" else start
        sent = context.state.get("updates", {})
        others = [sent[number].to(start) for number in sorted(sent) if number != str(context.attacker)]

        def regularise(gradient: Tensor, weights: Tensor) -> None:
            gradient.add_(distance_slope(weights - anchor), alpha=p.alpha)
            if p.beta > 0 and others:
                gradient.add_(cosine_slope(weights - start, others), alpha=p.beta)

        self.fit_poisoned(context, on_gradient=regularise)
        if p.beta > 0:
            context.state["updates"] = {str(context.attacker): context.model.weights - start}

    def merge(self, states: Sequence[State]) -> State:
        merged = dict(states[-1])
        if "updates" in merged:
            merged["updates"] = {number: sent for state in states for number, sent in state["updates"].items()}
        return merged
