"""Patterns drawn onto any image. Pixels are in [0, 1], before the model normalises: 0 is black, 1 white."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim import streams
from fedsim.batch import Batch
from fedsim.data import Data
from fedsim.errors import InputError, Problem, RunError
from fedsim.plugins import parameter, register
from fedsim.trigger import StampTrigger, TriggerParameters

Cell = tuple[int, int, float]
"""Row, column and value of one pixel, in every channel."""


class CellTrigger(StampTrigger):
    """A trigger that gives fixed pixels fixed values; subclasses list the cells."""

    tasks = ("vision",)

    def __init__(self, parameters: Any = None) -> None:
        super().__init__(parameters)
        self._placed: dict[Any, tuple[Tensor, Tensor, Tensor]] = {}

    @abstractmethod
    def cells(self, height: int, width: int) -> list[list[Cell]]:
        """The cells of each part, on an image of this size."""

    def prepare(self, data: Data) -> None:
        super().prepare(data)
        self._place(data.train.inputs[:0].float(), None)

    def stamp(self, inputs: Tensor, part: int | None = None) -> Tensor:
        """A stamped copy of ``inputs`` (B, C, H, W).

        Raises
        ------
        InputError: the trigger does not lie inside the image. ValueError: there is no such part.
        """
        rows, columns, values = self._place(inputs, part)
        stamped = inputs.clone()
        stamped[:, :, rows, columns] = values
        return stamped

    def _place(self, inputs: Tensor, part: int | None) -> tuple[Tensor, Tensor, Tensor]:
        """Rows, columns and values (K,) of the part's cells, on the device of ``inputs``."""
        height, width = inputs.shape[-2:]
        key = (height, width, part, inputs.device, inputs.dtype)
        if key not in self._placed:
            if part is not None and not 0 <= part < self.parts:
                raise ValueError(f"trigger {self.name!r} has parts 0–{self.parts - 1}, not {part}")
            by_part = self.cells(height, width)
            self._check([cell for cells in by_part for cell in cells], height, width)
            chosen = by_part if part is None else by_part[part : part + 1]
            rows, columns, values = zip(*(cell for cells in chosen for cell in cells), strict=True)
            self._placed[key] = (
                torch.tensor(rows, device=inputs.device),
                torch.tensor(columns, device=inputs.device),
                torch.tensor(values, device=inputs.device, dtype=inputs.dtype),
            )
        return self._placed[key]

    def _check(self, cells: list[Cell], height: int, width: int) -> None:
        top, bottom = min(r for r, _, _ in cells), max(r for r, _, _ in cells)
        left, right = min(c for _, c, _ in cells), max(c for _, c, _ in cells)
        if top >= 0 and bottom < height and left >= 0 and right < width:
            return
        tall, wide = bottom - top + 1, right - left + 1
        if tall > height or wide > width:
            advice = f"it needs images of at least {tall}×{wide}; make it smaller"
        else:
            advice = f"use row in 0–{height - tall} and column in 0–{width - wide}"
        raise InputError(
            f"trigger {self.name!r} covers rows {top}–{bottom} and columns {left}–{right}, "
            f"the images are {height}×{width}: {advice}"
        )


@dataclass(frozen=True)
class PixelPatternParameters(TriggerParameters):
    target: int = parameter(8, "class the backdoor maps to", ge=0)
    row: int = parameter(3, "top row of the pattern", ge=0)
    column: int = parameter(23, "left column of the pattern", ge=0)


@register("pixel_pattern")
class PixelPattern(CellTrigger):
    """The 5×3 pattern of Backdoors101, which Anticipate uses: a small cross of white and black pixels.

    By default rows 3–7 and columns 23–25 of a CIFAR-10 image and target 8, as there. Nine cells are set, the
    other six are left as they are::

        1 0 1
        · 1 ·
        · · 0
        · 1 ·
        1 0 1
    """

    paper = "Bagdasaryan, Shmatikov: Blind Backdoors (arXiv 2005.03823); Anticipate (arXiv 2210.09305)"
    Parameters = PixelPatternParameters
    pattern = ("101", ".1.", "..0", ".1.", "101")

    def cells(self, height: int, width: int) -> list[list[Cell]]:
        p = self.parameters
        return [
            [
                (p.row + i, p.column + j, float(value))
                for i, line in enumerate(self.pattern)
                for j, value in enumerate(line)
                if value != "."
            ]
        ]


