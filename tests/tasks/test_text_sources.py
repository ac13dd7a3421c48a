"""Where text comes from: embedded sets, Parquet files, the hub's layout; and everything wrong with them."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim import plugins
from fedsim.config.checking import read_choice
from fedsim.data import Corpus, Texts
from fedsim.errors import InputError, Problem
from fedsim.tasks.installed import Card
from fedsim.tasks.text_corpus import (
    by_user,
    make_corpus,
    of_length,
    split_by_label,
    split_by_time,
    split_by_user,
)

Folder = Callable[..., Path]


def load(name: str, **parameters: Any) -> Corpus:
    corpus: Corpus = plugins.create("dataset", name, **parameters).load()
    return corpus


def users(texts: Texts) -> list[int]:
    assert texts.users is not None
    return texts.users.tolist()


def labels(texts: Texts) -> list[int]:
    assert texts.labels is not None
    return texts.labels.tolist()


def said(texts: Texts) -> dict[int, list[str]]:
    """What every user said, in order."""
    result: dict[int, list[str]] = {}
    for user, text in zip(users(texts), texts.texts, strict=True):
        result.setdefault(user, []).append(text)
    return result


def digest(corpus: Corpus) -> str:
    """SHA-256 of everything in it but its source."""
    parts = [
        (part.texts, *(None if t is None else t.tolist() for t in (part.labels, part.users)))
        for part in (corpus.train, corpus.test)
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def test_every_data_set_names_its_tasks():
    fits = {name: plugins.get("dataset", name).tasks for name in plugins.names("dataset")}
    assert fits["chitchat"] == ("next_word",)
    assert fits["movie_reviews"] == ("sentiment",)
    assert fits["text_parquet"] == fits["text_hub"] == ("next_word", "sentiment")
    assert {fits[name] for name in ("mnist5k", "digits", "parquet", "hub")} == {("vision",)}


# ------------------------------------------------------------------------------------------------ chitchat


@pytest.fixture(scope="session")
def chat() -> Callable[..., Corpus]:
    """The chitchat corpus by its parameters, read once for all of them."""
    whole = plugins.get("dataset", "chitchat").card.read()  # type: ignore[attr-defined]
    patched = pytest.MonkeyPatch()

    @functools.cache
    def read(**parameters: Any) -> Corpus:
        with patched.context() as patch:
            patch.setattr(Card, "read", lambda card: whole)
            return load("chitchat", **parameters)

    return read


@pytest.fixture(scope="session")
def messages() -> dict[str, list[tuple[str, int, str]]]:
    """(time, place in the file, text) of every message, by sender, as the file has them."""
    file = "chitchat_dataset/dataset.json"
    found = importlib.metadata.distribution("chitchat-dataset").locate_file(file)
    talks = json.loads(Path(str(found)).read_text(encoding="utf-8"))
    assert len(talks) == 7168
    result: dict[str, list[tuple[str, int, str]]] = {}
    for place, m in enumerate(m for talk in talks.values() for turn in talk["messages"] for m in turn):
        result.setdefault(m["sender"], []).append((m["timestamp"], place, m["text"]))
    return result


def test_chitchat_is_what_it_is_said_to_be(messages):
    assert sum(map(len, messages.values())) == 258_145
    assert len(messages) == 1_315
    assert sum(sum(len(text.split()) for *_, text in sent) >= 100 for sent in messages.values()) == 812
    assert sum(not text.strip() for sent in messages.values() for *_, text in sent) == 33


def test_chitchat_holds_what_every_sender_wrote_in_the_order_of_time(chat, messages):
    corpus = chat(min_words=None, max_words=None)
    assert len(corpus.train) + len(corpus.test) == 258_145 - 33
    train, test = said(corpus.train), said(corpus.test)
    assert list(train) == list(range(1_315)), "by user, numbered in the order of their ids"
    assert users(corpus.test) == sorted(users(corpus.test))
    for number, sender in enumerate(sorted(messages)):
        sent = [text for *_, text in sorted(messages[sender]) if text.strip()]
        assert train[number] + test.get(number, []) == sent
        assert len(test.get(number, [])) == min(round(0.1 * len(sent)), len(sent) - 1)


def test_chitchat_as_it_comes(chat, messages):
    corpus = chat()
    assert (corpus.classes, corpus.names, corpus.train.labels) == (0, (), None)
    train, test = said(corpus.train), said(corpus.test)
    assert len(train) == 812
    for number, sender in enumerate(sorted(messages)):
        sent = [text for *_, text in sorted(messages[sender]) if text.strip()]
        if sum(len(text.split()) for text in sent) < 100:
            assert number not in train
            continue
        kept = train[number] + test.get(number, [])
        assert kept == sent[: len(kept)]
        assert sum(len(text.split()) for text in kept[:-1]) < 2000
        assert len(kept) == len(sent) or sum(len(text.split()) for text in kept) >= 2000
    assert corpus.source["name"] == "chitchat"
    assert corpus.source["licence"] == "MIT"
    assert "Myers" in corpus.source["citation"]
    assert corpus.source["distribution"].startswith("chitchat-dataset 0.9")


def test_chitchat_with_whole_senders_held_out(chat):
    everybody, corpus = chat(), chat(split="users")
    train, test = said(corpus.train), said(corpus.test)
    assert len(test) == 81
    assert not train.keys() & test.keys()
    whole = said(everybody.train)
    for user, later in said(everybody.test).items():
        whole[user] += later
    assert whole == train | test
    assert len(said(chat(split="users", test_fraction=0.5).test)) == 406
    assert list(test) != list(said(everybody.train))[:81], "a draw, not the first"


def test_the_chitchat_splits_are_fixed(chat):
    """Written down: another split makes every published run another one."""
    assert digest(chat()).startswith("f55b93b438da3bf1")
    assert digest(chat(split="users")).startswith("2e1964a565466d1c")


def test_chitchat_of_nobody(chat):
    with pytest.raises(InputError, match="chitchat: nobody wrote 1000000 words, the most is 228722; lower min_words"):
        chat(min_words=1_000_000)
    with pytest.raises(InputError, match="chitchat: the test set is empty"):
        chat(test_fraction=1e-6)
    with pytest.raises(InputError, match="chitchat: the test set is empty"):
        chat(split="users", test_fraction=1e-6)
    for wrong in ({"split": "messages"}, {"min_words": 0}, {"max_words": 0}, {"test_fraction": 1.0}):
        with pytest.raises(InputError, match="chitchat"):
            load("chitchat", **wrong)


# ------------------------------------------------------------------------------------------- movie reviews


@pytest.fixture(scope="session")
def reviews() -> Callable[..., Corpus]:
    """The film reviews by their parameters, read once."""
    return functools.cache(functools.partial(load, "movie_reviews"))


@pytest.mark.parametrize(("source", "per_class", "lost"), [("rotten_tomatoes", 4265, 0), ("imdb", 12_500, 28)])
def test_movie_reviews(reviews, source, per_class, lost):
    corpus = reviews(source=source)
    assert (corpus.classes, corpus.names) == (2, ("negative", "positive"))
    held = round(0.2 * per_class)
    assert Counter(labels(corpus.test)) == {0: held, 1: held}
    assert len(corpus.train) == 2 * (per_class - held) - lost
    assert min(Counter(labels(corpus.train)).values()) >= per_class - held - lost
    assert corpus.train.users is None
    assert all(text.strip() and "<br />" not in text for part in (corpus.train, corpus.test) for text in part.texts)
    train, test = ({text.strip().lower() for text in part.texts} for part in (corpus.train, corpus.test))
    assert not train & test, "a text is in both parts"
    assert corpus.source["source"] == source
    assert corpus.source["licence"].startswith("MIT")
    assert corpus.source["citation"].startswith({"rotten_tomatoes": "Pang, Lee", "imdb": "Maas"}[source])


def test_movie_reviews_are_rotten_tomatoes_unless_told(reviews):
    assert digest(reviews()) == digest(reviews(source="rotten_tomatoes"))
    with pytest.raises(InputError, match="one of rotten_tomatoes, imdb"):
        load("movie_reviews", source="netflix")


def test_the_reviews_split_is_fixed(reviews):
    """Written down: another split makes every published run another one."""
    assert digest(reviews(source="rotten_tomatoes")).startswith("3eeb8512385c8f48")
    assert digest(reviews(source="imdb")).startswith("2b5c090c8d6a49a8")


def test_reviews_belong_to_their_labels(reviews):
    corpus = reviews(source="rotten_tomatoes")
    by_word = {word: [] for word in ("dull", "delightful")}  # type: ignore[var-annotated]
    for text, label in zip(corpus.train.texts, labels(corpus.train), strict=True):
        for word, found in by_word.items():
            if word in text.split():
                found.append(label)
    assert np.mean(by_word["dull"]) < 0.2
    assert np.mean(by_word["delightful"]) > 0.8


def test_line_breaks_of_html_separate_words(reviews):
    texts = [*reviews(source="imdb").train.texts, *reviews(source="imdb").test.texts]
    [text] = [text for text in texts if text.startswith("I rented I AM CURIOUS-YELLOW")]
    assert "see this for myself. The plot is centered around" in text


# --------------------------------------------------------------------------------------- carrying packages


@pytest.mark.slow
def test_neither_the_packages_that_carry_the_texts_nor_table_libraries_are_imported():
    code = """
