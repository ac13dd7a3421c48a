"""What a run leaves behind tells nothing of who played it and where; text from configs and data stays text."""

from __future__ import annotations

import importlib.util
import json
import unicodedata
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from fedsim.config import load_config
from fedsim.recording.portable import portable

pytestmark = pytest.mark.usefixtures("own_registry")

Cli = Callable[..., Any]
USER, HOST = "alice-of-nowhere", "the-laptop-of-alice"

PLUGIN = '''
import dataclasses
from fedsim.attack import Attack
from fedsim.data import Corpus, Texts
from fedsim.plugins import Parameters, parameter, register
from fedsim.tasks.base import Dataset

import torch

NAMES = {names!r}


@dataclasses.dataclass(frozen=True)
class FileParameters(Parameters):
    file: str = parameter("", "a file")


@register("of_a_stranger")
class Stranger(Dataset):
    """Texts of two classes."""

    tasks = ("sentiment",)
    Parameters = FileParameters

    def load(self):
        words = [f"{{('bad', 'good')[i % 2]}} bread in {{('oslo', 'rome')[i % 3 > 0]}} today{{i}}" for i in range(60)]
        texts = Texts(tuple(words), torch.arange(60) % 2)
        train, test = texts.subset(torch.arange(40)), texts.subset(torch.arange(40, 60))
        return Corpus(train, test, 2, {{"name": NAMES[0], "id": self.parameters.file, "words": NAMES}}, tuple(NAMES))


@register("failing")
class Failing(Attack):
    """Fails as a file that is missing does."""

    def craft(self, update, context):
        raise OSError("no such file: " + {missing!r} + " \\x1b]0;gotcha\\x07\\x1b[31m[bold]red[/bold]")
'''


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home directory of somebody, whose name and machine are known to the system; it is the working directory."""
    directory = tmp_path / "home" / USER
    (directory / "data").mkdir(parents=True)
    for name in ("LOGNAME", "USER", "USERNAME", "LNAME"):
        monkeypatch.setenv(name, USER)
    monkeypatch.setenv("HOME", str(directory))
    monkeypatch.setenv("FEDSIM_DATA", str(directory / "data"))
    monkeypatch.setattr("socket.gethostname", lambda: HOST)
    monkeypatch.setattr("platform.node", lambda: HOST)
    monkeypatch.chdir(directory)
    rng = np.random.default_rng(0)
    rows = pa.array([rng.integers(0, 256, 64, np.uint8).tobytes() for _ in range(48)], pa.binary(64))
    for part in ("train", "test"):
        pq.write_table(
            pa.table({"image": rows, "label": [i % 4 for i in range(48)]}), directory / "data" / f"{part}.parquet"
        )
    return directory


def images(home: Path, **sections: Any) -> dict[str, Any]:
    """A config that names files of that home by absolute paths, in a variable, and as a plugin."""
    return {
        "name": "mine",
        "plugins": [str(home / "mine.py")],
        "task": {"data": {"name": "parquet", "path": "${oc.env:FEDSIM_DATA}"}, "model": "logistic"},
        "federation": {"clients": 4, "clients_per_round": 3, "rounds": 2, "partition": "iid"},
        "training": {"local_epochs": 1},
        "attack": {"name": "data_poisoning", "trigger": {"name": "blended", "target": 1}, "schedule": "continuous"},
        "engine": {"name": "serial"},
    } | sections


def write_plugin(home: Path, *names: str) -> Path:
    (home / "mine.py").write_text(PLUGIN.format(names=list(names) or ["no", "yes"], missing=str(home / "secret.txt")))
    return home / "mine.py"


def write(path: Path, config: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def telling(directory: Path, *, but: tuple[str, ...] = ()) -> list[str]:
    """The files below that hold the name of the user, the machine or a directory, in their contents or their names."""
    found = []
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        content = path.read_bytes() if path.is_file() else b""
        secrets = (USER, HOST, str(Path(*directory.parts[:3])))  # the beginning tells enough of a path that was cut
        if any(secret in name or secret.encode() in content for secret in secrets) and name not in but:
            found.append(name)
    return found


# ---------------------------------------------------------------------------------------------- paths and names


def test_a_run_names_neither_user_nor_machine_nor_directory(cli: Cli, home: Path) -> None:
    write_plugin(home)
    first = cli("run", write(home / "c.yaml", images(home)), "--out", home / "first", "output.report=false")
    assert first.status == 0, first.text
    trigger = {"name": "blended", "target": 1, "image": str(picture(home / "pattern.png"))}
    config = images(home, attack={"name": "data_poisoning", "trigger": trigger}, name="second")
    config["training"]["warm_start"] = str(home / "first" / "model.safetensors")
    config["output"] = {"tensorboard": importlib.util.find_spec("tensorboard") is not None}
    done = cli("run", write(home / "d.yaml", config), "--out", home / "run", "--twin")
    assert done.status == 0, done.text
    assert telling(home / "run", but=("config.yaml",)) == []
    manifest = json.loads((home / "run" / "manifest.json").read_text())
    assert manifest["methods"]["attack"]["trigger"]["parameters"]["image"] == "…/pattern.png"
    assert "path" not in manifest["methods"]["dataset"]["parameters"]
    page = (home / "run" / "report.html").read_text()
    assert "…/model.safetensors" in page


def picture(path: Path) -> Path:
    from PIL import Image

    Image.new("L", (8, 8)).save(path)
    return path


def test_the_config_of_a_run_holds_the_paths_that_were_given_and_plays_it_again(cli: Cli, home: Path) -> None:
    """The one file that may: it has to load back to the same run, wherever the working directory is."""
    write_plugin(home)
    config = write(home / "c.yaml", images(home))
    assert cli("run", config, "--out", home / "run", "output.report=false").status == 0
    text = (home / "run" / "config.yaml").read_text()
    kept = yaml.safe_load(text)
    assert kept["plugins"] == [str(home / "mine.py")]
    assert kept["task"]["data"]["path"] == str(home / "data")
    assert text.count(USER) == 2, "it holds no path that nobody gave"
    assert load_config(home / "run" / "config.yaml").to_dict() == load_config(config, ["output.report=false"]).to_dict()
    again = cli("run", home / "run" / "config.yaml", "--out", home / "again")
    assert again.status == 0, again.text
    assert (home / "run" / "rounds.parquet").read_bytes() == (home / "again" / "rounds.parquet").read_bytes()


def test_relative_paths_stay_relative(cli: Cli, home: Path) -> None:
    write_plugin(home)
    config = images(home, plugins=["mine.py"])
    config["task"]["data"]["path"] = "data"
    write(home / "c.yaml", config)
    assert cli("run", "c.yaml", "--out", "run").status == 0
    assert telling(home / "run") == []


def test_a_run_that_failed_names_nobody(cli: Cli, home: Path) -> None:
    """Nor does what a data set says of itself, such as the local directory that it calls its id."""
    write_plugin(home)
    config = sentiment(home, "mine", "in oslo")
    config["task"]["data"] = {"name": "of_a_stranger", "file": str(home / "texts")}
    config["attack"]["name"] = "failing"
    done = cli("run", write(home / "c.yaml", config), "--out", home / "run")
    assert done.status == 1, done.text
    assert telling(home / "run", but=("config.yaml",)) == []
    manifest = json.loads((home / "run" / "manifest.json").read_text())
    assert (manifest["status"], manifest["data"]["id"]) == ("failed", "…/texts")


def test_results_of_many_runs_name_nobody(cli: Cli, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedsim.report.grid.pictures", lambda part: [])  # figures take most of the time
    monkeypatch.setattr("fedsim.report.grid.grid_panels.save", lambda *_: None)
    monkeypatch.setattr("fedsim.report.grid._write_pages", lambda frame: None)
    write_plugin(home)
    (home / "other data").mkdir()
    for part in ("train", "test"):
        (home / "other data" / f"{part}.parquet").write_bytes((home / "data" / f"{part}.parquet").read_bytes())
    for seed, data in enumerate(("data", "other data")):
        config = images(home, seed=seed, output={"report": False})
        config["task"]["data"]["path"] = str(home / data)
        assert cli("run", write(home / "c.yaml", config), "--out", home / "runs" / f"run{seed}").status == 0
    done = cli("report", home / "runs", "--out", home / "report")
    assert done.status == 0, done.text
    assert telling(home / "report") == []
    table = pd.read_parquet(home / "report" / "results.parquet")
    assert table["task"].nunique() == 2, "data of two directories are told apart"


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("/home/alice/data", "…/data"),
        ("/data", "…/data"),
        ("~alice/data", "…/data"),
        ("/home/alice/my data", "…/my data"),
        ("C:\\Users\\alice\\x.png", "…/x.png"),
        ("hf:/home/alice/tokenizer", "hf:…/tokenizer"),
        ("file:///home/alice/x", "…/x"),
        ("path: '/home/alice/x.pt', other: a/b/c", "path: '…/x.pt', other: a/b/c"),
        ("no file in '/home/alice/my data' matches '*'", "no file in '…/my data' matches '*'"),
        ('File "/home/alice/x.py", line 3', 'File "…/x.py", line 3'),
        ("cannot read (/home/alice/x): denied", "cannot read (…/x): denied"),
        ("see https://example.org/a/b", "see https://example.org/a/b"),
        ("ylecun/mnist, 1/2 and/or x", "ylecun/mnist, 1/2 and/or x"),
        ("data/train", "data/train"),
        ("", ""),
    ],
)
def test_paths_are_cut_to_their_last_part(text: str, kept: str) -> None:
    assert portable(text) == kept
    assert portable({text: [text, 1, None, True]}) == {kept: [kept, 1, None, True]}


# ------------------------------------------------------------------------------------------------ hostile text

HOSTILE = (
    """<script>alert('gotcha')</script>"onload="alert(1)" <img src=x onerror=alert(2)> &lt;b&gt; {{ 7193 * 7211 }}"""
)
STEERING = "\x1b]0;gotcha\x07\x1b[2J\x1b[31mred\x9b31m[bold]x[/bold][/]"


