"""Weak differential privacy."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from defenses.norm_clipping import NormClipping, NormClippingParameters
from fedsim.defense import RoundUpdates
from fedsim.plugins import parameter, register


@dataclass(frozen=True)
class WeakDpParameters(NormClippingParameters):
    sigma: float = parameter(0.0025, "standard deviation of the noise on each trainable coordinate", ge=0)


@register("weak_dp")
class WeakDp(NormClipping):
    r"""Norm clipping, then Gaussian noise once on the aggregate: Δ ← Δ + N(0, σ² I).

    The noise goes on the aggregated update — not on each client's, where averaging would shrink it by √N —
    and only on its trainable part: a running variance pushed below zero would break the model, and the code
    of *Attack of the Tails*, which this follows, sees no running statistics at all. (Its deprecated class
    ``WeakDPDefense`` clips whole weights and throws its noise away; we do not repeat that.)

    ``sigma`` and ``bound`` default to what Multi-metrics (arXiv 2303.06601) runs on CIFAR-10; *Attack of the
    Tails* uses σ = 0.025 on EMNIST. Far too little for a privacy guarantee: hence *weak*. The noise comes
    from the round's stream ``weak_dp``, so a run repeats exactly. ``scope`` and the score are norm
    clipping's.

    Cost: O(N·D) time, one copy of the updates.
    """

    paper = "Sun et al., Can You Really Backdoor Federated Learning?, arXiv 1911.07963"
    cost = "O(N D) time, one copy of the updates"
    Parameters = WeakDpParameters

    def finish(self, vector: Tensor, round: RoundUpdates) -> Tensor:
        source = round.generator("weak_dp")
        noise = torch.randn(round.trainable, generator=source, dtype=torch.float64, device=vector.device)
        noisy = vector.clone()
        noisy[: round.trainable] += (self.parameters.sigma * noise).to(vector.dtype)
        return noisy