import sys
for name in ("chitchat_dataset", "movie_reviews", "pyarrow", "pandas", "datasets"):
    sys.modules[name] = None
from fedsim import plugins
for name in ("chitchat", "movie_reviews"):
    print(len(plugins.create("dataset", name).load().test))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == ["6973", "1706"]


@pytest.mark.parametrize(
    "content", [b"", b"{", b"{}", b"[1]", b"text,label,source\n", b'{"a": {"messages": [[{"text": "x"}]]}}', b"\xff"]
)
def test_a_damaged_file_in_a_carrying_package(tmp_path, monkeypatch, content):
    (tmp_path / "f").write_bytes(content)
    for name, file in (
        ("chitchat", "chitchat_dataset/dataset.json"),
        ("movie_reviews", "movie_reviews/data/combined_movie_reviews.csv"),
    ):
        one = SimpleNamespace(as_posix=lambda file=file: file, locate=lambda: tmp_path / "f")
        with monkeypatch.context() as patch:
            patch.setattr(importlib.metadata, "distribution", lambda name, one=one: SimpleNamespace(files=[one]))
            with pytest.raises(InputError, match=r"(dataset\.json|reviews\.csv) of .* cannot be read .*reinstall it"):
                load(name)


# ------------------------------------------------------------------------------------------------- Parquet


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """A function writing Parquet files: ``folder(train={…columns}, test={…})``."""

    def write(**files: dict[str, Any]) -> Path:
        for name, columns in files.items():
            pq.write_table(pa.table(columns), tmp_path / f"{name}.parquet")
        return tmp_path

    return write


