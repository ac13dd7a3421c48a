"""The figures of a report, drawn with matplotlib's object interface (no global state, no display).

Every function returns a new :class:`~matplotlib.figure.Figure`. ``narrow`` draws for a column of about 400
pixels. Colours are Okabe and Ito's, told apart with any colour vision; where two meet, shape differs too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from fedsim import persistence
from fedsim.errors import InputError
from fedsim.recording.summary import SUBMITTED, under_attack
from fedsim.report import words
from fedsim.report.drawing import (
    ATTACK,
    DASHES,
    HONEST,
    INK,
    MANY,
    MUTED,
    PAPER,
    PHASES,
    TWIN,
    Floats,
    aligned,
    bins,
    evaluated,
    label_ends,
    new_figure,
    plain_ticks,
    quarters,
    round_axis,
    stretches,
    styled,
    whole_numbers,
)


def backdoor(
    rounds: pd.DataFrame,
    summary: Mapping[str, Any],
    *,
    twin: pd.DataFrame | None = None,
    of: str = "test examples",
    narrow: bool = False,
) -> Figure:
    """Attack success rate and main accuracy by round; the age of the backdoor on the upper axis.

    rounds, twin: ``rounds`` tables. summary: of the same run; its t0 and lifespan are drawn in.
    of: what the rates are shares of.
    """
    with styled():
        figure = new_figure(narrow, 4.1, 3.9)
        ax = figure.subplots()
        t0 = summary["t0"]
        curves: list[tuple[pd.Series[float], str, Any, str]] = [
            (evaluated(rounds, "main_accuracy"), HONEST, "-", "accuracy" if narrow else "main accuracy"),
            (evaluated(rounds, "asr"), ATTACK, "-", "ASR" if narrow else "backdoor (ASR)"),
        ]
        if twin is not None:
            curves.insert(0, (evaluated(twin, "asr"), TWIN, (0, (3, 2)), "twin" if narrow else "clean twin’s ASR"))
        curves = [curve for curve in curves if len(curve[0])]
        for series, colour, style, _ in curves:
            dots: dict[str, Any] = {"marker": "o", "markersize": 3.5} if len(series) <= MANY else {}
            width = 1.6 if len(series) <= 400 else 0.9
            ax.plot(series.index, series.to_numpy(), color=colour, linestyle=style, linewidth=width, **dots)
        last = int(rounds["round"].max())
        first = min(1, int(rounds["round"].min()))
        ax.set_xlim(first - 0.5, last + 0.5)
        ax.set_ylim(-0.09, 1.02)
        quarters(ax.yaxis)
        ax.set_ylabel(f"share of {of}")
        round_axis(ax, narrow)
        label_ends(ax, [(float(s.iloc[-1]), name, colour) for s, colour, _, name in curves])
        _rug(ax, rounds.loc[rounds["malicious_submitted"] > 0, "round"].to_numpy(), last)
        if t0 is not None:
            ax.axvline(t0, color=INK, linewidth=0.8, linestyle=(0, (1, 2)))
            _age_axis(ax, t0, last, narrow)
            _bracket(ax, summary, last)
        return figure


def acceptance(clients: pd.DataFrame, *, narrow: bool = False) -> Figure:
    """What the defense let through: the accepted share of either group, and malicious weight in the aggregate.

    clients: the ``clients`` table; rows whose update never reached the server are left out. Without a
    malicious client there is no second panel.
    """
    sent = clients[clients["status"].isin(SUBMITTED)]
    malicious = sent["malicious"].astype(bool)
    taken = sent["accepted"].astype(bool) & (sent["status"] == "ok")
    with styled():
        down = 2 if malicious.any() else 1
        figure = new_figure(narrow, 2.4 * down, 2.7 * down)
        axes = figure.subplots(down, 1, squeeze=False)[:, 0]
        ends = []
        for group, colour, name in ((~malicious, HONEST, "benign"), (malicious, ATTACK, "malicious")):
            if not group.any():
                continue
            x, y = stretches(taken[group].groupby(sent["round"]).mean())
            form: dict[str, Any] = {"marker": "o", "markersize": 3, "linestyle": "none"}
            axes[0].plot(x, y, color=colour, **(form if name == "malicious" else {"linewidth": 1.4}))
            ends.append((float(y[-1]), name, colour))
        axes[0].set_ylim(-0.04, 1.04)
        axes[0].set_yticks([0, 0.5, 1])
        axes[0].yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes[0].set_title("accepted updates")
        round_axis(axes[0], narrow, sent["round"])
        label_ends(axes[0], ends)
        if malicious.any():
            _weights(axes[1], sent[under_attack(sent)], narrow)
        return figure


def _weights(ax: Axes, sent: pd.DataFrame, narrow: bool) -> None:
    """Malicious weight in the aggregate as stems; their share of the clients as a dash."""
    malicious = sent["malicious"].astype(bool)
    weight = sent["weight"].astype("float64").fillna(0.0).where(malicious, 0.0)
    x, got = stretches(weight.groupby(sent["round"]).sum())
    _, heads = stretches(malicious.groupby(sent["round"]).mean())
    round_axis(ax, narrow, sent["round"])
    ax.set_ylim(0, 1.15 * max(*got, *heads))
    ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    ax.yaxis.set_major_locator(_few())
    ax.set_title("weight of malicious clients in the aggregate, attack rounds only")
    ax.vlines(x, 0, got, color=ATTACK, linewidth=1)
    ax.plot(x, got, "o", color=ATTACK, markersize=3, clip_on=False)
    ax.plot(x, heads, "_", color=INK, markersize=6, markeredgewidth=1)
    label_ends(ax, [(float(got[-1]), "weight", ATTACK), (float(heads[-1]), "head count", INK)])


def scores(
    table: pd.DataFrame,
    malicious: pd.Series[bool],
    aurocs: Mapping[str, float | None],
    *,
    narrow: bool = False,
) -> Figure:
    """How each score of the defense is spread over malicious and benign clients, in attack rounds.

    table: one column a score, one row a client and round. malicious: on the same index.
    """
    with styled():
        across = 1 if narrow else min(3, max(1, table.shape[1]))
        down = max(1, math.ceil(table.shape[1] / across))
        figure = new_figure(narrow, 2.1 * down + 0.4, 2.0 * down + 0.4)
        axes = figure.subplots(down, across, squeeze=False)
        for ax in axes.flat[table.shape[1] :]:
            ax.set_visible(False)
        for ax, name in zip(axes.flat, table, strict=False):
            _spread(ax, table[name], malicious)
            value = aurocs.get(str(name))
            ax.set_title(f"{name}\nAUROC {words.number(value)}", linespacing=1.4)
        axes[0, 0].set_ylabel("share of clients")
        axes[-1, 0].set_xlabel("score (larger: more suspicious)")
        return figure


def norms(clients: pd.DataFrame, *, narrow: bool = False) -> Figure:
    """The norms of the updates as they were sent: benign as a band with its median, malicious as dots."""
    with styled():
        figure = new_figure(narrow, 2.9, 3.0)
        ax = figure.subplots()
        norm = clients["update_norm"].astype("float64").replace([np.inf, -np.inf], np.nan).dropna()
        malicious = clients.loc[norm.index, "malicious"].astype(bool)
        round_of = clients.loc[norm.index, "round"]
        ends = []
        by_round = norm[~malicious].groupby(round_of)
        if by_round.ngroups:
            x, median = stretches(by_round.median())
            _, low = stretches(by_round.min())
            _, high = stretches(by_round.max())
            ax.fill_between(x, low, high, color=HONEST, alpha=0.2, linewidth=0)
            ax.plot(x, median, color=HONEST, linewidth=1.4)
            ends.append((float(median[-1]), "benign", HONEST))
        if malicious.any():
            x, y = stretches(norm[malicious].groupby(round_of).median())
            ax.plot(x, y, "o", color=ATTACK, markersize=3)
            ends.append((float(y[-1]), "malicious", ATTACK))
        positive = norm[norm > 0]
        if len(positive) and positive.max() > 20 * positive.min():
            ax.set_yscale("log")
            plain_ticks(ax.yaxis)
        elif len(norm):
            ax.set_ylim(0, 1.08 * float(norm.max()) or 1)
        ax.set_ylabel("L2 norm of the update")
        round_axis(ax, narrow, clients["round"])
        label_ends(ax, ends)
        return figure


def timings(table: pd.DataFrame, *, narrow: bool = False) -> Figure:
    """Seconds a round by phase, stacked. table: the ``timings`` table."""
    with styled():
        figure = new_figure(narrow, 2.6, 2.8)
        ax = figure.subplots()
        base: Floats | None = None
        ends = []
        phases = [c for c in table if str(c).startswith("seconds_") and c != "seconds_total"]
        for column, colour in zip(phases, PHASES, strict=False):
            x, y = stretches(table.set_index("round")[column].fillna(0.0))
            below = np.zeros_like(y) if base is None else base
            base = below + y
            ax.fill_between(x, below, base, color=colour, alpha=0.85, linewidth=0, step="mid")
            ends.append((float((below[-1] + base[-1]) / 2), str(column).removeprefix("seconds_"), colour))
        ax.set_ylim(0, max(1.05 * float(base.max()), 1e-9) if base is not None and len(base) else 1)
        ax.set_ylabel("seconds a round")
        round_axis(ax, narrow, table["round"])
        label_ends(ax, ends, swatch=True)
        return figure


def compare(
    curves: Mapping[str, Sequence[pd.DataFrame]],
    *,
    kappa: float | None = 0.5,
    title: str = "",
    narrow: bool = False,
) -> Figure:
    """The backdoor's ASR by age for several methods: median over seeds, with a band from lowest to highest.

    Parameters
    ----------
    curves: method → the ``rounds`` tables of its runs (one a seed), each with its own t0. A line is drawn
        over the ages that all runs of the method cover; between two evaluated rounds it is straight.
    kappa: a threshold to draw as a line, or None.

    Raises
    ------
    InputError: a method without runs, a run without an attack or not evaluated since, or runs of one method
        that have no age in common.
    """
    with styled():
        figure = new_figure(narrow, 4.1, 3.9)
        ax = figure.subplots()
        colours = (HONEST, ATTACK, "#009e73", "#cc79a7", "#b87d00", "#3a9bd6", INK)
        ends, last = [], 0
        for i, (name, tables) in enumerate(curves.items()):
            ages, asr = _by_age(name, tables)
            colour, median = colours[i % len(colours)], np.median(asr, axis=0)
            ax.fill_between(ages, asr.min(axis=0), asr.max(axis=0), color=colour, alpha=0.15, linewidth=0)
            ax.plot(ages, median, color=colour, linestyle=DASHES[i % len(DASHES)])
            ends.append((float(median[-1]), name, colour))
            last = max(last, int(ages[-1]))
        if kappa is not None:
            ax.axhline(kappa, color=MUTED, linewidth=0.8, linestyle=(0, (1, 2)))
            ax.annotate(
                f"κ = {words.percent(kappa, 0)}", (0, kappa), xytext=(4, 2), textcoords="offset points", color=MUTED
            )
        ax.set_xlim(0, max(last, 1))
        ax.set_ylim(-0.02, 1.02)
        quarters(ax.yaxis)
        ax.xaxis.set_major_locator(whole_numbers(6 if narrow else 10))
        ax.set_ylabel("attack success rate")
        ax.set_xlabel("age of the backdoor s (rounds since the last malicious update)")
        ax.set_title(title)
        label_ends(ax, ends)
        return figure


def _rug(ax: Axes, attacks: NDArray[np.int64], last: int) -> None:
    """A tick for every attack round in the strip under zero; one path, however many there are."""
    if not len(attacks):
        return
    x = np.repeat(attacks.astype(np.float64), 3)
    y = np.tile([-0.065, -0.03, np.nan], len(attacks))
    ax.plot(x, y, color=ATTACK, linewidth=1.2, solid_capstyle="butt")
    left = attacks[-1] < 0.7 * last
    ax.annotate(
        "attack round" if len(attacks) == 1 else f"{len(attacks)} attack rounds",
        (attacks[-1] if left else attacks[0], -0.047),
        xytext=(5 if left else -5, 0),
        textcoords="offset points",
        color=ATTACK,
        va="center",
        ha="left" if left else "right",
        fontsize=7.5,
        annotation_clip=False,
    )


def _age_axis(ax: Axes, t0: int, last: int, narrow: bool) -> None:
    top = ax.secondary_xaxis("top", functions=(partial(_shift, by=-t0), partial(_shift, by=t0)))
    ticks: Any = whole_numbers(5 if narrow else 9).tick_values(0, max(last - t0, 1))
    top.set_xticks([s for s in ticks if 0 <= s <= last - t0])
    top.spines["top"].set_visible(False)
    label = f"age s = t − {t0} (rounds)" if narrow else f"age of the backdoor s = t − {t0} (rounds since the attack)"
    top.set_xlabel(label, loc="right")


def _shift(x: Any, by: int) -> Any:
    return x + by


def _bracket(ax: Axes, summary: Mapping[str, Any], last: int) -> None:
    """The lifespan at the headline's κ, drawn where it is: from t0 on, at the height of κ."""
    key, t0 = words.threshold(summary), summary["t0"]
    life, kappa = summary["lifespan"][key], float(words.threshold(summary))
    if life is None or not life["rounds"]:
        return
    end = t0 + life["rounds"]
    style = "->" if life["censored"] else "|-|,widthA=0.3,widthB=0.3"
    ax.annotate(
        "",
        (end, kappa),
        xytext=(t0, kappa),
        arrowprops={"arrowstyle": style, "color": INK, "lw": 1.1, "shrinkA": 0, "shrinkB": 0},
    )
    long = life["rounds"] > 0.3 * last
    length = f"{words.span(life)} rounds" if life["censored"] else words.rounds(life["rounds"])
    note: Text = ax.annotate(
        f"above {words.percent(kappa, 0)} for {length}",
        ((t0 + end) / 2 if long else end, kappa),
        xytext=(0, -5) if long else (4, 3),  # past its end the curve is below κ, so above κ there is room
        textcoords="offset points",
        ha="center" if long else "left",
        va="top" if long else "bottom",
    )
    note.set_bbox({"facecolor": PAPER, "edgecolor": "none", "pad": 1.5, "alpha": 0.85})


