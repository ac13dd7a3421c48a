"""A batch of examples, and a set of examples resident on a device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Batch(NamedTuple):
    """Inputs and labels as a model meets them.

    inputs: vision — float (B, C, H, W), pixels in [0, 1]; the model normalises.
    labels: int64 (B,).
    """

    inputs: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Examples:
    """A set of raw examples, decoded once and kept on one device.

    inputs: vision — uint8 (N, C, H, W).
    labels: int64 (N,).
    users:  int64 (N,) natural owner of each example (writer, author), or None.
    """

    inputs: Tensor
    labels: Tensor
    users: Tensor | None = None

    def __len__(self) -> int:
        return int(self.labels.shape[0])

    def subset(self, indices: Tensor) -> Examples:
        """The examples at ``indices`` (M,), as a copy."""
        users = None if self.users is None else self.users[indices]
        return Examples(self.inputs[indices], self.labels[indices], users)

    def to(self, device: torch.device) -> Examples:
        users = None if self.users is None else self.users.to(device)
        return Examples(self.inputs.to(device), self.labels.to(device), users)