def test_texts_with_labels_and_users_in_two_files(folder):
    root = folder(
        train={"text": ["b1", "a1", "", "b2"], "label": [0, 1, 1, 0], "user": ["bob", "ann", "zoe", "bob"]},
        test={"text": ["c1", "b3"], "label": [1, 0], "user": ["cat", "bob"]},
    )
    corpus = load("text_parquet", path=str(root), label="label", user="user")
    assert corpus.train.texts == ("a1", "b1", "b2", ""), "by user; an empty text is a text"
    assert labels(corpus.train) == [1, 0, 0, 1]
    assert users(corpus.train) == [0, 1, 1, 3]
    assert corpus.test.texts == ("b3", "c1")
    assert users(corpus.test) == [1, 2], "one user has one number in both parts"
    assert labels(corpus.test) == [0, 1]
    assert (corpus.classes, corpus.names) == (2, ())
    assert corpus.source["name"] == "text_parquet"
    plain = load("text_parquet", path=str(root))
    assert plain.train == Texts(("b1", "a1", "", "b2"))
    assert plain.classes == 0


@pytest.mark.parametrize("layout", ["string", "large_string", "dictionary"])
def test_kinds_of_text_columns(folder, layout):
    column = pa.array(["Zwölf", "🙂 ok", "Zwölf"])
    column = column.dictionary_encode() if layout == "dictionary" else column.cast(getattr(pa, layout)())
    root = folder(train={"text": column, "user": column}, test={"text": ["x"], "user": ["🙂 ok"]})
    corpus = load("text_parquet", path=str(root), user="user", where=["text=Zwölf"], test=None, test_fraction=0.5)
    assert (corpus.train.texts, corpus.test.texts) == (("Zwölf",), ("Zwölf",))
    corpus = load("text_parquet", path=str(root), user="user")
    assert said(corpus.train) == {0: ["Zwölf", "Zwölf"], 1: ["🙂 ok"]}
    assert said(corpus.test) == {1: ["x"]}


def test_several_files_are_one_set_and_owners_may_be_numbers(folder):
    root = folder(
        **{
            "train-1": {"text": ["c", "d"], "user": pa.array([900, 5], pa.int16())},
            "train-0": {"text": ["a", "b"], "user": pa.array([5, 7], pa.int64())},
            "test": {"text": ["e"], "user": [7]},
        }
    )
    corpus = load("text_parquet", path=str(root), user="user")
    assert said(corpus.train) == {5: ["a", "d"], 7: ["b"], 900: ["c"]}
    assert users(corpus.test) == [7]


