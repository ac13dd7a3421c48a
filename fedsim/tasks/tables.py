"""Tables that pictures and texts are read from: Parquet files of a directory, splits of a Hugging Face Hub id."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fedsim.errors import InputError, Problem

if TYPE_CHECKING:  # what is needed is imported where it is: the engine itself runs without Parquet
    import pyarrow as pa


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
