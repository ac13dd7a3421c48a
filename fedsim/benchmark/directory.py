"""Where a benchmark lies: its lock, and ``bench.yaml``, which says what it is.

::

    bench.yaml          the definition with everything it names: fedsim bench DIR/bench.yaml --out DIR goes on with it
    cells/NAME          a run directory a cell and seed, with cell.json: {"labels": {axis: label}, "seed": seed}
    twins/HASH          a run directory for each clean twin that several cells share
    errors/NAME.txt     the traceback of a cell that failed; gone once it has been played
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from fedsim.benchmark.definition import Definition
from fedsim.benchmark.grid import Grid, file_name, load_grid
from fedsim.errors import ConfigError, FedsimError, InputError
from fedsim.recording.files import disk_error, write_text
from fedsim.recording.identity import differing

DEFINITION, ERRORS, LOCK = "bench.yaml", "errors", ".lock"
_STALE = ".*.tmp"  # what a killed one was about to put in place
_MOST_NAMED = 5


def default_directory(grid: Grid) -> Path:
    """Where a benchmark goes if nobody says: the same place every time, so that it is gone on with there."""
    parent = grid.cells[0].config.output.dir if grid.cells else "runs"
    return Path(parent) / "bench" / file_name(grid.definition.name)


@contextlib.contextmanager
def opened(out: Path, grid: Grid) -> Iterator[None]:
    """Create the directory of the benchmark, or open it again, and hold its lock.

    Raises
    ------
    InputError: it holds something else, another benchmark, or a benchmark is at work in it.
    """
    _refuse_others(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        handle = (out / LOCK).open("w")
    except OSError as error:
        raise disk_error(out, error) from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(handle.fileno()).st_nlink == 0:  # its holder has removed it meanwhile
                raise BlockingIOError
        except OSError:
            raise InputError(f"another benchmark is at work in {out}; wait for it, or give another --out") from None
        try:
            for stale in out.glob(_STALE):
                stale.unlink(missing_ok=True)
            _refuse_another(out, grid)
            if not (out / DEFINITION).exists() or _written(out) != grid.definition.to_yaml():
                write_text(out / DEFINITION, grid.definition.to_yaml())
            yield
        finally:
            (out / LOCK).unlink(missing_ok=True)  # while it is held: nobody else's is taken away


def check(out: Path, grid: Grid) -> None:
    """Make sure that the grid can be played in ``out``; nothing is written.

    Raises
    ------
    InputError: it holds something else, or another benchmark.
    """
    _refuse_others(out)
    _refuse_another(out, grid)


def _refuse_others(out: Path) -> None:
    """Raises InputError if ``out`` is a file, or holds something and no benchmark."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; give a directory")
    try:
        occupied = out.exists() and any(p.name != LOCK and not p.match(_STALE) for p in out.iterdir())
    except OSError as error:
        raise disk_error(out, error) from error
    if occupied and not (out / DEFINITION).is_file():
        raise InputError(f"{out} holds files, but no benchmark; give another --out")


def _refuse_another(out: Path, grid: Grid) -> None:
    """Raises InputError if the benchmark in ``out`` is not the same or a part of this one, with what differs."""
    path = out / DEFINITION
    if not path.exists() or _written(out) == grid.definition.to_yaml():
        return
    differences = _differences(path, grid)
    if differences:
        raise InputError(
            f"{out} holds another benchmark; only cells may be added. What differs:\n"
            + "\n".join(f"  {line}" for line in differences)
        )


def _written(out: Path) -> str:
    return (out / DEFINITION).read_text(encoding="utf-8", errors="replace")


def _differences(path: Path, grid: Grid) -> list[str]:
    """In words, what of the cells that ``path`` defines is not so in the grid."""
    try:
        there = load_grid(path)
        if any(not problem.absent for problem in there.problems):
            raise ConfigError(there.problems)
    except FedsimError as error:
        raise InputError(f"{path} cannot be read any more: {error}") from None
    found = []
    if there.definition.twin != grid.definition.twin:
        found.append(f"twin: {_yes(there.definition)} there, {_yes(grid.definition)} here")
    here = {cell.name: cell for cell in grid.cells}
    gone = [cell.name for cell in there.cells if cell.name not in here]
    if gone:
        more = f" and {len(gone) - _MOST_NAMED} more" if len(gone) > _MOST_NAMED else ""
        found.append(f"cells that are not in the grid any more: {', '.join(gone[:_MOST_NAMED])}{more}")
    keys: dict[str, list[str]] = {}
    for cell in there.cells:
        if cell.name in here:
            for key in differing(cell.config, here[cell.name].config):
                keys.setdefault(key, []).append(cell.name)
    for key, cells in keys.items():
        where = cells[0] + (f" and {len(cells) - 1} more" if len(cells) > 1 else "")
        found.append(f"{key} (in {where})")
    return found


def _yes(definition: Definition) -> str:
    return "true" if definition.twin else "false"


def is_held(directory: Path) -> bool:
    """Whether a run is at work in a run directory: one that was killed a moment ago may not be gone yet."""
    try:
        with (directory / LOCK).open() as handle:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