@pytest.mark.parametrize(
    "order",
    [
        [3, 1, 2, 1],
        [0.3, -1.0, 0.2, -1.0],
        ["2009-06-03", "2009-05-31", "2009-06-01", "2009-05-31"],
        pa.array(["c", "a", "b", "a"]).dictionary_encode(),
        pa.array([30, 10, 20, 10], pa.date32()),
    ],
)
def test_an_order_within_users(folder, order):
    root = folder(train={"text": ["z", "x", "y", "w"], "at": order, "user": [1, 1, 1, 0]}, test={"text": ["t"]})
    corpus = load("text_parquet", path=str(root), user="user", order="at", test=None, test_fraction=0.4)
    assert said(corpus.train) == {0: ["w"], 1: ["x", "y"]}
    assert said(corpus.test) == {1: ["z"]}
    corpus = load("text_parquet", path=str(root), order="at", test=None, test_fraction=0.5)
    assert corpus.train.texts == ("x", "w"), "without users all are one author's; equal ones stay as they were"
    assert corpus.test.texts == ("y", "z")


def test_an_order_over_several_files_of_different_types(folder):
    first, second = {"text": ["a", "c"], "at": pa.array([1, 3], pa.int8())}, {"text": ["b"], "at": [2.0]}
    root = folder(train_0=first, train_1=second, test={"text": ["t"], "at": [0]})
    assert load("text_parquet", path=str(root), order="at").train.texts == ("a", "b", "c")
    folder(train_1={"text": ["b"], "at": ["2"]})
    with pytest.raises(
        InputError, match=r"train_0\.parquet.*: column 'at' holds int8, string.*, which cannot be sorted"
    ):
        load("text_parquet", path=str(root), order="at")


ROWS = {
    "text": ["a", "b", "c", "d", "e", "f"],
    "split": ["train", "train", "dev", "train", None, "dev"],
    "size": [1, 2, 3, 2, 2, 1],
    "good": [True, True, True, False, True, True],
}


@pytest.mark.parametrize(
    ("where", "kept"),
    [
        (["split=train"], "abd"),
        (["split = train ", "size=2"], "bd"),
        (["size=2"], "bde"),
        (["good=true", "size=2"], "be"),
        (["text=a"], "a"),
        ([], "abcdef"),
    ],
)
def test_rows_are_chosen_by_conditions(folder, where, kept):
    root = folder(train=ROWS, test={"text": ["t"] * 6} | {k: v for k, v in ROWS.items() if k != "text"})
    corpus = load("text_parquet", path=str(root), train_where=where)
    assert corpus.train.texts == tuple(kept)
    assert len(corpus.test) == 6
    corpus = load("text_parquet", path=str(root), test_where=where) if where != ["text=a"] else None
    assert corpus is None or (len(corpus.test), len(corpus.train)) == (len(kept), 6)


def test_one_file_with_a_column_that_splits_it(folder):
    root = folder(all=ROWS | {"label": [0, 1, 1, 0, 1, 0]})
    one = {"path": str(root), "train": "all.parquet", "test": "all.parquet", "label": "label", "classes": 2}
    corpus = load("text_parquet", **one, train_where=["split=train"], test_where=["split=dev"])
    assert (corpus.train.texts, corpus.test.texts) == (("a", "b", "d"), ("c", "f"))
    assert (labels(corpus.train), labels(corpus.test)) == ([0, 1, 0], [1, 0])
    corpus = load("text_parquet", **one, where=["size=1"], train_where=["split=train"], test_where=["split=dev"])
    assert (corpus.train.texts, corpus.test.texts) == (("a",), ("f",))
    with pytest.raises(InputError, match=r"2 rows of all\.parquet are in the training and in the test set"):
        load("text_parquet", **one, train_where=["split=train"], test_where=["size=2"])
    with pytest.raises(InputError, match="6 rows of"):
        load("text_parquet", **one)


def test_held_out_by_label(folder):
    texts = [f"text {i}" for i in range(40)]
    texts[7] = " TEXT 3 "
    root = folder(train={"text": texts, "label": [0] * 30 + [1] * 10, "user": list(range(40))})
    parameters = {"path": str(root), "test": None, "label": "label", "user": "user", "test_fraction": 0.3}
    corpus = load("text_parquet", **parameters)
    assert Counter(labels(corpus.test)) == {0: 9, 1: 3}
    assert len(corpus.train) + len(corpus.test) in (39, 40)
    assert not {t.strip().lower() for t in corpus.train.texts} & {t.strip().lower() for t in corpus.test.texts}
    assert users(corpus.test) != [*range(9), 30, 31, 32], "a draw"
    assert digest(load("text_parquet", **parameters)) == digest(corpus)


