"""DnC, divide and conquer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedsim.defense import Defense, RoundUpdates, Screening
from fedsim.distances import columns
from fedsim.errors import Problem
from fedsim.plugins import Parameters, parameter, register


@dataclass(frozen=True)
class DncParameters(Parameters):
    f: int | None = parameter(None, "malicious clients to expect; null: ⌊n / 5⌋", ge=0)
    filter_fraction: float = parameter(1.0, "c: c·f clients are dropped in every pass", gt=0)
    iterations: int = parameter(1, "passes, each on coordinates of its own", ge=1)
    coordinates: int = parameter(10_000, "coordinates b drawn for a pass (all, if there are fewer)", ge=1)
    fraction: float | None = parameter(
        None, "share of the coordinates drawn for a pass; overrides coordinates", gt=0, le=1
    )
    scope: str = parameter(
        "trainable",
        "where coordinates are drawn from: the whole vector or its trainable part",
        choices=("all", "trainable"),
    )


@register("dnc")
class Dnc(Defense):
    r"""Drop the updates that reach furthest along the direction in which the updates differ most.

    A pass draws b coordinates without replacement, centres the updates on them, Δ̃ᵢ = Δᵢ − mean, takes the top
    right singular vector u of the rows Δ̃ and scores

    .. math:: s_i = \langle \tilde\Delta_i, u \rangle^2

    The ⌊n − c·f⌋ lowest scores (of equal ones the first clients) pass. Kept are the clients that passed every
    time, and they are averaged unweighted. Where nobody did — the code gives the mean of nothing — it is those
    that passed most often.

    The paper gives f; ``f: null`` takes a fifth of the clients, as in its experiments (with fewer than 5
    clients nobody is dropped). Follows the paper; FLPoison agrees. (The port in SignGuard fails and the one in
    LASA takes the wrong vector: not repeated.) The score is the mean over the passes. The draws come from the
    round's stream ``dnc``.

    Cost: O(iterations · N²·b) time; the drawn columns (N, b) and one permutation of the coordinates in memory.
    u comes from the eigenvectors of the (N, N) matrix of the Δ̃ᵢ in float64.
    """

    paper = "Shejwalkar and Houmansadr, Manipulating the Byzantine, NDSS 2021"
    cost = "O(iterations · N² b) time for b drawn coordinates, O(N b + D) memory"
    Parameters = DncParameters

    @classmethod
    def required_clients(cls, parameters: Any) -> int:
        dropped: float = parameters.filter_fraction * (parameters.f or 0)
        return 1 + math.ceil(dropped)

    @classmethod
    def problems(cls, parameters: Any, experiment: Any) -> list[Problem]:
        n = experiment.federation.clients_per_round
        drop = parameters.filter_fraction * (n // 5 if parameters.f is None else parameters.f)
        if n - drop >= 1:
            return []
        return [Problem("f", f"dropping filter_fraction · f = {drop:g} of {n} clients a round leaves none; use less")]

    def draw(self, total: int, count: int, source: torch.Generator) -> Tensor:
        """(count,) coordinates of ``total``, without replacement."""
        return torch.randperm(total, generator=source, device=source.device)[:count]

    def screen(self, round: RoundUpdates) -> Screening:
        p, n, rows = self.parameters, round.count, round.seen(self.parameters.scope)
        total = rows.shape[1]
        count = min(p.coordinates, total) if p.fraction is None else max(1, int(p.fraction * total))
        keep = max(1, int(n - p.filter_fraction * (n // 5 if p.f is None else p.f)))
        source = round.generator("dnc")
        passed = torch.zeros(n, dtype=torch.int64, device=rows.device)
        scores = torch.zeros(n, dtype=torch.float64, device=rows.device)
        for _ in range(p.iterations):
            score = outlier_scores(rows[:, self.draw(total, count, source)])
            passed[score.argsort(stable=True)[:keep]] += 1
            scores += score / p.iterations
        return Screening(passed == passed.max(), torch.ones_like(round.weights), {"score": scores})


def outlier_scores(rows: Tensor) -> Tensor:
    """(N,) float64: squared length of each centred row along the top right singular vector of rows (N, b)."""
    products = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=rows.device)
    for block in columns(rows):
        centred = block.to(torch.float64)
        centred = centred - centred.mean(dim=0)
        products += centred @ centred.T
    values, vectors = torch.linalg.eigh(products)
    scores: Tensor = values[-1].clamp(min=0) * vectors[:, -1].square()
    return scores
