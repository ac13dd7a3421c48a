"""FoolsGold."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from defenses._statistics import similarities
from fedsim.defense import Aggregated, Defense, RoundUpdates
from fedsim.plugins import Parameters, parameter, register


@dataclass(frozen=True)
class FoolsGoldParameters(Parameters):
    combine: str = parameter(
        "sum", "the weighted sum, as the paper writes it, or the weighted mean", choices=("sum", "mean")
    )
    kappa: float = parameter(1.0, "confidence κ: the steepness of the logit", gt=0)
    epsilon: float = parameter(1e-5, "added to the maxima and inside the logarithm; 0: not", ge=0)
    scope: str = parameter(
        "trainable",
        "what similarity is measured on: the whole vector or its trainable part",
        choices=("all", "trainable"),
    )


@register("foolsgold")
class FoolsGold(Defense):
    r"""Weigh clients by how little their update history points the way of any other's.

    With Hᵢ the sum of client i's updates over all rounds so far, this one included, cᵢⱼ = cos(Hᵢ, Hⱼ), cᵢᵢ = 0
    and mᵢ = maxⱼ cᵢⱼ + ε, honest clients are pardoned — cᵢⱼ ← cᵢⱼ mᵢ / mⱼ where mᵢ < mⱼ — and then

    .. math:: v_i = 1 - \max_j c_{ij}, \qquad v_i \leftarrow v_i / \max_j v_j, \qquad
              \alpha_i = \kappa \left( \ln\left[\frac{v_i}{1 - v_i} + \varepsilon\right] + \frac{1}{2} \right)

    cut to [0, 1], where v = 1 counts as 0.99. The aggregate is the SUM Σᵢ αᵢ Δᵢ, as in the paper and the
    authors' code: its clients send single small gradient steps. After local training of many steps set
    ``combine: mean`` (divides by Σα, as later ports do) or a server learning rate near 1/n. Running statistics
    are always averaged with weights α / Σα.

    ε = 1e-5 is that of the authors' ``model_aggregator.py``; their other file and the paper have none. The
    per-class masks of important features (optional there) are left out. When every history is a copy of another
    all v are zero and the code divides by it; here such clients together count as one: α = 1/n. A zero history
    is similar to nobody. The number of examples plays no part.

    ``state["history"]`` holds H of every client met, by id: a vector of the scope's length for each. Cost:
    O(N²·D) time; a copy of the updates, O(N²) and the histories in memory.
    """

    paper = "Fung et al., Mitigating Sybils in Federated Learning Poisoning, arXiv 1808.04866"
    cost = "O(N² D) time, a copy of the updates and a vector for every client met"
    Parameters = FoolsGoldParameters

    def remember(self, round: RoundUpdates) -> Tensor:
        """Add the round to the histories and return those of its clients (N, ·)."""
        history = self.state.setdefault("history", {})
        for client, row in zip(map(str, round.clients), round.seen(self.parameters.scope), strict=True):
            history[client] = history[client].to(row) + row if client in history else row.clone()
        return torch.stack([history[str(client)] for client in round.clients])

    def judge(self, history: Tensor) -> tuple[Tensor, Tensor]:
        """(N,) the weights α and (N,) each client's highest similarity after pardoning."""
        p, n = self.parameters, history.shape[0]
        cosine = similarities(history)
        highest = cosine.amax(dim=1) + p.epsilon
        pardon = highest[:, None] < highest
        cosine = torch.where(pardon, cosine * highest[:, None] / highest, cosine)
        similarity = cosine.amax(dim=1)
        v = (1 - similarity).clamp(0, 1)
        if float(v.max()) < 1e-12:  # nothing but rounding
            return torch.full_like(v, 1 / n), similarity
        v = v / v.max()
        v[v == 1] = 0.99
        return (p.kappa * ((v / (1 - v) + p.epsilon).log() + 0.5)).clamp(0, 1), similarity

    def aggregate(self, round: RoundUpdates) -> Aggregated:
        alpha, similarity = self.judge(self.remember(round))
        weights = alpha / alpha.sum()
        vector = weights.to(round.updates.dtype) @ round.updates
        if self.parameters.combine == "sum":
            vector[: round.trainable] *= alpha.sum().to(vector.dtype)
        return Aggregated(vector, weights, {"similarity": similarity})
