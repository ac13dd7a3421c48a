"""The pictures of a slice of the grid: which there are, with their numbers, titles and captions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fedsim.errors import InputError
from fedsim.recording.summary import SUBMITTED
from fedsim.report import drawing, grid_figures, grid_panels, statistics, words
from fedsim.report.drawing import Floats
from fedsim.report.grid_cut import Slice, counted, interval, records
from fedsim.report.grid_figures import Band, Point, Steps
from fedsim.report.grid_panels import Line, Panel, Picture

_ROC_POINTS = 101
_FEW = 5  # up to so many seeds a band is their range, with more the middle half

Shown = list[tuple[Picture, str, str]]
"""Pictures, each with its title and its caption."""


def pictures(part: Slice) -> Shown:
    """The figures of a slice that there are numbers for."""
    styles = grid_panels.lines(part.defenses, part.plain)
    scored = {run["run"]: found for cell in part.having() for run in records(cell.frame) if (found := _scored(run))}
    return [
        *_survivals(part, styles),
        *_curves(part, styles),
        *_prices(part, styles),
        *_detection(part, styles, scored),
        *_spreads(part, scored),
    ]


def _survivals(part: Slice, styles: Mapping[str, Line]) -> Shown:
    """Kaplan–Meier curves: all attacks together, then each."""
    panels = []
    several = len(part.attacks) > 1
    for attack in [*([None] if several else []), *part.attacks]:
        curves, said = {}, []
        for defense in part.defenses:
            cells = part.having(attack, defense)
            runs = pd.concat([cell.frame for cell in cells]) if cells else pd.DataFrame({"lifespan_50": []})
            runs = runs[runs["lifespan_50"].notna()]
            if runs.empty:
                continue
            lives, censored = runs["lifespan_50"].to_numpy(np.float64), runs["lifespan_50_censored"].to_numpy(bool)
            life = statistics.survival(lives, censored)
            curves[defense] = Steps(life.times, life.alive, life.low, life.high, lives[censored])
            middle = "not reached" if life.median is None else f"{life.median:g} rounds"
            said.append(f"{defense} {middle}")
        if curves:
            title = attack or "all attacks together"
            label = f"Lifespans of the backdoors of {title}; medians: {'; '.join(said)}"
            panels.append(Panel(title, label, partial(grid_figures.survival, curves=curves, drawn=styles)))
    caption = (
        "Share of the backdoors still above κ = 50 % by their age, by Kaplan and Meier, with the 95 % band. A tick: "
        "a run that ended with its backdoor alive, which counts as censored."
    )
    picture = Picture("survival", panels, grid_panels.line_keys(styles))
    return [(picture, "How long the backdoors lived", caption)] if panels else []


def _curves(part: Slice, styles: Mapping[str, Line]) -> Shown:
    """ASR by round, a panel an attack."""
    panels = []
    for attack in part.attacks:
        bands, attacked, said = {}, [], []
        for cell in part.having(attack):
            rounds = [_rounds(Path(run)) for run in cell.frame["run"]]
            attacked += [table.loc[table["malicious_submitted"] > 0, "round"] for table in rounds]
            band = _band([drawing.evaluated(table, "asr") for table in rounds])
            if band is not None:
                bands[cell.defense] = band
                said.append(f"{cell.defense} {cell.values['asr'].text}")
        if bands:
            when = pd.concat(attacked)
            window = (float(when.min()), float(when.max())) if len(when) else None
            label = f"Attack success rate of {attack} by round; at the end: {'; '.join(said)}"
            draw = partial(grid_figures.curves, bands=bands, drawn=styles, window=window)
            panels.append(Panel(attack, label, draw))
    caption = (
        f"Attack success rate by round: the median over seeds, and a band of their range (of their middle half, if "
        f"there are more than {_FEW}). Shaded: from the first malicious update to the last."
    )
    picture = Picture("asr_curves", panels, grid_panels.line_keys(styles))
    return [(picture, "ASR round by round", caption)] if panels else []


def _rounds(run: Path) -> pd.DataFrame:
    table: pd.DataFrame = _read(run / "rounds.parquet", ["round", "asr", "malicious_submitted"]).to_pandas()
    return table


def _read(path: Path, columns: list[str]) -> pa.Table:
    try:
        return pq.read_table(path, columns=columns)
    except (OSError, ValueError) as error:  # what pyarrow raises derives from these
        raise InputError(f"{path} cannot be read: {error}") from None


def _band(series: Sequence[pd.Series[float]]) -> Band | None:
    """Median and spread of curves over the rounds that all of them cover; straight between evaluated rounds."""
    series = [one for one in series if len(one)]
    if not series:
        return None
    rounds, values = drawing.aligned([(one.index.to_numpy(), one.to_numpy()) for one in series])
    if not len(rounds):
        return None
    outer = (0, 100) if len(series) <= _FEW else (25, 75)
    kept = [pd.Series(q, index=rounds) for q in (np.median(values, axis=0), *np.percentile(values, outer, axis=0))]
    (x, middle), (_, low), (_, high) = map(drawing.stretches, kept)
    return Band(x, middle, low, high)


def _prices(part: Slice, styles: Mapping[str, Line]) -> Shown:
    """Main metric against ASR, a point a row."""
    points = []
    for cell in part.having():
        x, y = interval(cell.summary, "main_accuracy"), interval(cell.summary, "asr")
        if x is not None and y is not None:
            points.append(Point(cell.attack, cell.defense, x, y))
    if not points:
        return []
    shapes = grid_panels.markers(list(dict.fromkeys(point.attack for point in points)))
    label = f"Main accuracy against attack success rate at the end, {counted(len(points), 'row')}"
    draw = partial(grid_figures.tradeoff, points=points, drawn=styles, shapes=shapes)
    keys = grid_figures.tradeoff_keys(styles, shapes)
    caption = (
        "Each row of the grid at the end of its runs: colour is the defense, shape the attack; medians over seeds with "
        "95 % bootstrap intervals. A good defense lies below and to the right."
    )
    return [(Picture("tradeoff", [Panel("", label, draw, 3.4, 5.4)], keys), "Main metric against ASR", caption)]


@dataclass(frozen=True)
class _Scored:
    """A run's score in attacked rounds. benign, malicious: (n,) and (m,), NaN left out."""

    name: str
    benign: Floats
    malicious: Floats


