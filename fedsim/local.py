"""Local training as plugins see it: how a client trains, where it may be changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from fedsim.batch import Batch
from fedsim.layout import FlatModel

State = dict[str, Any]
"""What a plugin keeps between rounds: tensors, numbers, strings, lists of these, mappings with keys of text."""


@dataclass(frozen=True)
class LocalSettings:
    """How one client trains in one round.

    lr: learning rate, already decayed for the round. epochs: passes over the data. steps: if given, number of
    optimiser steps instead of epochs. momentum, weight_decay: SGD's.
    """

    lr: float
    epochs: int = 1
    batch_size: int = 64
    momentum: float = 0.0
    weight_decay: float = 0.0
    steps: int | None = None
    lr_decay: float = 1.0
    amp: bool = False
    channels_last: bool = False


GradientHook = Callable[[Tensor, Tensor], None]
"""(gradient (T,), weights (T,)): change the gradient in place, after backward and before the step."""


@dataclass(frozen=True)
class StepInfo:
    """Where in local training a step stands (all from 0)."""

    epoch: int
    batch: int
    last_batch: bool


StepHook = Callable[[Tensor, StepInfo], None]
"""(weights (T,), where): change the weights in place after the optimiser's step."""


class Fit(Protocol):
    """Plain local training of ``model`` in place; provided by :mod:`fedsim.training`.

    batches: one epoch of batches, called once an epoch. Returns the mean loss of the last epoch.
    """

    def __call__(
        self,
        model: FlatModel,
        batches: Callable[[], Iterator[Batch]],
        loss: nn.Module,
        settings: LocalSettings,
        *,
        transform: Callable[[Batch], Batch] | None = None,
        on_gradient: GradientHook | None = None,
        on_step: StepHook | None = None,
        lr_at: Callable[[int], float] | None = None,
    ) -> float: ...
