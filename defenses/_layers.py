"""The tensors of a model in the rows of updates."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fedsim.defense import RoundUpdates
from fedsim.distances import columns
from fedsim.layout import Entry


def tensors(round: RoundUpdates) -> list[Entry]:
    """The model's tensors in the vector; without a layout the whole vector counts as one matrix of one row."""
    if round.layout is None:
        size = round.updates.shape[1]
        return [Entry("vector", (1, size), 0, True)]
    return [entry for entry in round.layout.entries if entry.size > 0]


def wide_columns(rows: Tensor, entry: Entry) -> Iterator[Tensor]:
    """The columns of one tensor, block by block, in float64."""
    for block in columns(rows[:, entry.start : entry.stop]):
        yield block.to(torch.float64)