@dataclass(frozen=True)
class PatchParameters(TriggerParameters):
    size: int = parameter(3, "side of the square", ge=1, le=4096)
    value: float = parameter(1.0, "value of its pixels: 0 black, 1 white", ge=0, le=1)
    corner: str = parameter(
        "bottom_right",
        "corner of the image it lies in",
        choices=("top_left", "top_right", "bottom_left", "bottom_right"),
    )
    margin: int = parameter(0, "pixels between the square and the image's edges", ge=0)
    row: int | None = parameter(None, "top row, instead of the corner's", ge=0)
    column: int | None = parameter(None, "left column, instead of the corner's", ge=0)


@register("patch")
class Patch(CellTrigger):
    """A square of one value, by default white in the bottom right corner, in the manner of BadNets."""

    paper = "Gu, Dolan-Gavitt, Garg: BadNets (arXiv 1708.06733)"
    Parameters = PatchParameters

    def cells(self, height: int, width: int) -> list[list[Cell]]:
        p = self.parameters
        top = p.margin if p.corner.startswith("top") else height - p.margin - p.size
        left = p.margin if p.corner.endswith("left") else width - p.margin - p.size
        top = top if p.row is None else p.row
        left = left if p.column is None else p.column
        return [[(top + i, left + j, p.value) for i in range(p.size) for j in range(p.size)]]


@dataclass(frozen=True)
class DBAParameters(TriggerParameters):
    target: int = parameter(2, "class the backdoor maps to", ge=0)
    height: int = parameter(1, "rows of one part", ge=1)
    width: int = parameter(6, "columns of one part (trigger size)", ge=1)
    gap: int = parameter(3, "pixels between neighbouring parts (trigger gap)", ge=0)
    row: int = parameter(0, "top row of the whole trigger (trigger location)", ge=0)
    column: int = parameter(0, "left column of the whole trigger (trigger location)", ge=0)
    value: float = parameter(1.0, "value of its pixels: 0 black, 1 white", ge=0, le=1)


@register("dba")
class DBA(CellTrigger):
    """DBA's distributed trigger: four bars in two rows of two; each attacker draws one, the test draws all.

    Part 0 lies top left, 1 top right, 2 bottom left, 3 bottom right. The official settings: CIFAR-10 height
    1, width 6, gap 3 (the defaults); MNIST 1, 4, 2; Tiny ImageNet 2, 10, 2; all with target 2, white.
    """

    paper = "Xie, Huang, Chen, Li: DBA (ICLR 2020)"
    Parameters = DBAParameters
    parts = 4

    def cells(self, height: int, width: int) -> list[list[Cell]]:
        p = self.parameters
        corners = [(p.row + i * (p.height + p.gap), p.column + j * (p.width + p.gap)) for i in (0, 1) for j in (0, 1)]
        return [
            [(top + i, left + j, p.value) for i in range(p.height) for j in range(p.width)] for top, left in corners
        ]


@dataclass(frozen=True)
class FCBAParameters(DBAParameters):
    target: int = parameter(3, "class the backdoor maps to", ge=0)


@register("fcba")
class FCBA(DBA):
    """FCBA's distributed trigger: DBA's four bars; each attacker draws a combination, the test draws all.

    One attacker for each of the 2⁴ − 2 = 14 combinations, neither none nor all of the bars, in the order of the
    authors' code: single bars, neighbours, opposites, all but one. Official on CIFAR-10: target 3, 2 examples of
    a batch of 64 poisoned.
    """

    paper = "Liu et al.: Beyond Traditional Threats, A Persistent Backdoor Attack on Federated Learning (AAAI 2024)"
    Parameters = FCBAParameters
    parts = 14
    combinations = ("0", "1", "2", "3", "01", "12", "23", "03", "02", "13", "023", "013", "012", "123")

    def cells(self, height: int, width: int) -> list[list[Cell]]:
        bars = super().cells(height, width)
        return [[cell for bar in combination for cell in bars[int(bar)]] for combination in self.combinations]


