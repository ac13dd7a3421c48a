"""What a run looks like: the page with its figures, the table for the terminal, TensorBoard's events."""

from __future__ import annotations

from pathlib import Path

__all__ = ["write_report"]


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
