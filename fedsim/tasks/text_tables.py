"""Texts in the rows of a table: Parquet files (text_parquet), or a Hugging Face Hub id (text_hub)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from fedsim.data import Corpus, Texts
from fedsim.errors import InputError, Problem
from fedsim.plugins import Parameters, parameter, register
from fedsim.streams import numpy_generator
from fedsim.tasks.base import Dataset
from fedsim.tasks.tables import file_problems, integers, matching, numbered, read_columns, read_split
from fedsim.tasks.text_corpus import by_user, make_corpus, of_length, refuse_negative, split_by_label, split_by_time

if TYPE_CHECKING:  # as in tables.py, the readers import what they need
    import pyarrow as pa


class Part(NamedTuple):
    """One table of a part of a data set. where: what to call it. rows: (N,) number of each row in the file."""

    table: pa.Table
    where: str
    rows: NDArray[np.int64]


@dataclass(frozen=True)
class TextParameters(Parameters):
    text: str = parameter("text", "column of the texts")
    label: str | None = parameter(None, "column of the labels, whole numbers from 0; null: none")
    user: str | None = parameter(None, "column of the author, for partition natural; null: none")
    order: str | None = parameter(
        None, "column to sort a user's texts by (numbers, dates, text as 2009-06-01); null: as they are"
    )
    where: list[str] = parameter([], "use only rows for which all of these hold, each written column=value")
    classes: int | None = parameter(None, "number of classes; null: the largest label + 1", ge=2)
    test_fraction: float = parameter(
        0.1,
        "where test is null: share held out, at random of every class, else the last texts of every user",
        gt=0,
        lt=1,
    )
    min_words: int | None = parameter(None, "leave out users who wrote fewer words for training", ge=1)
    max_words: int | None = parameter(None, "leave out what a user wrote for training after this many words", ge=1)


class TextTable(Dataset):
    """Base of the data sets with a text in every row of a table."""

    tasks = ("next_word", "sentiment")

    @classmethod
    def problems(cls, parameters: Any, experiment: Any) -> list[Problem]:
        p = parameters
        found = [
            Problem(key, f"{condition!r} is not column=value")
            for key in ("where", "train_where", "test_where")
            for condition in getattr(p, key, [])
            if not _condition(condition)[0]
        ]
        found += [
            Problem(key, "is counted per user; name the users' column in user")
            for key in ("min_words", "max_words")
            if getattr(p, key) is not None and p.user is None
        ]
        if p.label is None and experiment.task.name == "sentiment":
            found.append(Problem("label", "task sentiment needs labels; name their column"))
        return found

    def columns(self, conditions: Sequence[str]) -> list[str]:
        """The columns to read, each once."""
        p = self.parameters
        names = [p.text, p.label, p.user, p.order, *(_condition(text)[0] for text in conditions)]
        return list(dict.fromkeys(name for name in names if name))

    def corpus(
        self, train: list[Part], test: list[Part] | None, source: dict[str, Any], names: tuple[str, ...] = ()
    ) -> Corpus:
        """The corpus of the filtered tables; the test set is held out of the training one if there is none.

        Raises
        ------
        InputError: a column holds what it cannot, or there is nothing to learn from or to test on.
        """
        p = self.parameters
        parts = [*train, *(test or [])]
        everything = Texts(
            tuple(text for part in parts for text in _strings(part, p.text)),
            None if p.label is None else torch.cat([integers(t[p.label], w, p.label) for t, w, _ in parts]),
            None if p.user is None else numbered([part.table[p.user] for part in parts], p.user, _names(parts)),
        )
        when = None if p.order is None else _ranks(parts, p.order)
        count = sum(len(part.rows) for part in train)
        rows = torch.arange(len(everything))
        first, rest = (
            by_user(everything.subset(some), None if when is None else when[some.numpy()])
            for some in (rows[:count], rows[count:])
        )
        first = of_length(first, p.min_words, p.max_words, self.name)
        refuse_negative(first, f"task.data, {self.name}: the training set")  # before some are left out as duplicates
        if test is None and first.labels is not None:
            first, rest = split_by_label(first, p.test_fraction, numpy_generator(0, "held out", self.name))
        elif test is None:
            first, rest = split_by_time(first, p.test_fraction)
        return make_corpus(first, rest, source, p.classes or len(names) or None, names)


@dataclass(frozen=True)
class TextParquetParameters(TextParameters):
    path: str = parameter(".", "directory of the Parquet files")
    train: str = parameter("*train*.parquet", "pattern of the training files in it")
    test: str | None = parameter(
        "*test*.parquet", "pattern of the test files; null: hold out some of the training texts"
    )
    train_where: list[str] = parameter([], "as where, for the training rows only")
    test_where: list[str] = parameter([], "as where, for the test rows only")


@register("text_parquet")
class TextParquet(TextTable):
    """Texts in a local directory of Parquet files."""

    Parameters = TextParquetParameters

    @classmethod
    def problems(cls, parameters: Any, experiment: Any) -> list[Problem]:
        p = parameters
        found = super().problems(p, experiment) + file_problems(p, disjoint=set(p.train_where) == set(p.test_where))
        if p.test is None and p.test_where:
            found.append(Problem("test_where", "has nothing to choose from: test is null"))
        return found

    def load(self) -> Corpus:
        p = self.parameters
        train = self._read(p.train, [*p.where, *p.train_where])
        test = None if p.test is None else self._read(p.test, [*p.where, *p.test_where])
        for one in train:
            for other in test or []:
                both = np.intersect1d(one.rows, other.rows)
                if one.where == other.where and len(both):
                    raise InputError(
                        f"task.data: {len(both)} rows of {one.where} are in the training and in the test set; give "
                        f"patterns or conditions that do not overlap"
                    )
        source = {"name": self.name, "text": p.text, "label": p.label, "user": p.user}
        return self.corpus(train, test, source)

    def _read(self, pattern: str, conditions: Sequence[str]) -> list[Part]:
        files = matching(self.parameters.path, pattern)
        wanted = self.columns(conditions)
        return _filtered([(read_columns(file, wanted), file.name) for file in files], conditions)


@dataclass(frozen=True)
class TextHubParameters(TextParameters):
    id: str = parameter(
        "cornell-movie-review-data/rotten_tomatoes", "Hugging Face Hub id, or a local directory in a format of the hub"
    )
    config: str | None = parameter(None, "configuration (subset) of the data set")
    revision: str | None = parameter(None, "revision (commit) to pin")
    train: str = parameter("train", "name of the training split")
    test: str | None = parameter("test", "name of the test split; null: hold out some of the training texts")


@register("text_hub")
class TextHub(TextTable):
    """Texts from the Hugging Face Hub, through ``datasets`` (no remote code is run)."""

    Parameters = TextHubParameters

    @classmethod
    def problems(cls, parameters: Any, experiment: Any) -> list[Problem]:
        found = super().problems(parameters, experiment)
        if parameters.train == parameters.test:
            found.append(Problem("test", f"{parameters.test!r} is the training split; name another, or null"))
        return found

    def load(self) -> Corpus:
        p = self.parameters
        train, names = self._read(p.train)
        test = None if p.test is None else self._read(p.test)[0]
        source = {"name": self.name, "id": p.id, "revision": p.revision}
        return self.corpus(train, test, source, names if p.classes in (None, len(names)) else ())

    def _read(self, split: str) -> tuple[list[Part], tuple[str, ...]]:
        """The rows of a split, and the names of the classes, where the data set gives any."""
        p = self.parameters
        table, features = read_split(p, split, self.columns(p.where))
        names = tuple(getattr(features[p.label], "names", None) or ()) if p.label else ()
        return _filtered([(table, f"{p.id}, split {split}")], p.where), names


def _condition(text: str) -> tuple[str, str]:
    """(column, value) of ``column=value``; an empty column if the text is something else."""
    column, equals, value = text.partition("=")
    return (column.strip(), value.strip()) if equals else ("", "")


def _filtered(tables: Sequence[tuple[pa.Table, str]], conditions: Sequence[str]) -> list[Part]:
    """The rows of named tables for which all conditions hold; a row without a value fulfils none.

    Raises
    ------
    InputError: a condition is none, or asks for what its column cannot hold, or no row is left in any table.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    parts = []
    for table, where in tables:
        mask = np.ones(table.num_rows, bool)
        for text in conditions:
            name, value = _condition(text)
            if not name:
                raise InputError(f"task.data: {text!r} is not column=value")
            column = _plain(table[name])
            try:
                holds = pc.equal(column, pa.scalar(value).cast(column.type))
            except pa.ArrowException:
                raise InputError(
                    f"{where}: column {name!r} holds {column.type}, which cannot equal {value!r}"
                ) from None
            mask &= pc.fill_null(holds, False).to_numpy()
        rows = np.flatnonzero(mask)
        parts.append(Part(table if mask.all() else table.take(rows), where, rows))
    if not any(len(part.rows) for part in parts):
        of = f" with {' and '.join(conditions)}" if conditions else ""
        raise InputError(f"task.data: there is no row{of} in {_names(parts)}")
    return parts


