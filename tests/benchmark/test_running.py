"""Whole benchmarks: played, killed and gone on with; cells that fail; twins that cells share."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from rich.console import Console

from fedsim import plugins
from fedsim.benchmark.display import Estimate, clock, display
from fedsim.benchmark.grid import load_grid
from fedsim.benchmark.running import Job, Outcome, Unwatched, jobs_of, play
from fedsim.config import load_config
from fedsim.errors import InputError
from fedsim.experiment import Run, run
from fedsim.federation.ray_grid import Resources, start_ray
from fedsim.federation.setup import prepare

PLUGINS = '''
"""Methods that fail, or take their time, or learn."""

import time
from pathlib import Path

import torch

from fedsim.attack import Attack
from fedsim.defense import Defense
from fedsim.errors import RunError
from fedsim.plugins import register
from fedsim.tasks.triggers.patterns import Patch


@register("test_clumsy")
class Clumsy(Attack):
    """Fails until it is mended."""

    def craft(self, update, context):
        if Path(__file__).with_name("mended").exists():
            return update
        raise ValueError("what a pity")


@register("test_patient")
class Patient(Attack):
    """Waits in round 10 until it is told to go on."""

    def craft(self, update, context):
        for _ in range(1200):
            if context.round < 10 or Path(__file__).with_name("go").exists():
                break
            time.sleep(0.05)
        return update


@register("test_broken")
class Broken(Defense):
    """Fails always."""

    def screen(self, round):
        raise RunError("no verdict")


@register("test_learnt")
class Learnt(Patch):
    """A patch that says it learns."""

    def optimise(self, context):
        self.state = {"steps": torch.ones(1)}
'''


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The file of the plugins above, the same for all tests that share the cluster; other tests do not meet them."""
    path = tmp_path_factory.mktemp("own") / "own.py"
    path.write_text(PLUGINS)
    yield path
    for kind in plugins._registry.values():
        for name in [name for name in kind if name.startswith("test_")]:
            del kind[name]
    plugins._loaded.discard(str(path))


@pytest.fixture
def bench(tiny: dict[str, Any]) -> dict[str, Any]:
    """Two attacks × two defenses, one seed."""
    return {
        "name": "small",
        "base": tiny,
        "seeds": [1],
        "grid": {"attack": ["data_poisoning", "neurotoxin"], "defense": {"fedavg": [], "median": "coordinate_median"}},
    }


@pytest.fixture
def reported(monkeypatch: pytest.MonkeyPatch) -> list[list[Path]]:
    """What a report was asked of, instead of a report."""
    asked: list[list[Path]] = []

    def write(directories: Sequence[Path], out: Path) -> Path:
        asked.append(list(directories))
        return out / "report.html"

    monkeypatch.setattr("fedsim.report.write_grid_report", write)
    return asked


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """One cluster for all benchmarks of this module that are played in this process."""
    ours = start_ray(Resources(2))
    yield
    if ours:
        ray.shutdown()


class Told(Unwatched):
    """Remembers what a watcher is told."""

    def __init__(self) -> None:
        self.changes: list[tuple[str, str]] = []
        self.lines: list[str] = []

    def changed(self, job: Job) -> None:
        self.changes.append((job.title, job.state))

    def say(self, line: str) -> None:
        self.lines.append(line)


def files(directory: Path) -> dict[str, int]:
    """Everything below a directory, with the time it was last changed."""
    return {str(p.relative_to(directory)): p.stat().st_mtime_ns for p in sorted([directory, *directory.rglob("*")])}


def states(outcome: Outcome) -> dict[str, str]:
    return {job.title: job.state for job in outcome.jobs}


# ------------------------------------------------------------------------------------------ twins (without Ray)


def serially(definition: dict[str, Any], out: Path) -> list[Job]:
    """Play all runs of a grid in this process, as a Ray task plays them."""
    jobs = jobs_of(load_grid(definition), out)
    for job in jobs:
        run(
            job.config,
            out=job.directory,
            twin=job.own_twin,
            twin_from=None if job.twin is None else job.twin.directory,
            clients_of=job.clients_of,
        )
    return jobs


