"""The figures of many runs: functions that draw into a panel of :mod:`fedsim.report.grid_panels`, and the heat map."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from fedsim.report import drawing, words
from fedsim.report.drawing import ATTACK, HONEST, INK, MUTED, RULE, Floats
from fedsim.report.grid_panels import FILLS, Key, Line, shortened
from fedsim.report.statistics import Interval

# ------------------------------------------------------------------------------------------------- lifespans


@dataclass(frozen=True)
class Steps:
    """An estimated survival function. times: (n,) ascending rounds, from 0. alive, low, high: (n,) in [0, 1],
    the share from each time on, with its 95 % band (NaN where there is none). censored: (m,) ages at which a run
    ended with its backdoor alive.
    """

    times: Floats
    alive: Floats
    low: Floats
    high: Floats
    censored: Floats


def survival(ax: Axes, curves: Mapping[str, Steps], drawn: Mapping[str, Line]) -> None:
    """Steps of the share of backdoors still alive by age, with bands; a tick where a run ended before its backdoor."""
    last = max([1.0, *(float(curve.times[-1]) for curve in curves.values())])
    for name, curve in curves.items():
        line = drawn[name]
        ended = curve.alive[-1] == 0  # then it stays so; otherwise nothing is known past the longest age seen
        times = np.append(curve.times, last if ended else curve.times[-1])
        alive, low, high = (np.append(share, share[-1]) for share in (curve.alive, curve.low, curve.high))
        ax.fill_between(times, low, high, step="post", color=line.colour, alpha=0.1, linewidth=0)
        ax.step(
            np.append(0, times),
            np.append(1, alive),
            where="post",
            color=line.colour,
            linestyle=line.dash,
            linewidth=1.5,
        )
        if len(curve.censored):
            heights = curve.alive[np.searchsorted(curve.times, curve.censored, side="right") - 1]
            ax.plot(curve.censored, heights, "|", color=line.colour, markersize=7, markeredgewidth=1.3)
    ax.set_xlim(-0.01 * last, 1.02 * last)
    ax.xaxis.set_major_locator(drawing.whole_numbers(5))
    ax.set_xlabel("age of the backdoor s (rounds)")
    _shares(ax, "backdoors alive")


# ------------------------------------------------------------------------------------------------- curves


@dataclass(frozen=True)
class Band:
    """A curve over rounds and how far seeds differ. rounds, middle, low, high: (n,)."""

    rounds: Floats
    middle: Floats
    low: Floats
    high: Floats


def curves(ax: Axes, bands: Mapping[str, Band], drawn: Mapping[str, Line], window: tuple[float, float] | None) -> None:
    """ASR by round. window: first and last round with a malicious update, shaded."""
    if window is not None:
        ax.axvspan(window[0] - 0.5, window[1] + 0.5, color=RULE, alpha=0.55, linewidth=0, zorder=0)
    for name, band in bands.items():
        line = drawn[name]
        if np.any(band.high > band.low):
            ax.fill_between(band.rounds, band.low, band.high, color=line.colour, alpha=0.13, linewidth=0)
        dots: dict[str, Any] = {"marker": "o", "markersize": 2.5} if len(band.rounds) == 1 else {}
        ax.plot(band.rounds, band.middle, color=line.colour, linestyle=line.dash, linewidth=1.2, **dots)
    ax.margins(x=0.01)
    ax.set_xlabel("federated round t")
    ax.xaxis.set_major_locator(drawing.whole_numbers(5))
    _shares(ax, "ASR")


def _shares(ax: Axes, label: str) -> None:
    ax.set_ylim(-0.03, 1.03)
    drawing.quarters(ax.yaxis)
    ax.set_ylabel(label)


# ------------------------------------------------------------------------------------------------- price


@dataclass(frozen=True)
class Point:
    """One row of the benchmark. x: main accuracy, y: ASR, each in [0, 1]."""

    attack: str
    defense: str
    x: Interval
    y: Interval


def tradeoff(
    ax: Axes, points: Sequence[Point], drawn: Mapping[str, Line], shapes: Mapping[str, tuple[str, str]]
) -> None:
    """Main accuracy against ASR, with the interval of each; a good defense lies below and to the right."""
    for point in points:
        line, shape = drawn[point.defense], shapes[point.attack][0]
        x, y = point.x, point.y
        if x.median is None or y.median is None:
            continue
        if x.low is not None and x.high is not None:
            ax.plot([x.low, x.high], [y.median, y.median], color=line.colour, linewidth=0.8, alpha=0.7)
        if y.low is not None and y.high is not None:
            ax.plot([x.median, x.median], [y.low, y.high], color=line.colour, linewidth=0.8, alpha=0.7)
        full = line.fill == "full"
        edge = {"markeredgecolor": drawing.PAPER if full else line.colour, "markeredgewidth": 0.6 if full else 1.0}
        style: dict[str, Any] = {"color": line.colour, "markersize": 5.5, "fillstyle": line.fill, **edge}
        ax.plot([x.median], [y.median], shape, **style)
    ax.set_xlabel("main accuracy at the end")
    ax.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    low, high = ax.get_xlim()
    if high - low < 0.02:  # as if hundredths mattered
        middle = (low + high) / 2
        ax.set_xlim(middle - 0.01, middle + 0.01)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g}%"))
    _shares(ax, "ASR at the end")


def tradeoff_keys(drawn: Mapping[str, Line], shapes: Mapping[str, tuple[str, str]]) -> list[Key]:
    """The legend of :func:`tradeoff`: colour and fill of a defense, then the shapes of the attacks in grey."""
    colours = [Key(name, line.colour, shape=("o", FILLS[line.fill]), fill=line.fill) for name, line in drawn.items()]
    return [*colours, *(Key(name, MUTED, shape=shape) for name, shape in shapes.items())]


# ------------------------------------------------------------------------------------------------- detection


def roc(ax: Axes, tpr: Mapping[str, Floats], drawn: Mapping[str, Line]) -> None:
    """ROC curves. tpr: name → true positive rates (n,) at n evenly spaced false positive rates from 0 to 1."""
    ax.plot([0, 1], [0, 1], color=MUTED, linewidth=0.8, linestyle=(0, (1, 2)))
    for name, rates in tpr.items():
        line = drawn[name]
        x = np.linspace(0, 1, len(rates))
        ax.plot(np.append(0, x), np.append(0, rates), color=line.colour, linestyle=line.dash, linewidth=1.4)
    ax.set_xlim(-0.03, 1.03)
    drawing.quarters(ax.xaxis)
    ax.set_xlabel("benign clients flagged (FPR)")
    _shares(ax, "malicious found (TPR)")


def spread(ax: Axes, groups: Mapping[str, tuple[Floats, Floats]]) -> None:
    """Histograms of a score, one ridge an attack: benign filled, malicious outlined, each of its own highest bar.

    groups: attack → scores of benign (n,) and of malicious clients (m,), finite. What lies beyond the middle 99 %
    is counted in the outermost bins.
    """
    everything = np.concatenate([part for pair in groups.values() for part in pair])
    low, high = (float(q) for q in np.quantile(everything, [0.005, 0.995]))
    edges = drawing.bins(ax, low, high, positive=bool((everything > 0).all()))
    for i, (benign, malicious) in enumerate(groups.values()):
        floor = len(groups) - 1 - i
        for part, colour, filled in ((benign, HONEST, True), (malicious, ATTACK, False)):
            if not len(part):
                continue
            counts, _ = np.histogram(np.clip(part, edges[0], edges[-1]), edges)
            bars = floor + 0.85 * counts / counts.max()
            if filled:
                ax.stairs(bars, edges, baseline=floor, fill=True, color=colour, alpha=0.45)
            else:
                ax.stairs(bars, edges, baseline=floor, color=colour, linewidth=1.3)
    ax.set_yticks(range(len(groups)), [shortened(name) for name in reversed(list(groups))])
    ax.set_ylim(-0.05, len(groups))
    ax.grid(visible=False, axis="y")
    if ax.get_xscale() == "linear":
        ax.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    ax.set_xlabel("score (larger: more suspicious)")


def spread_height(attacks: int) -> float:
    """Inches for a panel of so many ridges."""
    return 0.95 + 0.42 * attacks


def spread_keys() -> list[Key]:
    """The legend of :func:`spread`."""
    return [Key("benign", HONEST, faint=True), Key("malicious", ATTACK)]


# ------------------------------------------------------------------------------------------------- heat map


def heat(
    attacks: Sequence[str],
    defenses: Sequence[str],
    cells: Mapping[tuple[str, str], tuple[float, str]],
    title: str,
) -> Figure:
    """A heat map for a paper. cells: (attack, defense) → shade in [0, 1] (darker is worse; NaN: none) and its text."""
    with drawing.styled():
        longest = max(len(shortened(name)) for name in attacks)
        tall = 0.05 * max(len(shortened(name)) for name in defenses)
        size = (max(3.2, 0.085 * longest + 0.85 * len(defenses) + tall), 0.7 + tall + 0.42 * len(attacks))
        figure = Figure(figsize=size, layout="constrained")
        ax = figure.subplots()
        ax.grid(visible=False)
        shade = np.full((len(attacks), len(defenses)), np.nan)
        for i, attack in enumerate(attacks):
            for j, defense in enumerate(defenses):
                value, text = cells.get((attack, defense), (math.nan, words.ABSENT))
                shade[i, j] = value
                ax.text(j, i, text, ha="center", va="center", color=INK, fontweight="bold")
        ramp = LinearSegmentedColormap.from_list("heat", [drawing.PAPER, "#e07b2e"])
        ax.pcolormesh(
            np.arange(len(defenses) + 1) - 0.5,
            np.arange(len(attacks) + 1) - 0.5,
            np.ma.masked_invalid(shade),
            cmap=ramp,
            vmin=0,
            vmax=1,
            edgecolors=drawing.PAPER,
            linewidth=1.5,
        )
        ax.invert_yaxis()
        ax.set_xticks(range(len(defenses)), [shortened(name) for name in defenses], rotation=35, ha="left")
        ax.xaxis.tick_top()
        ax.tick_params(length=0)
        ax.set_yticks(range(len(attacks)), [shortened(name) for name in attacks])
        for spine in ax.spines.values():
            spine.set_visible(False)
        ax.set_xlabel(title)
        return figure
