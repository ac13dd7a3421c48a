"""Plays what is missing of a grid, many runs at a time on one Ray cluster.

How the machine is shared: whenever a run can start, it gets an even share of the idle cores, ``idle cores // runs that
could start``, at least one. With one core it plays serially in a single process (most grids have more cells than the
machine has cores); with more, which happens when few runs are left or ``jobs`` is small, it gets Ray workers of its
own on the same cluster. It measures the global model on as many threads. Results do not depend on that. On a GPU the
runs at a time share it evenly.

A run is played by a Ray task in a process of its own; the driver looks at its journal to see how far it is. What is
complete is not touched.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import ray
from ray.exceptions import RayError

from fedsim.benchmark.directory import ERRORS, is_held, opened
from fedsim.benchmark.grid import Grid
from fedsim.benchmark.jobs import Job, jobs_of, spare_twins
from fedsim.benchmark.worker import play_one
from fedsim.config import Config
from fedsim.errors import FedsimError
from fedsim.federation.client import initial_module
from fedsim.federation.cluster import Resources, start_ray
from fedsim.federation.engine import choose_device, cores
from fedsim.federation.setup import prepare
from fedsim.layout import Layout
from fedsim.recording.files import write_text

_JOBS_PER_GPU = 4
_PROCESS_BYTES = 0.75 * 2**30  # of a process that has imported everything
_MODELS = 16  # vectors of the model's size beside the matrix of updates: gradients, momentum, checkpoints, defenses
_LOOK_SECONDS = 0.5
_GRACE_SECONDS = 10.0  # to put what has been played on disk after Ctrl-C
_HELD_SECONDS = 60.0  # until a killed benchmark's processes are gone


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
                    job.keep()
            except FedsimError as error:
                job.state, job.message = "failed", str(error)
        spare_twins(every)
        watcher.begin(every)
        if any(job.state == "waiting" for job in every):
            _Players(every, out, jobs, watcher).play()
        done = [job.directory for job in every if job.cell is not None and job.state == "done"]
        return Outcome(out, every, _report(done, out) if done else None)


def _report(directories: list[Path], out: Path) -> Path:
    from fedsim.report import write_grid_report

    return write_grid_report(directories, out)


def listed(grid: Grid, out: Path) -> list[str]:
    """The runs of a grid in words, and which of them are complete."""
    every = jobs_of(grid, out)
    lines = []
    for job in every:
        try:
            there = "  complete" if job.is_complete() else ""
        except FedsimError:  # why: directory.check says it of all of them
            there = "  another run lies in its place"
        lines.append(f"{job.title}  {job.rounds} rounds{there}")
    cells, rounds = sum(job.cell is not None for job in every), sum(job.rounds for job in every)
    counts = [counted(cells, "cell"), counted(len(every) - cells, "clean twin"), counted(rounds, "round")]
    lines.append(f"{', '.join(counts)}; in {out}")
    return lines


def counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


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
            cpus = float(ray.cluster_resources().get("CPU", 1.0))
            self.cores = max(1, int(cpus // self.engine.cpus_per_worker))
            self.gpus = max(1, int(ray.cluster_resources().get("GPU", 0.0))) if self.cuda else 0
            self.most = self.most or self._at_a_time()
            task = ray.remote(max_retries=0)(play_one)
            while self.left or self.running:
                for job in self._ready():
                    self._hand_out(task, job)
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

    def _hand_out(self, task: Any, job: Job) -> None:
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
        job.start()
        ref = task.options(**options).remote(
            config,
            str(job.directory.resolve()),
            twin=None if job.twin is None else str(job.twin.directory.resolve()),
            own_twin=job.own_twin,
            clients_of=None if job.clients_of is None else job.clients_of.to_dict(),
            cell=None if job.cell is None else {"labels": dict(job.cell.labels), "seed": job.cell.seed},
            threads=max(1, int(workers * self.engine.cpus_per_worker)),
            started_in=os.getcwd(),
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
        path = self.out / ERRORS / f"{job.name}.txt"
        if trace:
            path.parent.mkdir(exist_ok=True)
            write_text(path, trace)
        elif not message:
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                path.parent.rmdir()
            job.result = job.final()
        self.watcher.changed(job)

    def _stop(self) -> None:
        """Let the runs put on disk what has been played."""
        for ref in self.running:
            ray.cancel(ref)
        if self.running:
            ray.wait(list(self.running), num_returns=len(self.running), timeout=_GRACE_SECONDS)


def _start(address: str | None) -> bool:
    """Connect to the cluster, or start one over all cores; True if it is ours to stop."""
    return start_ray(Resources(cores(), address=address))


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
