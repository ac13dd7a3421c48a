"""The command line: ``fedsim run``, ``bench``, ``validate``, ``list``, ``describe``, ``report``,
``compare``.

Exit status: 0 done, 1 the run failed, 2 bad input, 130 interrupted.
"""

from __future__ import annotations

import dataclasses
import sys
import time
import typing
import unicodedata
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table
from rich.text import Text

from fedsim.errors import ConfigError, FedsimError, InputError

if TYPE_CHECKING:
    from fedsim.federation.strategy import RoundRecord

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Federated learning under backdoor attack, and how long the backdoor lives.",
)
out = Console()
err = Console(stderr=True)

_INTERRUPTED = 130
LISTS = {
    "attacks": "attack",
    "defenses": "defense",
    "triggers": "trigger",
    "tasks": "task",
    "models": "model",
    "datasets": "dataset",
    "schedules": "schedule",
    "partitions": "partition",
    "crafts": "craft",
}

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Override any key, for example [bold]training.lr=0.1[/bold]."),
]


@app.command()
def run(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file, or the name of a shipped config.")],
    overrides: Overrides = None,
    out_dir: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="The run directory itself (default: under output.dir).")
    ] = None,
    twin: Annotated[
        bool, typer.Option("--twin", help="Also play the clean twin: the malicious clients train honestly.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out DIR to the same bytes.")] = False,
) -> None:
    """Play an experiment and print how long the backdoor lived.

    Examples:
      fedsim run quickstart
      fedsim run quickstart attack.name=neurotoxin seed=1
      fedsim run my.yaml training.lr=0.1 'defense=[{name: krum, f: 2}]' --out runs/krum --twin
    """
    from fedsim.config import load_config
    from fedsim.experiment import run as play
    from fedsim.report.table import persistence_table

    if resume and out_dir is None:
        raise InputError("--resume needs --out DIR, the directory of the run to continue")
    loaded = load_config(config, overrides or [])
    with _display(loaded) as progress:
        finished = play(loaded, out=out_dir, twin=True if twin else None, resume=resume, progress=progress)
    out.print(persistence_table(finished.summary))
    where = finished.report if finished.report.exists() else finished.directory
    out.print(f"\n{'report' if finished.report.exists() else 'run'}: {where}", soft_wrap=True, highlight=False)


@app.command()
def bench(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file, or the name of a shipped benchmark.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Change any key for all cells, or the definition.",
        ),
    ] = None,
    out_dir: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Directory of the benchmark (default: bench/NAME under output.dir)."),
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option("--jobs", metavar="N", min=1, help="Runs at a time (default: as cores and memory allow)."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the cells and whatever is wrong with them; play nothing.")
    ] = False,
) -> None:
    """Play a grid of attacks × triggers × defenses × seeds …, and compare.

    Stopped or killed, the same command plays what is missing and leaves alone what is complete; cells may be added.
    Cells that differ only in the adversary share one clean twin. A cell that fails is reported, the others go on, and
    the exit status is 1. KEY=VALUE changes a key for all cells; seeds=… and grid.AXIS=… change the definition.

    \b
    A benchmark is a YAML file:
      base: quickstart               # what every cell starts from: a name or file
      set: {federation.rounds: 60}   # changes for all cells
      seeds: \\[1, 2]
      grid:
        attack: \\[data_poisoning, {name: anticipate, k: 5}]
        defense:                     # LABEL: value
          fedavg: \\[]
          clip: {name: norm_clipping, bound: 3}
          clip and krum: \\[{name: norm_clipping, bound: 3}, {name: krum, f: 1}]
        trigger: \\[patch, blended]   # also schedule, partition, or any key
        pace: {slow: {set: {training.lr: 0.01}}, usual: {set: {}}}
      exclude: \\[{attack: anticipate, trigger: patch}]
      twin: true                     # measure every cell against its clean twin

    \b
    Examples:
      fedsim bench quick --dry-run
      fedsim bench quick 'seeds=\\[1,2,3]' federation.rounds=80 --out runs/quick
    """
    from fedsim.benchmark.display import display
    from fedsim.benchmark.grid import load_grid
    from fedsim.benchmark.running import default_directory, listed, play

    grid = load_grid(config, overrides or [])
    where = out_dir or default_directory(grid)
    if dry_run:
        for line in listed(grid, where):
            out.print(_harmless(line), markup=False, highlight=False, soft_wrap=True)
        lacking = [problem for problem in grid.problems if problem.absent]
        if len(lacking) < len(grid.problems):
            grid.check()
        for problem in lacking:
            out.print(f"this machine lacks a file: {problem}", markup=False, highlight=False, soft_wrap=True)
        return
    grid.check()
    try:
        with display(out) as watcher:
            done = play(grid, where, jobs=jobs, watcher=watcher)
    except KeyboardInterrupt:
        err.print("interrupted; the same command plays what is missing")
        raise SystemExit(_INTERRUPTED) from None
    for job in done.failed:
        said = _harmless(f"{job.title}: {job.message.strip()}")
        err.print(Text.assemble(("failed: ", "bold red"), said), soft_wrap=True)
    if done.report is not None:
        out.print(f"report: {done.report}", soft_wrap=True, highlight=False)
    if done.failed:
        err.print(
            f"{len(done.failed)} of {len(done.jobs)} runs failed; the same command tries them again", soft_wrap=True
        )
        raise typer.Exit(1)


