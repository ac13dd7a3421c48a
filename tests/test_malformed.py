"""Malformed configs and data files by the hundred, made from the shipped ones: one message that names the key or the
file, exit status 2, and nothing begun.

Every mutation is drawn from a seeded stream, so that the cases are the same on every machine. A mutation that leaves a
config right is not counted; ``fedsim validate`` then has to agree that it is right.
"""

from __future__ import annotations

import copy
import gzip
import io
import pickle
import random
import re
import shutil
import signal
import struct
import zlib
from collections.abc import Callable, Iterator
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

from fedsim.config import find, shipped
from fedsim.config.reading import config_directory, read_with_parents
from fedsim.experiment import Run

pytestmark = pytest.mark.usefixtures("own_registry")

Cli = Callable[..., Any]

# ------------------------------------------------------------------------------------------- what is put in

BOMB = "[&a [x,x,x,x,x,x,x,x,x,x], " + ", ".join(
    f"&{b} [{','.join([f'*{a}'] * 10)}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
CANARY = "canary"
UNUSABLE = {
    "an unknown tag": "!thing 1",
    "a Python object": f'!!python/object/apply:os.system ["touch {CANARY}"]',
    "a Python object made anew": f"!!python/object/new:subprocess.Popen [[touch, {CANARY}]]",
    "a Python name": "!!python/name:os.system",
    "a Python module": "!!python/module:antigravity",
    "a Python tuple": "!!python/tuple [1, 2]",
    "an alias of nothing": "*nobody",
    "an alias of itself": "&me [*me]",
    "a billion laughs": f"{BOMB}]",
    "nested too deep": "[" * 60 + "]" * 60,
    "nested beyond the parser": "[" * 20_000,
    "nested mappings": "{a: " * 200 + "1" + "}" * 200,
    "a number of 5,000 digits": "9" * 5_000,
    "no integer": "!!int many",
    "no number": "!!float many",
    "no boolean": "!!bool many",
    "no time": "!!timestamp 2020-99-99",
    "no base64": '!!binary "=="',
    "a set": "!!set {a, b}",
    "a key given twice": "{a: 1, a: 2}",
    "a key that is null": "{null: 1}",
    "a key that is a date": "{!!timestamp 2020-01-01: 1}",
    "a key that is a list": "{? [1] : 2}",
    "no merge": "{<<: 1}",
    "an unknown escape": r'"\q"',
    "half a character": r'"\ud800"',
    "an unclosed quote": "'",
    "an unclosed bracket": "[1, 2",
    "a reserved character": "@at",
    "a reference to nothing": "${nothing.there}",
    "a reference into a circle": "${federation.round_trip}",
    "a reference to a variable that is not set": "${oc.env:FEDSIM_NOT_SET}",
    "a reference that runs something": "${rm:x}",
    "a reference cut off": '"${"',
    "references in each other": '"' + "${a" * 300 + "}" * 300 + '"',
    "a reference that ends the parser": "${oc.decode:'['}",
}
"""YAML that no key of a config can hold."""

ODD = {
    "null": "null",
    "true": "true",
    "zero": "0",
    "minus one": "-1",
    "half": "0.5",
    "not a number": ".nan",
    "infinity": ".inf",
    "minus infinity": "-.inf",
    "1e999": "1e999",
    "2^63": "9223372036854775808",
    "a huge number": "1" + "0" * 300,
    "hexadecimal of 6,000 digits": "0x" + "f" * 6_000,
    "empty text": '""',
    "blank text": '" "',
    "a word": "nonsense",
    "a word of another kind": "krum",
    "very long text": "x" * 20_000,
    "control characters": r'"\x00\x1b]0;title\x07\x1b[2J"',
    "text that turns round": r'"\u202Egnp.exe\u2066"',
    "other scripts": '"模型 نموذج 💥"',
    "a wild card": '"**/*"',
    "a root": "/",
    "a stranger's home": "~nobody-of-that-name/x",
    "markup": '"[bold red]x[/bold red][/] <script>alert(1)</script>"',
    "bytes": "!!binary aGVsbG8=",
    "a date": "2020-01-01",
    "a list": "[1, two, [3]]",
    "an empty list": "[]",
    "a list of nulls": "[null, null]",
    "a mapping": "{a: {b: [1]}}",
    "an empty mapping": "{}",
    "a mapping of numbers": "{1: 2, 3.5: 4, true: 5}",
    "a mapping with a name": "{name: nonsense}",
    "a mapping with a name that is none": "{name: [patch]}",
    "to be filled in": '"???"',
}
"""YAML that few keys can hold."""

PLACE = "put-it-here"

# ---------------------------------------------------------------------------------------------- how it is judged


class Begun(Exception):
    """The command has found nothing wrong and would now load data."""


def begin(*_: object, **__: object) -> None:
    raise Begun


@pytest.fixture
def bounded() -> Iterator[None]:
    """Ends a test that a malformed file keeps busy for ever: after two minutes of computing, however slow the clock."""

    def stop(*_: object) -> None:
        raise AssertionError("a malformed file keeps the command busy")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, 120)
    yield
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    signal.signal(signal.SIGVTALRM, before)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bounded: None) -> Path:
    """An empty working directory; the data files of the shipped configs are named elsewhere, and are never opened."""
    data = tmp_path / "data"
    data.mkdir()
    for name in (
        *(f"{stem}-{part}.parquet" for stem in ("cifar10", "mnist_by_writer") for part in ("train", "test")),
        *(f"{stem}.parquet" for stem in ("edge_southwest", "ubuntu_irc", "sentiment140", "tiny_shakespeare_roles")),
    ):
        (data / name).touch()
    (data / "notes.yaml").write_bytes(b"\xff\xfe\x00")
    monkeypatch.setenv("FEDSIM_DATA", str(data))
    monkeypatch.delenv("FEDSIM_NOT_SET", raising=False)
    monkeypatch.setattr("fedsim.experiment._Experiment", begin)
    monkeypatch.setattr("fedsim.benchmark.running.play", begin)
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    return here


