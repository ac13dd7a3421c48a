"""Norm clipping."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedsim.defense import Defense, RoundUpdates, Screening
from fedsim.distances import norms
from fedsim.plugins import Parameters, parameter, register


@dataclass(frozen=True)
class NormClippingParameters(Parameters):
    bound: float = parameter(2.0, "largest L2 norm S an update may have", gt=0)
    scope: str = parameter(
        "all",
        "what is measured and clipped: the whole vector or its trainable part",
        choices=("all", "trainable"),
    )


@register("norm_clipping")
class NormClipping(Defense):
    r"""Clip every update to an L2 ball: Δᵢ ← Δᵢ / max(1, ‖Δᵢ‖₂ / S).

    ``scope: all`` clips running statistics along with the weights, as Anticipate's official server does;
    ``scope: trainable`` leaves them alone, as the code of *Attack of the Tails* does. The score is the norm.
    Norms are summed in float64: over millions of float32 entries a float32 sum is off in the fourth digit.

    Cost: O(N·D) time, one copy of the updates.
    """

    paper = "Sun et al., Can You Really Backdoor Federated Learning?, arXiv 1911.07963"
    cost = "O(N D) time, one copy of the updates"
    Parameters = NormClippingParameters

    def screen(self, round: RoundUpdates) -> Screening:
        return Screening(scores={"norm": norms(round.seen(self.parameters.scope))})

    def transform(self, round: RoundUpdates) -> Tensor:
        length = norms(round.seen(self.parameters.scope))
        scale: Tensor = (self.parameters.bound / length).clamp(max=1.0).to(round.updates.dtype)[:, None]
        if self.parameters.scope == "all":
            return round.updates * scale
        clipped = round.updates.clone()
        clipped[:, : round.trainable] *= scale
        return clipped