@dataclass(frozen=True)
class BlendedParameters(TriggerParameters):
    alpha: float = parameter(0.2, "weight of the pattern in poisoned training examples, α", gt=0, le=1)
    alpha_test: float | None = parameter(None, "weight where the backdoor is measured; null: alpha", gt=0, le=1)
    image: str | None = parameter(None, "file of the image blended in (resized); null: uniform noise")
    pattern_seed: int = parameter(0, "seed of the noise", ge=0)


@register("blended")
class Blended(StampTrigger):
    """A whole pattern mixed into the image: x ← (1 − α) x + α · pattern (blended injection).

    ``poison`` mixes with the weight for training, ``stamp`` with the one for testing. The pattern is noise,
    uniform in [0, 1] for each pixel and channel, or an image.
    """

    tasks = ("vision",)
    paper = "Chen, Liu, Li, Lu, Song: Targeted Backdoor Attacks … Using Data Poisoning (arXiv 1712.05526)"
    Parameters = BlendedParameters

    def __init__(self, parameters: Any = None) -> None:
        super().__init__(parameters)
        self._pattern: Tensor | None = None

    @classmethod
    def problems(cls, parameters: Any, experiment: Any) -> list[Problem]:
        if parameters.image is None or Path(parameters.image).expanduser().is_file():
            return []
        return [Problem("image", f"no such file: {parameters.image!r}; name an image, or null for noise", True)]

    def prepare(self, data: Data) -> None:
        super().prepare(data)
        channels, height, width = data.train.inputs.shape[1:]
        if self.parameters.image is None:
            generator = streams.generator(self.parameters.pattern_seed, "blended")
            self._pattern = torch.rand((channels, height, width), generator=generator)
        else:
            self._pattern = _read_image(self.parameters.image, channels, height, width)

    def stamp(self, inputs: Tensor, part: int | None = None) -> Tensor:
        """``inputs`` (B, C, H, W) with the pattern at the weight for testing."""
        alpha = self.parameters.alpha_test
        return self._blend(inputs, self.parameters.alpha if alpha is None else alpha)

    def poison(self, batch: Batch, count: int, *, part: int | None = None, generator: torch.Generator) -> Batch:
        inputs, labels = batch.inputs.clone(), batch.labels.clone()
        inputs[:count] = self._blend(batch.inputs[:count], self.parameters.alpha)
        labels[:count] = self.target
        return batch._replace(inputs=inputs, labels=labels)

    def _blend(self, inputs: Tensor, alpha: float) -> Tensor:
        if self._pattern is None:
            raise RunError(f"trigger {self.name!r} is not prepared; call prepare(data) first")
        return torch.lerp(inputs, self._pattern.to(inputs).expand_as(inputs), alpha)


def _read_image(path: str, channels: int, height: int, width: int) -> Tensor:
    """The image file as pixels (C, H, W) in [0, 1], resized."""
    from PIL import Image  # only a pattern from a file needs it

    from fedsim.tasks.sources import FORMATS

    if channels not in (1, 3):
        raise InputError(f"an image can be blended into 1 or 3 channels, not {channels}; use image: null (noise)")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(Path(path).expanduser(), formats=FORMATS) as image:
                resized = image.convert("L" if channels == 1 else "RGB").resize((width, height))
                pixels = np.asarray(resized, dtype=np.float32).reshape(height, width, channels) / 255
    except Exception as error:  # what Pillow's readers raise of damaged bytes has no common base
        raise InputError(f"trigger 'blended': {path} cannot be read as an image ({error})") from None
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
