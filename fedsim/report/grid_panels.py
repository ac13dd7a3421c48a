"""What the figures of many runs are made of: small panels, one an attack or a defense, with a legend that all share.

A :class:`Picture` is drawn twice: as one figure for the files, and panel by panel for the page, which lays them out
itself. Colours are told apart with any colour vision; neighbours differ in their dashes and markers too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from fedsim.report import drawing
from fedsim.report.drawing import DASHES

NEUTRAL = "#5a636d"
# as many colours and dashes as have no factor in common: 28 lines before two look the same
COLOURS = ("#0070b0", "#c4560a", "#007a5a", "#a63d85", "#8a6a00", "#3d3f9e", "#6b4a2f")
VARIABLES = {NEUTRAL: "--s0", **{colour: f"--s{i}" for i, colour in enumerate(COLOURS, start=1)}}
"""The CSS variable each series colour becomes on the page."""

FILLS = {"full": "●", "none": "○", "left": "◐", "right": "◑"}
"""matplotlib's fill styles of a round marker, with a character that looks like each."""

_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p")
_MARKER_SHAPES = ("●", "■", "▲", "◆", "▼", "✚", "✖", "◀", "▶", "⬟")
_PANEL = (3.4, 2.45)  # inches
_LONGEST = 38  # letters of a title


@dataclass(frozen=True)
class Line:
    """How one method is drawn. colour: as in :data:`COLOURS`. dash, fill: matplotlib's line and fill style.

    The fill tells markers of one colour apart as the dash does lines.
    """

    colour: str
    dash: Any
    fill: str = "full"


@dataclass(frozen=True)
class Key:
    """An entry of a legend: a line, an area (faint), or a marker where there is a shape.

    shape: matplotlib's marker and a character that looks like it.
    """

    name: str
    colour: str
    dash: Any = "-"
    faint: bool = False
    shape: tuple[str, str] | None = None
    fill: str = "full"

    @property
    def variable(self) -> str:
        """The CSS variable of its colour."""
        return {**drawing.VARIABLES, **VARIABLES}[self.colour]

    @property
    def dashes(self) -> str:
        """Its dashes as an SVG attribute, in pixels; empty for a solid line."""
        return "" if self.dash == "-" else " ".join(f"{1.6 * length:g}" for length in self.dash[1])

    def handle(self) -> Any:
        """The same for matplotlib."""
        name = shortened(self.name)
        if self.faint:
            return Patch(facecolor=self.colour, alpha=0.45, linewidth=0, label=name)
        if self.shape is not None:
            look: dict[str, Any] = {"linestyle": "none", "markersize": 5.5, "fillstyle": self.fill}
            return Line2D([], [], color=self.colour, marker=self.shape[0], label=name, **look)
        return Line2D([], [], color=self.colour, linestyle=self.dash, linewidth=1.6, label=name)


def lines(names: Sequence[str], neutral: str | None = None) -> dict[str, Line]:
    """A line for each name, in the order given. neutral: the one that is drawn in grey, to compare others with."""
    drawn, i = {}, 0
    for name in names:
        if name == neutral:
            drawn[name] = Line(NEUTRAL, "-")
            continue
        fill = list(FILLS)[i // len(COLOURS) % len(FILLS)]
        drawn[name] = Line(COLOURS[i % len(COLOURS)], DASHES[i % len(DASHES)], fill)
        i += 1
    return drawn


def markers(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """For each name matplotlib's marker and a character of that shape."""
    return {
        name: (_MARKERS[i % len(_MARKERS)], _MARKER_SHAPES[i % len(_MARKER_SHAPES)]) for i, name in enumerate(names)
    }


@dataclass(frozen=True)
class Panel:
    """One set of axes. draw: fills them. label: what they show, for those who do not see it. Sizes in inches."""

    title: str
    label: str
    draw: Callable[[Axes], None]
    height: float = _PANEL[1]
    width: float = _PANEL[0]


@dataclass(frozen=True)
class Picture:
    """A figure of panels. name: of its files. keys: the legend."""

    name: str
    panels: Sequence[Panel]
    keys: Sequence[Key] = ()

    def figure(self) -> Figure:
        """All panels on one sheet, at most three beside each other, with the legend under them."""
        with drawing.styled():
            across = min(3, len(self.panels))
            down = math.ceil(len(self.panels) / across)
            width = max(4.4, max(panel.width for panel in self.panels) * across)
            longest = max((len(shortened(key.name)) for key in self.keys), default=0)
            columns = max(1, min(len(self.keys), int(width / (0.5 + 0.071 * longest))))
            legend = 0.2 * math.ceil(len(self.keys) / columns) + 0.1 if self.keys else 0.0
            rows = [max(panel.height for panel in self.panels[i * across : (i + 1) * across]) for i in range(down)]
            figure = Figure(figsize=(width, sum(rows) + legend), layout="constrained")
            axes = figure.subplots(down, across, squeeze=False, height_ratios=rows)
            for ax in axes.flat[len(self.panels) :]:
                ax.set_visible(False)
            for ax, panel in zip(axes.flat, self.panels, strict=False):
                _fill(ax, panel)
            if self.keys:
                figure.legend(handles=[key.handle() for key in self.keys], loc="outside lower center", ncols=columns)
            return figure

    def inline(self, prefix: str) -> list[str]:
        """One ``<svg>`` a panel, for the page. prefix: put before every id."""
        return [_inline(panel, f"{prefix}-{i}") for i, panel in enumerate(self.panels)]


def _fill(ax: Axes, panel: Panel) -> None:
    ax.set_title(shortened(panel.title))
    panel.draw(ax)


def _inline(panel: Panel, prefix: str) -> str:
    with drawing.styled():
        figure = Figure(figsize=(panel.width, panel.height), layout="constrained")
        _fill(figure.subplots(), panel)
    return compact(drawing.inline(figure, prefix))


def compact(svg: str) -> str:
    """An inline SVG with the page's series colours and two decimals: a hundredth of a point is not seen."""

    def rounded(tag: str) -> str:
        return re.sub(r' (?:d|x|y|transform)="[^"]*"', lambda found: re.sub(r"(\.\d\d)\d+", r"\1", found[0]), tag)

    svg = drawing.in_tags(drawing.recoloured(svg, VARIABLES), rounded)
    return re.sub(r"\s*\n\s*", " ", svg)


def shortened(text: str) -> str:
    """A name that fits above a panel."""
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def save(figure: Figure, directory: Path, stem: str) -> None:
    """Write ``stem.png``, ``stem.svg`` and ``stem.pdf`` (with its fonts as TrueType); always the same bytes."""
    drawing.save(figure, directory, stem)
    with drawing.styled(), matplotlib.rc_context({"pdf.fonttype": 42}):
        figure.savefig(directory / f"{stem}.pdf", metadata={"CreationDate": None, "Producer": None, "Creator": None})


def line_keys(drawn: Mapping[str, Line]) -> list[Key]:
    """The legend of lines."""
    return [Key(name, line.colour, line.dash) for name, line in drawn.items()]
