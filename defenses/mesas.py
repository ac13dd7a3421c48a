"""MESAS."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from defenses._clustering import Array, agglomerative
from defenses._statistics import deviations
from fedsim.defense import Defense, RoundUpdates, Screening
from fedsim.distances import columns, cosine_distances_to_base, norms
from fedsim.plugins import Parameters, parameter, register


@dataclass(frozen=True)
class MesasParameters(Parameters):
    alpha: float = parameter(0.01, "significance level: a test whose p-value is below it prunes", gt=0, lt=1)
    lone: bool = parameter(True, "also test for one outlier (Grubbs); false: the three tests alone")
    scope: str = parameter(
        "trainable", "what is looked at: the whole vector or its trainable part", choices=("all", "trainable")
    )


@register("mesas")
class Mesas(Defense):
    r"""Walk through six measures of an update; while a measure looks poisoned, prune its smaller cluster.

    The measures of client i, with w₀ the global model, d = 1 … D the entries of its update Δᵢ: ``cosine``, 1 − cos(w₀,
    w₀ + Δᵢ); ``length``, ‖Δᵢ‖₂; ``increased``, the number of entries Δᵢd > 0; ``variance``, ``least`` and ``greatest``
    of the entries. For each in turn the values x of the clients that are left are split at their median m. Where nobody
    is malicious, the distances m − x of the lower half and x − m of the upper half are alike. They are compared by

    * Student's t-test (means), Levene's test (variances) and the Kolmogorov–Smirnov test (distributions).

    If one p-value is below α, agglomerative clustering (Ward) makes two clusters of the values, the smaller
    one is rejected, and the measure is tested again on the others; else the next measure comes. Those that are left at
    the end are averaged by examples. The score is the largest deviation \|x − m\| / σ over the measures.

    No authors' code is known and the paper was not at hand: its abstract speaks of a cascade of several metrics; the
    six measures, significance tests, clustering and pruning are as the method is commonly told, the split at the
    median, the tests by name, Ward's linkage and α from memory or ours. (A third party's port tests each half against
    all clients at α = 10⁻⁴, takes the least and the greatest of absolute values, and cuts at 3 σ.) Also ours: a pruning
    that would leave half of the round's clients or fewer is not done and ends the measure, so that a majority always
    stays; and ``lone``, Grubbs's test for one outlier.

    **Of few clients colluders stay.** Halves of five can hardly differ significantly, what is far off widens their
    spread as well, and two alike hide each other from Grubbs. Of 10 clients with normal values in one measure, a lone
    outlier by 6 σ is found in 73 % of rounds, by 20 σ always, but two or three are never; of 20 clients 2, 3, 4, 5
    and 6 by 6 σ in 27, 3, 15, 99 and 67 %. ``alpha`` is the parameter to turn: at 0.05 and 0.1 two of 10 are found in
    13 and 30 %, three in 20 and 72 %, two of 20 in 79 and 96 %.

    **Of many clients honest ones are lost**: least and greatest entries are skewed by nature, and the tests notice.
    Of 10, 20, 50 and 100 clients that send nothing but normal noise 99, 94, 84 and 73 % stay on average, with α = 0.001
    all of 20, 92 % of 50 and 85 % of 100.

    Fewer than 5 clients cannot be tested and all stay; so do clients without difference in a measure. Cost: O(N·D)
    time, blocks of columns, and the tests on the CPU.
    """

    paper = "Krauß and Dmitrienko, Avoid Adversarial Adaption in FL by Multi-Metric Investigations, arXiv 2306.03600"
    cost = "O(N D) time, no copy"
    Parameters = MesasParameters

    def screen(self, round: RoundUpdates) -> Screening:
        rows = round.seen(self.parameters.scope)
        left = np.arange(round.count)
        score = torch.zeros(round.count, dtype=torch.float64, device=rows.device)
        for values in measures(rows, round.global_vector[: rows.shape[1]]).values():
            score = torch.maximum(score, deviations(values))
            left = self.prune(values.cpu().numpy(), left)
        accepted = torch.zeros_like(round.accepted)
        accepted[torch.from_numpy(left).to(accepted.device)] = True
        return Screening(accepted, scores={"score": score})

    def prune(self, values: Array, left: Array) -> Array:
        """Those of the clients ``left`` that one measure (N,) leaves."""
        while len(left) >= 5 and self.significant(values[left]):
            labels = agglomerative(values[left][:, None], 2)
            larger = int(2 * (labels == 1).sum() > len(left))
            if 2 * (labels == larger).sum() <= len(values):
                break
            left = left[labels == larger]
        return left

    def significant(self, values: Array) -> bool:
        """Whether the values (n,), n ≥ 5, lie so unevenly about their median that somebody must be malicious."""
        from scipy import stats  # a second of import

        away = values - np.median(values)
        size = np.abs(away).max()
        if size <= 1e-12 * np.abs(values).max():
            return False
        away = away / size  # the tests do not notice, and nothing overflows
        lower, upper = -away[away <= 0], away[away >= 0]
        with warnings.catch_warnings(), np.errstate(all="ignore"):  # halves without spread: p is 0, 1 or NaN
            warnings.simplefilter("ignore")
            chances = [
                stats.ttest_ind(lower, upper).pvalue,
                stats.levene(lower, upper).pvalue,
                stats.ks_2samp(lower, upper).pvalue,
            ]
        if self.parameters.lone:
            chances.append(chance_of_outlier(away))
        return any(chance < self.parameters.alpha for chance in chances)


def chance_of_outlier(values: Array) -> float:
    """Grubbs's test, two-sided: a bound on the chance that of n normal values one lies as far off as the furthest."""
    from scipy import stats

    n = len(values)
    squared = np.square(values - values.mean()).max() / values.var(ddof=1)
    rest = (n - 1) ** 2 - n * squared
    if rest <= 1e-9 * n**2:  # all others are equal
        return 0.0
    return float(min(1.0, 2 * n * stats.t.sf(np.sqrt(n * (n - 2) * squared / rest), n - 2)))


def measures(rows: Tensor, base: Tensor) -> dict[str, Tensor]:
    """Name → (N,) float64: the six measures of the updates (N, D) of a model (D,), in the order of the cascade."""
    count, width = rows.shape
    total, squares, increased = (torch.zeros(count, dtype=torch.float64, device=rows.device) for _ in range(3))
    least, greatest = torch.full_like(total, torch.inf), torch.full_like(total, -torch.inf)
    for block in columns(rows):
        total += block.sum(dim=1, dtype=torch.float64)
        increased += (block > 0).sum(dim=1)
        least = torch.minimum(least, block.amin(dim=1).double())
        greatest = torch.maximum(greatest, block.amax(dim=1).double())
    mean = total / width
    for block in columns(rows):
        squares += (block.double() - mean[:, None]).square().sum(dim=1)
    return {
        "cosine": cosine_distances_to_base(rows, base),
        "length": norms(rows),
        "increased": increased,
        "variance": squares / width,
        "least": least,
        "greatest": greatest,
    }
