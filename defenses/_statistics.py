"""Numbers of the clients of a round: medians, deviations, clipping factors, cosines."""

from __future__ import annotations

import torch
from torch import Tensor

from fedsim.distances import columns, cosine_distances, norms


def median(x: Tensor, *, lower: bool = False) -> Tensor:
    """The median of x (N,); for an even N the mean of the two middle values, or the lower of them."""
    return x.median() if lower else x.quantile(0.5)


def deviations(x: Tensor) -> Tensor:
    """(N,) |xᵢ − median| / σ, σ with divisor N.

    All zero where the values differ by rounding noise only, and for fewer than 3: of two, both are exactly 1.
    """
    spread = x.std(correction=0)
    if len(x) < 3 or not bool(spread > 1e-12 * x.abs().amax()):
        return torch.zeros_like(x)
    scaled: Tensor = (x - median(x)).abs() / spread
    return scaled


def clip_scale(length: Tensor, bound: Tensor | float) -> Tensor:
    """(N,) the factors min(1, bound / lengthᵢ)."""
    return torch.where(length > bound, bound / length, torch.ones_like(length))


def cosines(rows: Tensor, base: Tensor) -> Tensor:
    """(N,) float64: cos(xᵢ, b) of rows (N, D) and b (D,); zero where one of them is zero. O(N·D)."""
    inner = torch.zeros(rows.shape[0], dtype=torch.float64, device=rows.device)
    for block, origin in zip(columns(rows), columns(base[None]), strict=True):
        inner += block.to(torch.float64) @ origin[0].to(torch.float64)
    size = norms(rows) * norms(base[None])
    return torch.where(size > 0, inner / size, torch.zeros_like(inner))


def similarities(rows: Tensor) -> Tensor:
    """(N, N) float64: cos(xᵢ, xⱼ) to the others, the diagonal zero; a zero row is similar to nobody. O(N²·D)."""
    matrix = 1 - cosine_distances(rows)
    still = norms(rows) == 0
    matrix[still] = matrix[:, still] = 0
    matrix.fill_diagonal_(0)
    return matrix
