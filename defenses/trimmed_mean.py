"""Coordinate-wise trimmed mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedsim.defense import Aggregated, Defense, RoundUpdates
from fedsim.distances import columns
from fedsim.errors import Problem, RunError
from fedsim.plugins import Parameters, parameter, register


def mean_of_ranks(rows: Tensor, first: int, last: int) -> Aggregated:
    """The mean of the values of rank ``first`` to ``last`` (from 0, both included) of every coordinate.

    The weights are the share of those values that each row gave; of equal values the first row's ranks lower.
    Cost: O(D·N·log N) time; beyond the result only blocks of columns are held.
    """
    n, d = rows.shape
    vector = torch.empty_like(rows[0])
    given = torch.zeros(n, dtype=torch.int64, device=rows.device)
    for block, out in zip(columns(rows), columns(vector[None]), strict=True):
        values, who = block.T.contiguous().sort(dim=1, stable=True)
        out[0] = values[:, first : last + 1].mean(dim=1)
        given += torch.bincount(who[:, first : last + 1].flatten(), minlength=n)
    return Aggregated(vector, given.to(torch.float64) / (d * (last - first + 1)))


@dataclass(frozen=True)
class TrimmedMeanParameters(Parameters):
    beta: float = parameter(0.2, "share of the clients cut from EACH side: ⌊beta·n⌋ values", ge=0, lt=0.5)
    f: int | None = parameter(None, "number of values cut from each side; overrides beta", ge=0)


@register("trimmed_mean")
class TrimmedMean(Defense):
    r"""Cut the ⌊βn⌋ largest and smallest values of every coordinate, average the rest.

    With x₍₁₎ ≤ … ≤ x₍ₙ₎ the values of a coordinate and c = ⌊βn⌋ (or c = f),

    .. math:: \operatorname{trmean}_\beta = \frac{1}{n - 2c} \sum_{k=c+1}^{n-c} x_{(k)}

    β is the share cut from each side, as in flwr 1.41, BackFed and the official server of Anticipate, 0.2 by
    default; byzfl takes f. Unweighted: examples, and weights that earlier stages gave, play no part; clients
    they rejected are absent. Whole weights give the same model, since the rule moves along with a shift.

    Looks at the whole vector. The reported weights are the share of all averaged values that came from each
    client; of equal values the first client's counts as the smaller. Cost: O(D·N·log N) time (sorting), O(D)
    memory beyond the updates: the coordinates are worked on in blocks.
    """

    paper = "Yin et al., Byzantine-Robust Distributed Learning, ICML 2018, arXiv 1803.01498"
    cost = "O(D N log N) time, O(D) memory"
    Parameters = TrimmedMeanParameters

    @classmethod
    def required_clients(cls, parameters: Any) -> int:
        return 1 + 2 * (parameters.f or 0)

    @classmethod
    def problems(cls, parameters: Any, experiment: Any) -> list[Problem]:
        n = experiment.federation.clients_per_round
        if parameters.f is not None and n <= 2 * parameters.f:
            message = f"cutting {parameters.f} from each side of {n} clients a round leaves none"
            return [Problem("f", f"{message}; use at most {max((n - 1) // 2, 0)}")]
        if parameters.f is None and parameters.beta > 0 and int(parameters.beta * n) == 0:
            message = f"⌊{parameters.beta:g} · {n} clients a round⌋ = 0 cuts nobody: this is the plain mean"
            return [Problem("beta", f"{message}; use at least {1 / n:.3g}, or set f" if n > 2 else message)]
        return []

    def aggregate(self, round: RoundUpdates) -> Aggregated:
        n = round.count
        cut = int(self.parameters.beta * n) if self.parameters.f is None else self.parameters.f
        if n <= 2 * cut:
            raise RunError(f"trimmed_mean: cutting {cut} from each side of the {n} clients left leaves none")
        return mean_of_ranks(round.updates, cut, n - cut - 1)
