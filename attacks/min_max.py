"""Min-Max: as far from the mean of honest updates as two of them are from each other."""

from __future__ import annotations

from torch import Tensor

from attacks._deviation import Deviating
from fedsim.plugins import register


@register("min_max")
class MinMax(Deviating):
    """All colluders send μ − λp, no further from any honest update than two of those are from each other.

    The largest λ with ``maxᵢ ‖μ − λp − xᵢ‖₂ ≤ maxᵢⱼ ‖xᵢ − xⱼ‖₂``, μ the mean of the honest
    updates xᵢ. By default, as in the paper's stronger setting, those are the round's benign clients' (``sees:
    benign``); ``colluders``: only the colluders' own, which are trained honestly first. A lone colluder that
    sees only itself sends its own update.

    λ is searched as in the paper: from 10, by half the last step up or down, until the last good λ and the next
    one tried are within 1e-5. λ thus ends less than 2e-5 below the exact one, and below 20; where nothing fits
    it is 0. p is the standard deviation, with ddof 1, the default of LASA's port; the authors' notebooks have the
    unit vector of the mean as theirs, and the paper tries all three. Blades searches coarsely (``start: 2.5``,
    ``tolerance: 0.005``) and sends the last λ it tried, which may break the bound; here the last good one is sent.

    Running statistics take part like any weight. Cost: honest training; at the server O(M² D) for M updates seen.
    """

    paper = "Shejwalkar, Houmansadr: Manipulating the Byzantine, NDSS 2021; code: vrt1shjwlkr/NDSS21-Model-Poisoning"
    cost = "an honest round; at the server O(M² D) time for M updates seen"

    def measure(self, squared: Tensor) -> Tensor:
        return squared.amax(dim=-1)