def _scored(run: Mapping[str, Any]) -> _Scored | None:
    """The score of a run that its AUROC is counted by."""
    name = run.get("auroc_score")
    if not isinstance(name, str) or not name:
        return None
    table = _read(Path(run["run"]) / "clients.parquet", ["round", "malicious", "status", "scores"])
    table = table.filter(pc.is_in(table["status"], value_set=pa.array(SUBMITTED)))
    attacked = pc.unique(table.filter(table["malicious"])["round"])
    table = table.filter(pc.is_in(table["round"], value_set=attacked))
    score = pc.map_lookup(table["scores"], pa.scalar(name), "first").to_numpy().astype(np.float64)
    malicious = table["malicious"].to_numpy().astype(bool)
    known = ~np.isnan(score)
    found = _Scored(name, score[known & ~malicious], score[known & malicious])
    return found if len(found.benign) and len(found.malicious) else None


def _true_positives(scored: _Scored) -> Floats:
    """True positive rate at evenly spaced false positive rates from 0 to 1."""
    from sklearn.metrics import roc_curve

    values = np.concatenate([scored.benign, scored.malicious])
    truth = np.repeat([0, 1], [len(scored.benign), len(scored.malicious)])
    fpr, tpr, _ = roc_curve(truth, pd.Series(values).rank().to_numpy())  # ranks: a score may be infinite
    rates: Floats = np.interp(np.linspace(0, 1, _ROC_POINTS), fpr, tpr)
    return rates


def _detection(part: Slice, styles: Mapping[str, Line], found: Mapping[str, _Scored]) -> Shown:
    """ROC curves, a panel an attack; over seeds the mean of the curves, since the scale of a score is its run's own."""
    panels, silent = [], set(part.defenses)
    for attack in part.attacks:
        rates, said = {}, []
        for cell in part.having(attack):
            scored = [found[run] for run in cell.frame["run"] if run in found]
            if scored:
                rates[cell.defense] = np.mean([_true_positives(one) for one in scored], axis=0)
                silent.discard(cell.defense)
                said.append(f"{cell.defense} {words.number(float(cell.frame['auroc'].astype('float64').mean()))}")
        if rates:
            label = f"ROC curves of the defenses’ scores under {attack}; AUROC: {'; '.join(said)}"
            panels.append(Panel(attack, label, partial(grid_figures.roc, tpr=rates, drawn=styles)))
    caption = (
        "How well each defense’s own score tells malicious from benign clients in attacked rounds; over seeds the mean."
    )
    if silent:
        caption += f" Without a score: {', '.join(name for name in part.defenses if name in silent)}."
    keys = grid_panels.line_keys({name: line for name, line in styles.items() if name not in silent})
    return [(Picture("roc", panels, keys), "Who was detected", caption)] if panels else []


def _spreads(part: Slice, found: Mapping[str, _Scored]) -> Shown:
    """Distributions of the scores, a panel a defense, a ridge an attack; runs of all seeds together."""
    panels = []
    for defense in part.defenses:
        cells = part.having(None, defense)
        names = [found[run].name for cell in cells for run in cell.frame["run"] if run in found]
        if not names:
            continue
        name = max(names, key=names.count)
        groups = {}
        for cell in cells:
            scored = [found[run] for run in cell.frame["run"] if run in found and found[run].name == name]
            benign, malicious = (_finite([getattr(one, group) for one in scored]) for group in ("benign", "malicious"))
            if len(benign) + len(malicious):
                groups[cell.attack] = (benign, malicious)
        if groups:
            title = name if name.split(".")[0] == defense else f"{defense}: {name}"
            label = f"Distribution of the score {name} of {defense} over malicious and benign clients"
            height = grid_figures.spread_height(len(groups))
            panels.append(Panel(title, label, partial(grid_figures.spread, groups=groups), height))
    caption = (
        "Each defense’s score in attacked rounds, of all seeds together: filled, benign clients; outlined, malicious "
        "ones; each group scaled to its own highest bar."
    )
    return [(Picture("scores", panels, grid_figures.spread_keys()), "What the defenses saw", caption)] if panels else []


def _finite(parts: Sequence[Floats]) -> Floats:
    """All finite values of several arrays."""
    whole: Floats = np.concatenate([*parts, np.zeros(0)])
    return whole[np.isfinite(whole)]


def heat(part: Slice, measure: Mapping[str, str]) -> Any:
    """The heat map of one measure, for the files."""
    values = {key: cell.values[measure["key"]] for key, cell in part.cells.items()}
    shaded = {key: (math.nan if math.isnan(v.number) else v.shade, v.text) for key, v in values.items()}
    return grid_figures.heat(part.attacks, part.defenses, shaded, measure["name"])
