"""Damaged files by the hundred: data, edge cases, indices, pictures, models, and the files of a run. One message that
names the file or the key, exit status 2, nothing executed and nothing written.
"""

from __future__ import annotations

import gzip
import io
import pickle
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
import yaml
from PIL import Image

from fedsim.experiment import Run
from tests.support.malformed import ANCHORS, PYTHON_OBJECT, Boom

pytestmark = pytest.mark.usefixtures("own_registry", "bounded")

Cli = Callable[..., Any]


def refusal(cli: Cli, *command: object) -> str:
    """What is printed by a command that is refused, with everything a refusal must be."""
    done = cli(*command)
    assert done.status == 2, done.text
    assert "Traceback" not in done.text
    assert done.err.startswith("error: ")
    assert all(c.isprintable() or c == "\n" for c in done.err)
    assert len(done.err) < 3_000
    return str(done.err)


# --------------------------------------------------------------------------------------------- data files

COUNT = 48  # rows of the whole files
SIDE = 8


def parquet(metadata: dict[str, str] | None = None, **columns: Any) -> bytes:
    table = pa.table(columns)
    buffer = io.BytesIO()
    pq.write_table(table if metadata is None else table.replace_schema_metadata(metadata), buffer, compression="snappy")
    return buffer.getvalue()


def pixels(count: int = COUNT, width: int = SIDE * SIDE) -> Any:
    rng = np.random.default_rng(0)
    return pa.array([rng.integers(0, 256, width, np.uint8).tobytes() for _ in range(count)], pa.binary(width))


def png(size: tuple[int, int] = (SIDE, SIDE), mode: str = "L") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, "PNG")
    return buffer.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few kilobytes that says to be of this size."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(2**20), 9)) + chunk(b"IEND", b"")


def encoded(odd: bytes) -> Any:
    return pa.array([png()] * 5 + [odd] + [png()] * (COUNT - 6), pa.binary())


def garbled(raw: bytes, start: int, stop: int) -> bytes:
    return raw[:start] + bytes(0xFF ^ b for b in raw[start:stop]) + raw[stop:]


def twice() -> bytes:
    """A file with two columns of one name."""
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_arrays([pixels(), pixels(), pa.array(CLASSES)], ["image", "image", "label"]), buffer)
    return buffer.getvalue()