KEY_NAMED = re.compile(r"  (?!not valid|mappings|it is|cannot|a config|unknown|expected)\S[^:]*: \S")
FILE_NAMED = re.compile(
    r"  (not valid YAML: |mappings and lists |mappings, lists |it is larger |cannot be read: |a config is )"
)


def is_refused(cli: Cli, place: Path, *command: object) -> bool:
    """Whether the command refuses what it is given, with everything a refusal must be; False if it would begin."""
    try:
        done = cli(command[0], "--out", "run", *command[1:])
    except Begun:
        shutil.rmtree("run", ignore_errors=True)
        return False
    said = f"{command[1:]!s:.300}: {done.out + done.err:.2000}"
    assert done.status == 2, said
    assert "Traceback" not in done.text, said
    assert done.err.startswith(("error: ", "Usage: ")), said
    assert not done.out, said
    assert all(c.isprintable() or c == "\n" for c in done.err), said
    assert len(done.err) < 60_000, said
    lines = done.err.splitlines()
    problems = [line for line in lines[1:] if line.startswith("  ")]
    if re.match(r"error: \d+ problem", lines[0]):
        count = int(lines[0].split()[1])
        assert len(problems) == count, said
        for line in problems:
            in_file = FILE_NAMED.match(line) and re.fullmatch(r"error: 1 problem in (\S+|the command line):", lines[0])
            assert in_file or KEY_NAMED.match(line), f"{line!r} names neither key nor file; {said}"
    assert [path.name for path in place.iterdir() if path.name != "c.yaml"] == [], said
    return True


