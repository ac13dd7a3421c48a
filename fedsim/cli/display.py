"""How a run gets on: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Column

from fedsim.cli.console import harmless

if TYPE_CHECKING:
    from fedsim.federation.records import RoundRecord


def display(console: Console, config: Any) -> AbstractContextManager[Any]:
    """A live display on a terminal; plain lines elsewhere."""
    return _Live(console, config) if console.is_terminal else nullcontext(_Lines(console))


class _Lines:
    """Progress where there is no terminal (a log, CI): a line every so often."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._what, self._rounds, self._done, self._started, self._said = "", 0, 0, 0.0, 0.0

    def begin(self, what: str, rounds: int, done: int) -> None:
        self._what, self._rounds, self._done = what, rounds, done
        self._started = self._said = time.monotonic()
        self._console.print(f"{what}: {rounds - done} rounds to play", highlight=False)

    def say(self, line: str) -> None:
        self._console.print(harmless(line), highlight=False, markup=False, soft_wrap=True)

    def client(self) -> None: ...

    def round(self, record: RoundRecord) -> None:
        from fedsim.report.words import clock

        now = time.monotonic()
        if now - self._said < 5 and record.round != self._rounds:
            return
        self._said = now
        played = record.round - self._done
        left = (now - self._started) / max(played, 1) * (self._rounds - record.round)
        self._console.print(
            f"round {record.round}/{self._rounds}  {_numbers(record)}  {clock(left)} left", highlight=False
        )


class _Live:
    """Progress on a terminal: one bar for the rounds, the numbers beside it."""

    def __init__(self, console: Console, config: Any) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._clients = config.federation.clients_per_round
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=10),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(table_column=Column(no_wrap=True)),  # where it is narrow the bar gives way
            TextColumn("left"),
            console=console,
        )
        self._task: Any = None
        self._done = 0.0

    def __enter__(self) -> _Live:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def begin(self, what: str, rounds: int, done: int) -> None:
        self._task = self._progress.add_task(what, total=rounds, completed=done, numbers="")

    def say(self, line: str) -> None:
        self._progress.console.print(harmless(line), markup=False, highlight=False)

    def client(self) -> None: ...

    def round(self, record: RoundRecord) -> None:
        self._progress.update(self._task, completed=record.round, numbers=_numbers(record))


def _numbers(record: RoundRecord) -> str:
    m = record.measurement
    if m is None:
        return "(not evaluated)"
    from fedsim.report.words import perplexity

    ppl = "" if m.perplexity is None else f"  ppl {perplexity(m.perplexity):>5}"
    asr = "" if m.asr is None else f"  ASR {m.asr:6.1%}"
    return f"main {m.main_accuracy:6.1%}{ppl}{asr}{'  attack' if record.malicious_submitted else '        '}"
