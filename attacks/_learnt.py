"""Triggers that are a square patch whose pixels are learnt."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.attack import AttackContext
from fedsim.data import Data
from fedsim.errors import InputError
from fedsim.plugins import parameter
from fedsim.trigger import StampTrigger, TriggerParameters


@dataclass(frozen=True)
class SquareParameters(TriggerParameters):
    size: int = parameter(5, "side of the square", ge=1, le=4096)
    row: int = parameter(2, "its top row", ge=0)
    column: int = parameter(2, "its left column", ge=0)


class SquareTrigger(StampTrigger):
    """A square whose pixels (C, s, s) lie in ``state["patch"]``; with an empty state it is ``initial``."""

    tasks = ("vision",)

    @abstractmethod
    def initial(self, channels: int) -> Tensor:
        """The patch (C, s, s) before anything is learnt, pixels in [0, 1]."""

    def prepare(self, data: Data) -> None:
        super().prepare(data)
        p = self.parameters
        height, width = data.train.inputs.shape[-2:]
        if p.row + p.size > height or p.column + p.size > width:
            raise InputError(
                f"trigger {self.name!r} covers rows {p.row}–{p.row + p.size - 1} and columns {p.column}–"
                f"{p.column + p.size - 1}, the images are {height}×{width}: "
                + (
                    f"use row in 0–{height - p.size} and column in 0–{width - p.size}"
                    if p.size <= min(height, width)
                    else f"use a size of at most {min(height, width)}"
                )
            )

    def patch(self, like: Tensor) -> Tensor:
        """The current patch (C, s, s), a copy with the device and dtype of the images ``like`` (…, C, H, W)."""
        patch = self.state.get("patch")
        return (self.initial(like.shape[-3]) if patch is None else patch.clone()).to(like)

    def paste(self, inputs: Tensor, patch: Tensor) -> Tensor:
        """A copy of ``inputs`` (B, C, H, W) with ``patch`` (C, s, s) in its place; differentiable in both."""
        p = self.parameters
        stamped = inputs.clone()
        stamped[:, :, p.row : p.row + p.size, p.column : p.column + p.size] = patch
        return stamped

    def stamp(self, inputs: Tensor, part: int | None = None) -> Tensor:
        return self.paste(inputs, self.patch(inputs))


def loss_to(context: AttackContext, outputs: Tensor, target: int) -> Tensor:
    """The scalar loss of the outputs (B, classes) if every label were the target."""
    labels = torch.full((outputs.shape[0],), target, dtype=torch.int64, device=outputs.device)
    value: Tensor = context.loss(outputs, labels)
    return value
