"""How a benchmark gets on: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fedsim.benchmark.estimate import Estimate
from fedsim.benchmark.jobs import Job
from fedsim.benchmark.running import Watcher, counted
from fedsim.report.words import clock

_LINE_SECONDS = 60.0  # between two lines that say nothing but how far it is


def display(console: Console) -> AbstractContextManager[Watcher]:
    """The display that suits the console."""
    return _Table(console) if console.is_terminal else nullcontext(_Lines(console))


def outcome(job: Job) -> str:
    """What a run that has ended came to, in a few words."""
    if job.state == "failed":
        return f"failed: {job.reason.partition(chr(10))[0]}"
    numbers = [
        f"{name} {value:.1%}"
        for name, value in (("main", job.result.get("main_accuracy")), ("ASR", job.result.get("asr")))
        if value is not None
    ]
    return "  ".join([*numbers, f"({clock(job.seconds)})"])


class _Counts(ABC):
    """What both displays count."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.jobs: Sequence[Job] = []
        self.estimate = Estimate([])

    def begin(self, jobs: Sequence[Job]) -> None:
        self.jobs, self.estimate = jobs, Estimate(jobs)
        cells = [job for job in jobs if job.cell is not None]
        kept = sum(job.state == "done" for job in cells)
        twins = sum(job.cell is None and job.state == "waiting" for job in jobs)
        there = f", {kept} of them complete already" if kept else ""
        more = f"; {counted(twins, 'clean twin')} to play first" if twins else ""
        self.say(f"{counted(len(cells), 'cell')}{there}{more}")

    def say(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def changed(self, job: Job) -> None:
        self.estimate.changed()
        if job.state in ("done", "failed"):
            self.tell(job)

    @abstractmethod
    def tell(self, job: Job) -> None:
        """Say that a run has ended."""

    def ended(self) -> int:
        return sum(job.state in ("done", "failed") for job in self.jobs)

    def told(self, job: Job) -> str:
        return f"[{self.ended()}/{len(self.jobs)}] {job.title}: {outcome(job)}"


class _Lines(_Counts):
    """A line for every run that ends; from time to time one that says how far the others are."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._said = time.monotonic()

    def tell(self, job: Job) -> None:
        self.say(f"{self.told(job)}  {clock(self.estimate.seconds())} left")
        self._said = time.monotonic()

    def look(self) -> None:
        if time.monotonic() - self._said < _LINE_SECONDS:
            return
        self._said = time.monotonic()
        playing = ", ".join(f"{job.title} {job.round}/{job.rounds}" for job in self.jobs if job.state == "running")
        self.say(f"playing {playing}  {clock(self.estimate.seconds())} left")


class _Table(_Counts):
    """What runs as a table that stays at the bottom; what ends scrolls by above it."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._live = Live(console=console, refresh_per_second=4, transient=True, get_renderable=self._rendered)

    def __enter__(self) -> _Table:
        self._live.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._live.stop()

    def tell(self, job: Job) -> None:
        style = "red" if job.state == "failed" else ""
        self.console.print(Text(self.told(job), style=style), soft_wrap=True)

    def look(self) -> None: ...

    def _rendered(self) -> Group:
        if not self.jobs:
            return Group()
        table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
        table.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
        table.add_column(width=16)
        table.add_column(justify="right", no_wrap=True)
        for job in self.jobs:
            if job.state == "running":
                bar = ProgressBar(total=job.rounds, completed=job.round, width=16)
                table.add_row(Text(job.title), bar, Text(f"round {job.round} of {job.rounds}"))
        failed = sum(job.state == "failed" for job in self.jobs)
        waiting = sum(job.state == "waiting" for job in self.jobs)
        parts = [f"{self.ended()} of {len(self.jobs)} runs ended", f"{waiting} waiting"]
        parts += [f"{failed} failed"] if failed else []
        line = f"{', '.join(parts)}; {clock(self.estimate.seconds())} left"
        return Group(table, Text(line, style="bold"))
