"""Plays what is missing of a grid, many runs at a time on one Ray cluster.

How the machine is shared: whenever a run can start, it gets an even share of the idle cores, ``idle cores // runs that
could start``, at least one. With one core it plays serially in a single process (most grids have more cells than the
machine has cores); with more, which happens when few runs are left or ``jobs`` is small, it gets Ray workers of its
own on the same cluster. Results do not depend on that. On a GPU the runs at a time share it evenly.

A run is played by a Ray task in a process of its own; the driver looks at its journal to see how far it is. What is
complete is not touched.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import ray
import torch
from ray.exceptions import RayError

from fedsim import plugins
from fedsim.benchmark.directory import is_held, opened
from fedsim.benchmark.grid import Cell, Grid, file_name
from fedsim.config import Config, build, load_config
from fedsim.errors import FedsimError, InputError
from fedsim.experiment import TWIN, Silent, choose_device, config_hash, differing, is_finished, is_played, run
from fedsim.federation.client import initial_module
from fedsim.federation.ray_grid import Resources, start_ray
from fedsim.federation.schedule import RoundPlan, plan
from fedsim.federation.setup import prepare
from fedsim.layout import Layout
from fedsim.recording.files import write_json, write_text
from fedsim.recording.tables import JOURNAL

CELL = "cell.json"
"""In a cell's directory: which labels and seed of the grid it is."""

_JOBS_PER_GPU = 4
_PROCESS_BYTES = 0.75 * 2**30  # of a process that has imported everything
_MODELS = 16  # vectors of the model's size beside the matrix of updates: gradients, momentum, checkpoints, defenses
_LOOK_SECONDS = 0.5
_GRACE_SECONDS = 10.0  # to put what has been played on disk after Ctrl-C
_HELD_SECONDS = 60.0  # until a killed benchmark's processes are gone


@dataclass
class Job:
    """One run to be in the benchmark: a cell, or a clean twin that several cells share.

    twin: the shared twin to take. own_twin: its twin is played with it, since nobody else could use it.
    clients_of: see :func:`fedsim.experiment.run`. state: waiting, running, done, failed; kept where nothing had to be
    played. round: rounds on disk, of ``rounds``. seconds: played here. result: accuracies of its last round.
    """

    name: str
    title: str
    directory: Path
    config: Config
    cell: Cell | None = None
    twin: Job | None = None
    own_twin: bool = False
    clients_of: Config | None = None
    state: str = "waiting"
    kept: bool = False
    round: int = 0
    message: str = ""
    seconds: float = 0.0
    started: float = 0.0
    began_at: int = 0
    result: Mapping[str, float | None] = field(default_factory=dict)
    _tails: dict[Path, tuple[int, int]] = field(default_factory=dict)

    @property
    def rounds(self) -> int:
        return self.config.federation.rounds * (2 if self.own_twin else 1)

    @property
    def kind(self) -> str:
        """What its time depends on most."""
        return "none" if self.config.attack is None else self.config.attack.name

    def is_complete(self) -> bool:
        """Whether everything of it is there, to the report.

        Raises
        ------
        InputError: what is there is another experiment's.
        """
        here = self.directory
        if not (here / "summary.json").is_file():
            return False
        keys = differing(load_config(here / "config.yaml"), self.config)
        if keys:
            raise InputError(f"{here} holds a run of another config; these keys differ: {', '.join(keys)}")
        marked = self.cell is None or (here / CELL).is_file()
        return marked and is_finished(here, self.config) and (not self._has_twin() or is_played(here / TWIN))

    def _has_twin(self) -> bool:
        return self.own_twin or self.twin is not None

    def look(self) -> None:
        """Count the rounds on disk."""
        places = [self.directory, *([self.directory / TWIN] if self.own_twin else [])]
        self.round = min(sum(map(self._count, places)), self.rounds)

    def _count(self, directory: Path) -> int:
        path = directory / JOURNAL
        read, lines = self._tails.get(path, (0, 0))
        try:
            with path.open("rb") as handle:
                if os.fstat(handle.fileno()).st_size < read:  # it was begun anew
                    read, lines = 0, 0
                handle.seek(read)
                new = handle.read()
        except OSError:
            return self.config.federation.rounds if is_played(directory) else 0
        self._tails[path] = (read + len(new), lines + new.count(b"\n"))
        return self._tails[path][1]