@app.command()
def validate(
    configs: Annotated[
        list[str], typer.Argument(metavar="CONFIG...", help="Files, or names of shipped configs and benchmarks.")
    ],
) -> None:
    """Check configs and benchmarks without loading data; all problems of each are printed together.

    Of a benchmark every cell is checked. A file that a config names and this machine lacks is mentioned, but does
    not make the config wrong.
    """
    from fedsim.benchmark.grid import is_definition, load_grid
    from fedsim.config import load_config
    from fedsim.federation.schedule import plan, plan_problems

    failed = False
    for name in configs:
        try:
            if is_definition(name):
                problems = load_grid(name).problems
            else:
                loaded = load_config(name)
                problems = plan_problems(loaded, plan(loaded))
            if problems:
                raise ConfigError(problems, name)
        except ConfigError as error:
            if all(problem.absent for problem in error.problems):
                lacks = "; ".join(map(str, error.problems))
                out.print(
                    f"{name}: ok, but this machine lacks a file ({lacks})",
                    highlight=False,
                    markup=False,
                    soft_wrap=True,
                )
                continue
            failed = True
            _complain(error)
        else:
            out.print(f"{name}: ok", highlight=False, markup=False)
    if failed:
        raise typer.Exit(2)


@app.command("list")
def list_(
    what: Annotated[str | None, typer.Argument(metavar="WHAT", help=", ".join([*LISTS, "configs"]))] = None,
) -> None:
    """List what there is: attacks, defenses, triggers, tasks, models, datasets, schedules, partitions, configs …

    The list of one kind says of a method, too, what it knows or needs, what it costs (N clients, D weights), and its
    paper.
    """
    from fedsim import plugins
    from fedsim.config import shipped

    if what == "configs":
        for name in shipped():
            out.print(name, markup=False, highlight=False)
        return
    if what is not None and what not in LISTS:
        raise InputError(f"nothing is listed as {what!r}; use one of: {', '.join([*LISTS, 'configs'])}")
    for plural in [what] if what else LISTS:
        kind = LISTS[plural]
        table = Table(box=None, padding=(0, 2, 0, 0), title=None if what else plural, title_justify="left")
        table.add_column("name", style="bold", no_wrap=True)
        table.add_column("what it is")
        for name in plugins.names(kind):
            cls = plugins.get(kind, name)
            facts = _facts(cls) if what else []
            table.add_row(name, Text.assemble(cls.summary(), *[("\n" + line, "dim") for line in facts]))
        out.print(table)


@app.command()
def describe(
    kind: Annotated[str, typer.Argument(metavar="KIND", help="attack, defense, trigger …, or config, or base")],
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="The method's name.")] = None,
) -> None:
    """Everything about one method: parameters, defaults, ranges, paper, what it knows.

    Examples:
      fedsim describe attack anticipate
      fedsim describe config          every key of a config, with its default
      fedsim describe base            the same as a config file
    """
    from fedsim import config, plugins

    if kind == "config":
        _describe_section(config.Config, "")
        return
    if kind == "base":
        out.print(config.render_base(), end="", markup=False, highlight=False, soft_wrap=True)
        return
    kind = LISTS.get(kind, kind)
    if kind not in plugins.KINDS:
        raise InputError(f"there is no kind {kind!r}; use one of: {', '.join([*plugins.KINDS, 'config', 'base'])}")
    if name is None:
        raise InputError(f"name one: {', '.join(plugins.names(kind))}")
    cls: Any = plugins.get(kind, name)
    out.print(Text(f"{kind} {name}", style="bold"))
    out.print(Text(_dedent(cls.__doc__ or "")), soft_wrap=True)
    out.print()
    facts = {"paper": cls.paper, "cost": cls.cost, "tasks": ", ".join(cls.tasks)}
    if kind == "attack":
        facts |= {"knows": knowledge(cls), "backdoor": _yes(cls.backdoor)}
    if kind == "defense":
        facts |= {"needs": needs(cls), "own aggregation rule": _yes(cls.aggregates())}
    for fact, value in facts.items():
        if value:
            out.print(Text(f"{fact}: {value}"), soft_wrap=True)
    out.print()
    _parameters_table(cls.Parameters)