def _spread(ax: Axes, values: pd.Series[float], malicious: pd.Series[bool]) -> None:
    """Two histograms over the same bins, each of its group's share; benign filled, malicious outlined."""
    finite = values[np.isfinite(values)]
    if finite.empty:
        return
    edges = bins(ax, float(finite.min()), float(finite.max()), positive=bool((finite > 0).all()))
    for group, colour, name in ((~malicious, HONEST, "benign"), (malicious, ATTACK, "malicious")):
        part = finite[group.reindex(finite.index, fill_value=False)]
        if part.empty:
            continue
        counts, _ = np.histogram(part, edges)
        line = colour == ATTACK
        ax.stairs(counts / len(part), edges, fill=not line, color=colour, alpha=1 if line else 0.45, linewidth=1.5)
        ax.annotate(
            name,
            (1, 1),
            xytext=(0 if line else -50, 6),
            xycoords="axes fraction",
            textcoords="offset points",
            color=colour,
            ha="right",
        )
    ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    ax.yaxis.set_major_locator(_few())
    if ax.get_xscale() == "linear":
        ax.xaxis.set_major_locator(_few())


def _few() -> MaxNLocator:
    return MaxNLocator(4, steps=[1, 2, 5, 10], min_n_ticks=3)


def _by_age(name: str, tables: Sequence[pd.DataFrame]) -> tuple[NDArray[np.int64], Floats]:
    """Common ages (n,) of a method's runs and their ASR (runs, n)."""
    if not tables:
        raise InputError(f"there are no runs of {name!r} to compare")
    curves = []
    for table in tables:
        submitted = dict(zip(table["round"].tolist(), table["malicious_submitted"].tolist(), strict=True))
        t0 = persistence.last_submission(submitted)
        if t0 is None:
            raise InputError(f"a run of {name!r} has no malicious submission, so its backdoor has no age")
        asr = evaluated(table, "asr")
        ages, rates = persistence.Curve.of(asr.index.to_numpy(), asr.to_numpy()).since(t0)
        if not len(ages):
            raise InputError(f"a run of {name!r} has no evaluated round since the attack")
        curves.append((ages, rates))
    common, rates = aligned(curves)
    if not len(common):
        raise InputError(f"the runs of {name!r} have no age of the backdoor in common")
    return common, rates
