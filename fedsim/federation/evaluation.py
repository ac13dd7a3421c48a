"""Measuring the global model: the main task on clean held-out data, the backdoor on held-out triggered data."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from fedsim.batch import Batch, Examples, State, outputs_of
from fedsim.data import Data
from fedsim.defense import Defense, HeldOut, Server
from fedsim.layout import FlatModel
from fedsim.pipeline import prefixes
from fedsim.tasks.base import Task
from fedsim.trigger import Trigger

T = TypeVar("T")
_LARGEST = 700.0
"""A loss whose exponential is still a number."""


@dataclass(frozen=True)
class Measurement:
    """accuracies in [0, 1]; loss in nats per example (next word: per word). ``asr`` is None where there is no backdoor.

    perplexity: exp(loss), where the task counts it and it is a number.
    class_accuracy: per true class; NaN for one without examples.
    defense: what the defense's stages measured besides, ``stage.name`` → value.
    """

    main_accuracy: float
    main_loss: float
    asr: float | None
    asr_examples: int | None
    perplexity: float | None = None
    class_accuracy: tuple[float, ...] | None = None
    defense: dict[str, float] = field(default_factory=dict)


class Evaluator:
    """Evaluates models on the test data, pass by pass, on a few threads.

    Every batch is computed with one thread and the results are added up in order, so the numbers do not depend
    on how many threads there are.
    """

    def __init__(
        self, task: Task, model: FlatModel, data: Data, trigger: Trigger | None, batch_size: int, threads: int
    ) -> None:
        self.task, self.model, self.trigger = task, model, trigger
        self.test = data.test.to(model.device)
        self.triggered: Examples | None = None
        if trigger is not None:
            self.triggered = trigger.held_out(data.test).to(model.device)
        self.batch_size = batch_size
        self.pool = ThreadPoolExecutor(threads) if threads > 1 and model.device.type == "cpu" else None

    def measure(self, vector: Tensor, stages: Sequence[Defense] = (), server: Server | None = None) -> Measurement:
        """Main accuracy and loss, the ASR, and what the defense measures, of the model ``vector`` (D,)."""
        self.model.load(vector.to(self.model.device))
        self.model.module.eval()
        counted = list(self._counted(self.test, lambda batch: batch, self.task.count))
        total = sum(int(c.total) for c in counted)
        loss = sum(float(c.loss) for c in counted) / total
        by_class = [c.by_class for c in counted if c.by_class is not None]
        rates = torch.stack(by_class).sum(0).double() if by_class else None
        asr = examples = None
        if self.triggered is not None and self.trigger is not None:
            shots = list(self._counted(self.triggered, self.trigger.test, self.trigger.succeeded))
            examples = sum(int(n) for _, n in shots)
            asr = sum(int(hits) for hits, _ in shots) / examples if examples else float("nan")
        return Measurement(
            main_accuracy=sum(int(c.right) for c in counted) / total,
            main_loss=loss,
            asr=asr,
            asr_examples=examples,
            perplexity=math.exp(loss) if self.task.perplexity and loss < _LARGEST else None,
            class_accuracy=None if rates is None else tuple((rates[0] / rates[1]).tolist()),
            defense={} if server is None else self._defense(vector, stages, server),
        )

    def _defense(self, vector: Tensor, stages: Sequence[Defense], server: Server) -> dict[str, float]:
        def batches(examples: Examples, change: Callable[[Batch], Batch]) -> Iterator[Batch]:
            return (change(b) for each in self.task.passes(examples, self.batch_size) for b in each())

        triggered, trigger = self.triggered, self.trigger
        held_out = HeldOut(
            lambda: batches(self.test, lambda batch: batch),
            None if triggered is None or trigger is None else lambda: batches(triggered, trigger.test),
        )
        return {
            f"{prefix}.{name}": float(value)
            for stage, prefix in zip(stages, prefixes(stages), strict=True)
            for name, value in stage.evaluate(vector, held_out, server).items()
        }

    def _counted(
        self, examples: Examples, change: Callable[[Batch], Batch], count: Callable[[Tensor, Tensor], T]
    ) -> Iterator[T]:
        """What ``count`` says of (outputs, labels) of each batch after ``change``, in order."""

        def walk(batches: Callable[[], Iterator[Batch]]) -> list[T]:
            state: State | None = None
            counted = []
            with torch.inference_mode():
                for batch in map(change, batches()):
                    outputs, state = outputs_of(self.model.module, batch, state)
                    counted.append(count(outputs, batch.labels))
            return counted

        passes = self.task.passes(examples, self.batch_size)
        walked = self.pool.map(walk, passes) if self.pool is not None else map(walk, passes)
        return itertools.chain.from_iterable(walked)

    def close(self) -> None:
        if self.pool is not None:
            self.pool.shutdown()
