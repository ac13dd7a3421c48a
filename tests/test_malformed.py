"""Malformed configs by the hundred, made from the shipped ones: one message that names the key or the file, exit
status 2, and nothing begun.

Every mutation is drawn from a seeded stream, so that the cases are the same on every machine. A mutation that leaves a
config right is not counted; ``fedsim validate`` then has to agree that it is right.
"""

from __future__ import annotations

import copy
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedsim.config import find, shipped
from fedsim.config.reading import config_directory, read_with_parents
from tests.support.malformed import ANCHORS, CANARY, PYTHON_OBJECT, paths

pytestmark = pytest.mark.usefixtures("own_registry")

Cli = Callable[..., Any]

# ------------------------------------------------------------------------------------------- what is put in

BOMB = "[&a [x,x,x,x,x,x,x,x,x,x], " + ", ".join(
    f"&{b} [{','.join([f'*{a}'] * 10)}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
UNUSABLE = {
    "an unknown tag": "!thing 1",
    "a Python object": PYTHON_OBJECT,
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
    "a bomb of anchors": ANCHORS,
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
