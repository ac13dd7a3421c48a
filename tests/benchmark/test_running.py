"""Whole benchmarks: played, killed and gone on with; cells that fail; twins that cells share."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from rich.console import Console

from fedsim.benchmark.display import _Table, display, outcome
from fedsim.benchmark.estimate import Estimate
from fedsim.benchmark.grid import load_grid
from fedsim.benchmark.jobs import Job, jobs_of
from fedsim.benchmark.running import Outcome, Unwatched, _Players, play
from fedsim.config import load_config
from fedsim.errors import InputError
from fedsim.experiment import Run, run
from fedsim.federation.evaluation import Evaluator
from fedsim.federation.setup import prepare
from fedsim.report.words import clock
from tests.support.processes import living, rounds_in, wait
from tests.support.runs import RESULTS, contents, differing, forgotten

TWIN = ("twin/rounds.parquet", "twin/clients.parquet")

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
    with forgotten(path):
        yield path


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
    assert differing(job.directory, contents(alone.directory, (*RESULTS, *TWIN))) == []
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
        assert differing(job.directory, contents(reference.directory, (*RESULTS, *TWIN))) == []
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
        return [rounds_in(cell) for cell in patient] == [9, 9] and statuses() == {"running"}

    first = start("bench", file, "--out", out)
    first.until(all_wait)
    with pytest.raises(InputError, match="another benchmark is at work"):
        play(load_grid(file), out)
    assert "interrupted; the same command plays what is missing" in first.interrupt()
    assert wait(lambda: not living(first.sign), 15), living(first.sign)
    assert statuses() == {"interrupted"}
    complete = {cell: files(cell) for cell in quick}
    assert all("summary.json" in found for found in complete.values())

    second = start("bench", file, "--out", out)
    second.until(all_wait)
    second.kill(group=True)

    own.with_name("go").touch()
    third = play(load_grid(file), out)
    assert third.failed == []
    assert {cell: files(cell) for cell in quick} == complete
    assert [job.directory for job in third.jobs if job.cell and not job.kept] == patient
    cut = third.jobs[-1]
    reference = run(cut.config, out=tmp_path / "alone", twin=True)
    assert len(reference.rounds) == 12
    assert differing(cut.directory, contents(reference.directory, (*RESULTS, *TWIN))) == []


# ---------------------------------------------------------------------------------------------------- display


@pytest.fixture
def jobs(bench, tmp_path) -> list[Job]:
    """A twin that is done, a cell at work, one that failed, others that wait."""
    made = jobs_of(load_grid(bench), tmp_path)
    twin, _, first, second, *_ = made
    twin.state, twin.round, twin.seconds, twin.result = "done", 6, 12.0, {"main_accuracy": 0.5, "asr": None}
    now = time.monotonic()
    first.state, first.round, first.started, first.first, first.last = "running", 3, now - 30, (now - 20, 1), (now, 3)
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


def playing(job: Job, *, ago: float, rounds: int, pace: float, first: float) -> None:
    """Let a job be at work since ``ago`` seconds: its first round took ``first`` seconds, each other ``pace``."""
    now = time.monotonic()
    job.state, job.started, job.round = "running", now - ago, rounds
    job.first = (job.started + first, 1)
    job.last = (job.started + first + pace * (rounds - 1), rounds)


def test_the_estimate_keeps_in_mind_how_many_run_at_a_time(bench, tmp_path):
    """A place that has just become free is played on again, and the longest of what is left decides."""
    bench["seeds"] = [1, 2, 3]
    bench["grid"] = {"attack": ["data_poisoning"]}
    bench["twin"] = False
    one, two, three = jobs_of(load_grid(bench), tmp_path)
    estimate = Estimate([one, two, three])
    for job in (one, two):
        playing(job, ago=40, rounds=4, pace=10, first=10)
        estimate.changed()
    assert estimate.seconds() == pytest.approx(20 + 60, abs=2), "two at a time: the third begins in 20 s"
    one.state, one.round, one.seconds = "done", 6, 60.0
    assert estimate.seconds() == pytest.approx(60, abs=2), "the third begins at once, beside the second"
    three.state = "done"
    assert estimate.seconds() == pytest.approx(20, abs=2)


def test_what_a_run_takes_besides_its_rounds_is_counted_once_a_run(bench, tmp_path):
    bench["seeds"] = [1, 2]
    bench["grid"] = {"attack": ["data_poisoning"]}
    bench["twin"] = False
    bench["set"] = {"federation.rounds": 101, "attack.schedule.stop": None}
    one, two = jobs_of(load_grid(bench), tmp_path)
    estimate = Estimate([one, two])
    one.state, one.started = "running", time.monotonic() - 60
    assert estimate.seconds() is None, "no round has been seen"
    one.first = one.last = (time.monotonic() - 1, 1)
    one.round = 1
    assert estimate.seconds() is None, "how much of it was the start is not known yet"
    playing(one, ago=62, rounds=2, pace=1, first=61)
    assert estimate.seconds() == pytest.approx(99 + 60 + 101, abs=3)
    one.state, one.round, one.last, one.seconds = "done", 101, (one.started + 161, 101), 170.0
    assert estimate.seconds() == pytest.approx(69 + 101, abs=3), "and what comes after the last round"
    two.state, two.kept = "done", True
    assert estimate.seconds() == 0
    one.began_at, one.first, one.last = 101, None, None
    two.state, two.kept = "waiting", False
    assert estimate.seconds() is None, "only a report was missing"


def test_a_run_that_goes_back_to_its_checkpoint_is_counted_from_there(jobs):
    job = jobs[-1]
    job.directory.mkdir(parents=True)
    journal = job.directory / "journal.jsonl"
    journal.write_text("{}\n" * 5)
    job.start()
    assert (job.state, job.round, job.began_at) == ("running", 5, 5)
    journal.write_text("{}\n" * 2)
    job.look()
    assert (job.round, job.began_at, job.first) == (2, 2, None)
    journal.write_text("{}\n" * 3)
    job.look()
    assert job.first is not None
    assert job.first == job.last
    assert job.first[1] == 3
    journal.write_text("{}\n" * 4)
    job.look()
    assert job.last is not None
    assert (job.first[1], job.last[1]) == (3, 4)


def test_a_line_for_what_failed_says_why(jobs):
    job = jobs[3]
    trace = "Traceback (most recent call last):\n  File x\n    raise ValueError\nValueError: a pity\n"
    job.message = f"round 3, client 1 failed:\n{trace}"
    assert job.reason == "round 3, client 1 failed: ValueError: a pity"
    assert outcome(job) == "failed: round 3, client 1 failed: ValueError: a pity"
    job.message = "2 problems:\n  one\n  two"
    assert job.reason == job.message
    assert outcome(job) == "failed: 2 problems:"


def test_a_dry_run_says_what_is_there_and_what_is_in_the_way(bench, cli, tmp_path):
    bench["grid"] = {"attack": ["data_poisoning"]}
    file, out = tmp_path / "b.yaml", tmp_path / "out"
    file.write_text(yaml.safe_dump(bench, sort_keys=False))
    serially(bench, out)
    done = cli("bench", file, "--dry-run", "--out", out)
    assert done.status == 2
    assert "1 cell, 1 clean twin, 12 rounds" in done.text
    assert "holds files, but no benchmark" in done.err
    (out / "bench.yaml").write_text(load_grid(file).definition.to_yaml())
    done = cli("bench", file, "--dry-run", "--out", out)
    assert done.status == 0, done.err
    assert "clean twin · data_poisoning · seed 1 6 rounds complete" in done.text
    grown = cli("bench", file, "seeds=[1,2]", "--dry-run", "--out", out)
    assert grown.status == 0
    assert "2 cells, 2 clean twins, 24 rounds" in grown.text
    other = cli("bench", file, "training.lr=0.1", "--dry-run", "--out", out)
    assert other.status == 2
    assert "data_poisoning · seed 1 6 rounds another run lies in its place" in other.text
    assert "training.lr (in data_poisoning-seed1)" in other.err
    wrong = cli("bench", file, "grid={}", "--dry-run", "--out", out)
    assert (wrong.status, wrong.out) == (2, "")
    assert "the grid is empty" in wrong.err


# -------------------------------------------------------------------------------------- shares of the machine


class Handed:
    """A Ray task that is not played: what it is handed."""

    def __init__(self) -> None:
        self.reserved: list[dict[str, Any]] = []
        self.configs: list[dict[str, Any]] = []
        self.threads: list[int] = []

    def options(self, **options: Any) -> Handed:
        self.reserved.append(options)
        return self

    def remote(self, raw: dict[str, Any], out: str, *, threads: int, **rest: Any) -> object:
        self.configs.append(raw)
        self.threads.append(threads)
        return object()


@pytest.mark.parametrize(
    ("cores", "most", "per_worker", "workers", "threads"),
    [
        (4, 4, 1.0, [1, 1, 1, 1], [1, 1, 1, 1]),
        (8, 4, 1.0, [2, 2, 2, 2], [2, 2, 2, 2]),
        (5, 2, 1.0, [2, 3], [2, 3]),
        (2, 4, 1.0, [1, 1, 1, 1], [1, 1, 1, 1]),
        (2, 2, 4.0, [1, 1], [4, 4]),
        (8, 4, 0.5, [2, 2, 2, 2], [1, 1, 1, 1]),
    ],
)
def test_a_run_measures_on_its_share_of_the_machine(bench, tmp_path, cores, most, per_worker, workers, threads):
    bench["twin"] = False
    bench["base"]["engine"]["cpus_per_worker"] = per_worker
    players = _Players(jobs_of(load_grid(bench), tmp_path), tmp_path, most, Unwatched())
    players.cores, players.gpus = cores, 0
    task = Handed()
    for job in players._ready():
        players._hand_out(task, job)
    asked = [config["engine"] for config in task.configs]
    assert [1 if engine["name"] == "serial" else engine["workers"] for engine in asked] == workers
    assert task.threads == threads
    assert sum(options["num_cpus"] for options in task.reserved) <= cores * per_worker


@pytest.mark.parametrize("threads", [None, 1, 3])
def test_a_run_measures_on_the_threads_it_is_given(tiny, tmp_path, monkeypatch, finished, threads):
    made = []

    def evaluator(*arguments: Any) -> Evaluator:
        made.append(arguments[-1])
        return Evaluator(*arguments)

    monkeypatch.setattr("fedsim.experiment.Evaluator", evaluator)
    monkeypatch.setattr("fedsim.experiment.cores", lambda: 5)
    run(load_config(tiny), out=tmp_path / "run", threads=threads)
    assert made == [threads or 5]
    for name in ("rounds.parquet", "clients.parquet", "model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (finished.directory / name).read_bytes()


def test_a_live_table_shows_nothing_before_anything_is_known(jobs):
    out = io.StringIO()
    with _Table(Console(file=out, width=100, force_terminal=True, color_system=None)) as table:
        table._live.refresh()
        assert "ended" not in out.getvalue()
        table.begin(jobs)
        table._live.refresh()
        assert "2 of 6 runs ended" in out.getvalue()
