"""What the figures of a report share: style, helpers, and how a figure becomes a file or part of a page."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, PercentFormatter
from numpy.typing import NDArray

Floats = NDArray[np.float64]

INK, MUTED, RULE, PAPER = "#1b1f24", "#59636e", "#d8dee4", "#fffffe"
ATTACK, HONEST, TWIN = "#c25400", "#0072b2", "#6b7178"
PHASES = ("#56b4e9", "#e69f00", "#cc79a7", "#009e73", "#8a9099")
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (5, 1.5, 1, 1.5)))
VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    RULE: "--rule",
    PAPER: "--paper",
    ATTACK: "--attack",
    HONEST: "--honest",
    TWIN: "--twin",
}
"""The CSS variable each colour becomes on a page, so that a figure follows the page into the dark."""

_STYLE: Any = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 8.5,
    "axes.titlesize": 8.5,
    "axes.labelsize": 8.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "text.color": INK,
    "text.parse_math": False,  # names come from users; a dollar sign in one is only a dollar sign
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "figure.facecolor": PAPER,
    "axes.facecolor": "none",
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "fedsim",  # ids, and so files, are the same every time
    "path.simplify_threshold": 0.3,
}
_WIDE, _NARROW = 9.0, 4.4  # inches; shown at about 100 and 90 pixels an inch
_COLUMNS = 150  # at most so many points are drawn where a curve is averaged over stretches of rounds
_BINS = 30
MANY = 24  # up to so many evaluated rounds each is marked with a dot


def styled() -> AbstractContextManager[None]:
    """Inside it, everything drawn has the report's style; matplotlib's own settings come back afterwards."""
    return matplotlib.rc_context(_STYLE)


def new_figure(narrow: bool, height: float, narrow_height: float) -> Figure:
    """An empty figure of the page's width; the heights are in inches, for either width."""
    size = (_NARROW, narrow_height) if narrow else (_WIDE, height)
    return Figure(figsize=size, layout="constrained")


def evaluated(rounds: pd.DataFrame, column: str) -> pd.Series[float]:
    """One column of a ``rounds`` table by round, where it was evaluated."""
    return rounds.set_index("round")[column].astype("float64").dropna().sort_index()


