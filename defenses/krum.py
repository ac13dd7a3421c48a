"""Krum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedsim.defense import Defense, RoundUpdates, Screening
from fedsim.distances import squared_distances
from fedsim.errors import Problem
from fedsim.plugins import Parameters, parameter, register


@dataclass(frozen=True)
class KrumParameters(Parameters):
    f: int | None = parameter(
        None, "malicious clients to tolerate; null: the most that Krum's theorem allows, ⌊(n − 3) / 2⌋", ge=0
    )
    distance: str = parameter("squared", "what a score sums: squared or plain distances", choices=("squared", "plain"))
    scope: str = parameter(
        "all",
        "what distances are measured on: the whole vector or its trainable part",
        choices=("all", "trainable"),
    )


@register("krum")
class Krum(Defense):
    r"""Keep the one update that lies closest to its n − f − 2 nearest neighbours.

    With Nᵢ the n − f − 2 other clients nearest to client i,

    .. math:: s(i) = \sum_{j \in N_i} \lVert \Delta_i - \Delta_j \rVert_2^2

    and the aggregate is the update with the lowest score, unchanged; the number of examples plays no part. Of
    equal scores the first client wins. Distances do not care about the global model, so updates and whole
    weights give the same choice.

    n: clients that reach the stage. f: malicious clients tolerated; n ≥ f + 3 is needed for a neighbour, the
    theorem needs n ≥ 2f + 3. ``f: null`` takes ⌊(n − 3) / 2⌋ of the clients really present in the round.

    Follows the paper; flwr 1.41 and the code of *Attack of the Tails* agree. (flwr computes distances by the
    Gram matrix and loses digits beside a boosted row; byzfl 0.0.11 uses n − f − 1 neighbours: neither is
    repeated.) The official server of Anticipate is ``distance: plain`` with f = ⌊n/2⌋; its sum runs over
    n − f − 1 distances but counts the zero one of the client to itself.

    Cost: O(N²·D) time, O(N²) memory beyond the updates.
    """

    paper = "Blanchard et al., Byzantine-Tolerant Machine Learning, NeurIPS 2017, arXiv 1703.02757"
    cost = "O(N² D) time, O(N²) memory"
    Parameters = KrumParameters

    @classmethod
    def required_clients(cls, parameters: Any) -> int:
        return 3 + (parameters.f or 0)

    @classmethod
    def problems(cls, parameters: Any, experiment: Any) -> list[Problem]:
        n, f = experiment.federation.clients_per_round, parameters.f
        if f is None or n >= f + 3:
            return []
        most = f"use at most {n - 3} (the theorem holds up to {(n - 3) // 2}), or null" if n >= 3 else "use null"
        return [Problem("f", f"with {n} clients a round and f = {f} nobody has n - f - 2 >= 1 neighbours; {most}")]

    def tolerated(self, n: int) -> int:
        """f for a round of n clients."""
        return (n - 3) // 2 if self.parameters.f is None else int(self.parameters.f)

    def measure(self, round: RoundUpdates) -> tuple[Tensor, Tensor]:
        """The scores (N,) and the distances (N, N) they are sums of."""
        distances = squared_distances(round.seen(self.parameters.scope))
        if self.parameters.distance == "plain":
            distances = distances.sqrt()
        neighbours = round.count - self.tolerated(round.count) - 2
        return krum_scores(distances, neighbours), distances

    def screen(self, round: RoundUpdates) -> Screening:
        scores, _ = self.measure(round)
        accepted = torch.zeros_like(round.accepted)
        accepted[scores.argmin()] = True
        return Screening(accepted, torch.ones_like(round.weights), {"score": scores})


def krum_scores(distances: Tensor, neighbours: int) -> Tensor:
    """(N,) the sum of each row's smallest distances, its own zero aside; (N, N) distances are non-negative."""
    return distances.sort(dim=1).values[:, 1 : neighbours + 1].sum(dim=1)
