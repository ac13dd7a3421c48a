"""Bulyan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from defenses.krum import krum_scores
from fedsim.defense import Aggregated, Defense, RoundUpdates
from fedsim.distances import columns, squared_distances
from fedsim.errors import Problem
from fedsim.plugins import Parameters, parameter, register


@dataclass(frozen=True)
class BulyanParameters(Parameters):
    f: int | None = parameter(
        None, "malicious clients to tolerate; null: the most that the theorem allows, ⌊(n − 3) / 4⌋", ge=0
    )
    variant: str = parameter(
        "paper", "as the paper writes it, as flwr or as the code of NDSS21 does it", choices=("paper", "flwr", "ndss21")
    )
    scope: str = parameter(
        "all",
        "what distances are measured on: the whole vector or its trainable part",
        choices=("all", "trainable"),
    )


@register("bulyan")
class Bulyan(Defense):
    r"""Select θ = n − 2f updates by Krum, then average the values nearest the median of every coordinate.

    Selection: the best update by Krum's score (the sum of squared distances to the n' − f − 2 nearest of the
    n' updates left, at least one) is taken out and the rest is scored again, θ times. Then, with med_k the
    median of coordinate k over the selected, the aggregate's coordinate is the mean of the β = θ − 2f values
    closest to med_k. n ≥ 4f + 3 is needed; ``f: null`` with fewer than 7 clients is f = 0, the plain mean.

    The number of neighbours shrinks as updates leave, so that close colluders win the last picks: it is the
    second step that removes them. ``variant: flwr`` (flwr 1.41) scores once and takes the θ best.
    ``variant: ndss21`` (code of Shejwalkar and Houmansadr) counts the client itself among the neighbours,
    ends the selection when none is left (for f = 1 one update early) and takes the lower of two middle values.

    Unweighted: examples, and weights that earlier stages gave, play no part. Both steps do not care about the
    global model. The reported weights are the share of the averaged values that each client gave, the score is
    Krum's over all n clients. Cost: O(N²·D + D·N·log N + N³·log N) time, O(N²) memory beyond the updates and
    the result: coordinates are worked on in blocks.
    """

    paper = "El Mhamdi et al., The Hidden Vulnerability of Distributed Learning in Byzantium, arXiv 1802.07927"
    cost = "O(N² D + D N log N + N³ log N) time, O(N² + D) memory"
    Parameters = BulyanParameters

    @classmethod
    def required_clients(cls, parameters: Any) -> int:
        return 3 + 4 * (parameters.f or 0)

    @classmethod
    def problems(cls, parameters: Any, experiment: Any) -> list[Problem]:
        n, f = experiment.federation.clients_per_round, parameters.f
        if f is None or n >= 4 * f + 3:
            return []
        most = f"use at most {(n - 3) // 4}, or null" if n >= 3 else "use null and at least 3 clients"
        return [Problem("f", f"Bulyan needs 4f + 3 = {4 * f + 3} clients a round, not {n}; {most}")]

    def tolerated(self, n: int) -> int:
        """f for a round of n clients."""
        return (n - 3) // 4 if self.parameters.f is None else int(self.parameters.f)

    def select(self, distances: Tensor) -> Tensor:
        """The selected rows in the order of their selection, from squared distances (N, N)."""
        n, variant = distances.shape[0], self.parameters.variant
        f = self.tolerated(n)
        if variant == "flwr":
            return krum_scores(distances, n - f - 2).argsort(stable=True)[: n - 2 * f]
        left = distances.clone()
        gone = torch.zeros(n, dtype=torch.bool, device=distances.device)
        order: list[Tensor] = []
        for remaining in range(n, 2 * f, -1):
            neighbours = remaining - f - 2
            if variant == "ndss21":
                if neighbours <= 0:
                    break
                neighbours -= 1  # the first of them is the client itself
            else:
                neighbours = min(max(neighbours, 1), remaining - 1)
            scores = krum_scores(left, neighbours).masked_fill(gone, torch.inf)
            order.append(scores.argmin())
            gone[order[-1]] = True
            left[order[-1]] = left[:, order[-1]] = torch.inf
        return torch.stack(order)

    def aggregate(self, round: RoundUpdates) -> Aggregated:
        n, f = round.count, self.tolerated(round.count)
        distances = squared_distances(round.seen(self.parameters.scope))
        order = self.select(distances)
        theta = len(order)
        beta = theta - 2 * f
        low = (theta - 1) // 2
        high = low if self.parameters.variant == "ndss21" else theta // 2
        vector = torch.empty_like(round.updates[0])
        given = torch.zeros(theta, dtype=torch.int64, device=order.device)
        for block, out in zip(columns(round.updates), columns(vector[None]), strict=True):
            values = block[order].T.to(torch.float64)
            ranked = values.sort(dim=1).values
            median = (ranked[:, low] + ranked[:, high]) / 2
            nearest = (values - median[:, None]).abs().argsort(dim=1, stable=True)[:, :beta]
            out[0] = values.gather(1, nearest).mean(dim=1)
            given += torch.bincount(nearest.flatten(), minlength=theta)
        weights = torch.zeros(n, dtype=torch.float64, device=order.device)
        weights[order] = given.to(torch.float64) / (len(vector) * beta)
        return Aggregated(vector, weights, {"score": krum_scores(distances, n - f - 2)})