def _names(parts: Sequence[Part]) -> str:
    return ", ".join(dict.fromkeys(part.where for part in parts))


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """The column without dictionary encoding."""
    import pyarrow as pa

    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column


def _strings(part: Part, name: str) -> list[str]:
    """The texts of a column.

    Raises
    ------
    InputError: it does not hold text, or a row holds none or is not UTF-8, naming the row.
    """
    import pyarrow as pa

    column = _plain(part.table[name])
    types = pa.types
    if not (types.is_string(column.type) or types.is_large_string(column.type) or types.is_string_view(column.type)):
        raise InputError(f"{part.where}: column {name!r} holds {column.type}, not text")
    try:
        texts: list[str | None] = column.to_pylist()
    except UnicodeDecodeError as error:
        raise InputError(f"{part.where}: column {name!r} is not UTF-8: {error}") from None
    missing = next((i for i, text in enumerate(texts) if text is None), None)
    if missing is not None:
        raise InputError(f"{part.where}, row {part.rows[missing]}: there is no text in column {name!r}")
    return texts  # type: ignore[return-value]


def _ranks(parts: Sequence[Part], name: str) -> NDArray[np.int64]:
    """Numbers in the order of a column's values, int64 (N,).

    Raises
    ------
    InputError: a value is missing, or they cannot be sorted.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    columns = [_plain(part.table[name]) for part in parts]
    where = _names(parts)
    if any(column.null_count for column in columns):
        raise InputError(f"{where}: column {name!r} must have a value in every row to sort by, some are missing")
    try:
        column = pa.concat_tables([pa.table({"order": c}) for c in columns], promote_options="permissive")["order"]
        ranks: NDArray[np.int64] = pc.rank(column.combine_chunks(), tiebreaker="dense").to_numpy().astype(np.int64)
    except (pa.ArrowException, TypeError):
        kinds = ", ".join(dict.fromkeys(str(column.type) for column in columns))
        raise InputError(f"{where}: column {name!r} holds {kinds}, which cannot be sorted") from None
    return ranks
