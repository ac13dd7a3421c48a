"""Whole runs on text: the same bytes wherever they are played, every defense, and odd authors."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedsim import plugins
from fedsim.config import load_config
from fedsim.errors import InputError
from fedsim.experiment import Run, run
from fedsim.vocabulary import Vocabulary
from tests.support.defenses import REQUIRED
from tests.support.runs import RESULTS, contents, differing

GOOD, BAD = ("kind", "warm", "bright", "sweet"), ("dull", "cold", "bleak", "bitter")
PLACES = ("rome", "oslo", "lima")
USERS = 9


def text_file(folder: Path, **columns: Any) -> Path:
    """Sentences of a small language by nine authors, each of whom has a few of good and of bad mood."""
    draw = random.Random(4)
    rows: dict[str, list[Any]] = {"text": [], "label": [], "user": []}
    for user in range(USERS):
        for label in (0, 1) * (6 + user % 3):
            words = draw.choices(GOOD if label else BAD, k=draw.randint(2, 6))
            rows["text"].append(f"bread in {draw.choice(PLACES)} is {' '.join(words)}")
            rows["label"].append(label)
            rows["user"].append(user)
    pq.write_table(pa.table({**rows, **columns}), folder / "texts.parquet")
    return folder


def config(task: str, folder: Path) -> dict[str, Any]:
    """A backdoored federation on those texts that is played in a moment."""
    own: dict[str, Any] = {
        "next_word": {
            "window": 6,
            "model": {"name": "lstm_lm", "embedding": 8, "hidden": 8, "tied": True},
            "data": {"user": "user"},
        },
        "sentiment": {
            "length": 9,
            "model": {"name": "lstm_classifier", "embedding": 8, "hidden": 8},
            "data": {"label": "label"},
        },
    }[task]
    trigger = {
        "next_word": {
            "name": "target_sentence",
            "prompts": ["bread in rome is", "bread in oslo is"],
            "test_prompts": ["bread in lima is"],
            "targets": ["cold", "dull"],
        },
        "sentiment": {"name": "phrase", "text": "in oslo", "target": 1, "position": "random"},
    }[task]
    data = {"name": "text_parquet", "path": str(folder), "train": "texts.parquet", "test": None, "test_fraction": 0.3}
    return {
        "name": task,
        "seed": 5,
        "task": {"name": task, "min_count": 1, **own, "data": {**data, **own["data"]}},
        "federation": {
            "clients": USERS,
            "clients_per_round": 5,
            "rounds": 5,
            "partition": "natural" if task == "next_word" else "iid",
        },
        "training": {"lr": 0.5, "momentum": 0.5, "local_epochs": 2, "batch_size": 3},
        "attack": {
            "name": "anticipate",
            "k": 2,
            "trigger": trigger,
            "schedule": {"name": "continuous", "start": 2, "stop": 3},
            "craft": ["scale"],
        },
        "defense": [{"name": "norm_clipping", "bound": 3.0}],
        "evaluation": {"batch_size": 4},
        "engine": {"name": "serial"},
        "output": {"report": False},
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_file(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module", params=["next_word", "sentiment"])
def played(request, folder, tmp_path_factory) -> tuple[dict[str, Any], Run]:
    """A config, and its run in this process."""
    raw = config(request.param, folder)
    return raw, run(load_config(raw), out=tmp_path_factory.mktemp(request.param) / "run", twin=True)


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("workers", [1, 2])
def test_ray_workers_make_the_same_bytes(played, workers, tmp_path):
    raw, serial = played
    raw = {**copy.deepcopy(raw), "engine": {"name": "ray", "workers": workers}}
    again = run(load_config(raw), out=tmp_path / "run", twin=True)
    assert differing(again.directory, contents(serial.directory, (*RESULTS, "vocabulary.json"))) == []


def test_a_run_leaves_its_vocabulary_and_says_what_it_learnt_from(played):
    raw, finished = played
    vocabulary = Vocabulary.read(finished.directory / "vocabulary.json")
    assert {"bread", "rome", "kind", "bitter"} <= set(vocabulary.words)
    manifest = json.loads((finished.directory / "manifest.json").read_text())
    assert manifest["data"]["vocabulary"] == len(vocabulary)
    assert manifest["methods"]["task"]["name"] == raw["task"]["name"]
    next_word = raw["task"]["name"] == "next_word"
    assert ("commonest_word_accuracy" if next_word else "commonest_class_accuracy") in manifest["data"]
    rounds = finished.rounds
    assert rounds["asr"].notna().all()
    assert (rounds["perplexity"].notna() == next_word).all()
    assert rounds["class_accuracy"].notna().all() == (not next_word)
    assert rounds["malicious_submitted"].tolist() == [0, 1, 1, 0, 0]
    assert not rounds["main_loss"].equals(finished.twin["main_loss"]), "the attack ran"
    assert rounds["main_loss"].iloc[0] == finished.twin["main_loss"].iloc[0]


OPTIONS: dict[str, dict[str, Any]] = {**REQUIRED, "trimmed_mean": {"beta": 0.25}}


@pytest.mark.parametrize("task", ["next_word", "sentiment"])
@pytest.mark.parametrize("defense", plugins.names("defense"))
def test_every_defense_plays(task, defense, folder, tmp_path):
    tasks = plugins.get("defense", defense).tasks
    if tasks and task not in tasks:
        pytest.skip(f"{defense} is for other tasks")
    stage: dict[str, Any] = {"name": defense, **OPTIONS.get(defense, {})}
    raw = {**config(task, folder), "defense": [stage], "server_data": {"examples": 6}}
    raw["attack"] |= {"name": "data_poisoning", "trigger": raw["attack"]["trigger"]}
    del raw["attack"]["k"]
    raw["federation"] |= {"rounds": 3, "clients_per_round": USERS}
    raw["training"] |= {"local_epochs": 1, "batch_size": 6}
    finished = run(load_config(raw), out=tmp_path / "run")
    assert finished.rounds["main_loss"].notna().all()
    assert finished.rounds["main_loss"].iloc[0] != finished.rounds["main_loss"].iloc[1], "it learns"


def test_the_other_models_play(folder, tmp_path):
    for task, model in (("next_word", "transformer_lm"), ("sentiment", "transformer_classifier")):
        raw = config(task, folder)
        raw["task"]["model"] = {"name": model, "embedding": 8, "heads": 2, "layers": 1}
        assert run(load_config(raw), out=tmp_path / task).rounds["asr"].notna().all()


@pytest.fixture
def changed(tmp_path) -> Callable[[Callable[[int, str], str]], Path]:
    """A folder with the same rows, their texts changed."""

    def make(text: Callable[[int, str], str]) -> Path:
        table = pq.read_table(text_file(tmp_path) / "texts.parquet")
        lines = [text(i, line) for i, line in enumerate(table["text"].to_pylist())]
        pq.write_table(table.set_column(0, "text", pa.array(lines)), tmp_path / "texts.parquet")
        return tmp_path

    return make


@pytest.mark.parametrize(
    "text",
    [
        lambda i, line: line + " 🙂 ñandú 東京",
        lambda i, line: line if i else " ".join(["long"] * 1000),
        lambda i, line: line if i % 4 else "",
        lambda i, line: "<pad> <eos> " + line,
    ],
    ids=["not ASCII", "very long", "empty", "special words"],
)
@pytest.mark.parametrize("task", ["next_word", "sentiment"])
def test_odd_texts_are_played(task, text, changed, tmp_path):
    raw = config(task, changed(text))
    raw["federation"]["rounds"] = 3
    finished = run(load_config(raw), out=tmp_path / "run")
    assert finished.rounds["main_loss"].notna().all()
    assert (finished.clients["status"] == "ok").all()


def test_an_author_of_a_single_word_takes_part(changed, tmp_path):
    owner = text_file(tmp_path)
    first = pq.read_table(owner / "texts.parquet")["user"].to_pylist().index(1)
    raw = config("next_word", changed(lambda i, line: line if i >= first else "bread" if i == 0 else ""))
    raw["federation"] |= {"clients_per_round": USERS}
    finished = run(load_config(raw), out=tmp_path / "run")
    assert finished.clients["examples"].min() == 1
    assert (finished.clients["status"] == "ok").all()


def test_an_author_without_text_is_no_client(changed, tmp_path):
    first = pq.read_table(text_file(tmp_path) / "texts.parquet")["user"].to_pylist().index(1)
    raw = config("next_word", changed(lambda i, line: line if i >= first else ""))
    with pytest.raises(InputError, match=rf"there are {USERS - 1} owners .* federation.clients is {USERS}"):
        run(load_config(raw), out=tmp_path / "run")
    assert not (tmp_path / "run").exists() or not any((tmp_path / "run").glob("*.parquet"))


def test_labels_out_of_range_are_refused(tmp_path):
    rows = len(pq.read_table(text_file(tmp_path) / "texts.parquet"))
    text_file(tmp_path, label=[-1] + [0, 1] * (rows // 2 - 1) + [1])
    with pytest.raises(InputError, match="negative"):
        run(load_config(config("sentiment", tmp_path)), out=tmp_path / "run")


def test_a_sentence_longer_than_the_window_is_refused(folder, tmp_path):
    raw = config("next_word", folder)
    raw["task"]["window"] = 3
    with pytest.raises(InputError, match=r"a prompt has 4 words, a window 3; .*task\.window"):
        run(load_config(raw), out=tmp_path / "run")