class Watcher(Protocol):
    """Who is told how the benchmark gets on."""

    def begin(self, jobs: Sequence[Job]) -> None:
        """The runs that the benchmark consists of, complete ones included."""

    def say(self, line: str) -> None:
        """Something worth a line."""

    def changed(self, job: Job) -> None:
        """A run has begun, or has ended."""

    def look(self) -> None:
        """Rounds have been counted anew."""


class Unwatched:
    """No display."""

    def begin(self, jobs: Sequence[Job]) -> None: ...
    def say(self, line: str) -> None: ...
    def changed(self, job: Job) -> None: ...
    def look(self) -> None: ...


@dataclass(frozen=True)
class Outcome:
    """What became of a benchmark. failed: the runs that failed, with their messages. report: None if no cell ended."""

    directory: Path
    jobs: list[Job]
    report: Path | None

    @property
    def failed(self) -> list[Job]:
        return [job for job in self.jobs if job.state == "failed"]


def play(grid: Grid, out: Path, *, jobs: int | None = None, watcher: Watcher | None = None) -> Outcome:
    """Play what is missing of a grid, and write the report of all its cells.

    Parameters
    ----------
    out: the directory of the benchmark; what is complete there stays as it is.
    jobs: runs at a time; default: as many as cores and memory allow, or four a GPU.
    watcher: who is told.

    Raises
    ------
    ConfigError: something in the grid is wrong. InputError: ``out`` cannot be used. RunError: Ray cannot be started.
    A cell that fails raises nothing: see the outcome.
    """
    grid.check()
    watcher = watcher or Unwatched()
    with opened(out, grid):
        every = jobs_of(grid, out)
        for job in every:
            try:
                if job.is_complete():
                    job.state, job.kept, job.round = "done", True, job.rounds
                    job.result = _result(job)
            except FedsimError as error:
                job.state, job.message = "failed", str(error)
        _spare_twins(every)
        watcher.begin(every)
        if any(job.state == "waiting" for job in every):
            _Players(every, out, jobs, watcher).play()
        done = [job.directory for job in every if job.cell is not None and job.state == "done"]
        return Outcome(out, every, _report(done, out) if done else None)


def _report(directories: list[Path], out: Path) -> Path:
    from fedsim.report import write_grid_report

    return write_grid_report(directories, out)


def default_directory(grid: Grid) -> Path:
    """Where a benchmark goes if nobody says: the same place every time, so that it is gone on with there."""
    parent = grid.cells[0].config.output.dir if grid.cells else "runs"
    return Path(parent) / "bench" / file_name(grid.definition.name)


def listed(grid: Grid, out: Path) -> list[str]:
    """The runs of a grid in words, and which of them are complete."""
    every = jobs_of(grid, out)
    lines = []
    for job in every:
        there = "  complete" if job.is_complete() else ""
        lines.append(f"{job.title}  {job.rounds} rounds{there}")
    cells, rounds = sum(job.cell is not None for job in every), sum(job.rounds for job in every)
    lines.append(f"{cells} cells, {len(every) - cells} clean twins, {rounds} rounds; in {out}")
    return lines


# ------------------------------------------------------------------------------------------- cells and twins


