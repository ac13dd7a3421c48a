"""Comparing our numbers with those of other people's code, in float64."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fedsim.pipeline import Aggregation


def tensor(values: Any) -> Tensor:
    """Numbers in nested lists as float64."""
    return torch.tensor(values, dtype=torch.float64)


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal numbers of this seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def assert_near(found: Any, expected: Any, tolerance: float) -> None:
    """Of the same shape, and |found − expected| ≤ tolerance · max(1, |expected|), entry by entry.

    found, expected: numbers, nested lists of them, tensors; or mappings, of which every name expected is compared.
    """
    if isinstance(expected, Mapping):
        for name, value in expected.items():
            _compare(found[name], value, tolerance, f"{name} is ")
    else:
        _compare(found, expected, tolerance, "")


def _compare(found: Any, expected: Any, tolerance: float, name: str) -> None:
    have, wanted = (torch.as_tensor(values, dtype=torch.float64) for values in (found, expected))
    assert have.shape == wanted.shape, f"{name}of shape {tuple(have.shape)}, expected {tuple(wanted.shape)}"
    deviation = ((have - wanted).abs() / wanted.abs().clamp(min=1)).max().item()
    assert deviation <= tolerance, f"{name}off by {deviation:.3g}, allowed {tolerance:g}"


def kept(result: Aggregation) -> set[int]:
    """The rows of the clients that a defense accepted."""
    return set(result.accepted.nonzero().flatten().tolist())