CLASSES = [i % 4 for i in range(COUNT)]
IMAGES = parquet(image=pixels(), label=CLASSES)
WORDS = [
    f"{'kind warm' if i % 2 else 'dull cold'} bread in {'rome' if i % 3 else 'oslo'} today{i}" for i in range(COUNT)
]
SIDES = [i % 2 for i in range(COUNT)]
TEXT = parquet(text=WORDS, label=SIDES, user=CLASSES)
SPLIT = ["train"] * (COUNT // 2) + ["test"] * (COUNT // 2)

ANY_PARQUET: dict[str, bytes] = {
    "of no bytes": b"",
    "cut in half": IMAGES[: len(IMAGES) // 2],
    "without its last bytes": IMAGES[:-8],
    "of the marks alone": b"PAR1PAR1",
    "with a footer of four gigabytes": IMAGES[:-8] + b"\xff\xff\xff\xffPAR1",
    "with a garbled footer": garbled(IMAGES, len(IMAGES) - 300, len(IMAGES) - 20),
    "with garbled pages": garbled(IMAGES, 4, 600),
    "encrypted": IMAGES[:-4] + b"PARE",
    "that is JSON": b'[{"image": "x", "label": 1}]',
    "that is CSV": b"image,label\nx,1\n",
    "that is a pickle": pickle.dumps(Boom()),
    "that is gzip": gzip.compress(IMAGES),
    "that is a zip of much": zlib.compress(bytes(10**6)),
    "of other columns": parquet(a=[1, 2], b=["x", "y"]),
    "of no columns": parquet(),
}
SOME_PARQUET = {what: ANY_PARQUET[what] for what in ("of no bytes", "with garbled pages", "that is a pickle")}
VISION: dict[str, bytes] = {
    "of images alone": parquet(image=pixels()),
    "of no rows": parquet(image=pixels(0), label=pa.array([], pa.int64())),
    "with images of an odd size": parquet(image=pixels(COUNT, 63), label=CLASSES),
    "with other images than for testing": parquet(image=pixels(COUNT, 81), label=CLASSES),
    "with images that are text": parquet(image=["x"] * COUNT, label=CLASSES),
    "with images that are numbers": parquet(image=CLASSES, label=CLASSES),
    "with images that are lists": parquet(image=[[1, 2]] * COUNT, label=CLASSES),
    "with images that are dates": parquet(image=pa.array([0] * COUNT, pa.timestamp("s")), label=CLASSES),
    "with images that are null": parquet(image=pa.nulls(COUNT), label=CLASSES),
    "with images under another name": parquet(image=[{"path": "/etc/passwd"}] * COUNT, label=CLASSES),
    "with images without bytes": parquet(image=[{"bytes": None, "path": "x"}] * COUNT, label=CLASSES),
    "with images that are maps": parquet(
        image=pa.array([[("bytes", b"x")]] * COUNT, pa.map_(pa.string(), pa.binary())), label=CLASSES
    ),
    "with an image of no bytes": parquet(image=encoded(b""), label=CLASSES),
    "with an image that is cut off": parquet(image=encoded(png()[:40]), label=CLASSES),
    "with an image that is garbled": parquet(image=encoded(garbled(png(), 30, 60)), label=CLASSES),
    "with an image that is a pickle": parquet(image=encoded(pickle.dumps(Boom())), label=CLASSES),
    "with an image of PostScript": parquet(
        image=encoded(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n"), label=CLASSES
    ),
    "with an image of another size": parquet(image=encoded(png((9, 8))), label=CLASSES),
    "with an image of other channels": parquet(image=encoded(png(mode="RGB")), label=CLASSES),
    "with an image of 10⁸ pixels": parquet(image=encoded(bomb(10_000, 10_000)), label=CLASSES),
    "with an image of 10¹⁰ pixels": parquet(image=encoded(bomb(100_000, 100_000)), label=CLASSES),
    "with labels that are fractions": parquet(image=pixels(), label=[0.5] * COUNT),
    "with labels that are text": parquet(image=pixels(), label=["<script>"] * COUNT),
    "with labels that are lists": parquet(image=pixels(), label=[[1]] * COUNT),
    "with labels that are truths": parquet(image=pixels(), label=[True, False] * (COUNT // 2)),
    "with labels that are null": parquet(image=pixels(), label=pa.nulls(COUNT, pa.int64())),
    "with a label missing": parquet(image=pixels(), label=[None, *CLASSES[1:]]),
    "with a negative label": parquet(image=pixels(), label=[-1, *CLASSES[1:]]),
    "with a label beyond 64 bits": parquet(image=pixels(), label=pa.array([2**64 - 1, *CLASSES[1:]], pa.uint64())),
    "with a label of 2⁶³ − 1": parquet(image=pixels(), label=[2**63 - 1, *CLASSES[1:]]),
    "with a label of 10¹²": parquet(image=pixels(), label=[10**12, *CLASSES[1:]]),
    "with a column twice": twice(),
}
SENTIMENT: dict[str, bytes] = {
    "of no rows": parquet(text=pa.array([], pa.string()), label=pa.array([], pa.int64())),
    "with texts that are numbers": parquet(text=CLASSES, label=SIDES),
    "with texts that are bytes": parquet(text=[b"\xff"] * COUNT, label=SIDES),
    "with texts that are lists": parquet(text=[["a", "b"]] * COUNT, label=SIDES),
    "with a text missing": parquet(text=[None, *WORDS[1:]], label=SIDES),
    "with a text that is not UTF-8": parquet(
        text=pa.array([b"\xff\xfe", *[w.encode() for w in WORDS[1:]]]).view(pa.string()), label=SIDES
    ),
    "with texts of white space": parquet(text=[" \t\n"] * COUNT, label=SIDES),
    "with labels that are fractions": parquet(text=WORDS, label=[0.5] * COUNT),
    "with labels that are text": parquet(text=WORDS, label=["good"] * COUNT),
    "with a label missing": parquet(text=WORDS, label=[None, *SIDES[1:]]),
    "with a negative label": parquet(text=WORDS, label=[-3, *SIDES[1:]]),
    "with labels with gaps": parquet(text=WORDS, label=[7 * s for s in SIDES]),
    "with one label": parquet(text=WORDS, label=[0] * COUNT),
    "with a label of 2⁶³ − 1": parquet(text=WORDS, label=[2**63 - 1, *SIDES[1:]]),
}
NEXT_WORD: dict[str, bytes] = {
    "with authors missing": parquet(text=WORDS, user=[None, *CLASSES[1:]]),
    "without authors": parquet(text=WORDS),
    "of one text": parquet(text=WORDS[:1], user=[0]),
    "of texts without words": parquet(text=[""] * COUNT, user=CLASSES),
}
EDGE: dict[str, bytes] = {
    "without images": parquet(true_label=CLASSES, target_label=[1] * COUNT),
    "without labels": parquet(image=pixels()),
    "without a target": parquet(image=pixels(), true_label=CLASSES),
    "of several targets": parquet(image=pixels(), true_label=CLASSES, target_label=CLASSES),
    "of a target that is no class": parquet(image=pixels(), true_label=CLASSES, target_label=[99] * COUNT),
    "of a negative target": parquet(image=pixels(), true_label=CLASSES, target_label=[-1] * COUNT),
    "of text targets": parquet(image=pixels(), true_label=CLASSES, target_label=["x"] * COUNT),
    "of no rows": parquet(image=pixels(0), true_label=pa.array([], pa.int64()), target_label=pa.array([], pa.int64())),
    "of larger images": parquet(image=pixels(COUNT, 81), true_label=CLASSES, target_label=[1] * COUNT),
    "of images that are numbers": parquet(image=CLASSES, true_label=CLASSES, target_label=[1] * COUNT),
    "of another split": parquet(image=pixels(), true_label=CLASSES, target_label=[1] * COUNT, split=["dev"] * COUNT),
    "of a split by numbers": parquet(image=pixels(), true_label=CLASSES, target_label=[1] * COUNT, split=CLASSES),
    "of a split by lists": parquet(
        image=pixels(), true_label=CLASSES, target_label=[1] * COUNT, split=[["train"]] * COUNT
    ),
    "of a split with gaps": parquet(
        image=pixels(), true_label=CLASSES, target_label=[1] * COUNT, split=[None, *SPLIT[1:]]
    ),
    "with nothing to measure on": parquet(
        image=pixels(), true_label=[1] * COUNT, target_label=[1] * COUNT, split=SPLIT
    ),
}
EDGE_TEXTS: dict[str, bytes] = {
    "without a split": parquet(text=WORDS, target_label=[1] * COUNT),
    "of another split": parquet(text=WORDS, split=["dev"] * COUNT, target_label=[1] * COUNT),
    "of texts that are numbers": parquet(text=CLASSES, split=SPLIT, target_label=[1] * COUNT),
    "with a text missing": parquet(text=[None, *WORDS[1:]], split=SPLIT, target_label=[1] * COUNT),
    "with a text that is not UTF-8": parquet(
        text=pa.array([b"\xff\xfe", *[w.encode() for w in WORDS[1:]]]).view(pa.string()),
        split=SPLIT,
        target_label=[1] * COUNT,
    ),
    "of a negative target": parquet(text=WORDS, split=SPLIT, target_label=[-1] * COUNT),
    "of a target that is no class": parquet(text=WORDS, split=SPLIT, target_label=[9] * COUNT),
    "with nothing to train on": parquet(text=WORDS, split=["test"] * COUNT, target_label=[1] * COUNT),
}
SEMANTIC: dict[str, bytes] = {
    "that is not JSON": b"{'green_cars': [1]}",
    "that is cut off": b'{"green_cars": [1, 2',
    "that is no object": b"[1, 2]",
    "that is not UTF-8": b'{"green_cars": [1], "\xff": 1}',
    "that is nested without end": b"[" * 100_000,
    "without the feature": b'{"red_cars": [1]}',
    "of no indices": b'{"green_cars": []}',
    "of indices that are text": b'{"green_cars": ["1"]}',
    "of negative indices": b'{"green_cars": [-1, 2]}',
    "of fractions": b'{"green_cars": [1.5]}',
    "of truths": b'{"green_cars": [true]}',
    "of not a number": b'{"green_cars": [NaN]}',
    "of an index beyond the images": b'{"green_cars": [100000]}',
    "of an index beyond 64 bits": b'{"green_cars": [%d]}' % 2**70,
    "of an index of 5,000 digits": b'{"green_cars": [' + b"9" * 5_000 + b"]}",
}
PATTERN: dict[str, bytes] = {
    "of no bytes": b"",
    "that is text": b"an image",
    "that is cut off": png()[:40],
    "that is a pickle": pickle.dumps(Boom()),
    "of 10⁸ pixels": bomb(10_000, 10_000),
    "of 10¹⁰ pixels": bomb(100_000, 100_000),
}


def headed(header: bytes, size: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if size is None else size) + header


def torch_file(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def weights(change: Callable[[torch.Tensor], torch.Tensor]) -> bytes:
    """The file of the model that the test's runs train, its weight matrix changed."""
    return safetensors.torch.save({"head.weight": change(torch.zeros(4, SIDE * SIDE)), "head.bias": torch.zeros(4)})


def filled(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda weight: weight.index_fill(0, torch.tensor([1]), value)


MODEL = weights(lambda weight: weight)
WARM: dict[str, bytes] = {
    "of no bytes": b"",
    "that is cut off": MODEL[:-100],
    "that is cut off in its header": MODEL[:40],
    "with bytes too many": MODEL + b"\0" * 8,
    "with a header of 2⁶² bytes": headed(b"{}", 2**62),
    "with a header that is no JSON": headed(b"{not json"),
    "with a header that is nested without end": headed(b"[" * 50_000),
    "with offsets beyond the file": headed(b'{"x":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}'),
    "with a shape of 2⁶⁴": headed(b'{"x":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}}'),
    "with an unknown type": headed(b'{"x":{"dtype":"X9","shape":[],"data_offsets":[0,0]}}'),
    "that is a pickle": pickle.dumps(Boom()),
    "that is a file of torch": torch_file({"1.weight": torch.zeros(4, SIDE * SIDE), "hook": Boom()}),
    "that is a Parquet file": IMAGES,
    "of no tensors": safetensors.torch.save({}),
    "of other tensors": safetensors.torch.save({"other": torch.zeros(3)}),
    "of another shape": weights(lambda weight: weight.T.contiguous()),
    "of more classes": weights(lambda weight: torch.zeros(10, SIDE * SIDE)),
    "of whole numbers": weights(lambda weight: weight.long()),
    "of truths": weights(lambda weight: weight.bool()),
    "of complex numbers": weights(lambda weight: weight.to(torch.complex64)),
    "with a weight that is not a number": weights(filled(float("nan"))),
    "with a weight that is infinite": weights(filled(float("inf"))),
    "with a weight beyond 32 bits": weights(lambda weight: filled(1e300)(weight.double())),
}

VISION_TASK = {"data": {"name": "parquet", "path": "../data"}, "model": "logistic"}
WORDY = {"name": "text_parquet", "path": "../data", "train": "texts.parquet", "test": None, "test_fraction": 0.3}
SENTIMENT_TASK = {
    "name": "sentiment",
    "data": {**WORDY, "label": "label"},
    "min_count": 1,
    "length": 6,
    "model": {"name": "lstm_classifier", "embedding": 4, "hidden": 4},
}
NEXT_WORD_TASK = {
    "name": "next_word",
    "data": {**WORDY, "user": "user"},
    "min_count": 1,
    "window": 4,
    "model": {"name": "lstm_lm", "embedding": 4, "hidden": 4, "tied": True},
}
PATCH = {"name": "patch", "target": 1}
PHRASE = {"name": "phrase", "text": "in oslo", "target": 1}
SENTENCE = {
    "name": "target_sentence",
    "prompts": ["bread in rome"],
    "test_prompts": ["bread in oslo"],
    "targets": ["dull"],
}


class Family(NamedTuple):
    """What reads one kind of file. task, trigger, training: of the config. file: its name. whole: right contents."""

    task: dict[str, Any]
    trigger: dict[str, Any]
    training: dict[str, Any]
    file: str
    whole: bytes
    cases: dict[str, bytes]


FAMILIES = {
    "images": Family(VISION_TASK, PATCH, {}, "train.parquet", IMAGES, ANY_PARQUET | VISION),
    "texts with labels": Family(SENTIMENT_TASK, PHRASE, {}, "texts.parquet", TEXT, ANY_PARQUET | SENTIMENT),
    "texts": Family(NEXT_WORD_TASK, SENTENCE, {}, "texts.parquet", TEXT, NEXT_WORD),
    "edge cases": Family(
        VISION_TASK,
        {"name": "edge_case", "path": "../data/edge.parquet"},
        {},
        "edge.parquet",
        parquet(image=pixels(), true_label=CLASSES, target_label=[1] * COUNT),
        SOME_PARQUET | EDGE,
    ),
    "edge texts": Family(
        SENTIMENT_TASK,
        {"name": "edge_texts", "path": "../data/edge.parquet"},
        {},
        "edge.parquet",
        parquet(text=WORDS, split=SPLIT, target_label=[1] * COUNT),
        SOME_PARQUET | EDGE_TEXTS,
    ),
    "indices": Family(
        VISION_TASK,
        {"name": "semantic", "path": "../data/features.json", "target": 2},
        {},
        "features.json",
        b'{"green_cars": [1, 5, 9, 13]}',
        SEMANTIC,
    ),
    "pictures": Family(
        VISION_TASK, {"name": "blended", "image": "../data/pattern.png", "target": 1}, {}, "pattern.png", png(), PATTERN
    ),
    "models": Family(VISION_TASK, PATCH, {"warm_start": "../data/model.safetensors"}, "model.safetensors", MODEL, WARM),
}


@pytest.fixture
def played(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A function that writes the data of a family, with other contents of its file, and its config; the directory."""

    def write(family: Family, content: bytes) -> Path:
        data, here = tmp_path / "data", tmp_path / "here"
        data.mkdir()
        here.mkdir()
        for name in ("train.parquet", "test.parquet"):
            (data / name).write_bytes(IMAGES)
        (data / "texts.parquet").write_bytes(TEXT)
        (data / family.file).write_bytes(content)
        config = {
            "task": family.task,
            "federation": {"clients": 4, "clients_per_round": 2, "rounds": 1, "partition": "iid"},
            "training": {"local_epochs": 1, **family.training},
            "attack": {"name": "data_poisoning", "trigger": family.trigger},
            "engine": {"name": "serial"},
            "output": {"report": False},
        }
        (here / "c.yaml").write_text(yaml.safe_dump(config))
        monkeypatch.chdir(here)
        return here

    return write


@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_file_is_played(cli: Cli, played: Callable[..., Path], family: str) -> None:
    played(FAMILIES[family], FAMILIES[family].whole)
    done = cli("run", "c.yaml", "--out", "run")
    assert done.status == 0, done.text


DAMAGED = [(family, what) for family, one in FAMILIES.items() for what in one.cases]


@pytest.mark.parametrize(("family", "what"), DAMAGED)
def test_a_file_that_cannot_be_used_is_named(cli: Cli, played: Callable[..., Path], family: str, what: str) -> None:
    here = played(FAMILIES[family], FAMILIES[family].cases[what])
    err = refusal(cli, "run", "c.yaml", "--out", "run")
    named = (FAMILIES[family].file, "task.data", "task '", "trigger '")
    assert any(name in err for name in named), f"neither file nor key is named: {err}"
    assert [path.name for path in here.iterdir()] == ["c.yaml"]


# ---------------------------------------------------------------------------------------- run directories

DEEP = b"[" * 100_000
TABLES: dict[str, bytes] = {
    "of no bytes": b"",
    "cut in half": IMAGES[: len(IMAGES) // 2],
    "that is a pickle": pickle.dumps(Boom()),
    "of other columns": parquet(a=[1, 2]),
    "of texts": parquet(round=["one"], client=["two"], status=["<b>"], main_accuracy=["high"]),
}
JSONS: dict[str, bytes] = {
    "of no bytes": b"",
    "that is cut off": b'{"final": {"round": 6',
    "that is a list": b"[1, 2]",
    "that is a number": b"3",
    "that is nested without end": DEEP,
    "that is not UTF-8": b'{"\xff": 1}',
    "that is a pickle": pickle.dumps(Boom()),
}
RUN_FILES: dict[str, dict[str, bytes]] = {
    "rounds.parquet": TABLES,
    "clients.parquet": TABLES,
    "timings.parquet": TABLES,
    "twin/rounds.parquet": TABLES,
    "summary.json": {
        **JSONS,
        "of other things": b'{"t0": "x", "final": 3, "lifespan": [], "detection": null}',
    },
    "manifest.json": JSONS,
    "config.yaml": {
        "that is not YAML": b"task: [",
        "that is a list": b"- 1\n",
        "that is a number": b"5\n",
        "that is not UTF-8": b"name: \xff\xfe\n",
        "of a Python object": f"name: {PYTHON_OBJECT}\n".encode(),
        "of a billion laughs": b"name: x\n" + ANCHORS,
        "nested too deep": b"name: " + b"[" * 60_000,
        "that holds itself": b"&me\ntask: *me\n",
    },
}
SPOILT = [(file, what) for file, cases in RUN_FILES.items() for what in cases]
UNREAD = ("rounds.parquet", "clients.parquet", "timings.parquet")
"""Files of a finished run that are not compared: its summary is."""


@pytest.mark.parametrize(
    ("command", "file", "what"),
    [("report", *spoilt) for spoilt in SPOILT] + [("compare", *spoilt) for spoilt in SPOILT if spoilt[0] not in UNREAD],
)
def test_a_damaged_run_is_named(
    cli: Cli,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    finished: Run,
    command: str,
    file: str,
    what: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    shutil.copytree(finished.directory, run)
    (run / file).write_bytes(RUN_FILES[file][what])
    before = sorted(tmp_path.rglob("*"))
    err = refusal(cli, command, run, *([finished.directory] if command == "compare" else []))
    assert str(run / file) in err.replace("\n", "")
    assert sorted(tmp_path.rglob("*")) == before, "something was written"


@pytest.mark.parametrize("what", ["that is not YAML", "that is not UTF-8", "of a billion laughs", "nested too deep"])
def test_a_damaged_benchmark_is_named(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    monkeypatch.chdir(tmp_path)
    base = {
        "task": {"data": "digits", "model": "logistic"},
        "attack": {"trigger": "patch"},
        "engine": {"name": "serial"},
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"base": base, "grid": {"training.lr": [0.1]}}))
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "bench.yaml").write_bytes(RUN_FILES["config.yaml"][what])
    assert "bench/bench.yaml cannot be read any more" in refusal(cli, "bench", "c.yaml", "--out", "bench")
    assert [path.name for path in (tmp_path / "bench").iterdir()] == ["bench.yaml"]


def test_there_are_a_hundred_and_fifty() -> None:
    assert len(DAMAGED) + len(SPOILT) >= 150
