"""The runs that a benchmark consists of: its cells, and the clean twins that they share."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fedsim import plugins
from fedsim.benchmark.grid import Cell, Grid
from fedsim.config import Config, build, load_config
from fedsim.errors import InputError
from fedsim.federation.schedule import RoundPlan, plan
from fedsim.recording.directory import TWIN, is_finished, is_played
from fedsim.recording.identity import config_hash, differing
from fedsim.recording.runs import CELL
from fedsim.recording.tables import JOURNAL


@dataclass
class Job:
    """One run to be in the benchmark: a cell, or a clean twin that several cells share.

    twin: the shared twin to take. own_twin: its twin is played with it, since nobody else could use it.
    clients_of: see :func:`fedsim.experiment.run`. state: waiting, running, done, failed; kept where nothing had to be
    played. round: rounds on disk, of ``rounds``; ``began_at`` of them were there before it was played here.
    seconds: played here, from ``started`` on (monotonic). first, last: when the first and the last new round were seen,
    and which these were. result: accuracies of its last round.
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
    first: tuple[float, int] | None = None
    last: tuple[float, int] | None = None
    result: Mapping[str, float | None] = field(default_factory=dict)
    _tails: dict[Path, tuple[int, int]] = field(default_factory=dict)

    @property
    def rounds(self) -> int:
        return self.config.federation.rounds * (2 if self.own_twin else 1)

    @property
    def kind(self) -> str:
        """What its time depends on most."""
        return "none" if self.config.attack is None else self.config.attack.name

    @property
    def reason(self) -> str:
        """The message of one that failed, of a traceback in it only the last line (all of it: ``errors/``)."""
        said, traced, trace = self.message.strip().partition("\nTraceback (most recent call last):\n")
        return f"{said} {trace.splitlines()[-1].strip()}" if traced and trace else said

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

    def keep(self) -> None:
        """Note that nothing of it has to be played."""
        self.state, self.kept, self.round, self.result = "done", True, self.rounds, self.final()

    def final(self) -> dict[str, float | None]:
        """Main accuracy and ASR of the last round, as far as they are there."""
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            final = json.loads((self.directory / "summary.json").read_text(encoding="utf-8"))["final"]
            return {"main_accuracy": final["main_accuracy"], "asr": final["asr"]}
        return {}

    def _has_twin(self) -> bool:
        return self.own_twin or self.twin is not None

    def look(self) -> None:
        """Count the rounds on disk."""
        places = [self.directory, *([self.directory / TWIN] if self.own_twin else [])]
        before, self.round = self.round, min(sum(map(self._count, places)), self.rounds)
        if self.round < self.began_at:  # a run goes on from its last checkpoint
            self.began_at = self.round
        elif self.round > before:
            self.last = (time.monotonic(), self.round)
            self.first = self.first or self.last

    def start(self) -> None:
        """Note that it is being played from now on."""
        self.look()
        self.state, self.started = "running", time.monotonic()
        self.began_at, self.first, self.last = self.round, None, None

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


def spare_twins(jobs: list[Job]) -> None:
    """A twin that no cell waits for need not be played."""
    wanted = {id(job.twin) for job in jobs if job.state == "waiting"}
    for job in jobs:
        if job.cell is None and job.state == "waiting" and id(job) not in wanted:
            job.keep()


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