def test_held_out_in_the_order_of_time(folder):
    root = folder(train={"text": list("abcdefg"), "user": list("xxxxyyz")})
    corpus = load("text_parquet", path=str(root), test=None, user="user", test_fraction=0.5)
    assert said(corpus.train) == {0: ["a", "b"], 1: ["e"], 2: ["g"]}
    assert said(corpus.test) == {0: ["c", "d"], 1: ["f"]}


def test_words_of_a_user_are_limited_for_training(folder):
    texts = ["one two", "three", "four five", "", "six", "alone"]
    root = folder(train={"text": texts, "user": [2, 2, 2, 2, 2, 1]}, test={"text": ["t", "u v"], "user": [1, 2]})
    corpus = load("text_parquet", path=str(root), user="user", min_words=2, max_words=4)
    assert said(corpus.train) == {2: ["one two", "three", "four five"]}
    assert said(corpus.test) == {1: ["t"], 2: ["u v"]}, "test texts are given: they stay"
    corpus = load("text_parquet", path=str(root), user="user", test=None, max_words=3, test_fraction=0.5)
    assert said(corpus.train) == {1: ["alone"], 2: ["one two"]}
    assert said(corpus.test) == {2: ["three"]}


GOOD = {"text": ["a", "b", "c"], "label": [0, 1, 1], "user": ["x", "y", "x"], "at": [1, 2, 3]}
COLUMNS = {"label": "label", "user": "user", "order": "at"}
NOT_UTF8 = pa.StringArray.from_buffers(2, pa.py_buffer(np.array([0, 1, 2], np.int32)), pa.py_buffer(b"a\xff"))


@pytest.mark.parametrize(
    ("train", "more", "expected"),
    [
        (GOOD | {"text": ["a", None, "c"]}, {}, r"train\.parquet, row 1: there is no text in column 'text'"),
        (GOOD | {"text": ["a", "b", None]}, {"train_where": ["user=x"]}, r"train\.parquet, row 2: there is no text"),
        (GOOD | {"text": [1, 2, 3]}, {}, r"train\.parquet: column 'text' holds int64, not text"),
        (GOOD | {"text": [b"a", b"b", b"c"]}, {}, "column 'text' holds binary, not text"),
        (GOOD | {"text": [None] * 3}, {}, "column 'text' holds null, not text"),
        ({"text": NOT_UTF8, "label": [0, 1], "user": [1, 2], "at": [1, 2]}, {}, r"train\.parquet: .* is not UTF-8"),
        (GOOD, {"text": "tweet"}, r"train\.parquet has no column 'tweet'; it has: text, label, user, at"),
        (GOOD, {"user": "author"}, "has no column 'author'"),
        (GOOD, {"order": "when"}, "has no column 'when'"),
        (GOOD, {"train_where": ["split=train"]}, "has no column 'split'"),
        (GOOD | {"label": [0, -1, 1]}, {}, "text_parquet: the training set has a negative label"),
        (GOOD | {"label": [0, 4, 4]}, {}, "the labels are 0, 1, 4; number the classes from 0 without gaps"),
        (GOOD | {"label": [0, 2, 1]}, {"classes": 2}, "a label is 2, but there are 2 classes"),
        (GOOD | {"label": [0, None, 1]}, {}, r"train\.parquet: column 'label' must hold whole numbers without gaps"),
        (GOOD | {"label": [0.0, 0.5, 1.0]}, {}, "must hold whole numbers without gaps, it holds double"),
        (GOOD | {"label": ["0", "1", "1"]}, {}, "must hold whole numbers"),
        (GOOD | {"label": [0, 0, 0]}, {"test": None, "test_fraction": 0.5}, "every label is 0; there must be two"),
        (GOOD | {"user": ["x", None, "x"]}, {}, "column 'user' must name an owner in every row"),
        (GOOD | {"at": [1, None, 3]}, {}, "column 'at' must have a value in every row to sort by"),
        (GOOD | {"at": [[1], [2], [3]]}, {}, "column 'at' holds list.*, which cannot be sorted"),
        (GOOD, {"where": ["user=nobody", "label=1"]}, r"no row with user=nobody and label=1 in train\.parquet"),
        (GOOD, {"test_where": ["at=9"]}, r"there is no row with at=9 in test\.parquet"),
        (GOOD, {"where": ["at=soon"]}, r"train\.parquet: column 'at' holds int64, which cannot equal 'soon'"),
        (GOOD, {"where": ["at"]}, "'at' is not column=value"),
        (GOOD, {"where": ["=3"]}, "'=3' is not column=value"),
        ({name: pa.array([], pa.string()) for name in GOOD}, {}, r"there is no row in train\.parquet"),
        (GOOD, {"min_words": 3}, "nobody wrote 3 words, the most is 2; lower min_words"),
        (GOOD, {"test": None, "test_fraction": 0.01}, "text_parquet: the test set is empty"),
        (GOOD, {"test": None, "label": None, "test_fraction": 0.01}, "the test set is empty"),
        (GOOD | {"text": ["a", "a", "A "]}, {"test": None, "test_fraction": 0.4}, "the training set is empty"),
    ],
)
def test_texts_that_cannot_be_used(folder, train, more, expected):
    root = folder(train=train, test=GOOD)
    with pytest.raises(InputError, match=expected):
        load("text_parquet", **({"path": str(root)} | COLUMNS | more))


