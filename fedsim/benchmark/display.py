"""How a benchmark gets on: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fedsim.benchmark.running import Job, Watcher

_LINE_SECONDS = 60.0  # between two lines that say nothing but how far it is


def display(console: Console) -> AbstractContextManager[Watcher]:
    """The display that suits the console."""
    return _Table(console) if console.is_terminal else nullcontext(_Lines(console))


class Estimate:
    """The time left, from the seconds that a round of the same attack has taken so far."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.jobs = jobs

    def seconds(self) -> float | None:
        """None while nothing is known."""
        now = time.monotonic()
        spent: dict[str, list[float]] = {}
        for job in self.jobs:
            if job.kept or job.state not in ("running", "done"):
                continue
            took = now - job.started if job.state == "running" else job.seconds
            if job.round > job.began_at:
                spent.setdefault(job.kind, []).append(took / (job.round - job.began_at))
        if not spent:
            return None
        rates = {kind: sum(found) / len(found) for kind, found in spent.items()}
        usual = sum(rates.values()) / len(rates)
        left = sum(
            rates.get(job.kind, usual) * (job.rounds - job.round)
            for job in self.jobs
            if job.state in ("waiting", "running")
        )
        return left / max(1, sum(job.state == "running" for job in self.jobs))


def clock(seconds: float | None) -> str:
    """A duration as 1:02:03, 2:03, or ? where it is not known."""
    if seconds is None:
        return "?"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def outcome(job: Job) -> str:
    """What a run that has ended came to, in a few words."""
    if job.state == "failed":
        return f"failed: {job.message.strip().partition(chr(10))[0]}"
    numbers = [
        f"{name} {value:.1%}"
        for name, value in (("main", job.result.get("main_accuracy")), ("ASR", job.result.get("asr")))
        if value is not None
    ]
    return "  ".join([*numbers, f"({clock(job.seconds)})"])


class _Counts:
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
        more = f"; {twins} clean twin{'s' if twins != 1 else ''} to play first" if twins else ""
        self.say(f"{len(cells)} cell{'s' if len(cells) != 1 else ''}{there}{more}")

    def say(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def ended(self) -> int:
        return sum(job.state in ("done", "failed") for job in self.jobs)

    def told(self, job: Job) -> str:
        return f"[{self.ended()}/{len(self.jobs)}] {job.title}: {outcome(job)}"


class _Lines(_Counts):
    """A line for every run that ends; from time to time one that says how far the others are."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._said = time.monotonic()

    def changed(self, job: Job) -> None:
        if job.state in ("done", "failed"):
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

    def changed(self, job: Job) -> None:
        if job.state in ("done", "failed"):
            style = "red" if job.state == "failed" else ""
            self.console.print(Text(self.told(job), style=style), soft_wrap=True)

    def look(self) -> None: ...

    def _rendered(self) -> Group:
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
