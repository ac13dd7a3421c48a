"""Coordinate-wise median."""

from __future__ import annotations

from dataclasses import dataclass

from defenses.trimmed_mean import mean_of_ranks
from fedsim.defense import Aggregated, Defense, RoundUpdates
from fedsim.plugins import Parameters, parameter, register


@dataclass(frozen=True)
class CoordinateMedianParameters(Parameters):
    lower: bool = parameter(False, "for an even number of clients take the lower middle value, not the mean of both")


@register("coordinate_median")
class CoordinateMedian(Defense):
    r"""The median of the clients' values, coordinate by coordinate.

    For an even number of clients the two middle values are averaged, as in flwr 1.41 and byzfl. ``lower:
    true`` takes the lower one, as ``torch.median`` does: that is the official server of Anticipate and the
    code of *Robust Learning Rate*. Unweighted: examples, and weights that earlier stages gave, play no part;
    clients they rejected are absent. Whole weights give the same model, since the rule moves along with a
    shift.

    Looks at the whole vector. The reported weights are the share of coordinates that each client gave, half a
    coordinate each for an averaged pair; of equal values the first client's counts as the smaller. Cost:
    O(D·N·log N) time (sorting), O(D) memory beyond the updates: the coordinates are worked on in blocks.
    """

    paper = "Yin et al., Byzantine-Robust Distributed Learning, ICML 2018, arXiv 1803.01498"
    cost = "O(D N log N) time, O(D) memory"
    Parameters = CoordinateMedianParameters

    def aggregate(self, round: RoundUpdates) -> Aggregated:
        low = (round.count - 1) // 2
        return mean_of_ranks(round.updates, low, low if self.parameters.lower else round.count // 2)