def test_classes_may_be_more_than_there_are_labels(folder):
    root = folder(train={"text": ["a", "b"], "label": [0, 4]}, test={"text": ["c"], "label": [4]})
    assert load("text_parquet", path=str(root), label="label", classes=5).classes == 5


@pytest.mark.parametrize("content", [b"", b"no parquet", b"PAR1" + b"\0" * 40 + b"PAR1"])
def test_files_that_are_no_parquet(folder, content):
    root = folder(test=GOOD)
    (root / "train.parquet").write_bytes(content)
    with pytest.raises(InputError, match=r"train\.parquet cannot be read as Parquet"):
        load("text_parquet", path=str(root))


def test_files_that_went_away(folder):
    with pytest.raises(InputError, match=r"no file in .* matches '\*train\*\.parquet'"):
        load("text_parquet", path=str(folder(test=GOOD)))


# -------------------------------------------------------------------------- found out before anything is read


def problems(name: str, task: str = "next_word", **parameters: Any) -> dict[str, str]:
    """What is wrong with a config's data section, by key."""
    found: list[Problem] = []
    choice = read_choice("dataset", {"name": name, **parameters}, "data", found)
    experiment = SimpleNamespace(task=SimpleNamespace(name=task))
    if not found:
        found = plugins.get("dataset", name).problems(choice.parameters, experiment)
    return {problem.path.removeprefix("data."): problem.message for problem in found}


def test_parameters_are_checked_with_the_config(folder):
    root = str(folder(train=GOOD, test=GOOD, all=GOOD))
    fine = {"path": root, "train": "train.parquet", "test": "test.parquet"}
    assert problems("text_parquet", **fine) == {}
    assert problems("text_parquet", **fine, user="user", min_words=3, where=["at=1", "user=x"]) == {}
    assert problems("text_parquet", task="sentiment", **fine, label="label") == {}
    assert problems("text_parquet", path=root, train="*in.parquet", test=None) == {}
    assert "needs labels" in problems("text_parquet", task="sentiment", **fine)["label"]
    assert "there is no directory '/nowhere'" in problems("text_parquet", path="/nowhere")["path"]
    found = problems("text_parquet", path=root, train="*.pq", test="nothing*")
    assert found.keys() == {"train", "test"}
    one = {"path": root, "train": "all.parquet", "test": "all.parquet"}
    assert "is a training file too" in problems("text_parquet", **one)["test"]
    assert "is a training file too" in problems("text_parquet", **one, where=["user=x"])["test"]
    assert problems("text_parquet", **one, train_where=["at=1"], test_where=["at=2"]) == {}
    assert "test is null" in problems("text_parquet", path=root, test=None, test_where=["at=2"])["test_where"]
    for key in ("where", "train_where", "test_where"):
        assert "'at' is not column=value" in problems("text_parquet", **fine, **{key: ["at"]})[key]
        assert "expected a list" in problems("text_parquet", **fine, **{key: "at=1"})[key]
    for key in ("min_words", "max_words"):
        assert "is counted per user" in problems("text_parquet", **fine, **{key: 5})[key]
        assert "out of range" in problems("text_parquet", **fine, user="user", **{key: 0})[key]
    assert "out of range" in problems("text_parquet", **fine, classes=1)["classes"]
    assert "out of range" in problems("text_parquet", **fine, test_fraction=1)["test_fraction"]
    assert problems("text_hub", id="a/b") == {}
    assert "is the training split" in problems("text_hub", id="a/b", test="train")["test"]
    assert "not column=value" in problems("text_hub", id="a/b", where=["x"])["where"]


# --------------------------------------------------------------------------------------------- the real thing