def stretches(series: pd.Series[Any]) -> tuple[Floats, Floats]:
    """A series over rounds, averaged over stretches of rounds where it has more than a figure can show."""
    x, y = series.index.to_numpy(dtype=np.float64), series.to_numpy(dtype=np.float64)
    stride = -(-len(x) // _COLUMNS)
    if stride <= 1:
        return x, y
    starts = np.arange(0, len(x), stride)
    counts = np.diff(np.append(starts, len(x)))
    return np.add.reduceat(x, starts) / counts, np.add.reduceat(y, starts) / counts


def aligned(curves: Sequence[tuple[NDArray[Any], NDArray[Any]]]) -> tuple[NDArray[Any], Floats]:
    """The rounds (n,) that all curves cover (none: n = 0), and the curves there (curves, n), straight between points.

    curves: at least one; rounds (m,) ascending, and the values (m,) there.
    """
    first, last = max(rounds[0] for rounds, _ in curves), min(rounds[-1] for rounds, _ in curves)
    seen = np.unique(np.concatenate([rounds for rounds, _ in curves]))
    common = seen[(seen >= first) & (seen <= last)]
    return common, np.array([np.interp(common, rounds, values) for rounds, values in curves])


def whole_numbers(most: int) -> MaxNLocator:
    """At most so many ticks, at round numbers."""
    return MaxNLocator(most, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1)


def round_axis(ax: Axes, narrow: bool, rounds: pd.Series[int] | None = None) -> None:
    """Make the lower axis one of rounds, from the first to the last of ``rounds``."""
    ax.set_xlabel("federated round t")
    ax.xaxis.set_major_locator(whole_numbers(6 if narrow else 10))
    if rounds is not None and len(rounds):
        ax.set_xlim(int(rounds.min()) - 0.5, int(rounds.max()) + 0.5)


def quarters(axis: Axis) -> None:
    """Label an axis of shares 0 %, 25 %, … 100 %."""
    axis.set_ticks([0, 0.25, 0.5, 0.75, 1])
    axis.set_major_formatter(PercentFormatter(1, decimals=0))


def bins(ax: Axes, low: float, high: float, *, positive: bool) -> Floats:
    """The edges of the bins of a histogram from ``low`` to ``high``, for all its groups.

    They are even, or, where the values are ``positive`` and differ by more than a factor of 30, even on a logarithmic
    scale; the lower axis becomes logarithmic then.
    """
    if positive and high > 30 * low:
        ax.set_xscale("log")
        plain_ticks(ax.xaxis)
        return np.geomspace(low, high, _BINS + 1)
    if low == high:
        low, high = low - 0.5, high + 0.5
    return np.linspace(low, high, _BINS + 1)


def plain_ticks(axis: Axis) -> None:
    """Label the decades of a logarithmic axis 0.1, 1, 10 (matplotlib's own labels are formulas)."""
    axis.set_major_formatter(FuncFormatter(_plain))
    axis.set_minor_formatter(NullFormatter())


def _plain(value: float, _: int) -> str:
    return f"{value:g}"


def label_ends(ax: Axes, ends: Sequence[tuple[float, str, str]], *, swatch: bool = False) -> None:
    """Name each line at its right end, in its colour; names that would touch are moved apart.

    ends: height in data units, name, colour. swatch: a square in the colour before a name in ink, for fills.
    """
    x = ax.get_xlim()[1]
    to_axes = ax.transScale + ax.transLimits
    wanted = sorted((float(to_axes.transform((x, y))[1]), name, colour) for y, name, colour in ends)
    size: Any = ax.get_figure(root=True)
    gap = 12 / (72 * ax.get_position().height * size.get_figheight())  # a line of text in axes units, roughly
    at: list[float] = []
    for y, _, _ in wanted:
        at.append(max(y, at[-1] + gap) if at else y)
    shift = max(0.0, at[-1] - 1.0) if at else 0.0
    for y, (_, name, colour) in zip(at, wanted, strict=True):
        place: Any = {"xycoords": "axes fraction", "textcoords": "offset points", "va": "center", "ha": "left"}
        if swatch:
            ax.annotate("■", (1, y - shift), xytext=(6, 0), color=colour, **place)
        ax.annotate(name, (1, y - shift), xytext=(17 if swatch else 6, 0), color=INK if swatch else colour, **place)


def save(figure: Figure, directory: Path, stem: str) -> None:
    """Write ``stem.png`` (150 dots an inch) and ``stem.svg``; the same figure gives the same bytes."""
    directory.mkdir(parents=True, exist_ok=True)
    with styled():
        _settle(figure)
        figure.savefig(directory / f"{stem}.png", dpi=150, metadata={"Software": None})
        figure.savefig(directory / f"{stem}.svg", metadata={"Date": None, "Creator": None})


def _settle(figure: Figure) -> None:
    """Lay the figure out once: doing so is most of the work of drawing it, and every file is to look the same."""
    if figure.get_layout_engine() is not None:
        figure.draw_without_rendering()
        figure.set_layout_engine("none")


def inline(figure: Figure, prefix: str) -> str:
    """The figure as one ``<svg>`` element for a page: CSS variables for colours, the page's own font.

    prefix: put before every id, so that several figures can share a page.
    """
    buffer = io.StringIO()
    with styled():
        _settle(figure)
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', svg))

    def rename(match: re.Match[str]) -> str:
        return f' id="{prefix}-{match[1]}"' if match[1] in used else ""

    def adapt(tag: str) -> str:
        tag = re.sub(r' id="([^"]*)"', rename, tag)
        tag = re.sub(r'(url\(#|href="#)', rf"\g<1>{prefix}-", tag)
        return re.sub(r"'?DejaVu Sans'?(, [^;\"]*)?", "var(--sans)", tag)

    svg = recoloured(in_tags(svg, adapt), VARIABLES)
    return svg.replace("<svg ", '<svg aria-hidden="true" focusable="false" ', 1).strip()


def in_tags(svg: str, change: Callable[[str], str]) -> str:
    """Change every tag of an SVG and none of its texts, which are names from configs and may look like anything."""
    return re.sub("<[^<>]*>", lambda tag: change(tag[0]), svg)


def recoloured(svg: str, variables: Mapping[str, str]) -> str:
    """An SVG with CSS variables for colours. variables: colour → name of its variable."""
    wanted = re.compile("|".join(map(re.escape, variables)))
    return in_tags(svg, lambda tag: wanted.sub(lambda colour: f"var({variables[colour[0]]})", tag))
