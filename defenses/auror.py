"""Auror."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.defense import Defense, RoundUpdates, Screening
from fedsim.distances import columns
from fedsim.plugins import Parameters, parameter, register


@dataclass(frozen=True)
class AurorParameters(Parameters):
    alpha: float = parameter(1e-3, "a coordinate is indicative if its two centres are further apart than this", ge=0)
    tau: float = parameter(
        0.5, "reject who is in the minority of more than this share of the indicative coordinates", ge=0, le=1
    )
    scope: str = parameter(
        "trainable", "what is looked at: the whole vector or its trainable part", choices=("all", "trainable")
    )


@register("auror")
class Auror(Defense):
    r"""Split every coordinate in two by 2-means; reject clients that are often in the minority.

    A coordinate is indicative when the centres of its two clusters are further apart than α. A client is
    suspicious in it if it is in the smaller cluster (of two equal ones nobody is), and rejected if
    that happens in more than the share τ of the indicative coordinates. That share is the score. The rest
    is averaged by examples; without an indicative coordinate everybody stays.

    No authors' code is known and the paper was not at hand: this is the rule as it is commonly told. The
    paper finds the indicative coordinates in the first rounds and tunes α to the task; here they are found in every
    round and **α has to be fitted to the size of the updates** (its default is ours). From τ = ½ on somebody always
    stays, for a minority is smaller than half.

    2-means on a line is solved exactly: of the N − 1 cuts of the sorted values the one with the least sum of
    squares, the first in a tie. Cost: O(D·N·log N) time; beyond the updates only blocks of columns are held.
    """

    paper = "Shen et al., Auror: Defending Against Poisoning Attacks in Collaborative Deep Learning, ACSAC 2016"
    cost = "O(D N log N) time, no copy"
    Parameters = AurorParameters

    def screen(self, round: RoundUpdates) -> Screening:
        suspicious, indicative = minorities(round.seen(self.parameters.scope), self.parameters.alpha)
        share = suspicious.double() / max(indicative, 1)
        return Screening(share <= self.parameters.tau, scores={"score": share})


def minorities(rows: Tensor, alpha: float) -> tuple[Tensor, int]:
    """How often each row (N,) is in the minority of an indicative coordinate, and how many of these there are."""
    n = rows.shape[0]
    total, indicative = torch.zeros(n, dtype=torch.int64, device=rows.device), 0
    if n < 3:  # of two values neither is a minority
        return total, indicative
    left = torch.arange(1, n, dtype=torch.float64, device=rows.device)
    rank = torch.arange(n, device=rows.device)
    for block in columns(rows):
        values, who = block.T.to(torch.float64).sort(dim=1, stable=True)
        values = values - values[:, n // 2, None]  # from the middle, so that one huge value costs no digits of others
        sums = values.cumsum(dim=1)
        low = sums[:, :-1] / left
        high = (sums[:, -1:] - sums[:, :-1]) / (n - left)
        # the sum of squares between the clusters is the largest where that within them is the least
        cut = (left * (n - left) * (high - low).square()).argmax(dim=1, keepdim=True)
        apart = (high - low).gather(1, cut) > alpha
        below = rank <= cut  # ranks 0 … cut are the lower cluster
        size = 2 * (cut + 1)
        minority = apart & torch.where(size < n, below, ~below & (size > n))
        total += torch.bincount(who[minority], minlength=n)
        indicative += int(apart.sum())
    return total, indicative