@pytest.fixture
def real(shared: Path) -> Callable[..., Corpus]:
    """A function reading one of the shared text files, where they are."""

    def read(file: str, **parameters: Any) -> Corpus:
        if not (shared / "data" / file).is_file():
            pytest.skip(f"no {file} at {shared / 'data'}; set FEDSIM_SHARED to the directory that has data/")
        return load("text_parquet", path=str(shared / "data"), train=file, **parameters)

    return read


def test_ubuntu_irc_is_read(real):
    corpus = real("ubuntu_irc.parquet", test=None, user="user", order="day", min_words=100, max_words=2000)
    train = said(corpus.train)
    assert len(train) == 5_090
    assert said(corpus.test).keys() < train.keys()
    assert len(corpus.test) == pytest.approx(0.1 * (len(corpus.train) + len(corpus.test)), rel=0.02)
    whole = real("ubuntu_irc.parquet", test=None, user="user")
    assert len(whole.train) + len(whole.test) == 216_550
    assert len(said(whole.train)) == 17_735


def test_tiny_shakespeare_is_read(real):
    corpus = real("tiny_shakespeare_roles.parquet", test=None, user="user")
    assert len(corpus.train) + len(corpus.test) == 7_222
    assert len(said(corpus.train)) == 309
    assert "" in corpus.train.texts, "speeches without words are kept"


def test_sentiment140_is_read(real):
    corpus = real("sentiment140_subset.parquet", test=None, label="label", where=["subset=random"])
    assert len(corpus.train) + len(corpus.test) == pytest.approx(29_998, abs=30)
    assert corpus.classes == 2
    assert np.mean(labels(corpus.test)) == pytest.approx(0.5, abs=0.01)


def test_sst2_is_read(real):
    corpus = real(
        "sst2.parquet", test="sst2.parquet", label="label", train_where=["split=train"], test_where=["split=dev"]
    )
    assert (len(corpus.train), len(corpus.test), corpus.classes) == (67_349, 872, 2)
    assert corpus.train.texts[0] == "hide new secretions from the parental units"
    assert labels(corpus.train)[:2] == [0, 0]


