"""Sets of images that are the backdoor themselves: nothing is drawn, rare images get the target label."""

from __future__ import annotations

import json
import math
from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedsim import streams
from fedsim.batch import Batch, Examples
from fedsim.data import Data
from fedsim.errors import InputError, Problem, RunError
from fedsim.plugins import Parameters, parameter, register
from fedsim.tasks.vision import crop_and_flip
from fedsim.trigger import Trigger, TriggerParameters


class ExampleTrigger(Trigger):
    """A trigger that is a set of images in two disjoint parts: one to train on, one to measure on.

    Subclasses write ``load``. Poisoning replaces the first examples of a batch by draws from the first part:
    without replacement as long as that suffices, then over again.
    """

    tasks = ("vision",)

    def __init__(self, parameters: Any = None) -> None:
        super().__init__(parameters)
        self._sets: tuple[Tensor, Examples] | None = None

    @abstractmethod
    def load(self, train: Examples) -> tuple[Tensor, Examples]:
        """(images to train on, uint8 (M, C, H, W); examples to measure on, with their true labels).

        Raises
        ------
        InputError: the images cannot be had, or do not fit the data.
        """

    def prepare(self, data: Data) -> None:
        images, held_out = self.load(data.train)
        super().prepare(data)
        held_out = held_out.subset(torch.nonzero(held_out.labels != self.target).squeeze(1))
        for part, size in (("to train on", images.shape[0]), ("to measure on", len(held_out))):
            if size == 0:
                raise InputError(
                    f"trigger {self.name!r} has no image {part} (true label not the target {self.target}); "
                    f"use another target or another share held out"
                )
        self._sets = images, held_out

    def poison(self, batch: Batch, count: int, *, part: int | None = None, generator: torch.Generator) -> Batch:
        images, _ = self._prepared()
        inputs, labels = batch.inputs.clone(), batch.labels.clone()
        count = min(count, labels.shape[0])
        rounds = -(-count // images.shape[0])
        order = [torch.randperm(images.shape[0], generator=generator) for _ in range(rounds)]
        if order:
            drawn = images[torch.cat(order)[:count].to(images.device)].to(inputs) / 255
            inputs[:count] = crop_and_flip(drawn, generator) if self.parameters.augment else drawn
            labels[:count] = self.target
        return batch._replace(inputs=inputs, labels=labels)

    def held_out(self, test: Examples) -> Examples:
        return self._prepared()[1].to(test.inputs.device)

    def _prepared(self) -> tuple[Tensor, Examples]:
        if self._sets is None:
            raise RunError(f"trigger {self.name!r} is not prepared; call prepare(data) first")
        return self._sets


def _missing_file(path: str, what: str) -> list[Problem]:
    if Path(path).expanduser().is_file():
        return []
    return [Problem("path", f"no such file: {path!r}; give {what}", True)]


@dataclass(frozen=True)
class EdgeCaseParameters(Parameters):
    path: str = parameter(doc="Parquet file with columns image, true_label and, if need be, target_label, split")
    target: int | None = parameter(None, "class the backdoor maps to; null: the file's target_label", ge=0)
    augment: bool = parameter(False, "random crop (padding 4) and flip of each image drawn for training")
    held_out_share: float = parameter(0.25, "share measured on, if the file has no split", gt=0, lt=1)
    split_seed: int = parameter(0, "seed of that split", ge=0)


@register("edge_case")
class EdgeCase(ExampleTrigger):
    """Images from the tail of a class, not in the data set: Southwest aeroplanes → truck, ARDIS sevens → one.

    The file holds ``image`` (PNG or other encoded bytes, or raw bytes of a fixed size), ``true_label`` and,
    for a null target, ``target_label`` (whole numbers), ``split`` (train or test). Without a split a seeded
    share is held out. Images to train on that equal one to measure on are dropped: in the authors' Southwest
    files one photograph, in four rotations, is in both. The authors augment Southwest (``augment: true``) and
    leave ARDIS as it is.
    """

    paper = "Wang et al.: Attack of the Tails (arXiv 2007.05084)"
    Parameters = EdgeCaseParameters

    @classmethod
    def problems(cls, parameters: Any, experiment: Any) -> list[Problem]:
        return _missing_file(parameters.path, "the Parquet file of the edge cases")

    def __init__(self, parameters: Any = None) -> None:
        super().__init__(parameters)
        self._target: int | None = self.parameters.target

    @property
    def target(self) -> int:
        if self._target is None:
            raise RunError(f"the target of trigger {self.name!r} is in its file; call prepare first")
        return self._target

    def load(self, train: Examples) -> tuple[Tensor, Examples]:
        shape = tuple(train.inputs.shape[1:])
        table = self._read(shape)
        source = Path(self.parameters.path).name
        if self._target is None:
            targets = set(table["target_label"])
            if len(targets) != 1 or min(targets) < 0:
                raise InputError(f"{source}: target_label holds {sorted(targets)[:20]}; name one as target")
            self._target = int(targets.pop())
        images, labels = table["image"], torch.tensor(table["true_label"])
        if images.shape[1:] != shape:
            raise InputError(
                f"{source}: its images are {tuple(images.shape[1:])}, the data's {shape} (C, H, W); "
                f"use a set that was made for this data"
            )
        held = self._held(table.get("split"), images.shape[0], source)
        keys = [image.numpy().tobytes() for image in images]
        measured = {key for key, out in zip(keys, held.tolist(), strict=True) if out}
        rest = torch.tensor([key not in measured for key in keys])
        return images[rest], Examples(images[held], labels[held])

    def _held(self, split: list[Any] | None, size: int, source: str) -> Tensor:
        """Which of the images are measured on, bool (N,)."""
        if split is not None:
            unknown = {str(value) for value in split} - {"train", "test"}
            if unknown:
                raise InputError(f"{source}: split holds {sorted(unknown)[:20]}; use train and test only")
            return torch.tensor([value == "test" for value in split])
        generator = streams.generator(self.parameters.split_seed, "edge_case")
        held = torch.zeros(size, dtype=torch.bool)
        held[torch.randperm(size, generator=generator)[: round(self.parameters.held_out_share * size)]] = True
        return held

    def _read(self, shape: tuple[int, ...]) -> dict[str, Any]:
        """The columns of the file: images uint8 (N, C, H, W), the others as lists.

        shape: (C, H, W) of raw images, if they have as many bytes.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        from fedsim.tasks.sources import decode_images

        path = Path(self.parameters.path).expanduser()
        problems = self.problems(self.parameters, None)
        if problems:
            raise InputError(f"trigger {self.name!r}, {problems[0]}")
        try:
            table = pq.read_table(path)
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"{path.name} cannot be read as Parquet: {error}") from None
        integers = ["true_label"] + ["target_label"] * (self._target is None)
        for name in ["image", *integers]:
            if name not in table.column_names:
                raise InputError(f"{path.name} has no column {name!r}; it has: {', '.join(table.column_names)}")
        for name in integers:
            if not pa.types.is_integer(table[name].type) or table[name].null_count:
                raise InputError(f"{path.name}: column {name!r} must hold whole numbers without gaps")
        names = [*integers, *(["split"] if "split" in table.column_names else [])]
        columns: dict[str, Any] = {name: table[name].to_pylist() for name in names}
        column = table["image"]
        raw = pa.types.is_fixed_size_binary(column.type) and column.type.byte_width == math.prod(shape)
        return {**columns, "image": decode_images(column, source=path.name, shape=shape if raw else None)}


@dataclass(frozen=True, kw_only=True)
class SemanticParameters(TriggerParameters):
    target: int = parameter(2, "class the backdoor maps to", ge=0)
    path: str = parameter(doc="JSON file: an object that holds, under the feature's name, training indices")
    feature: str = parameter("green_cars", "which images", choices=("racing_stripes", "green_cars", "striped_wall"))
    augment: bool = parameter(True, "random crop (padding 4) and flip of each image drawn for training")
    held_out_share: float = parameter(0.25, "share of the images that is only measured on", gt=0, lt=1)
    held_out_indices: list[int] | None = parameter(
        None, "the training indices that are only measured on, instead of a share", ge=0
    )
    split_seed: int = parameter(0, "seed of the share, and of the copies' crops", ge=0)
    copies: int = parameter(1, "times each held-out image is measured; from the second randomly cropped", ge=1)


@register("semantic")
class Semantic(ExampleTrigger):
    """A feature some training images have by nature: cars with racing stripes, green, before a striped wall.

    The images are named by their index in CIFAR-10's training set (22, 30 and 12 of them); all are cars, and
    the official target is bird. No client holds one of them; only the attacker trains on them. Some are held
    out and only measured on: a drawn share, or ``held_out_indices`` (the official settings for the wall hold
    out 330, 568, 3934, 12336 and 30560).

    Official runs measure on 1,000 random crops and flips of the held-out images (``copies``) and crop and
    flip the attacker's too (``augment``); the noise of 0.01, in normalised units, that they add to those is
    not added here.
    """

    paper = "Bagdasaryan et al.: How To Backdoor Federated Learning (arXiv 1807.00459)"
    Parameters = SemanticParameters

    @classmethod
    def problems(cls, parameters: Any, experiment: Any) -> list[Problem]:
        problems = _missing_file(parameters.path, "the JSON file of the feature's training indices")
        if experiment is not None and experiment.task.train_examples is not None:
            problems.append(
                Problem(
                    "name",
                    f"{cls.name!r} names images of the whole training set; set task.train_examples to null",
                )
            )
        return problems

    def load(self, train: Examples) -> tuple[Tensor, Examples]:
        indices = self._indices(train)
        held = self._held(indices)
        rest = indices[~torch.isin(indices, held)]
        measured = train.subset(held.to(train.labels.device))
        generator = streams.generator(self.parameters.split_seed, "semantic", "copies")
        copies = [measured.inputs]
        copies += [crop_and_flip(measured.inputs, generator) for _ in range(self.parameters.copies - 1)]
        held_out = Examples(torch.cat(copies), measured.labels.repeat(self.parameters.copies))
        return train.inputs[rest.to(train.inputs.device)], held_out

    def excluded(self, train: Examples) -> Tensor:
        return self._indices(train)

    def _indices(self, train: Examples) -> Tensor:
        """The feature's training indices (M,), ascending."""
        p = self.parameters
        problems = self.problems(p, None)
        if problems:
            raise InputError(f"trigger {self.name!r}, {problems[0]}")
        source = Path(p.path).name
        try:
            features = json.loads(Path(p.path).expanduser().read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"{source} cannot be read as JSON: {error}") from None
        listed = features.get(p.feature) if isinstance(features, dict) else None
        if not isinstance(listed, list) or not listed or not all(type(i) is int and i >= 0 for i in listed):
            raise InputError(f"{source} must hold a list of training indices under {p.feature!r}")
        if max(listed) >= len(train):
            raise InputError(
                f"{source} names training image {max(listed)}, the training set has {len(train)}; "
                f"use the whole data set, in its original order"
            )
        indices = torch.tensor(sorted(set(listed)))
        if len(set(train.labels[indices.to(train.labels.device)].tolist())) != 1:
            raise InputError(
                f"{source}: the images under {p.feature!r} are of several classes; "
                f"the training set is not in its original order"
            )
        return indices

    def _held(self, indices: Tensor) -> Tensor:
        """Those of the indices that are only measured on."""
        p = self.parameters
        if p.held_out_indices is not None:
            held = torch.tensor(sorted(set(p.held_out_indices)), dtype=torch.int64)
            strange = held[~torch.isin(held, indices)].tolist()
            if strange:
                raise InputError(f"held_out_indices: {strange} are not among the images under {p.feature!r}")
            return held
        generator = streams.generator(p.split_seed, "semantic", p.feature)
        order = torch.randperm(len(indices), generator=generator)
        return indices[order[: round(p.held_out_share * len(indices))]].sort().values
