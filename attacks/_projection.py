"""Projection onto the ball an attacker keeps its model in."""

from __future__ import annotations

import torch
from torch import Tensor

from fedsim.local import StepHook, StepInfo


def project_l2(weights: Tensor, centre: Tensor, radius: float) -> None:
    """Bring ``weights`` (T,) in place into the L2 ball of ``radius`` around ``centre`` (T,).

    ``w ← c + (w − c) · r / ‖w − c‖₂`` where the norm exceeds r; otherwise not a bit changes. Nothing is read
    back from the device.
    """
    difference = weights - centre
    norm = torch.linalg.vector_norm(difference)
    inside = centre + difference * (radius / norm.clamp_min(radius))
    weights.copy_(torch.where(norm > radius, inside, weights))


def held_near(centre: Tensor, radius: float | None) -> StepHook | None:
    """The hook that projects after every step; None for a radius of None."""
    if radius is None:
        return None

    def project(weights: Tensor, where: StepInfo) -> None:
        project_l2(weights, centre, radius)

    return project
