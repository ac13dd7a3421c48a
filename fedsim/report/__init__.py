"""What a run looks like: the page with its figures, the table for the terminal, TensorBoard's events."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

__all__ = ["write_grid_report", "write_report"]


def write_report(directory: Path) -> Path:
    """Write ``report.html`` and ``figures/*.png``, ``*.svg`` into a run directory; returns the page's path.

    The page stands alone: it loads nothing, and works offline and without scripts. A run that has not
    finished (no ``summary.json`` yet) gets a report of what there is, which says so.

    Raises
    ------
    InputError: the directory holds no run, or no round of it has ended.
    """
    from fedsim.report import html  # matplotlib is slow to import, and most commands draw nothing

    return html.write(Path(directory))


def write_grid_report(directories: Sequence[Path], out: Path) -> Path:
    """Write into ``out`` what many runs say together; returns the path of its page.

    directories: of runs, or directories that hold runs. Written are ``report.html`` (self-contained, with links to
    the runs' own reports where those have been written), ``results.parquet``, ``results.csv``, ``tables.md``,
    ``tables.tex``, and ``figures/*.png``, ``*.svg``, ``*.pdf``. Runs that failed are listed and counted nowhere.

    Raises
    ------
    InputError: a directory holds no run, or a file of a run is damaged.
    RunError: ``out`` cannot be written.
    """
    from fedsim.report import grid

    return grid.write([Path(directory) for directory in directories], Path(out))
