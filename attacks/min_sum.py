"""Min-Sum: as far from all honest updates, in sum, as the most remote of them is."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from attacks._deviation import Deviating, DeviationParameters
from fedsim.plugins import parameter, register


@dataclass(frozen=True)
class MinSumParameters(DeviationParameters):
    row: str = parameter(
        "max", "whose sum of squared distances is the bound: largest or smallest", choices=("max", "min")
    )


@register("min_sum")
class MinSum(Deviating):
    """All colluders send μ − λp, no further from all honest updates in sum than the most remote of those.

    The largest λ with ``Σᵢ ‖μ − λp − xᵢ‖² ≤ maxᵢ Σⱼ ‖xᵢ − xⱼ‖²``, μ the mean of the honest
    updates xᵢ. The largest sum is the paper's bound and LASA's; the authors' notebook takes the *smallest* (``row:
    min``), which gives a smaller λ. Whose updates are seen, the direction p and the search for λ are as in
    ``min_max``: all benign ones, the standard deviation, from 10 to within 1e-5.

    Running statistics take part like any weight. Cost: honest training; at the server O(M² D) for M updates seen.
    """

    paper = "Shejwalkar, Houmansadr: Manipulating the Byzantine, NDSS 2021; code: vrt1shjwlkr/NDSS21-Model-Poisoning"
    cost = "an honest round; at the server O(M² D) time for M updates seen"
    Parameters = MinSumParameters

    def measure(self, squared: Tensor) -> Tensor:
        return squared.sum(dim=-1)

    def bound(self, measures: Tensor) -> Tensor:
        return measures.max() if self.parameters.row == "max" else measures.min()
