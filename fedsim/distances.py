"""Norms and distances of the rows of a big matrix, block of columns by block of columns.

Everything is summed in float64 and from differences, never through the Gram matrix: next to a boosted update
‖x‖² + ‖y‖² − 2⟨x, y⟩ loses the digits in which the others differ. No (N, N, D) tensor and no float64 copy of
the whole matrix is built: the working memory is a few blocks of N × ``BLOCK`` numbers.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK = 8192
"""Columns worked on at a time."""


def columns(rows: Tensor) -> Iterator[Tensor]:
    """The matrix (N, D) cut into blocks (N, at most ``BLOCK``), left to right, as views."""
    yield from torch.split(rows, BLOCK, dim=1)


def _shifted(rows: Tensor, base: Tensor | None) -> Iterator[Tensor]:
    """The blocks of ``rows + base`` in float64."""
    for start, block in enumerate(columns(rows)):
        wide = block.to(torch.float64)
        yield wide if base is None else wide + base[start * BLOCK : (start + 1) * BLOCK].to(torch.float64)


def _zeros(*shape: int, like: Tensor) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64, device=like.device)


def norms(rows: Tensor, base: Tensor | None = None, *, p: int = 2) -> Tensor:
    """(N,) float64: ‖xᵢ + b‖ₚ for p 1 or 2. rows: (N, D). base: b (D,), default zero. O(N·D)."""
    total = _zeros(rows.shape[0], like=rows)
    for block in _shifted(rows, base):
        total += block.abs().sum(dim=1) if p == 1 else block.square().sum(dim=1)
    return total if p == 1 else total.sqrt()


def _pairwise(blocks: Iterator[Tensor], rows: Tensor, p: int) -> Tensor:
    n = rows.shape[0]
    upper = _zeros(n * (n - 1) // 2, like=rows)
    for block in blocks:
        part = torch.nn.functional.pdist(block, p=float(p))
        upper += part if p == 1 else part.square()
    matrix = _zeros(n, n, like=rows)
    i, j = torch.triu_indices(n, n, offset=1, device=rows.device)
    matrix[i, j] = upper
    return matrix + matrix.T


def squared_distances(rows: Tensor) -> Tensor:
    """(N, N) float64: ‖xᵢ − xⱼ‖₂²; exactly zero between equal rows. O(N²·D)."""
    return _pairwise(_shifted(rows, None), rows, p=2)


def manhattan_distances(rows: Tensor) -> Tensor:
    """(N, N) float64: ‖xᵢ − xⱼ‖₁. O(N²·D)."""
    return _pairwise(_shifted(rows, None), rows, p=1)


def _unit_scale(length: Tensor) -> Tensor:
    return torch.where(length > 0, 1 / length, torch.zeros_like(length))


def cosine_distances(rows: Tensor, base: Tensor | None = None) -> Tensor:
    """(N, N) float64: 1 − cos(xᵢ + b, xⱼ + b), as half the squared distance of the unit vectors.

    That keeps every digit when the rows point nearly the same way, where 1 − cos would cancel. A zero row has
    no direction: its unit vector is taken as zero, half a unit from every other. O(N²·D).
    """
    scale = _unit_scale(norms(rows, base))[:, None]
    return _pairwise((block * scale for block in _shifted(rows, base)), rows, p=2) / 2


def cosine_distances_to_base(rows: Tensor, base: Tensor) -> Tensor:
    """(N,) float64: 1 − cos(b, xᵢ + b), in the same way. O(N·D)."""
    scale = _unit_scale(norms(rows, base))[:, None]
    base_scale = _unit_scale(norms(base[None]))[:, None]
    total = _zeros(rows.shape[0], like=rows)
    for block, origin in zip(_shifted(rows, base), _shifted(base[None], None), strict=True):
        total += (block * scale - origin * base_scale).square().sum(dim=1)
    return total / 2


def distances_to_mean(rows: Tensor, weights: Tensor) -> Tensor:
    """(N,) float64: ‖xᵢ − Σⱼ wⱼ xⱼ‖₂ for weights (N,) summing to 1. O(N·D)."""
    shares = weights.to(torch.float64)
    total = _zeros(rows.shape[0], like=rows)
    for block in _shifted(rows, None):
        total += (block - shares @ block).square().sum(dim=1)
    return total.sqrt()
