"""Many runs cut into the cells of a grid (one attack, one defense, all seeds) and the slices that a page shows."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd

from fedsim.recording.results import COMPLETE
from fedsim.report import statistics, words
from fedsim.report.statistics import Interval

_LEAST_COST = 0.02  # a loss of main accuracy that a heat map shades in full, unless there are larger ones

MEASURES = (
    {"key": "asr", "name": "ASR at the end"},
    {"key": "life", "name": "lifespan (κ = 50 %)"},
    {"key": "cost", "name": "main-metric cost"},
)


@dataclass(frozen=True)
class Value:
    """One measure of one cell. number: to sort by, NaN where unknown. shade: 0 (good) to 1 (bad)."""

    text: str
    note: str = ""
    number: float = math.nan
    shade: float = 0.0


@dataclass(frozen=True)
class Cell:
    """One row of the benchmark: the runs that differ in their seed only.

    summary: its row of :func:`fedsim.report.statistics.summary_by_row`. frame: its runs, one a seed. runs: all of
    them, as links.
    """

    attack: str
    defense: str
    values: Mapping[str, Value]
    summary: Mapping[str, Any]
    frame: pd.DataFrame
    runs: list[dict[str, str]]

    @property
    def label(self) -> str:
        """What a screen reader says of it."""
        said = ", ".join(f"{m['name']} {self.values[m['key']].text}" for m in MEASURES)
        return f"{self.attack} against {self.defense}: {said}; {counted(len(self.runs), 'run')}"


@dataclass(frozen=True)
class Slice:
    """The part of the grid that one heat map shows. label: what tells it from the others; empty if it is alone."""

    label: str
    stem: str
    attacks: list[str]
    defenses: list[str]
    cells: dict[tuple[str, str], Cell]
    failed: set[tuple[str, str]]
    """Attack and defense of the cells none of whose runs has finished."""
    plain: str | None
    """The defense that is none: plain averaging."""
    against: str
    """What the main accuracy is compared with; empty where there is nothing."""
    longest: float
    """The lifespan that a heat map shades in full, in rounds."""
    dearest: float
    """The loss of main accuracy that a heat map shades in full."""

    def having(self, attack: str | None = None, defense: str | None = None) -> list[Cell]:
        """Its cells of one attack or one defense, in order."""
        wanted = ((a, d) for a in self.attacks for d in self.defenses)
        return [
            self.cells[a, d] for a, d in wanted if (a, d) in self.cells and attack in (None, a) and defense in (None, d)
        ]


def slices(frame: pd.DataFrame, out: Path) -> list[Slice]:
    """Cut the finished runs so that a slice has at most one row for an attack and a defense.

    Further axes cut only as far as that needs: a trigger that goes with its attack cuts nothing.
    """
    done = frame[frame["status"] == COMPLETE]
    if done.empty:
        return []
    attacks = _ordered(frame["attack"], frame["attack"] == "none")
    defenses = _ordered(frame["defense"], frame["undefended"])
    axes = [column for column in statistics.cell_columns(done) if column not in ("attack", "defense")]
    done = done.assign(_cell=done.groupby(["row", "attack", "defense", *axes], sort=False).ngroup())
    cuts: list[str] = []
    for axis in [*axes, "row"]:
        spot = done.groupby(["attack", "defense", *cuts], sort=False)
        if spot["_cell"].nunique().max() == 1:
            break
        if spot[axis].nunique().max() > 1:
            cuts.append(axis)
    failed = frame[frame["status"] != COMPLETE]
    if not cuts:
        return [_slice("", "", attacks, defenses, done, failed, out)]
    found: list[Slice] = []
    for values, runs in done.groupby(cuts, sort=False):
        label = named(cuts, values)
        stem = f"-{len(found) + 1}-{_slug(label)}"
        lost = failed[(failed[cuts] == pd.Series(values, index=cuts)).all(axis=1)]
        met = [
            [name for name in names if name in {*runs[column], *lost[column]}]
            for column, names in (("attack", attacks), ("defense", defenses))
        ]
        found.append(_slice(label, stem, met[0], met[1], runs, lost, out))
    return found


def _ordered(names: pd.Series[str], first: pd.Series[bool]) -> list[str]:
    """Names in the order they come, those that are marked before all others."""
    ahead = set(names[first])
    return sorted((str(name) for name in names.unique()), key=lambda name: name not in ahead)


def _slug(text: str) -> str:
    """A label as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60]


