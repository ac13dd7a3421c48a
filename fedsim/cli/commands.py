"""The commands and their exit status: 0 done, 1 the run failed, 2 bad input, 130 interrupted."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from fedsim.cli import describing
from fedsim.cli.command import Command
from fedsim.cli.console import complain, err, harmless, out
from fedsim.cli.describing import LISTS
from fedsim.cli.display import display
from fedsim.errors import ConfigError, FedsimError, InputError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Federated learning under backdoor attack, and how long the backdoor lives.",
)
_INTERRUPTED = 130

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Override any key, for example [bold]training.lr=0.1[/bold]."),
]


@app.command(cls=Command)
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

    \b
    Examples:
      fedsim run quickstart
      fedsim run quickstart attack.name=neurotoxin seed=1
      fedsim run my.yaml 'defense=[{name: krum, f: 2}]' --out runs/krum --twin
    """
    from fedsim.config import load_config
    from fedsim.experiment import run as play
    from fedsim.report.table import persistence_table

    if resume and out_dir is None:
        raise InputError("--resume needs --out DIR, the directory of the run to continue")
    loaded = load_config(config, overrides or [])
    with display(out, loaded) as progress:
        finished = play(loaded, out=out_dir, twin=True if twin else None, resume=resume, progress=progress)
    out.print(persistence_table(finished.summary))
    where = finished.report if finished.report.exists() else finished.directory
    out.print(f"\n{'report' if finished.report.exists() else 'run'}: {where}", soft_wrap=True, highlight=False)


@app.command(cls=Command)
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
    from fedsim.benchmark.directory import ERRORS, check, default_directory
    from fedsim.benchmark.display import display as table
    from fedsim.benchmark.grid import load_grid
    from fedsim.benchmark.running import listed, play

    grid = load_grid(config, overrides or [])
    where = out_dir or default_directory(grid)
    if dry_run:
        for line in listed(grid, where) if grid.cells else ():
            out.print(harmless(line), markup=False, highlight=False, soft_wrap=True)
        lacking = [problem for problem in grid.problems if problem.absent]
        if len(lacking) < len(grid.problems):
            grid.check()
        check(where, grid)
        for problem in lacking:
            out.print(f"this machine lacks a file: {problem}", markup=False, highlight=False, soft_wrap=True)
        return
    grid.check()
    try:
        with table(out) as watcher:
            done = play(grid, where, jobs=jobs, watcher=watcher)
    except KeyboardInterrupt:
        err.print("interrupted; the same command plays what is missing")
        raise SystemExit(_INTERRUPTED) from None
    for job in done.failed:
        said = harmless(f"{job.title}: {job.reason}")
        err.print(Text.assemble(("failed: ", "bold red"), said), soft_wrap=True)
    if done.report is not None:
        out.print(f"report: {done.report}", soft_wrap=True, highlight=False)
    if done.failed:
        traces = f" (tracebacks: {where / ERRORS})" if (where / ERRORS).is_dir() else ""
        err.print(
            f"{len(done.failed)} of {len(done.jobs)} runs failed; the same command tries them again{traces}",
            soft_wrap=True,
        )
        raise typer.Exit(1)


@app.command(cls=Command)
def validate(
    configs: Annotated[
        list[str], typer.Argument(metavar="CONFIG...", help="Files, or names of shipped configs and benchmarks.")
    ],
) -> None:
    """Check configs and benchmarks without loading data; all problems of each are printed together.

    Of a benchmark every cell is checked. A file that a config names and this machine lacks is mentioned, but does
    not make the config wrong.
    """
    from fedsim.benchmark.definition import is_definition
    from fedsim.benchmark.grid import load_grid
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
            complain(error)
        else:
            out.print(f"{name}: ok", highlight=False, markup=False)
    if failed:
        raise typer.Exit(2)


@app.command("list", cls=Command)
def list_(
    what: Annotated[str | None, typer.Argument(metavar="WHAT", help=", ".join([*LISTS, "configs"]))] = None,
) -> None:
    """List what there is: attacks, defenses, triggers, tasks, models, datasets, schedules, partitions, configs …

    The list of one kind says of a method, too, what it knows or needs, what it costs (N clients, D weights), and its
    paper.
    """
    from fedsim.config import shipped

    if what == "configs":
        for name in shipped():
            out.print(name, markup=False, highlight=False)
        return
    if what is not None and what not in LISTS:
        raise InputError(f"nothing is listed as {what!r}; use one of: {', '.join([*LISTS, 'configs'])}")
    for plural in [what] if what else LISTS:
        out.print(describing.methods(plural, alone=what is not None))


@app.command(cls=Command)
def describe(
    kind: Annotated[str, typer.Argument(metavar="KIND", help="attack, defense, trigger …, or config, or base")],
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="The method's name.")] = None,
) -> None:
    """Everything about one method: parameters, defaults, ranges, paper, what it knows.

    \b
    Examples:
      fedsim describe attack anticipate
      fedsim describe config          every key of a config, with its default
      fedsim describe base            the same as a config file
    """
    from fedsim import config, plugins

    if kind == "config":
        describing.describe_section(config.Config)
        return
    if kind == "base":
        out.print(config.render_base(), end="", markup=False, highlight=False, soft_wrap=True)
        return
    kind = LISTS.get(kind, kind)
    if kind not in plugins.KINDS:
        raise InputError(f"there is no kind {kind!r}; use one of: {', '.join([*plugins.KINDS, 'config', 'base'])}")
    if name is None:
        raise InputError(f"name one: {', '.join(plugins.names(kind))}")
    describing.describe_method(kind, name)


@app.command(cls=Command)
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

    \b
    Examples:
      fedsim report runs/quickstart/20260101-120000-seed1
      fedsim report runs/bench
      fedsim report runs/a runs/b --out runs/a-and-b
    """
    from fedsim.recording.runs import run_directories
    from fedsim.report import write_grid_report, write_report

    single = len(directories) == 1 and out_dir is None
    if single and (not directories[0].is_dir() or not set(run_directories(directories[0])) - {directories[0]}):
        page = write_report(directories[0])
    elif out_dir is None and not single:
        raise InputError("the report of several directories needs a place: add --out DIR")
    else:
        page = write_grid_report(directories, out_dir or directories[0])
    out.print(str(page), markup=False, highlight=False, soft_wrap=True)


@app.command(cls=Command)
def compare(
    a: Annotated[Path, typer.Argument(metavar="A", help="A run directory, or a directory of runs (several seeds).")],
    b: Annotated[Path, typer.Argument(metavar="B", help="The one to compare it with.")],
) -> None:
    """Put two runs, or two sets of runs, side by side: what differs in their configs, then their numbers.

    Runs of several seeds are compared in pairs, seed by seed.

    \b
    Examples:
      fedsim compare runs/krum runs/norm_clipping
    """
    from fedsim.report.comparison import compare as side_by_side

    out.print(side_by_side(a, b))


def main() -> None:
    """Entry point of ``fedsim`` and ``python -m fedsim``."""
    sys.exit(guarded(app))


def guarded(call: Callable[..., Any]) -> int:
    """Run the command line and turn what happens into an exit status and one clear message."""
    try:
        status = call(standalone_mode=False)
    except FedsimError as error:
        complain(error)
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