def jobs_of(grid: Grid, out: Path) -> list[Job]:
    """The runs of a grid: the twins that cells share, then the cells."""
    twins: dict[str, Job] = {}
    built: dict[str, Config] = {}
    plans: dict[str, list[RoundPlan]] = {}
    cells = []
    for cell in grid.cells:
        job = Job(cell.name, cell.title, out / "cells" / cell.name, cell.config, cell)
        if grid.definition.twin and cell.config.attack is not None:
            trigger: Any = plugins.get("trigger", cell.config.attack.trigger.name)
            job.own_twin = trigger.learnt()  # measured with what the trigger became in this very run
            if not job.own_twin:
                made = _twin_of(cell, out / "twins", built, plans)
                job.twin = twins.setdefault(made.name, made)
        cells.append(job)
    for twin in twins.values():
        sharing = [job.cell.labels.items() for job in cells if job.twin is twin and job.cell is not None]
        common = [label for axis, label in sharing[0] if all((axis, label) in labels for labels in sharing)]
        twin.title = " · ".join(["clean twin", *common, f"seed {twin.config.seed}"])
    return [*twins.values(), *cells]


def _twin_of(cell: Cell, root: Path, built: dict[str, Config], plans: dict[str, list[RoundPlan]]) -> Job:
    """The clean twin of a cell as a run of its own: nobody attacks, the trigger is still measured.

    It is the same for all cells that share everything but the adversary. Where the adversary decides who takes part
    (attackers with fixed places, or who never drop out), the twin meets the same clients, and only such cells share it.
    """
    config = cell.config
    assert config.attack is not None
    raw = {**config.to_dict(), "attack": {"name": "none", "trigger": config.attack.trigger.to_dict()}}
    raw["name"] = f"clean twin ({'+'.join(stage.name for stage in config.defense) or 'fedavg'}, seed {config.seed})"
    raw["evaluation"]["twin"], raw["output"]["report"] = False, False
    key = json.dumps(raw, sort_keys=True)
    if key not in built:
        built[key] = build(raw, possible=False)  # the cell has been checked
    honest = built[key]
    met, own = _who_replies(config, plans), _who_replies(honest, plans)
    other = [(r.replying, r.dropped, r.stragglers) for r in met] if met is not own and not _alike(met, own) else None
    digest = hashlib.sha256(json.dumps([config_hash(honest), other]).encode()).hexdigest()[:12]
    return Job(digest, honest.name, root / digest, honest, clients_of=None if other is None else config)


def _who_replies(config: Config, plans: dict[str, list[RoundPlan]]) -> list[RoundPlan]:
    federation, attack = config.to_dict()["federation"], config.attack
    schedule = None if attack is None or attack.name == "none" else attack.schedule.to_dict()
    key = json.dumps([federation, schedule, config.seed], sort_keys=True)
    if key not in plans:
        plans[key] = plan(config)
    return plans[key]


def _alike(one: list[RoundPlan], other: list[RoundPlan]) -> bool:
    return [replace(r, malicious={}) for r in one] == [replace(r, malicious={}) for r in other]


def _spare_twins(jobs: list[Job]) -> None:
    """A twin that no cell waits for need not be played."""
    wanted = {id(job.twin) for job in jobs if job.state == "waiting"}
    for job in jobs:
        if job.cell is None and job.state == "waiting" and id(job) not in wanted:
            job.state, job.kept, job.round = "done", True, job.rounds


# -------------------------------------------------------------------------------------------------- playing