@app.command()
def report(
    directories: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="Run directories, or directories that hold runs.")
    ],
    out_dir: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Where the report of many runs goes (default: the one DIR given)."),
    ] = None,
) -> None:
    """Write a run's report.html and figures anew; of many runs, the page that compares them, with tables.

    Examples:
      fedsim report runs/quickstart/20260101-120000-seed1
      fedsim report runs/bench
      fedsim report runs/a runs/b --out runs/a-and-b
    """
    from fedsim.recording.results import run_directories
    from fedsim.report import write_grid_report, write_report

    single = len(directories) == 1 and out_dir is None
    if single and (not directories[0].is_dir() or not set(run_directories(directories[0])) - {directories[0]}):
        page = write_report(directories[0])
    elif out_dir is None and not single:
        raise InputError("the report of several directories needs a place: add --out DIR")
    else:
        page = write_grid_report(directories, out_dir or directories[0])
    out.print(str(page), markup=False, highlight=False, soft_wrap=True)


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(metavar="A", help="A run directory, or a directory of runs (several seeds).")],
    b: Annotated[Path, typer.Argument(metavar="B", help="The one to compare it with.")],
) -> None:
    """Put two runs, or two sets of runs, side by side: what differs in their configs, then their numbers.

    Runs of several seeds are compared in pairs, seed by seed.

    Examples:
      fedsim compare runs/krum runs/norm_clipping
    """
    from fedsim.report.comparison import compare as side_by_side

    out.print(side_by_side(a, b))


def main() -> None:
    """Entry point of ``fedsim`` and ``python -m fedsim``."""
    sys.exit(_guarded(app))


def _guarded(call: Callable[..., Any]) -> int:
    """Run the command line and turn what happens into an exit status and one clear message."""
    try:
        status = call(standalone_mode=False)
    except FedsimError as error:
        _complain(error)
        return error.exit_status
    except KeyboardInterrupt:
        status = _INTERRUPTED
    except Exception as error:
        import click

        if isinstance(error, click.ClickException):
            error.show()
            return error.exit_code
        if isinstance(error, MemoryError):
            err.print("error: out of memory; use fewer engine.workers or a smaller batch")
            return 1
        if not isinstance(error, click.exceptions.Abort):
            raise
        status = _INTERRUPTED
    if status == _INTERRUPTED:  # Ctrl-C: typer itself makes this status of it
        err.print("interrupted; continue with the same command and --out DIR --resume")
    return status if isinstance(status, int) else 0


def _complain(error: FedsimError) -> None:
    err.print(Text.assemble(("error: ", "bold red"), _harmless(str(error))), soft_wrap=True)


def _harmless(text: str) -> str:
    """Text from a config, a file or a client as it may be shown: nothing in it steers a terminal."""
    return "".join(c if unicodedata.category(c)[0] != "C" or c in "\n\t" else "�" for c in text)


def _dedent(text: str) -> str:
    import inspect

    return inspect.cleandoc(text)


def _defaults(cls: Any) -> Any:
    """The default parameters of a plugin; None where one of them has no default."""
    try:
        return cls.Parameters()
    except TypeError:
        return None


def knowledge(cls: Any) -> str:
    """What an attack sees with its default parameters, and what others may add."""
    defaults = _defaults(cls)
    usual = cls.knows if defaults is None else cls.knowledge(defaults)
    more = sorted(str(k) for k in cls.knows - usual)
    return ", ".join(sorted(str(k) for k in usual)) + (f"; by its parameters also {', '.join(more)}" if more else "")