@pytest.mark.slow
@pytest.mark.parametrize(
    ("base", "fits"),
    [
        ({}, True),
        ({"attack.schedule": {"name": "fixed_frequency", "every": 2, "fixed": True, "attackers": 2}}, False),
        ({"federation.dropout": 0.4, "federation.stragglers": 0.2}, False),
        ({"attack.schedule": {"name": "pool", "fraction": 0.6}, "federation.dropout": 0.2}, True),
        ({"attack.trigger": {"name": "semantic", "path": "", "augment": False, "target": 1}}, True),
    ],
    ids=["usual", "fixed attackers", "drop-out", "pool", "excluded examples"],
)
def test_a_shared_twin_is_the_twin_each_cell_would_have_played(bench, tmp_path, base, fits):
    """Byte for byte; ``fits``: the attackers do not decide who takes part."""
    if "attack.trigger" in base:
        threes = (prepare(load_config(bench["base"])).data.train.labels == 3).nonzero().flatten().tolist()
        (tmp_path / "cars.json").write_text(json.dumps({"green_cars": threes}))
        base["attack.trigger"]["path"] = str(tmp_path / "cars.json")
    bench["set"] = base
    bench["grid"] = {"attack": ["neurotoxin"], "defense": {"clip": {"name": "norm_clipping", "bound": 1.0}}}
    twin, job = serially(bench, tmp_path / "out")
    assert twin.cell is None
    assert job.twin is twin
    assert (twin.clients_of is None) == fits
    assert twin.config.attack is not None
    assert twin.config.attack.name == "none"
    alone = run(job.config, out=tmp_path / "alone", twin=True)
    for where in ("rounds.parquet", "clients.parquet", "twin/rounds.parquet", "twin/clients.parquet", "summary.json"):
        assert (job.directory / where).read_bytes() == (alone.directory / where).read_bytes(), where
    assert alone.summary["floor"] == "clean twin"
    assert not Run.open(job.directory).rounds.equals(Run.open(twin.directory).rounds)


@pytest.mark.slow
def test_what_is_no_twin_of_a_run_is_refused(bench, tmp_path):
    bench["grid"] = {"attack": ["data_poisoning"]}
    _, attacked = serially(bench, tmp_path / "out")
    config = attacked.config
    with pytest.raises(InputError, match=r"is not the finished clean twin of this run \(its attack\)"):
        run(config, out=tmp_path / "a", twin_from=attacked.directory)
    other = jobs_of(load_grid({**bench, "seeds": [2]}), tmp_path / "out")[0]
    run(other.config, out=tmp_path / "other")
    with pytest.raises(InputError, match=r"is not the finished clean twin of this run \(seed\)"):
        run(config, out=tmp_path / "b", twin_from=tmp_path / "other")
    assert not (tmp_path / "b" / "summary.json").exists()


def test_which_cells_share_a_twin(bench, tmp_path):
    bench["seeds"] = [1, 2]
    bench["grid"]["trigger"] = ["patch", {"name": "blended"}]
    jobs = jobs_of(load_grid(bench), tmp_path)
    twins = [job for job in jobs if job.cell is None]
    assert len(twins) == 2 * 2 * 2, "one for every defense, trigger and seed"
    assert len(jobs) == 8 + 16
    assert twins[0].title == "clean twin · fedavg · patch · seed 1"
    for job in jobs:
        if job.cell is not None:
            assert job.twin is not None
            ours, theirs = job.config.to_dict(), job.twin.config.to_dict()
            assert ours.pop("attack")["trigger"] == theirs.pop("attack")["trigger"]
            for key in ("name", "evaluation", "output"):
                ours.pop(key), theirs.pop(key)
            assert ours == theirs
    bench["grid"]["schedule"] = {"now": "continuous", "fixed": {"name": "continuous", "fixed": True}}
    more = jobs_of(load_grid(bench), tmp_path)
    assert sum(job.cell is None for job in more) == 2 * len(twins), "fixed attackers meet other clients"
    assert sum(job.cell is None for job in jobs_of(load_grid({**bench, "twin": False}), tmp_path)) == 0
    bench["grid"] = {"attack": {"nothing": None}, "training.lr": [0.1, 0.2]}
    assert all(job.twin is None for job in jobs_of(load_grid(bench), tmp_path)), "there is nothing to compare"