class _Players:
    """The cluster, and what is being played on it."""

    def __init__(self, jobs: list[Job], out: Path, most: int | None, watcher: Watcher) -> None:
        self.jobs, self.out, self.watcher = jobs, out, watcher
        self.left = [job for job in jobs if job.state == "waiting"]
        self.engine = self.left[0].config.engine
        self.cuda = choose_device(self.engine.device).type == "cuda"
        self.running: dict[Any, tuple[Job, int]] = {}
        self.most = most

    def play(self) -> None:
        ours = _start(self.engine.address)
        try:
            cores = int(float(ray.cluster_resources().get("CPU", 1.0)) // self.engine.cpus_per_worker)
            self.cores = max(1, cores)
            self.gpus = max(1, int(ray.cluster_resources().get("GPU", 0.0))) if self.cuda else 0
            self.most = self.most or self._at_a_time()
            play_one = ray.remote(max_retries=0)(_play_one)
            while self.left or self.running:
                for job in self._ready():
                    self._hand_out(play_one, job)
                self._wait()
        except KeyboardInterrupt:
            self._stop()
            raise
        finally:
            if ours:
                ray.shutdown()

    def _at_a_time(self) -> int:
        if self.cuda:
            return min(_JOBS_PER_GPU * self.gpus, self.cores)
        memory = float(ray.cluster_resources().get("memory", math.inf))
        needed = _PROCESS_BYTES
        for config in _distinct(self.left):
            with contextlib.suppress(FedsimError):  # it will say so when it is played
                needed = max(needed, _bytes_of(config))
        fit = max(1, int(min(memory / needed, self.cores)))
        if fit < self.cores:
            self.watcher.say(
                f"a run takes about {needed / 2**30:.1f} GiB: {fit} at a time, though there are {self.cores} cores "
                f"(--jobs says otherwise)"
            )
        return fit

    def _ready(self) -> list[Job]:
        """The runs that can start now, as many as may."""
        found = []
        for job in list(self.left):
            if job.twin is not None and job.twin.state == "failed":
                self._ended(job, f"its clean twin failed: {job.twin.message}")
            elif (job.twin is None or job.twin.state == "done") and self._is_free(job):
                found.append(job)
        assert self.most is not None
        return found[: max(0, self.most - len(self.running))]

    def _is_free(self, job: Job) -> bool:
        """Whether nobody else is at work in the job's directory."""
        if not is_held(job.directory):
            return True
        job.started = job.started or time.monotonic()
        if time.monotonic() - job.started > _HELD_SECONDS:
            self._ended(job, f"another run is at work in {job.directory}")
        return False

    def _hand_out(self, play_one: Any, job: Job) -> None:
        ready = 1 + sum(
            1 for other in self.left if other is not job and (other.twin is None or other.twin.state == "done")
        )
        assert self.most is not None
        places = max(1, min(ready, self.most - len(self.running)))
        idle = self.cores - sum(workers for _, workers in self.running.values())
        workers = max(1, min(idle // places, job.config.federation.clients_per_round))
        if self.cuda and self.most > 1:
            workers = 1  # pieces of several runs might not fit on the GPUs together
        config, options = self._shared(job.config, workers)
        self.left.remove(job)
        job.state, job.started = "running", time.monotonic()
        job.look()
        job.began_at = job.round
        ref = play_one.options(**options).remote(
            config,
            str(job.directory.resolve()),
            None if job.twin is None else str(job.twin.directory.resolve()),
            None if job.clients_of is None else job.clients_of.to_dict(),
            job.own_twin,
            None if job.cell is None else {"labels": dict(job.cell.labels), "seed": job.cell.seed},
            os.getcwd(),
        )
        self.running[ref] = (job, workers)
        self.watcher.changed(job)

    def _shared(self, config: Config, workers: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """The config with its share of the machine, and what its task reserves."""
        raw, cpus = config.to_dict(), self.engine.cpus_per_worker
        serial = workers == 1
        raw["engine"].update(name="serial" if serial else "ray", workers="auto" if serial else workers, address=None)
        assert self.most is not None
        options: dict[str, Any] = {"num_cpus": min(1.0, self.cores / self.most) * cpus if serial else 0}
        if self.cuda:
            pieces = math.ceil(self.most * (1 if serial else workers + 1) / self.gpus)
            share = math.floor(1e4 / pieces) / 1e4  # what Ray counts in
            options["num_gpus"] = share
            raw["engine"]["gpus_per_worker"] = share
        return raw, options

    def _wait(self) -> None:
        if not self.running:
            if self.left:
                time.sleep(_LOOK_SECONDS)  # a killed benchmark's processes are not gone yet
            return
        done, _ = ray.wait(list(self.running), num_returns=1, timeout=_LOOK_SECONDS)
        for ref in done:
            job, _ = self.running.pop(ref)
            try:
                message, trace = ray.get(ref)
            except RayError as error:
                last = [line for line in str(error).splitlines() if line.strip()][-1]
                message, trace = f"its process died: {last.strip()}", str(error)
            if not message and not (job.directory / "summary.json").is_file():
                message = (
                    f"it was played on another machine, and {job.directory} is not there to see; share the directory"
                )
            self._ended(job, message, trace)
        for job, _ in self.running.values():
            job.look()
        self.watcher.look()

    def _ended(self, job: Job, message: str, trace: str = "") -> None:
        if job in self.left:
            self.left.remove(job)
        else:
            job.seconds = time.monotonic() - job.started
        job.look()
        job.state, job.message = "failed" if message else "done", message
        path = self.out / "errors" / f"{job.name}.txt"
        if trace:
            path.parent.mkdir(exist_ok=True)
            write_text(path, trace)
        elif not message:
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                path.parent.rmdir()
            job.result = _result(job)
        self.watcher.changed(job)

    def _stop(self) -> None:
        """Let the runs put on disk what has been played."""
        for ref in self.running:
            ray.cancel(ref)
        if self.running:
            ray.wait(list(self.running), num_returns=len(self.running), timeout=_GRACE_SECONDS)


def _start(address: str | None) -> bool:
    """Connect to the cluster, or start one over all cores; True if it is ours to stop."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return start_ray(Resources(cores, address=address))


def _distinct(jobs: Sequence[Job]) -> list[Config]:
    """One config of each size."""
    sizes = {
        json.dumps([job.config.to_dict()["task"], job.config.federation.clients_per_round]): job.config for job in jobs
    }
    return list(sizes.values())


def _bytes_of(config: Config) -> float:
    """Memory that a serial run takes, roughly: the process, the data, and vectors of the model's size.

    Raises
    ------
    InputError: data, trigger and partition do not fit each other, or a file is unusable.
    """
    data = prepare(config).data
    held = sum(part.inputs.nbytes + part.labels.nbytes for part in (data.train, data.test))
    model = 4 * Layout.of(initial_module(config, data)).size
    return _PROCESS_BYTES + 2 * held + model * (config.federation.clients_per_round + _MODELS)


def _result(job: Job) -> dict[str, float | None]:
    """Main accuracy and ASR of the last round."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        final = json.loads((job.directory / "summary.json").read_text(encoding="utf-8"))["final"]
        return {"main_accuracy": final["main_accuracy"], "asr": final["asr"]}
    return {}


# ------------------------------------------------------------------------------------------ in a Ray worker


class _Mark(Silent):
    """Says in the run's directory which cell it is, as soon as there is one."""

    def __init__(self, directory: Path, cell: dict[str, Any] | None) -> None:
        self.directory, self.cell = directory, cell

    def begin(self, what: str, rounds: int, done: int) -> None:
        self.write()

    def write(self) -> None:
        path = self.directory / CELL
        if self.cell is not None and not path.is_file():
            write_json(path, self.cell)


def _play_one(
    raw: dict[str, Any],
    out: str,
    twin: str | None,
    clients_of: dict[str, Any] | None,
    own_twin: bool,
    cell: dict[str, Any] | None,
    started_in: str,
) -> tuple[str, str]:
    """Play one run, or what is missing of it; ("", "") or what went wrong: (message, traceback)."""
    logging.getLogger("flwr").setLevel(logging.WARNING)
    torch.set_num_threads(1)
    with contextlib.suppress(OSError):
        os.chdir(started_in)  # paths in a config are relative to it
    directory = Path(out)
    try:
        mark = _Mark(directory, cell)
        run(
            build(raw),
            out=directory,
            twin=own_twin,
            resume=True,
            progress=mark,
            twin_from=None if twin is None else Path(twin),
            clients_of=None if clients_of is None else build(clients_of, possible=False),
        )
        mark.write()
    except FedsimError as error:
        return str(error), traceback.format_exc()
    except MemoryError:
        return "out of memory; play fewer runs at a time (--jobs)", traceback.format_exc()
    except Exception as error:
        return f"{type(error).__name__}: {error}", traceback.format_exc()
    return "", ""