def _slice(
    label: str,
    stem: str,
    attacks: list[str],
    defenses: list[str],
    runs: pd.DataFrame,
    failed: pd.DataFrame,
    out: Path,
) -> Slice:
    """A slice of the finished runs; failed: those of it that have no result."""
    plain = next((name for name in defenses if name in set(runs.loc[runs["undefended"], "defense"])), None)
    twins = bool(runs["stealth_final"].notna().any())
    against = f"that of {plain} under the same attack" if plain else "that of its clean twin" if twins else ""
    one = statistics.one_a_seed(runs)
    found = {}
    for (attack, defense), part in runs.groupby(["attack", "defense"], sort=False):
        chosen = one[(one["attack"] == attack) & (one["defense"] == defense)].sort_values("seed")
        summary = records(statistics.summary_by_row(chosen))[0]
        change: Interval | None = None
        if plain:
            both = one[one["attack"] == attack]
            change = statistics.paired(both, "main_accuracy", str(defense), plain, by=["seed"]).difference
        elif twins:
            change = interval(summary, "stealth_final")
        found[str(attack), str(defense)] = (chosen, summary, change, part.sort_values(["seed", "run"]))
    longest = max((_number(summary["lifespan_50"]) for _, summary, _, _ in found.values()), default=0.0)
    dearest = max([_LEAST_COST, *(-change.median for _, _, change, _ in found.values() if change and change.median)])
    cells = {
        key: Cell(
            *key,
            {"asr": share(summary), "life": _lifespan(summary, longest), "cost": _change(change, summary, dearest)},
            summary,
            chosen,
            [_link(run, out) for run in records(part)],
        )
        for key, (chosen, summary, change, part) in found.items()
    }
    lost = set(zip(failed["attack"], failed["defense"], strict=True)) - set(cells)
    return Slice(label, stem, attacks, defenses, cells, lost, plain, against, longest, dearest)


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a table, by the names of its columns."""
    return [{str(key): value for key, value in row.items()} for row in frame.to_dict("records")]


def _number(value: Any) -> float:
    """A number of a summary; 0 where it is missing."""
    return 0.0 if pd.isna(value) else float(value)


def interval(summary: Mapping[str, Any], column: str) -> Interval | None:
    """A column of a summary with its bounds; None where it is missing."""
    if pd.isna(summary[column]):
        return None
    low, high = (
        None if pd.isna(summary[f"{column}_{b}"]) else float(summary[f"{column}_{b}"]) for b in ("low", "high")
    )
    return Interval(float(summary[column]), low, high, int(summary[f"{column}_n"]))


def share(summary: Mapping[str, Any], column: str = "asr") -> Value:
    """A share in percent, with its interval."""
    found = interval(summary, column)
    if found is None or found.median is None:
        return Value(words.ABSENT)
    note = "" if found.low is None or found.high is None else f"{100 * found.low:.1f} – {100 * found.high:.1f}"
    return Value(words.percent(found.median), note, found.median, found.median)


def _change(found: Interval | None, summary: Mapping[str, Any], worst: float) -> Value:
    """A difference of main accuracies; below it the accuracy itself."""
    accuracy = share(summary, "main_accuracy").text
    if found is None or found.median is None:
        return Value(words.ABSENT, accuracy)
    return Value(words.points(found.median), accuracy, found.median, min(1.0, max(0.0, -found.median / worst)))


def _lifespan(summary: Mapping[str, Any], longest: float) -> Value:
    """The Kaplan–Meier median over seeds; where it is not reached, the longest age seen as a lower bound."""
    if pd.isna(summary["lifespan_50"]):
        return Value(words.ABSENT)
    rounds, open_, n = (
        float(summary["lifespan_50"]),
        bool(summary["lifespan_50_censored"]),
        int(summary["lifespan_50_n"]),
    )
    note = f"{int(summary['lifespan_50_events'])} of {n} ended" if n > 1 else ""
    text = f">\u202f{rounds:g}" if open_ else f"{rounds:g}"
    return Value(text, note, rounds + 0.5 * open_, rounds / longest if longest > 0 else 0.0)


def _link(run: Mapping[str, Any], out: Path) -> dict[str, str]:
    """A run for the page: its seed, and where its report lies from there; no address where it has none."""
    page = Path(str(run["run"])) / "report.html"
    href = quote(os.path.relpath(page, out)) if page.is_file() else ""
    return {"seed": str(run["seed"]), "href": href}


def counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def named(axes: Sequence[str], values: Sequence[Any]) -> str:
    """What tells a slice from the others: each axis with its value."""
    return " · ".join(f"{axis.removeprefix('axis.')} {v or '(none)'}" for axis, v in zip(axes, values, strict=True))