def test_a_learnt_trigger_is_measured_in_a_twin_of_its_own(bench, own, tmp_path):
    bench["base"]["plugins"] = [str(own)]
    bench["grid"]["trigger"] = {"patch": "patch", "learnt": {"name": "test_learnt", "size": 3}}
    jobs = [job for job in jobs_of(load_grid(bench), tmp_path) if job.cell is not None]
    assert {(job.cell.labels["trigger"], job.own_twin, job.twin is None) for job in jobs if job.cell} == {
        ("patch", False, False),
        ("learnt", True, True),
    }
    assert {job.rounds for job in jobs} == {6, 12}


# --------------------------------------------------------------------------------------------------- playing


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_a_benchmark_is_played_and_what_is_complete_stays_as_it_is(bench, reported, tmp_path):
    bench["grid"]["defense"] = ["coordinate_median"]
    out, told = tmp_path / "out", Told()
    done = play(load_grid(bench), out, watcher=told)
    assert done.failed == []
    assert done.report == out / "report.html"
    cells = [job for job in done.jobs if job.cell is not None]
    assert reported == [[out / "cells" / f"{a}--coordinate_median-seed1" for a in ("data_poisoning", "neurotoxin")]]
    twin = done.jobs[0]
    assert told.changes[:2] == [(twin.title, "running"), (twin.title, "done")], "cells wait for their twin"
    assert {change for change in told.changes if change[1] == "done"} == {(job.title, "done") for job in done.jobs}
    for job in cells:
        reference = run(job.config, out=tmp_path / "alone" / job.name, twin=True)
        for name in ("rounds.parquet", "clients.parquet", "twin/rounds.parquet", "model.safetensors", "summary.json"):
            assert (job.directory / name).read_bytes() == (reference.directory / name).read_bytes()
        assert json.loads((job.directory / "cell.json").read_text()) == {"labels": dict(job.cell.labels), "seed": 1}  # type: ignore[union-attr]
        assert job.result["asr"] == reference.summary["final"]["asr"]
        assert job.round == job.rounds == 6
    assert json.loads((cells[0].directory / "manifest.json").read_text())["engine"]["name"] == "serial"
    assert not (out / "errors").exists()
    assert not list(out.glob(".*"))

    before = files(out / "cells") | files(out / "twins")
    told = Told()
    again = play(load_grid(bench), out, watcher=told)
    assert told.changes == []
    assert files(out / "cells") | files(out / "twins") == before
    assert [job.kept for job in again.jobs] == [True] * 3
    assert reported[1] == reported[0]

    # What lacks something is played again, from what is there; the rest is left alone, and one cell is new.
    lacking, whole = cells[0].directory, cells[1].directory
    untouched, tables = files(whole), (lacking / "rounds.parquet").stat().st_mtime_ns
    (lacking / "manifest.json").write_text('{"status": "running"}')  # killed when all but the end was done
    bench["seeds"] = [1, 2]
    grown = play(load_grid(bench), out)
    assert grown.failed == []
    assert json.loads((lacking / "manifest.json").read_text())["status"] == "finished"
    assert (lacking / "rounds.parquet").stat().st_mtime_ns == tables
    assert files(whole) == untouched
    assert len(reported[2]) == 4
    (lacking / "config.yaml").write_text((lacking / "config.yaml").read_text().replace("rounds: 6", "rounds: 5"))
    broken = play(load_grid(bench), out)
    assert [job.title for job in broken.failed] == [cells[0].title]
    assert "these keys differ: federation.rounds" in broken.failed[0].message


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_a_cell_that_fails_is_reported_and_the_others_go_on(bench, reported, own, tmp_path, cli):
    """And tried again by the same command: here one at a time, each on all workers of the cluster."""
    bench["base"]["plugins"] = [str(own)]
    bench["grid"] = {
        "attack": ["test_clumsy", "neurotoxin"],
        "defense": {"median": "coordinate_median", "broken": "test_broken"},
    }
    bench["exclude"] = [{"attack": "test_clumsy", "defense": "broken"}]
    (tmp_path / "b.yaml").write_text(yaml.safe_dump(bench, sort_keys=False))
    out = tmp_path / "out"
    done = cli("bench", tmp_path / "b.yaml", "--out", out)
    assert done.status == 1, done.text
    said = done.err.splitlines()
    assert said[0].startswith("failed: clean twin · neurotoxin · broken · seed 1: ")
    assert "no verdict" in done.err
    assert "failed: test_clumsy · median · seed 1: " in done.err
    assert "what a pity" in done.err
    assert "failed: neurotoxin · broken · seed 1: its clean twin failed: " in done.err
    assert "3 of 5 runs failed" in said[-1]
    assert "neurotoxin · median · seed 1: main" in done.out
    assert reported == [[out / "cells" / "neurotoxin--median-seed1"]]
    trace = (out / "errors" / "test_clumsy--median-seed1.txt").read_text()
    assert "Traceback" in trace
    assert "what a pity" in trace
    failed = out / "cells" / "test_clumsy--median-seed1"
    assert (failed / "cell.json").exists()

    own.with_name("mended").touch()
    again = play(load_grid(tmp_path / "b.yaml"), out, jobs=1)
    assert [job.title for job in again.failed] == [job for job in states(again) if "broken" in job]
    assert sorted(p.stem for p in (out / "errors").iterdir()) == [again.jobs[1].name]
    assert len(reported[1]) == 2
    manifest = json.loads((failed / "manifest.json").read_text())
    assert manifest["engine"] == {"name": "ray", "workers": 2}
    job = next(job for job in again.jobs if job.directory == failed)
    reference = run(job.config, out=tmp_path / "alone", twin=True)
    assert (failed / "rounds.parquet").read_bytes() == (reference.directory / "rounds.parquet").read_bytes()
    assert ray.is_initialized(), "a cluster that was there stays"


