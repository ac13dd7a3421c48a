"""A defense of your own: reject clients whose update points away from the median update."""

from __future__ import annotations

from dataclasses import dataclass

from torch.nn.functional import cosine_similarity

from fedsim.defense import Defense, RoundUpdates, Screening
from fedsim.plugins import Parameters, parameter, register


@dataclass(frozen=True)
class MedianDirectionParameters(Parameters):
    threshold: float = parameter(0.0, "least cosine similarity to the coordinate-wise median", ge=-1, le=1)


@register("median_direction")
class MedianDirection(Defense):
    """Keep clients whose update has a cosine of at least the threshold with the median update."""

    paper = "an example, not published"
    Parameters = MedianDirectionParameters
    min_clients = 3

    def screen(self, round: RoundUpdates) -> Screening:
        updates = round.seen("trainable")
        cosine = cosine_similarity(updates, updates.median(dim=0).values[None], dim=1)
        return Screening(accepted=cosine >= self.parameters.threshold, scores={"angle": 1 - cosine})
