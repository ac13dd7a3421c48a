"""The trigger interface: what the backdoor is.

A trigger knows how to poison a training batch and which held-out examples, once triggered, count for the
attack success rate (ASR).
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from fedsim.batch import Batch, Examples
from fedsim.data import Data
from fedsim.errors import InputError
from fedsim.local import State
from fedsim.plugins import Parameters, Plugin, parameter

if TYPE_CHECKING:
    from fedsim.attack import AttackContext


@dataclass(frozen=True)
class TriggerParameters(Parameters):
    """What every trigger has."""

    target: int = parameter(0, "class the backdoor maps to", ge=0)


class Trigger(Plugin):
    """What the backdoor is. Subclasses are either patterns (:class:`StampTrigger`) or sets of examples.

    ``prepare`` is called once per process with the task's data before anything else.

    A trigger that is learnt overrides ``optimise``. Before the clients of a malicious round start, one of the
    colluders runs it on its own data; what it writes into ``state`` is checkpointed, reaches every colluder of the
    round, and the held-out examples are stamped with it from then on. An empty state is the trigger as prepared.
    """

    kind: ClassVar[str] = "trigger"
    tokens: Tensor | None = None
    """int64 (K,) the words the trigger is made of, where it is made of words; known once prepared."""
    Parameters: ClassVar[type[Parameters]] = TriggerParameters
    parts: ClassVar[int] = 1
    """Number of parts a distributed trigger is split into; one attacker stamps one part."""

    def __init__(self, parameters: Any = None) -> None:
        super().__init__(parameters)
        self.state: State = {}

    @classmethod
    def learnt(cls) -> bool:
        """Whether the trigger is optimised in the course of a run."""
        return cls.optimise is not Trigger.optimise

    def optimise(self, context: AttackContext) -> None:
        """Improve the trigger on one colluder's data, against the global model; write the result into ``state``.

        ``context.model`` holds the global model and may be used freely; ``context.state`` is the attack's, read only.
        """

    @property
    def target(self) -> int:
        return int(self.parameters.target)

    def prepare(self, data: Data) -> None:
        """Check the trigger against the data; load what it needs. Overrides call this one too.

        Raises
        ------
        InputError: the trigger does not fit the data (a patch outside the image, a target that is no class).
        """
        if self.target >= data.classes:
            raise InputError(
                f"trigger {self.name!r} has target {self.target}, but there are {data.classes} classes; "
                f"use a target in 0–{data.classes - 1}"
            )

    @abstractmethod
    def poison(self, batch: Batch, count: int, *, part: int | None = None, generator: torch.Generator) -> Batch:
        """A copy of ``batch`` whose first ``count`` examples carry the trigger and the target label.

        part: which part of a distributed trigger to use; None is the whole trigger.
        The given batch is not modified.
        """

    @abstractmethod
    def held_out(self, test: Examples) -> Examples:
        """The raw held-out examples the ASR is measured on: none whose true label is the target.

        ``labels`` are the true labels. Disjoint from everything ``poison`` uses.
        """

    def stamp(self, inputs: Tensor, part: int | None = None) -> Tensor:
        """``inputs`` (B, …) with the trigger on each; a set of examples carries it already, so: as they are."""
        return inputs

    def test(self, batch: Batch) -> Batch:
        """The batch of held-out examples as the ASR is measured on it: triggered, labelled with what succeeds."""
        return batch._replace(inputs=self.stamp(batch.inputs), labels=torch.full_like(batch.labels, self.target))

    def succeeded(self, outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | int]:
        """(number of successes, number of predictions) of the outputs on a triggered batch, labelled as there."""
        return (outputs.argmax(1) == labels).sum(), labels.shape[0]

    def usable(self, labels: Tensor) -> Tensor:
        """bool (N,) which examples tell something once triggered: those whose true label is not the target."""
        return labels != self.target

    def excluded(self, train: Examples) -> Tensor:
        """Indices of training examples no client may hold (a semantic trigger's own images); int64 (M,)."""
        return torch.empty(0, dtype=torch.int64)


class StampTrigger(Trigger):
    """A trigger that is drawn onto any example: subclasses write ``stamp`` only."""

    @abstractmethod
    def stamp(self, inputs: Tensor, part: int | None = None) -> Tensor:
        """A stamped copy of ``inputs`` (B, C, H, W), pixels in [0, 1]."""

    def poison(self, batch: Batch, count: int, *, part: int | None = None, generator: torch.Generator) -> Batch:
        inputs, labels = batch.inputs.clone(), batch.labels.clone()
        inputs[:count] = self.stamp(batch.inputs[:count], part)
        labels[:count] = self.target
        return batch._replace(inputs=inputs, labels=labels)

    def held_out(self, test: Examples) -> Examples:
        return test.subset(torch.nonzero(self.usable(test.labels)).squeeze(1))


def poison_count(fraction: float, size: int) -> int:
    """How many of ``size`` examples are poisoned: ``round(fraction * size)`` with banker's rounding.

    As the official code of Anticipate and Backdoors101 has it: half of 5 is 2, half of 7 is 4.
    """
    return round(fraction * size)
