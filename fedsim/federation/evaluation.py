"""Measuring the global model: the main task on clean held-out data, the backdoor on held-out triggered data."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.batch import Batch, Examples
from fedsim.layout import FlatModel
from fedsim.tasks.base import Data, Task
from fedsim.trigger import Trigger


@dataclass(frozen=True)
class Measurement:
    """accuracies in [0, 1]; loss in nats per example. ``asr`` is None where there is no backdoor."""

    main_accuracy: float
    main_loss: float
    asr: float | None
    asr_examples: int | None


class Evaluator:
    """Evaluates models on the test data, batch by batch, on a few threads.

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

    def measure(self, vector: Tensor) -> Measurement:
        """Main accuracy and loss, and the ASR, of the model ``vector`` (D,)."""
        self.model.load(vector.to(self.model.device))
        self.model.module.eval()
        right, loss, total = self._counts(self.test, lambda batch: batch)
        asr = hits = examples = None
        if self.triggered is not None:
            hits, _, examples = self._counts(self.triggered, self._stamp)
            asr = hits / examples if examples else float("nan")
        return Measurement(right / total, loss / total, asr, examples)

    def _stamp(self, batch: Batch) -> Batch:
        assert self.trigger is not None
        return Batch(self.trigger.stamp(batch.inputs), torch.full_like(batch.labels, self.trigger.target))

    def _counts(self, examples: Examples, change: Callable[[Batch], Batch]) -> tuple[int, float, int]:
        def one(rows: Tensor) -> tuple[Tensor, Tensor, int]:
            with torch.inference_mode():
                batch = change(self.task.batch(examples, rows))
                return self.task.count(self.model.module(batch.inputs), batch.labels)

        chunks = torch.split(torch.arange(len(examples), device=self.model.device), self.batch_size)
        counted = list(self.pool.map(one, chunks) if self.pool is not None else map(one, chunks))
        right = sum(int(r) for r, _, _ in counted)
        return right, sum(float(loss) for _, loss, _ in counted), sum(n for _, _, n in counted)

    def close(self) -> None:
        if self.pool is not None:
            self.pool.shutdown()