# ------------------------------------------------------------------------------------------------- the hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folder:
    """A function writing a local directory as the hub lays it out; the cache is the test's own."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    features = datasets.Features(
        {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "fair", "good"])}
        | {name: datasets.Value("string") for name in ("who", "at")}
    )

    def write(**splits: dict[str, Any]) -> Path:
        root = tmp_path / "hub"
        (root / "data").mkdir(parents=True, exist_ok=True)
        for split, columns in splits.items():
            made = datasets.Dataset.from_dict(columns, features=features)
            made.to_parquet(root / "data" / f"{split}-00000-of-00001.parquet")
        return root

    return write


def hub_rows(texts: str, who: str, label: list[int]) -> dict[str, Any]:
    return {"sentence": list(texts), "label": label, "who": list(who), "at": [str(-i) for i in range(len(texts))]}


def test_a_local_directory_in_the_hubs_layout(hub):
    root = hub(train=hub_rows("abcd", "yxyx", [0, 1, 1, 0]), test=hub_rows("ef", "zx", [1, 0]))
    columns = {"id": str(root), "text": "sentence", "label": "label", "user": "who"}
    corpus = load("text_hub", **columns)
    assert said(corpus.train) == {0: ["b", "d"], 1: ["a", "c"]}
    assert labels(corpus.train) == [1, 0, 0, 1]
    assert said(corpus.test) == {0: ["f"], 2: ["e"]}
    assert (corpus.classes, corpus.names) == (3, ("bad", "fair", "good")), "as the data set says"
    assert corpus.source["id"] == str(root)
    assert load("text_hub", **columns, classes=4).names == ()
    corpus = load("text_hub", **columns | {"test": None, "label": None}, where=["who=x"], test_fraction=0.5)
    assert (said(corpus.train), said(corpus.test)) == ({0: ["b"]}, {0: ["d"]})
    assert said(load("text_hub", **columns, order="at").train)[1] == ["c", "a"]
    for wrong, message in (
        ({"test": "validation"}, "split 'validation', cannot be loaded"),
        ({"text": "text"}, "has no column 'text'; it has: sentence, label, who, at"),
        ({"where": ["who=nobody"]}, "there is no row with who=nobody in .*, split train"),
    ):
        with pytest.raises(InputError, match=message):
            load("text_hub", **columns | wrong)


def test_hub_labels_that_were_withheld(hub):
    root = hub(train=hub_rows("ab", "xx", [0, 1]), test=hub_rows("c", "x", [-1]))
    with pytest.raises(InputError, match="text_hub: the test set has a negative label"):
        load("text_hub", id=str(root), text="sentence", label="label")


@pytest.mark.parametrize("name", ["/nowhere/at/all", "nobody/of-that-name", ""])
def test_a_hub_set_that_is_not_there(hub, name):
    with pytest.raises(InputError, match=r"the hub data set .* cannot be loaded"):
        load("text_hub", id=name)


# -------------------------------------------------------------------------------------------------- pieces

TEXTS = st.lists(
    st.tuples(st.integers(0, 4), st.integers(0, 3), st.sampled_from(["", "a", "a b", "a b c d", "B", " a "])),
    min_size=1,
    max_size=40,
)


@settings(max_examples=150)
@given(TEXTS, st.sampled_from([None, 1, 3]), st.sampled_from([None, 1, 4, 9]), st.floats(0.01, 0.99))
def test_limits_and_splits_by_time_are_as_one_would_do_them_by_hand(rows, low, high, fraction):
    texts = Texts(tuple(text for *_, text in rows), users=torch.tensor([user for user, *_ in rows]))
    placed = by_user(texts, np.array([time for _, time, _ in rows]))
    expected: dict[int, list[str]] = {}
    for user, _, text in sorted(rows, key=lambda row: row[:2]):
        expected.setdefault(user, []).append(text)
    assert said(placed) == expected
    assert list(said(placed)) == sorted(expected)

    limited = {}
    for user, own in expected.items():
        if sum(len(text.split()) for text in own) < (low or 0):
            continue
        kept: list[str] = []
        for text in own:
            if high is not None and sum(len(k.split()) for k in kept) >= high:
                break
            kept.append(text)
        limited[user] = kept
    if not limited:
        with pytest.raises(InputError, match="lower min_words"):
            of_length(placed, low, high, "x")
        return
    placed = of_length(placed, low, high, "x")
    assert said(placed) == limited

    train, test = split_by_time(placed, fraction)
    held = {user: min(round(fraction * len(own)), len(own) - 1) for user, own in limited.items()}
    assert said(train) == {user: own[: len(own) - held[user]] for user, own in limited.items()}
    assert said(test) == {user: own[len(own) - held[user] :] for user, own in limited.items() if held[user]}


def test_whole_users_and_classes_are_drawn_by_the_stream():
    count = 200
    texts = Texts(tuple(f"t{i}" for i in range(count)), torch.arange(count) % 2, torch.arange(count) // 10)
    draws = [split_by_user(texts, 0.25, np.random.default_rng(seed)) for seed in (0, 0, 1)]
    assert [len(said(test)) for _, test in draws] == [5, 5, 5]
    assert said(draws[0][1]) == said(draws[1][1]) != said(draws[2][1])
    draws = [split_by_label(texts, 0.25, np.random.default_rng(seed)) for seed in (0, 0, 1)]
    assert [Counter(labels(test)) for _, test in draws] == [Counter({0: 25, 1: 25})] * 3
    assert draws[0][1].texts == draws[1][1].texts != draws[2][1].texts
    for train, test in draws:
        assert sorted([*train.texts, *test.texts]) == sorted(texts.texts)
        for part in (train, test):  # labels and users go with their text
            numbers = [int(text[1:]) for text in part.texts]
            assert labels(part) == [i % 2 for i in numbers]
            assert users(part) == [i // 10 for i in numbers]


def test_texts_that_equal_a_test_text_are_not_trained_on():
    texts = Texts(("Same", " same\n", "SAME", "other"), torch.tensor([0, 0, 0, 0]))
    for seed in range(8):
        train, test = split_by_label(texts, 0.25, np.random.default_rng(seed))
        assert len(test) == 1
        assert train.texts == (("other",) if test.texts != ("other",) else ("Same", " same\n", "SAME"))


def test_a_corpus_is_checked():
    one = Texts(("a",), torch.tensor([0]))
    two = Texts(("a", "b"), torch.tensor([0, 1]))
    assert make_corpus(two, one, {}).classes == 2
    assert make_corpus(one, two, {}).classes == 2
    assert make_corpus(two, one, {}, 3, ("x", "y", "z")).names == ("x", "y", "z")
    assert make_corpus(Texts(("a",)), Texts(("b",)), {}).classes == 0
    for train, test, said_ in (
        (Texts(()), one, "mine: the training set is empty"),
        (one, Texts(()), "mine: the test set is empty"),
        (one, one, "mine: every label is 0"),
        (two, Texts(("c",), torch.tensor([-1])), "mine: the test set has a negative label"),
    ):
        with pytest.raises(InputError, match=said_):
            make_corpus(train, test, {"name": "mine"})
