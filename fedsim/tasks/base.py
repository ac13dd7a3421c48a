"""The task interface: data, model, loss and metric of one task family."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fedsim.batch import Batch, Examples
from fedsim.plugins import Plugin


@dataclass(frozen=True)
class Data:
    """A data set, decoded once.

    train, test: raw examples. classes: number of classes. mean, std: per channel, of pixels in [0, 1].
    source: where it came from (name, licence), for the manifest. fingerprint: SHA-256 of everything in it.
    """

    train: Examples
    test: Examples
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    source: dict[str, Any]
    fingerprint: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one example."""
        return tuple(self.train.inputs.shape[1:])

    def to(self, device: torch.device) -> Data:
        return replace(self, train=self.train.to(device), test=self.test.to(device))


class Dataset(Plugin):
    """Where data comes from; ``load`` reads and checks it."""

    kind: ClassVar[str] = "dataset"

    @abstractmethod
    def load(self) -> Data:
        """Read the data.

        Raises
        ------
        InputError: a file is missing or unreadable, or holds what cannot be used.
        """


class Task(Plugin):
    """A task family. Everything the engine needs to know about what is learnt."""

    kind: ClassVar[str] = "task"

    @abstractmethod
    def module(self, model: Any, data: Data) -> nn.Module:
        """The network, freshly initialised from torch's global generator.

        Raises
        ------
        InputError: the model does not fit the data.
        """

    @abstractmethod
    def batch(self, examples: Examples, indices: Tensor, *, augment: torch.Generator | None = None) -> Batch:
        """The batch of the examples at ``indices`` (B,), as the model takes it; augmented if a stream is given."""

    @abstractmethod
    def loss(self) -> nn.Module:
        """Module mapping (outputs, labels) to the scalar that training minimises."""

    @abstractmethod
    def count(self, outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, int]:
        """(number right, sum of losses in float64, number of predictions) of one evaluated batch."""

    def epoch(
        self,
        examples: Examples,
        indices: Tensor,
        batch_size: int,
        generator: torch.Generator,
        augment: bool,
    ) -> Callable[[], Iterator[Batch]]:
        """A function making one freshly shuffled epoch over ``indices`` (M,) each call, the last batch smaller."""

        def batches() -> Iterator[Batch]:
            order = torch.randperm(indices.shape[0], generator=generator).to(indices.device)
            for rows in torch.split(indices[order], batch_size):
                yield self.batch(examples, rows, augment=generator if augment else None)

        return batches