# --------------------------------------------------------------------------------------------- stopped, killed


def marked(mark: str) -> dict[int, str]:
    """The living processes that were started, directly or not, with ``mark`` in their environment."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if f"FEDSIM_TEST_MARK={mark}".encode() in (entry / "environ").read_bytes():
                    found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()[:120]
            except OSError:
                continue  # gone meanwhile, or not ours
    return found


def wait(condition: Callable[[], Any], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


class Started:
    """``fedsim bench`` in a process group of its own, as a shell starts it."""

    def __init__(self, file: Path, out: Path) -> None:
        self.mark = uuid.uuid4().hex
        self.process = subprocess.Popen(
            [
                *("env", "--default-signal=INT"),  # a shell that runs the suite in the background has it ignored
                *(sys.executable, "-m", "fedsim", "bench", str(file), "--out", str(out)),
            ],
            env={**os.environ, "FEDSIM_TEST_MARK": self.mark},
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def until(self, condition: Callable[[], Any]) -> None:
        assert wait(lambda: condition() or self.process.poll() is not None, 90), "it takes too long"
        assert self.process.poll() is None, self.process.communicate()[0]

    def clean_up(self) -> None:
        for pid in marked(self.mark):
            os.kill(pid, signal.SIGKILL)
        self.process.wait(20)


@pytest.fixture
def start() -> Iterator[Callable[[Path, Path], Started]]:
    if not Path("/proc/self/environ").exists():
        pytest.skip("processes are looked up in /proc")
    made: list[Started] = []

    def begin(file: Path, out: Path) -> Started:
        made.append(Started(file, out))
        return made[-1]

    yield begin
    for one in made:
        one.clean_up()


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_stopped_then_killed_then_played_to_the_end(bench, reported, start, own, tmp_path):
    """Ctrl-C, then SIGKILL to the whole group, then the end: nothing complete is touched, all is as if never cut."""
    bench["base"]["plugins"] = [str(own)]
    bench["base"]["output"]["checkpoint_every"] = 2
    bench["set"] = {"federation.rounds": 12, "attack.schedule.stop": None}
    bench["grid"] = {"attack": ["data_poisoning", "test_patient"]}
    bench["seeds"] = [1, 2]
    file, out = tmp_path / "b.yaml", tmp_path / "out"
    file.write_text(yaml.safe_dump(bench, sort_keys=False))
    quick, patient = ([out / "cells" / f"{attack}-seed{k}" for k in (1, 2)] for attack in bench["grid"]["attack"])

    def statuses() -> set[str]:
        return {json.loads((cell / "manifest.json").read_text())["status"] for cell in patient}

    def all_wait() -> bool:
        played = [
            (cell / "journal.jsonl").read_bytes().count(b"\n") for cell in patient if (cell / "journal.jsonl").is_file()
        ]
        return len(played) == 2 and min(played) == 9 and statuses() == {"running"}

    first = start(file, out)
    first.until(all_wait)
    with pytest.raises(InputError, match="another benchmark is at work"):
        play(load_grid(file), out)
    os.killpg(first.process.pid, signal.SIGINT)  # a terminal sends it to the whole group
    output, _ = first.process.communicate(timeout=60)
    assert first.process.returncode == 130, output
    assert "interrupted; the same command plays what is missing" in output
    assert "Traceback" not in output
    assert wait(lambda: not marked(first.mark), 15), marked(first.mark)
    assert statuses() == {"interrupted"}
    complete = {cell: files(cell) for cell in quick}
    assert all("summary.json" in found for found in complete.values())

    second = start(file, out)
    second.until(all_wait)
    os.killpg(second.process.pid, signal.SIGKILL)
    second.process.wait(20)

    own.with_name("go").touch()
    third = play(load_grid(file), out)
    assert third.failed == []
    assert {cell: files(cell) for cell in quick} == complete
    assert [job.directory for job in third.jobs if job.cell and not job.kept] == patient
    cut = third.jobs[-1]
    reference = run(cut.config, out=tmp_path / "alone", twin=True)
    assert len(reference.rounds) == 12
    for name in ("rounds.parquet", "clients.parquet", "twin/rounds.parquet", "summary.json"):
        assert (cut.directory / name).read_bytes() == (reference.directory / name).read_bytes()


# ---------------------------------------------------------------------------------------------------- display


@pytest.fixture
def jobs(bench, tmp_path) -> list[Job]:
    """A twin that is done, a cell at work, one that failed, others that wait."""
    made = jobs_of(load_grid(bench), tmp_path)
    twin, _, first, second, *_ = made
    twin.state, twin.round, twin.seconds, twin.result = "done", 6, 12.0, {"main_accuracy": 0.5, "asr": None}
    first.state, first.round, first.started = "running", 3, time.monotonic() - 30
    second.state, second.message = "failed", "[red]no[/red] luck\nTraceback"
    return made


def test_the_time_left_is_that_of_the_rounds_left(jobs):
    left = Estimate(jobs).seconds()
    # A round without an attack took 2 s and with data_poisoning 10 s; neurotoxin's is taken to be between.
    assert left == pytest.approx(3 * 10 + 6 * 2 + 12 * 6, abs=5)
    for job in jobs:
        job.state = "waiting"
    assert Estimate(jobs).seconds() is None
    assert [clock(None), clock(65), clock(3725.9)] == ["?", "1:05", "1:02:05"]


def test_plain_lines_where_there_is_no_terminal(jobs, monkeypatch):
    out = io.StringIO()
    with display(Console(file=out, width=200)) as watcher:
        watcher.begin(jobs)
        watcher.changed(jobs[0])
        watcher.changed(jobs[2])
        watcher.changed(jobs[3])
        watcher.look()
        monkeypatch.setattr("fedsim.benchmark.display._LINE_SECONDS", 0.0)
        watcher.look()
    lines = out.getvalue().splitlines()
    assert lines[0] == "4 cells; 1 clean twin to play first"
    assert lines[1].startswith("[2/6] clean twin · fedavg · seed 1: main 50.0%  (0:12)")
    assert lines[2].startswith("[2/6] data_poisoning · median · seed 1: failed: [red]no[/red] luck  ")
    assert lines[3].startswith("playing data_poisoning · fedavg · seed 1 3/6  1:5")
    assert len(lines) == 4


def test_a_live_table_on_a_terminal(jobs):
    out = io.StringIO()
    with display(Console(file=out, width=100, force_terminal=True, color_system=None)) as watcher:
        watcher.begin(jobs)
        watcher.changed(jobs[3])
        watcher.look()
    text = out.getvalue()
    assert "data_poisoning · fedavg · seed 1" in text
    assert "round 3 of 6" in text
    assert "2 of 6 runs ended, 3 waiting, 1 failed; 1:5" in text
    assert "failed: [red]no[/red] luck" in text


def test_rounds_are_counted_while_the_journal_grows(jobs):
    job = jobs[-1]
    job.directory.mkdir(parents=True)
    journal = job.directory / "journal.jsonl"
    for text, rounds in (('{"a": 1}\n{"a"', 1), ('{"a": 1}\n{"a": 2}\n{}\n', 3), ("{}\n", 1)):
        journal.write_text(text)
        job.look()
        assert job.round == rounds
    journal.unlink()
    (job.directory / "rounds.parquet").touch()
    job.look()
    assert job.round == 6
