"""A run that is killed, at whatever moment, and resumed ends with the very same bytes."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedsim.config import load_config
from fedsim.errors import InputError, RunError
from fedsim.experiment import Run, Silent, run
from fedsim.federation.records import RoundRecord
from tests.support.runs import RESULTS, STATEFUL, contents, differing, forgotten

pytestmark = pytest.mark.slow

CONFIG: dict[str, Any] = {
    "name": "resumed",
    "seed": 4,
    "plugins": [str(STATEFUL)],
    "task": {"data": "digits", "model": "test_dropout", "train_examples": 160, "test_examples": 60},
    "federation": {
        "clients": 8,
        "clients_per_round": 4,
        "rounds": 6,
        "partition": "iid",
        "dropout": 0.1,
        "stragglers": 0.1,
    },
    "training": {"local_epochs": 1, "augment": True, "lr_decay": 0.9},
    "attack": {
        "name": "test_memory",
        "trigger": {"name": "patch", "size": 2, "target": 1},
        "schedule": {"name": "single_shot", "rounds": [2, 3, 5], "attackers": 2},
    },
    "defense": [{"name": "norm_clipping", "bound": 5.0}, "test_momentum", {"name": "weak_dp", "sigma": 0.001}],
    "evaluation": {"every": 2},
    "engine": {"name": "serial"},
    "output": {"report": False, "checkpoint_every": 2},
}

SERVER = '''
"""Plays runs in forked children and kills them where it is told: imports and warms up once."""
import json, os, signal, sys, tempfile, time
from pathlib import Path

from fedsim.config import load_config
from fedsim.experiment import Silent, run

counts, said = {}, []
real_fsync, real_replace = os.fsync, os.replace


def happens(event):
    counts[event] = counts.get(event, 0) + 1
    counts[""] = counts.get("", 0) + 1
    if order["kill"] in ([event, counts[event]], ["", counts[""]]):
        os.kill(os.getpid(), signal.SIGKILL)
    if order.get("pause") == [event, counts[event]]:
        Path(order["paused"]).touch()
        time.sleep(60)


def short(path):
    path = Path(path)
    return f"{path.parent.name}/{path.name}" if path.parent.name == "twin" else path.name


def fsync(fd):
    name = short(os.readlink(f"/proc/self/fd/{fd}"))
    if not name.endswith(".tmp"):
        happens(f"sync {name}")
    real_fsync(fd)


def replace(source, target):
    happens(f"write {short(target)}")
    real_replace(source, target)


class Progress(Silent):
    def begin(self, what, rounds, done):
        self.what = what
        happens(f"begin {what}")

    def client(self):
        happens(f"client {self.what}")

    def round(self, record):
        happens(f"round {self.what}")

    def say(self, line):
        said.append(line)


def play():
    os.fsync, os.replace = fsync, replace
    try:
        config = load_config(order["config"], order["overrides"])
        run(config, out=order["out"], twin=order["twin"], resume=order["resume"], progress=Progress())
        result = {"error": "", "counts": counts}
    except Exception as error:
        result = {"error": f"{type(error).__name__}: {error}", "counts": counts}
    Path(order["result"]).write_text(json.dumps({**result, "said": said}))


for number, line in enumerate(sys.stdin):
    order = json.loads(line)
    if number == 0:  # once in this process: whatever is imported on the way, the children share
        with tempfile.TemporaryDirectory() as directory:
            run(load_config(order["config"]), out=Path(directory) / "run")
    child = os.fork()
    if child == 0:
        try:
            play()
        finally:
            os._exit(0)
    if order.get("pause"):
        print(json.dumps(child), flush=True)
        continue
    _, status = os.waitpid(child, 0)
    print(json.dumps(-os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0), flush=True)
'''


class Server:
    """The process that plays runs."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.config = directory / "config.json"
        self.config.write_text(json.dumps(CONFIG))
        (directory / "server.py").write_text(SERVER)
        self.process = subprocess.Popen(
            [sys.executable, str(directory / "server.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def order(
        self, out: Path, *, kill: list[Any] | None = None, twin: bool = True, resume: bool = False, **more: Any
    ) -> tuple[int, dict[str, Any]]:
        """Play a run; its exit (−9: killed) and what it left to say."""
        result = self.directory / "result.json"
        result.unlink(missing_ok=True)
        order = {
            "config": json.loads(self.config.read_text()),
            "overrides": more.pop("overrides", {}),
            "out": str(out),
            "kill": kill,
            "twin": twin,
            "resume": resume,
            "result": str(result),
            **more,
        }
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        status = int(self.process.stdout.readline())
        return status, json.loads(result.read_text()) if result.exists() else {}

    def play(self, out: Path, **options: Any) -> dict[str, Any]:
        """Play a run to its end."""
        status, result = self.order(out, **options)
        assert status == 0
        assert result["error"] == ""
        return result


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(tmp_path_factory.mktemp("server"))
    yield made
    made.process.kill()
    made.process.wait(20)


@pytest.fixture(autouse=True, scope="module")
def registry() -> Iterator[None]:
    """Other tests do not meet this module's plugins."""
    with forgotten(STATEFUL):
        yield


@pytest.fixture(scope="module")
def whole(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run and its twin, never interrupted."""
    directory = tmp_path_factory.mktemp("whole") / "run"
    server.play(directory)
    return directory


def everything(directory: Path) -> dict[str, bytes]:
    """Every file by name; of those that hold times, only that they are there."""
    return {
        str(path.relative_to(directory)): b""
        if path.name in ("manifest.json", "timings.parquet")
        else path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def assert_same(directory: Path, whole: Path) -> None:
    made, wanted = everything(directory), everything(whole)
    assert sorted(made) == sorted(wanted)
    assert [name for name in made if made[name] != wanted[name]] == []


def test_a_whole_run_has_what_the_tests_look_at(whole: Path) -> None:
    assert {
        "config.yaml",
        "rounds.parquet",
        "clients.parquet",
        "model.safetensors",
        "summary.json",
        "manifest.json",
        "twin/rounds.parquet",
        "twin/clients.parquet",
        "checkpoints/round-000006.safetensors",
        "twin/checkpoints/round-000004.json",
    } <= set(everything(whole))
    state = json.loads(json.loads((whole / "checkpoints" / "round-000006.json").read_text())["state"])
    assert state["attack"]["history"]["rounds"] == [2, 3, 5]
    assert len(state["defense"][1]["clients"]) == 8
    finished = Run.open(whole)
    assert finished.twin is not None
    assert not finished.rounds["main_accuracy"].equals(finished.twin["main_accuracy"])


def test_the_same_run_again_is_the_same(server: Server, whole: Path, tmp_path: Path) -> None:
    server.play(tmp_path / "run", twin=True)
    assert_same(tmp_path / "run", whole)


# ------------------------------------------------------------------------------------------------------- killed

INSTANTS: list[tuple[str, int]] = [
    ("write config.yaml", 1),  # nothing is there yet but half a file
    ("write manifest.json", 1),
    ("write journal.jsonl", 1),
    ("client attack", 2),  # in the first round
    ("sync journal.jsonl", 2),
    ("write clients.parquet", 3),  # between two tables of a round
    ("write round-000004.safetensors", 1),
    ("write round-000004.json", 1),  # between a checkpoint's two files
    ("round attack", 4),
    ("client attack", 18),  # in a round after a checkpoint
    ("write model.safetensors", 1),
    ("begin clean twin", 1),
    ("client clean twin", 13),
    ("write summary.json", 1),
]


@pytest.mark.parametrize(("event", "nth"), INSTANTS)
def test_killed_and_resumed(server: Server, whole: Path, tmp_path: Path, event: str, nth: int) -> None:
    status, _ = server.order(tmp_path / "run", kill=[event, nth])
    assert status == -9, f"there was no {event} for the {nth}th time"
    server.play(tmp_path / "run", resume=True)
    assert_same(tmp_path / "run", whole)


def test_killed_again_and_again(server: Server, whole: Path, tmp_path: Path) -> None:
    """Each time after a few files more, until there is nothing left to do."""
    deaths = 0
    for after in range(20, 200, 9):
        status, result = server.order(
            tmp_path / "run",
            kill=["", after],
            resume=deaths > 0,
            overrides={"output.checkpoint_every": 1 + deaths % 3},
        )
        if status == 0:
            assert result["error"] == ""
            break
        deaths += 1
    assert deaths >= 3
    made, wanted = everything(tmp_path / "run"), everything(whole)
    # how often checkpoints are written is not part of the result; config.yaml says how often that was
    tables = [name for name in wanted if "checkpoints" not in name and name != "config.yaml"]
    assert [name for name in tables if made.get(name) != wanted[name]] == []


def test_a_resumed_run_says_where_it_goes_on(server: Server, tmp_path: Path) -> None:
    server.order(tmp_path / "run", kill=["round attack", 5], twin=False)
    result = server.play(tmp_path / "run", resume=True, twin=False)
    assert "continuing after round 4" in result["said"]
    assert result["counts"]["round attack"] == 2


def test_a_damaged_checkpoint_costs_the_rounds_since_the_one_before(
    server: Server, whole: Path, tmp_path: Path
) -> None:
    server.order(tmp_path / "run", kill=["round attack", 5])
    path = tmp_path / "run" / "checkpoints" / "round-000004.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    result = server.play(tmp_path / "run", resume=True)
    said = [line for line in result["said"] if line.startswith(("checkpoint", "continuing"))]
    assert said[:2] == [
        "checkpoint round-000004 is damaged (its checksum does not match); trying the one before",
        "continuing after round 2",
    ]
    assert_same(tmp_path / "run", whole)


def test_without_any_intact_checkpoint_it_starts_over(server: Server, whole: Path, tmp_path: Path) -> None:
    server.order(tmp_path / "run", kill=["round attack", 5])
    for path in (tmp_path / "run" / "checkpoints").glob("*.json"):
        path.write_text("{")
    server.play(tmp_path / "run", resume=True)
    assert_same(tmp_path / "run", whole)


def test_resuming_nothing_is_starting(server: Server, whole: Path, tmp_path: Path) -> None:
    server.play(tmp_path / "run", resume=True)
    assert_same(tmp_path / "run", whole)


# ----------------------------------------------------------------------------------------------------- complete


def test_a_run_killed_before_its_last_file_is_ended(whole: Path, tmp_path: Path) -> None:
    """The manifest says last that it is finished; whatever is missing before is written when it is resumed."""
    shutil.copytree(whole, tmp_path / "run")
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    (tmp_path / "run" / "manifest.json").write_text(json.dumps({**manifest, "status": "running"}))
    (tmp_path / "run" / "report.html").unlink(missing_ok=True)
    run(load_config(CONFIG, {"output.report": True}), out=tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "report.html").is_file()
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["status"] == "finished"
    assert differing(tmp_path / "run", contents(whole, RESULTS)) == []


def test_a_complete_run_is_returned_as_it_is(whole: Path) -> None:
    class Strict(Silent):
        lines: list[str] = []  # noqa: RUF012

        def say(self, line: str) -> None:
            self.lines.append(line)

        def begin(self, what: str, rounds: int, done: int) -> None:
            raise AssertionError("it plays again")

    before = {p: p.stat().st_mtime_ns for p in whole.rglob("*") if p.is_file()}
    finished = run(load_config(CONFIG), out=whole, twin=True, resume=True, progress=Strict())
    assert "this run is complete" in Strict.lines
    assert {p: p.stat().st_mtime_ns for p in whole.rglob("*") if p.is_file()} == before
    assert finished.rounds.equals(Run.open(whole).rounds)


def test_a_twin_can_be_added_later_and_be_killed_too(server: Server, whole: Path, tmp_path: Path) -> None:
    server.play(tmp_path / "run", twin=False)
    assert not (tmp_path / "run" / "twin").exists()
    status, _ = server.order(tmp_path / "run", twin=True, resume=True, kill=["round clean twin", 3])
    assert status == -9
    result = server.play(tmp_path / "run", twin=True, resume=True)
    assert "this run is complete" not in result["said"], "its twin is not"
    assert_same(tmp_path / "run", whole)


def test_what_does_not_change_a_result_may_change(server: Server, whole: Path, tmp_path: Path) -> None:
    server.order(tmp_path / "run", kill=["round attack", 3], twin=False)
    server.play(
        tmp_path / "run",
        resume=True,
        overrides={"name": "other", "evaluation.twin": True, "output.checkpoint_every": 1, "engine.retries": 5},
    )
    made, wanted = everything(tmp_path / "run"), everything(whole)
    tables = ("rounds.parquet", "clients.parquet", "model.safetensors", "twin/rounds.parquet", "summary.json")
    assert [name for name in tables if made[name] != wanted[name]] == []


# ------------------------------------------------------------------------------------------------------ refused


def test_another_config_is_refused_naming_the_keys(whole: Path) -> None:
    other = load_config(CONFIG, {"training.lr": 0.5, "defense.0.bound": 4.0, "engine.retries": 9, "seed": 5})
    with pytest.raises(InputError, match=r"these keys differ: defense\.0\.bound, seed, training\.lr$"):
        run(other, out=whole, resume=True)


def test_a_directory_in_use_is_refused(server: Server, whole: Path, tmp_path: Path) -> None:
    """By a run in another process, from its start to its death."""
    paused = tmp_path / "paused"
    pid, _ = server.order(tmp_path / "run", pause=["client attack", 3], paused=str(paused))
    try:
        deadline = time.monotonic() + 30
        while not paused.exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        with pytest.raises(InputError, match=r"another run is at work in .*run; give another --out"):
            run(load_config(CONFIG), out=tmp_path / "run", resume=True)
        with pytest.raises(InputError, match="is not empty; give another --out, or continue the run there with"):
            run(load_config(CONFIG), out=tmp_path / "run")
    finally:
        subprocess.run(["kill", "-9", str(pid)], check=True)
    deadline = time.monotonic() + 30
    while True:  # until the killed process lets go of its lock
        status, result = server.order(tmp_path / "run", resume=True)
        if "another run is at work" not in result.get("error", "") or time.monotonic() > deadline:
            break
        time.sleep(0.05)
    assert (status, result["error"]) == (0, "")
    assert_same(tmp_path / "run", whole)


def test_a_lock_nobody_holds_does_not_matter(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / ".lock").touch()
    run(load_config(CONFIG), out=tmp_path / "run", resume=True)
    assert not (tmp_path / "run" / ".lock").exists()


def test_a_lock_that_was_just_removed_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between opening the lock's file and locking it, its holder may have finished and removed it."""
    real = fcntl.flock

    def late(handle: Any, how: int) -> None:
        (tmp_path / "run" / ".lock").unlink()
        real(handle, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(InputError, match="another run is at work"):
        run(load_config(CONFIG), out=tmp_path / "run")


def test_a_directory_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    for resume, says in ((False, "is not empty"), (True, "holds files, but no run")):
        with pytest.raises(InputError, match=says):
            run(load_config(CONFIG), out=tmp_path, resume=resume)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(InputError, match="is a file; give a directory"):
        run(load_config(CONFIG), out=tmp_path / "thesis.tex")


def test_a_checkpoint_of_another_model_is_refused(server: Server, tmp_path: Path) -> None:
    from fedsim.recording import checkpoint
    from fedsim.recording.checkpoint import Checkpoint

    server.order(tmp_path / "run", kill=["round attack", 5], twin=False)
    directory = tmp_path / "run" / "checkpoints"
    described = json.loads((directory / "round-000004.json").read_text())
    found, _ = checkpoint.load(directory, described["config"])
    assert found is not None
    good = found.state
    for change in (
        {"global_vector": good["global_vector"][:-1]},
        {"global_vector": 3.0},
        {"last_aggregate": good["global_vector"].double()},
        {"attack": [1]},
        {"defense": []},
        {"defense": [{}, {}, 3]},
    ):
        checkpoint.save(directory, Checkpoint(4, {**good, **change}), described["config"])
        status, result = server.order(tmp_path / "run", resume=True, twin=False)
        assert status == 0
        assert result["error"].startswith("InputError: the checkpoint of round 4 does not fit this run"), change


# -------------------------------------------------------------------------------------------------- interrupted


class Stopping(Silent):
    """Raises at the nth client."""

    def __init__(self, nth: int, error: BaseException) -> None:
        self.left, self.error = nth, error

    def client(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise self.error


@pytest.mark.parametrize(
    ("error", "status"), [(KeyboardInterrupt(), "interrupted"), (RunError("it broke\nbadly"), "failed")]
)
def test_an_interrupted_run_leaves_readable_tables_and_goes_on(
    server: Server, whole: Path, tmp_path: Path, error: BaseException, status: str
) -> None:
    import pandas as pd

    with pytest.raises(type(error)):
        run(load_config(CONFIG), out=tmp_path / "run", twin=True, progress=Stopping(15, error))
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert (manifest["status"], manifest["reason"]) == (status, "it broke" if status == "failed" else "")
    rounds = pd.read_parquet(tmp_path / "run" / "rounds.parquet")
    assert rounds["round"].tolist() == [1, 2, 3] or rounds["round"].tolist() == [1, 2, 3, 4]
    assert not (tmp_path / "run" / ".lock").exists()
    with pytest.raises(InputError, match="holds no finished run"):
        Run.open(tmp_path / "run")
    server.play(tmp_path / "run", resume=True)
    assert_same(tmp_path / "run", whole)


class Filling(Silent):
    """Some time after round 2, one file meets a full disk."""

    def __init__(self, path: Path) -> None:
        self.link = path.with_name(f".{path.name}.{os.getpid()}.tmp")

    def round(self, record: RoundRecord) -> None:
        if record.round == 2 and not self.link.is_symlink():
            self.link.symlink_to("/dev/full")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
@pytest.mark.parametrize(
    "name", ["clients.parquet", "checkpoints/round-000004.safetensors", "model.safetensors", "summary.json"]
)
def test_a_run_stopped_by_a_full_disk_goes_on_when_there_is_room(
    server: Server, whole: Path, tmp_path: Path, name: str
) -> None:
    path = tmp_path / "run" / name
    with pytest.raises(RunError, match=f"^the disk is full: {path.name} could not be written; free some room"):
        run(load_config(CONFIG), out=tmp_path / "run", twin=True, progress=Filling(path))
    assert not list((tmp_path / "run").rglob(".*"))
    server.play(tmp_path / "run", resume=True)
    assert_same(tmp_path / "run", whole)


def test_a_run_that_could_not_begin_leaves_nothing_behind(tmp_path: Path) -> None:
    config = load_config(CONFIG, {"federation.clients": 159, "federation.partition": {"name": "natural"}})
    with pytest.raises(InputError, match="needs an owner"):
        run(config, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_progress_hears_of_rounds_that_are_on_disk(tmp_path: Path) -> None:
    class Looking(Silent):
        def round(self, record: RoundRecord) -> None:
            lines = (tmp_path / "run" / "journal.jsonl").read_text().splitlines()
            assert len(lines) == record.round

    run(
        load_config(CONFIG, {"federation.rounds": 3, "attack.schedule.rounds": [2]}),
        out=tmp_path / "run",
        progress=Looking(),
    )