class Elements(HTMLParser):
    """The elements of a page with their attributes, comments and declarations, and its text outside scripts."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[tuple[str, tuple[tuple[str, str | None], ...]]] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, tuple(attrs)))

    handle_startendtag = handle_starttag

    def handle_comment(self, data: str) -> None:
        self.found.append(("!--", ()))

    def handle_data(self, data: str) -> None:
        self.text += data


def sentiment(home: Path, name: str, phrase: str) -> dict[str, Any]:
    """A run on texts whose trigger is a phrase, and whose classes have names."""
    return {
        "name": name,
        "plugins": [str(home / "mine.py")],
        "task": {
            "name": "sentiment",
            "data": "of_a_stranger",
            "model": {"name": "lstm_classifier", "embedding": 4, "hidden": 4},
            "min_count": 1,
            "length": 12,
            "tokenizer": "split",
            "specials": phrase.split(),
        },
        "federation": {"clients": 4, "clients_per_round": 3, "rounds": 2, "partition": "iid"},
        "training": {"local_epochs": 1},
        "attack": {
            "name": "data_poisoning",
            "trigger": {"name": "phrase", "text": phrase, "target": 1},
            "schedule": "continuous",
        },
        "engine": {"name": "serial"},
    }


def skeleton(page: Elements) -> list[tuple[str, tuple[str, ...]]]:
    """Every element with the names of its attributes."""
    return [(tag, tuple(key for key, _ in attrs)) for tag, attrs in page.found]


def test_hostile_names_phrases_and_classes_make_no_element_of_a_page(
    cli: Cli, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedsim.report.html._figures", lambda run: {})  # they hold none of these texts
    pages = {}
    for kind, text in (("plain", "harmless words"), ("hostile", HOSTILE)):
        directory = home / kind
        directory.mkdir()
        write_plugin(home, f"no {text}", f"yes {text}")
        code = (home / "mine.py").read_text().replace("of_a_stranger", kind).replace('"failing"', f'"failing_{kind}"')
        (directory / "mine.py").write_text(code)
        config = sentiment(directory, f"{kind}: {text}", f"in oslo {text}")
        config["task"]["data"] = kind
        done = cli("run", write(directory / "c.yaml", config), "--out", directory / "run")
        assert done.status == 0, done.text
        pages[kind] = Elements((directory / "run" / "report.html").read_text(encoding="utf-8"))
    plain, hostile = pages["plain"], pages["hostile"]
    assert skeleton(hostile) == skeleton(plain)
    for tag, attrs in hostile.found:
        keys = [key for key, _ in attrs]
        assert not any(key.startswith("on") for key in keys), (tag, attrs)
        assert not any("gotcha" in key or "alert" in key for key in keys), (tag, attrs)
        assert not (tag == "script" and any(key == "src" for key in keys))
    said = " ".join(hostile.text.split())
    words = " ".join(HOSTILE.split())
    assert f"hostile: {words}" in said, "the name"
    assert f"in oslo {words}" in said.replace("''", "'"), "the phrase, in the config"
    assert f"yes {words}" in said, "the class"
    assert "51868723" not in said, "a template in a text is not filled in"


@pytest.mark.parametrize("kind", ["a config", "a run", "a client", "a comparison"])
def test_nothing_steers_the_terminal(cli: Cli, home: Path, kind: str) -> None:
    write_plugin(home, STEERING, "yes")
    config = sentiment(home, f"name {STEERING}", "in oslo")
    if kind == "a config":
        config["task"][STEERING] = STEERING
    if kind == "a client":
        config["attack"]["name"] = "failing"
    file = write(home / "c.yaml", config)
    done = cli("run", file, "--out", home / "run", "output.report=false")
    assert done.status == {"a config": 2, "a client": 1}.get(kind, 0), done.text
    outputs = [done]
    if kind == "a comparison":
        other = write(home / "d.yaml", {**config, "name": f"other {STEERING}", "seed": 1})
        outputs.append(cli("run", other, "--out", home / "other", "output.report=false"))
        outputs.append(cli("compare", home / "run", home / "other"))
        outputs.append(cli("report", home / "run"))
        assert [done.status for done in outputs] == [0, 0, 0, 0]
    for done in outputs:
        steering = [c for c in done.out + done.err if unicodedata.category(c)[0] == "C" and c not in "\n\t"]
        assert not steering, repr(done.out + done.err)
    if kind == "a client":
        assert "[bold]red[/bold]" in done.text, "markup is shown as it is"
    if kind == "a config":
        assert "[bold]x[/bold][/]" in done.text