def needs(cls: Any) -> str:
    """What a defense needs besides updates, with its default parameters."""
    defaults = _defaults(cls)
    least = cls.min_clients if defaults is None else cls.required_clients(defaults)
    parts = {
        f"{least} clients or more": least > 1,
        "the network at the server": cls.needs_network or cls.needs_data,
        "data at the server": cls.needs_data,
        "honest clients that take part in it": cls.client_side(),
    }
    return ", ".join(part for part, needed in parts.items() if needed) or "the updates only"


def _facts(cls: Any) -> list[str]:
    """In two lines: what a method knows or needs and what it costs; its paper."""
    wanted = (
        f"knows {knowledge(cls)}" if cls.kind == "attack" else f"needs {needs(cls)}" if cls.kind == "defense" else ""
    )
    cost = f"cost: {cls.cost}" if cls.cost else ""
    return [line for line in (" · ".join(filter(None, (wanted, cost))), cls.paper) if line]


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _show(value: Any) -> str:
    """A default as it is written in a config."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _field_row(f: dataclasses.Field[Any], hint: Any) -> tuple[str, str, str, str]:
    from fedsim.config import type_name
    from fedsim.plugins import allowed

    if f.default is not dataclasses.MISSING:
        default = _show(f.default)
    elif f.default_factory is not dataclasses.MISSING:
        default = _show(f.default_factory())
    else:
        default = "required"
    return default, type_name(hint), allowed(f), f.metadata.get("doc", "")


def _parameters_table(cls: type) -> None:
    if not dataclasses.fields(cls):
        out.print("no parameters of its own")
        return
    hints = typing.get_type_hints(cls)
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("parameter", style="bold", no_wrap=True)
    table.add_column("default", max_width=24)
    table.add_column("meaning (what is allowed)")
    for f in dataclasses.fields(cls):
        default, type_text, allowed, doc = _field_row(f, hints[f.name])
        note = allowed if allowed.startswith("one of") else ", ".join(part for part in (type_text, allowed) if part)
        table.add_row(f.name, default, escape(f"{doc} ({note})"))
    out.print(table)


def _describe_section(cls: type, path: str) -> None:
    from fedsim.config import section_class

    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        if f.metadata.get("internal"):
            continue
        key = f"{path}.{f.name}" if path else f.name
        section = section_class(cls, f.name)
        if section is not None:
            out.print(Text(f"\n{key}:  {(section.__doc__ or '').strip()}", style="bold"))
            _describe_section(section, key)
        elif "plugin" in f.metadata or "plugins" in f.metadata:
            kind = f.metadata.get("plugin") or f.metadata["plugins"]
            default = f.metadata.get("plugin_default", [])
            out.print(Text(f"  {key} = {default}   {f.metadata['doc']} (fedsim list {kind}s)"), soft_wrap=True)
        else:
            default, type_text, allowed, doc = _field_row(f, hints[f.name])
            note = f"{type_text}{', ' + allowed if allowed else ''}"
            out.print(Text(f"  {key} = {default}   {doc} ({note})"), soft_wrap=True)


# --------------------------------------------------------------------------------------- progress display


def _display(config: Any) -> AbstractContextManager[Any]:
    """A live display on a terminal; plain lines elsewhere."""
    return _Live(config) if out.is_terminal else nullcontext(_Lines())


class _Lines:
    """Progress where there is no terminal (a log, CI): a line every so often."""

    def __init__(self) -> None:
        self._what, self._rounds, self._done, self._started, self._said = "", 0, 0, 0.0, 0.0

    def begin(self, what: str, rounds: int, done: int) -> None:
        self._what, self._rounds, self._done = what, rounds, done
        self._started = self._said = time.monotonic()
        out.print(f"{what}: {rounds - done} rounds to play", highlight=False)

    def say(self, line: str) -> None:
        out.print(_harmless(line), highlight=False, markup=False, soft_wrap=True)

    def client(self) -> None: ...

    def round(self, record: RoundRecord) -> None:
        now = time.monotonic()
        if now - self._said < 5 and record.round != self._rounds:
            return
        self._said = now
        played = record.round - self._done
        left = (now - self._started) / max(played, 1) * (self._rounds - record.round)
        out.print(f"round {record.round}/{self._rounds}  {_numbers(record)}  {_clock(left)} left", highlight=False)


class _Live:
    """Progress on a terminal: one bar for the rounds, the numbers beside it."""

    def __init__(self, config: Any) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._clients = config.federation.clients_per_round
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=10),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(table_column=Column(no_wrap=True)),  # where it is narrow the bar gives way
            TextColumn("left"),
            console=out,
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
        self._progress.console.print(_harmless(line), markup=False, highlight=False)

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


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
