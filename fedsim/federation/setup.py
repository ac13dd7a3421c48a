"""What every process of a run needs before the first round: data, their split, the model, the trigger."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from flwr.app import Context
from torch import Tensor

from fedsim.batch import Examples
from fedsim.config import Config, load_config
from fedsim.data import Data
from fedsim.federation.client import ClientRuntime
from fedsim.federation.server_data import set_aside
from fedsim.streams import numpy_generator
from fedsim.tasks.base import Dataset
from fedsim.tasks.partition import Partition
from fedsim.trigger import Trigger


@dataclass(frozen=True)
class Setup:
    """data: decoded once, cut to the sizes asked for. parts: indices of every client's training examples.

    trigger: prepared with the data; None where the config has no attack section.
    server: examples at the server, nobody else's; None where the config sets none aside.
    """

    data: Data
    parts: list[Tensor]
    trigger: Trigger | None
    server: Examples | None = None

    @property
    def sizes(self) -> list[int]:
        return [len(part) for part in self.parts]


def prepare(config: Config) -> Setup:
    """Load the data and split it: a function of the config alone.

    Raises
    ------
    InputError: data, trigger and partition do not fit each other, or a file is unusable.
    """
    dataset: Dataset = config.task.data.create()
    raw = dataset.load()
    raw = replace(
        raw,
        train=_cut(raw.train, config.task.train_examples, config.seed, "train"),
        test=_cut(raw.test, config.task.test_examples, config.seed, "test"),
    )
    data: Data = config.task.create().encode(raw)
    trigger: Trigger | None = None
    rows = torch.arange(len(data.train))
    tested = torch.arange(len(data.test))
    if config.attack is not None:
        made: Trigger = config.attack.trigger.create()
        made.prepare(data)
        rows = rows[~torch.isin(rows, made.excluded(data.train))]
        trigger = made
    server, rows, tested = set_aside(config, data, rows, tested)
    data = replace(data, test=data.test.subset(tested)) if len(tested) < len(data.test) else data
    partition: Partition = config.federation.partition.create()
    parts = partition.split(data.train.subset(rows), config.federation.clients, config.seed)
    return Setup(data, [rows[part] for part in parts], trigger, server)


def _cut(examples: Any, count: int | None, seed: int, part: str) -> Any:
    """``count`` of the examples or texts in a seeded draw, in their order; all of them if there are no more."""
    if count is None or count >= len(examples):
        return examples
    rows = numpy_generator(seed, "limit", part).permutation(len(examples))[:count]
    return examples.subset(torch.from_numpy(rows).sort().values)


@lru_cache(maxsize=1)
def _resident(config: str, overrides: tuple[str, ...]) -> ClientRuntime:
    loaded = load_config(config, overrides)
    made = prepare(loaded)
    torch.set_num_threads(1)
    return ClientRuntime(loaded, made.data, made.parts, torch.device("cpu"))


def resident_runtime(config: str, overrides: tuple[str, ...] = ()) -> Callable[[Context], ClientRuntime]:
    """A runtime found by the name of its config, made once a process: for Flower's own runtimes, which ship no data."""
    return lambda context: _resident(config, overrides)
