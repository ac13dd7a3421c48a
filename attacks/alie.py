"""A little is enough: all colluders send the mean, shifted by as many standard deviations as go unnoticed."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

from torch import Tensor

from attacks._deviation import Colluding, mean_and_std
from fedsim.attack import CoordinationKnowledge
from fedsim.errors import RunError
from fedsim.plugins import Parameters, parameter, register


@dataclass(frozen=True)
class ALIEParameters(Parameters):
    z: float | None = parameter(None, "standard deviations shifted by; null: the paper's, from n and m", ge=0)
    sees: str = parameter("colluders", "whose honest updates the colluders see", choices=("colluders", "benign"))
    sign: str = parameter("plus", "direction of the shift: μ + zσ or μ − zσ", choices=("plus", "minus"))
    ddof: int = parameter(0, "0: standard deviation of the updates seen; 1: estimate for all", choices=(0, 1))


def largest_shift(n: int, m: int) -> float:
    """z with ``Φ(z) = (n − m − s) / (n − m)``, ``s = ⌊n/2⌋ + 1 − m`` the benign clients needed for a majority.

    Raises
    ------
    RunError: there is no such z: the colluders are the majority, or two clients are one against one.
    """
    needed = n // 2 + 1 - m
    if not 0 < needed < n - m:
        raise RunError(f"alie: the paper has no z for {m} colluders among {n} clients; set z (its authors used 1.5)")
    return NormalDist().inv_cdf((n - m - needed) / (n - m))


@register("alie")
class ALIE(Colluding):
    """All colluders send μ + zσ, coordinate by coordinate, a shift small enough to hide in the spread.

    z is the largest shift at which a majority is still to be expected further from the mean than the colluders:
    ``Φ(z) = (n − m − s) / (n − m)``, ``s = ⌊n/2⌋ + 1 − m``, n clients in the round, m
    colluders. With few colluders it is zero or negative (n = 10, m = 1: −0.14): give ``z`` then. Where no z
    solves it, the run stops and says so.

    μ and σ are, as in the paper, of the colluders' own honest updates; alone, a colluder sees no spread and
    sends its own. ``sees: benign`` takes the benign clients' (blades, byzfl). The sign is the paper's; the
    authors' code and LASA shift by minus. The paper does not say which σ; ddof 0 is the authors' code, all others
    have 1. Fixed z: 1.5 in the authors' code, 0.5 in LASA. The table of z in NDSS21's lie attack holds Φ where
    Φ⁻¹ is meant, and is not followed.

    Running statistics take part like any weight. Cost: honest training; at the server O(M D) for M updates seen.
    """

    paper = "Baruch, Baruch, Goldberg: A Little Is Enough, NeurIPS 2019; code: moranant/attacking_distributed_learning"
    cost = "an honest round; at the server O(M D) time for M updates seen"
    Parameters = ALIEParameters

    def make(self, honest: Tensor, knowledge: CoordinationKnowledge) -> Tensor:
        p, malicious = self.parameters, knowledge.malicious
        z = largest_shift(malicious.shape[0], int(malicious.sum())) if p.z is None else p.z
        mean, std = mean_and_std(honest, p.ddof)
        return mean + z * std if p.sign == "plus" else mean - z * std
