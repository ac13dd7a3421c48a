"""Data at the server: set aside so that no client trains on them and nothing is measured on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fedsim import streams
from fedsim.batch import Batch, Examples
from fedsim.config import Config
from fedsim.data import Data
from fedsim.defense import Server
from fedsim.errors import InputError
from fedsim.federation.client import honest_settings, seed_torch
from fedsim.layout import FlatModel
from fedsim.tasks.base import Dataset, Task
from fedsim.training import fit


def set_aside(config: Config, data: Data, train: Tensor, test: Tensor) -> tuple[Examples | None, Tensor, Tensor]:
    """(the server's examples or None, training rows left, test rows left).

    train, test: int64 indices of the examples that may be used. The draw is seeded.

    Raises
    ------
    InputError: there are not as many, or another data set's do not fit the task.
    """
    block = config.server_data
    if block.examples == 0:
        return None, train, test
    generator = streams.generator(config.seed, "server data")
    if block.source in ("train", "test"):
        pool = train if block.source == "train" else test
        if block.examples >= len(pool):
            raise InputError(
                f"server_data.examples: {block.examples} of {len(pool)} {block.source} examples leave none for "
                f"{'the clients' if block.source == 'train' else 'the measurements'}; use fewer"
            )
        drawn = pool[torch.randperm(len(pool), generator=generator)[: block.examples].sort().values]
        left = pool[~torch.isin(pool, drawn)]
        part = data.train if block.source == "train" else data.test
        return (part.subset(drawn), left, test) if block.source == "train" else (part.subset(drawn), train, left)
    inputs = _random(data, block.examples, generator) if block.source == "noise" else _other(config, data, generator)
    like = data.train.labels.shape[1:]
    labels = torch.randint(0, data.classes, (block.examples, *like), generator=generator)
    return Examples(inputs, labels), train, test


def _random(data: Data, count: int, generator: torch.Generator) -> Tensor:
    """Random raw inputs (count, …): bytes, or words of the vocabulary."""
    shape = (count, *data.shape)
    if data.vocabulary is None:
        return torch.randint(0, 256, shape, generator=generator).to(torch.uint8)
    return torch.randint(0, len(data.vocabulary), shape, generator=generator).to(data.train.inputs.dtype)


def _other(config: Config, data: Data, generator: torch.Generator) -> Tensor:
    """Images of another data set, in this one's shape (count, C, H, W)."""
    if data.vocabulary is not None:
        raise InputError("server_data.source: other takes images; for text use train, test or noise")
    dataset: Dataset = config.server_data.other.create()
    raw = dataset.load()
    if not isinstance(raw, Data):
        raise InputError("server_data.other: this data set is text; name one of images")
    count = config.server_data.examples
    if count > len(raw.train):
        raise InputError(f"server_data.examples: server_data.other has {len(raw.train)} images, not {count}; use fewer")
    images = raw.train.inputs[torch.randperm(len(raw.train), generator=generator)[:count]].float()
    channels, height, width = data.shape
    if images.shape[1] != channels:
        images = images.mean(1, keepdim=True).expand(-1, channels, -1, -1)
    if images.shape[2:] != (height, width):
        images = functional.interpolate(images, (height, width), mode="bilinear", antialias=True)
    return images.round().clamp(0, 255).to(torch.uint8)


def server_maker(
    config: Config, task: Task, model: FlatModel, data: Data, examples: Examples | None
) -> Callable[[int], Server]:
    """What makes the :class:`Server` of a round; ``model`` may be used by others between the rounds."""
    loss: Any = task.loss()
    held = None if examples is None else examples.to(model.device)
    every = None if held is None else torch.arange(len(held), device=model.device)
    batch = None if held is None or every is None else task.batch(held, every)

    def epoch(size: int, generator: torch.Generator) -> Callable[[], Iterator[Batch]]:
        assert held is not None
        assert every is not None
        return task.epoch(held, every, size, generator, augment=False)

    def random_inputs(count: int, generator: torch.Generator) -> Tensor:
        if data.vocabulary is None:
            return torch.rand((count, *data.shape), generator=generator).to(model.device)
        return _random(data, count, generator).long().to(model.device)

    def serve(round: int) -> Server:
        def seeded(*given: Any, **options: Any) -> float:
            """Local training whose dropout does not depend on what this process has done before."""
            seed_torch(streams.derive(config.seed, "torch", "server", round), model.device)
            return fit(*given, **options)

        return Server(
            model=model,
            loss=loss,
            fit=seeded,
            settings=honest_settings(config, round),
            classes=data.classes,
            random_inputs=random_inputs,
            data=batch,
            epoch=None if held is None else epoch,
            round=round,
            rounds=config.federation.rounds,
            seed=config.seed,
        )

    return serve