def paths(value: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where every value of nested containers lies."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = [prefix] if prefix else []
    for key, item in items:
        found += paths(item, (*prefix, key))
    return found


def changed(raw: dict[str, Any], path: tuple[Any, ...], change: Callable[[Any, Any], None]) -> dict[str, Any]:
    """A copy in which ``change(container, key)`` has been made at ``path``."""
    made = copy.deepcopy(raw)
    holder: Any = made
    for key in path[:-1]:
        holder = holder[key]
    change(holder, path[-1])
    return made


def written(raw: dict[str, Any]) -> str:
    return yaml.safe_dump(raw, sort_keys=False, allow_unicode=True, width=1000)


def with_value(raw: dict[str, Any], path: tuple[Any, ...], text: str) -> str:
    """The mapping as YAML, with ``text`` as the value at ``path``."""

    def put(holder: Any, key: Any) -> None:
        holder[key] = PLACE

    return written(changed(raw, path, put)).replace(PLACE, text, 1)


def mutation(raw: dict[str, Any], draw: random.Random) -> str:
    """The mapping as YAML, with one thing wrong with it (mostly)."""
    path = draw.choice(paths(raw))
    kind = draw.choice(["unusable", "odd", "odd", "odd", "odd", "unknown", "rename", "delete", "twice"])
    if kind == "unusable":
        return with_value(raw, path, draw.choice(list(UNUSABLE.values())))
    if kind == "odd":
        return with_value(raw, path, draw.choice(list(ODD.values())))
    if kind == "twice":
        text = written(raw)
        line = draw.choice([line for line in text.splitlines() if re.match(r"\w+:", line)])
        return f"{text}{line} {{}}\n"

    def change(holder: Any, key: Any) -> None:
        if isinstance(holder, list):
            holder.insert(key, {"name": "nonsense"})
        elif kind == "unknown":
            holder[
                draw.choice(["nonsense", "learning_rate", "Seed", "", "a b", "é", "\x1b[31m", "[red]", "x" * 5_000])
            ] = 1
        elif kind == "rename":
            holder[f"{key}s"] = holder.pop(key)
        else:
            del holder[key]

    return written(changed(raw, path, change))


def damage(raw: bytes, draw: random.Random) -> bytes:
    """The bytes of a file that was cut off, garbled, or written in another encoding."""
    kind = draw.choice(
        ["cut", "garbage", "insert", "tabs", "utf-16", "utf-32", "latin", "binary", "nul", "quotes", "join"]
    )
    at = draw.randrange(len(raw))
    if kind == "cut":
        return raw[:at]
    if kind == "garbage":
        return raw[:at] + draw.randbytes(40) + raw[at + 40 :]
    if kind == "insert":
        return raw[:at] + draw.choice([b"]", b"}", b": ", b"&", b"*", b"!", b"%", b"\t", b"- ", b"? "]) + raw[at:]
    if kind == "tabs":
        return raw.replace(b"  ", b"\t")
    if kind in ("utf-16", "utf-32"):
        return raw.decode().encode(kind)
    if kind == "latin":
        return raw[:at] + "é".encode("latin-1") + raw[at:]
    if kind == "binary":
        return draw.choice([b"PK\x03\x04", b"\x1f\x8b\x08", b"PAR1", b"\x80\x04\x95"]) + draw.randbytes(200)
    if kind == "nul":
        return raw[:at] + b"\0" + raw[at:]
    if kind == "quotes":
        return raw[:at] + b"'" + raw[at:]
    return raw.replace(b"\n", b" ", draw.randrange(1, 20))


# ------------------------------------------------------------------------------------------------ configs

FROM_KEYS, FROM_BYTES, FROM_COMMAND_LINE, FROM_BENCHES = 8, 4, 80, 36
"""So many malformed ones each test makes at least: of each shipped config, of each, of the command line, of benches."""
PLACES = [("name",), ("training",), ("attack", "trigger", "target"), ("defense", 0)]

TEXTS = {
    "just text": b"just text",
    "a number": b"5\n",
    "a list": b"- seed\n- 1\n",
    "two documents": b"seed: 1\n---\nseed: 2\n",
    "another version of YAML": b"%YAML 9.9\n---\nseed: 1\n",
    "a tag of its own": b"%TAG ! tag:example.org,2000:\n---\n!config {seed: 1}\n",
    "a bomb of anchors": b"a: &a [x, x, x, x, x, x, x, x, x, x]\n"
    + b"".join(
        b"%c: &%c [%s]\n" % (b, b, b", ".join([b"*%c" % a] * 10))
        for a, b in zip(range(97, 110), range(98, 111), strict=True)
    ),
    "a bomb of interpolations": b"a: xxxxxxxxxx\n"
    + b"".join(b'%c: "%s"\n' % (b, b"${%c}" % a * 10) for a, b in zip(range(97, 110), range(98, 111), strict=True)),
    "a bomb of relative interpolations": b"training:\n  a: xxxxxxxxxx\n"
    + b"".join(b'  %c: "%s"\n' % (b, b"${.%c}" % a * 10) for a, b in zip(range(97, 110), range(98, 111), strict=True)),
    "a mapping that holds itself": b"&me\ntraining: *me\n",
    "sections in each other for ever": b"".join(b" " * i + b"training:\n" for i in range(1000)),
    "larger than a config can be": b"# " + b"x" * 2**20,
    "a circle of two": b'training: {lr: "${training.momentum}", momentum: "${training.lr}"}\n',
    "a reference to its own section": b'training: {lr: "${training}"}\n',
    "a parent that is the file": b"defaults: c\n",
    "a parent that is missing": b"defaults: [base, nowhere]\n",
    "a parent that is no name": b"defaults: {base: 1}\n",
    "a parent that is no YAML": b"defaults: ../data/notes.yaml\n",
    "a parent of an endless name": b"defaults: " + b"x" * 20_000,
    "a parent with a nul in its name": b'defaults: "a\\0b"\n',
    "a plugin that is missing": b"plugins: [nowhere.py]\n",
    "a plugin that is no Python": b"plugins: [c.yaml]\n",
    "a plugin that is a directory": b"plugins: [.]\n",
    "a plugin with a nul in its name": b'plugins: ["a\\0.py"]\n',
    "plugins that are one text": b"plugins: nowhere.py\n",
    "mappings and lists where texts belong": b"task: {name: next_word, data: {name: text_parquet, path: ../data, "
    b"train: ubuntu_irc.parquet, test: null, user: user, where: [{a: 1}, [b]]}, model: lstm_lm}\n"
    b"attack: {trigger: target_sentence}\n",
    "more rounds than can be planned": b"federation: {rounds: 1000000000000000}\n",
    "more clients than can be planned": b"federation: {clients: 1000000000000000}\n",
}


@pytest.mark.parametrize("name", shipped())
def test_a_shipped_config_with_a_mistake_in_it(cli: Cli, place: Path, name: str) -> None:
    raw, draw, refused = read_with_parents(find(name)), random.Random(name), 0
    for _ in range(FROM_KEYS + 3):
        (place / "c.yaml").write_text(mutation(raw, draw), encoding="utf-8")
        if is_refused(cli, place, "run", "c.yaml"):
            refused += 1
        else:
            assert cli("validate", "c.yaml").status == 0
    assert refused >= FROM_KEYS


@pytest.mark.parametrize("name", shipped())
def test_a_shipped_config_that_was_damaged(cli: Cli, place: Path, name: str) -> None:
    raw, draw, refused = find(name).read_bytes(), random.Random(name), 0
    for _ in range(FROM_BYTES + 3):
        (place / "c.yaml").write_bytes(damage(raw, draw))
        if is_refused(cli, place, "run", "c.yaml"):
            refused += 1
        else:
            assert cli("validate", "c.yaml").status == 0
    assert refused >= FROM_BYTES


@pytest.mark.parametrize("what", UNUSABLE)
def test_a_value_that_no_key_takes(cli: Cli, place: Path, what: str) -> None:
    raw = read_with_parents(find("quickstart"))
    for path in PLACES:
        (place / "c.yaml").write_text(with_value(raw, path, UNUSABLE[what]), encoding="utf-8")
        assert is_refused(cli, place, "run", "c.yaml"), path


@pytest.mark.parametrize("what", ODD)
def test_a_value_that_is_no_number_of_clients(cli: Cli, place: Path, what: str) -> None:
    raw = read_with_parents(find("quickstart"))
    path = ("federation", "clients_per_round")
    (place / "c.yaml").write_text(with_value(raw, path, ODD[what]), encoding="utf-8")
    assert is_refused(cli, place, "run", "c.yaml")
    assert "federation.clients_per_round: " in cli("validate", "c.yaml").err


@pytest.mark.parametrize("what", TEXTS)
def test_a_file_that_is_no_config(cli: Cli, place: Path, what: str) -> None:
    (place / "c.yaml").write_bytes(TEXTS[what])
    assert is_refused(cli, place, "run", "c.yaml")


def test_the_command_line_with_a_mistake_in_it(cli: Cli, place: Path) -> None:
    raw, draw, refused = read_with_parents(find("quickstart")), random.Random("the command line"), 0
    keys = [".".join(map(str, path)) for path in paths(raw)]
    strange = [
        "",
        ".",
        "..",
        "=",
        "seed",
        "seed.",
        ".seed",
        "nonsense",
        "defense.9.bound",
        "defense.²",
        "defense.٣",
        "0",
    ]
    strange += ["defense." + "9" * 5_000, "a." * 2_000 + "a", "x" * 5_000, "\x1b[31m", "[bold]", "attack.craft.-1", "-"]
    options = [f"{key}={value}" for key in strange for value in ("1", "[")]
    values = [*UNUSABLE.values(), *ODD.values(), "1\nseed: 2", "1}", "{", "]", "a: b: c"]
    options += [f"{draw.choice(keys)}={draw.choice(values)}" for _ in range(60)]
    for option in options:
        refused += is_refused(cli, place, "run", "--", "quickstart", option)
    assert refused >= FROM_COMMAND_LINE


def first(entries: Any) -> Any:
    """The first entry of an axis of a benchmark: few cells are soon checked."""
    return entries[:1] if isinstance(entries, list) else dict([next(iter(entries.items()))])


def test_benchmarks_with_a_mistake_in_them(cli: Cli, place: Path) -> None:
    refused = 0
    for name in shipped(benches=True):
        file = config_directory() / "bench" / f"{name}.yaml"
        raw, draw = yaml.safe_load(file.read_text(encoding="utf-8")), random.Random(name)
        raw["grid"] = {axis: first(entries) for axis, entries in raw["grid"].items()}
        for _ in range(12):
            made = mutation(raw, draw).encode()
            (place / "c.yaml").write_bytes(made if draw.random() < 0.8 else damage(made, draw))
            if is_refused(cli, place, "bench", "c.yaml"):
                refused += 1
            else:
                assert cli("bench", "c.yaml", "--dry-run").status == 0
        (place / "c.yaml").write_text(written({**raw, "seeds": [0, 2**63]}))
        assert is_refused(cli, place, "bench", "c.yaml")
    assert refused >= FROM_BENCHES


def test_there_are_five_hundred() -> None:
    written_out = len(UNUSABLE) * len(PLACES) + len(ODD) + len(TEXTS)
    assert written_out + len(shipped()) * (FROM_KEYS + FROM_BYTES) + FROM_COMMAND_LINE + FROM_BENCHES >= 500
    assert len(DAMAGED) + len(SPOILT) >= 150


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


class Boom:
    """Unpickled, it leaves a file behind."""

    def __reduce__(self) -> Any:
        return (Path.touch, (Path(CANARY),))


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
def played(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bounded: None) -> Callable[..., Path]:
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
    done = cli("run", "c.yaml", "--out", "run")
    assert done.status == 2, done.text
    assert "Traceback" not in done.text
    assert done.err.startswith("error: ")
    assert all(c.isprintable() or c == "\n" for c in done.err)
    assert len(done.err) < 3_000
    named = (FAMILIES[family].file, "task.data", "task '", "trigger '")
    assert any(name in done.err for name in named), f"neither file nor key is named: {done.err}"
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
        "of a Python object": f"name: {UNUSABLE['a Python object']}\n".encode(),
        "of a billion laughs": b"name: x\n" + TEXTS["a bomb of anchors"],
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
    bounded: None,
    command: str,
    file: str,
    what: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    shutil.copytree(finished.directory, run)
    (run / file).write_bytes(RUN_FILES[file][what])
    before = sorted(tmp_path.rglob("*"))
    done = cli(command, run, *([finished.directory] if command == "compare" else []))
    assert done.status == 2, done.text
    assert "Traceback" not in done.text
    assert done.err.startswith("error: ")
    assert all(c.isprintable() or c == "\n" for c in done.err)
    assert len(done.err) < 3_000
    assert str(run / file) in done.err.replace("\n", "")
    assert sorted(tmp_path.rglob("*")) == before, "something was written"


@pytest.mark.parametrize("what", ["that is not YAML", "that is not UTF-8", "of a billion laughs", "nested too deep"])
def test_a_damaged_benchmark_is_named(cli: Cli, place: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    monkeypatch.undo()  # nothing is stopped on its way to the players
    monkeypatch.chdir(place)
    base = {
        "task": {"data": "digits", "model": "logistic"},
        "attack": {"trigger": "patch"},
        "engine": {"name": "serial"},
    }
    (place / "c.yaml").write_text(yaml.safe_dump({"base": base, "grid": {"training.lr": [0.1]}}))
    (place / "bench").mkdir()
    (place / "bench" / "bench.yaml").write_bytes(RUN_FILES["config.yaml"][what])
    done = cli("bench", "c.yaml", "--out", "bench")
    assert done.status == 2, done.text
    assert "bench/bench.yaml cannot be read any more" in done.err
    assert [path.name for path in (place / "bench").iterdir()] == ["bench.yaml"]


# ------------------------------------------------------------------------------------- the page that says so


def test_every_test_that_the_page_on_reliability_names_is_there() -> None:
    root = Path(__file__).parents[1]
    page = (root / "docs" / "reliability.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page)
    assert len(named) > 40
    missing = [
        f"{file}::{name}"
        for file, name in named
        if not re.search(rf"^def {name}\(", (root / file).read_text(encoding="utf-8"), re.MULTILINE)
    ]
    assert missing == []
    assert page.count("`tests/") == len(named), "a test is named with its file and its function"
    assert len(re.findall(r"^## \d", page, re.MULTILINE)) == 7, "a section for each promise"
