"""The page of many runs: which defense stops which attack, at what price, for how long."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from markupsafe import Markup, escape

from fedsim.errors import InputError
from fedsim.recording import results as recorded
from fedsim.recording.files import disk_error, write_text
from fedsim.recording.summary import SUBMITTED
from fedsim.report import drawing, grid_figures, html, statistics, tables, words
from fedsim.report.drawing import Floats
from fedsim.report.grid_figures import Band, Line, Panel, Picture, Point, Steps
from fedsim.report.statistics import Interval

_HERE = Path(__file__).parent
_ROC_POINTS = 101
_FEW = 5  # up to so many seeds a band is their range, with more the middle half
_SAME = 5e-4  # defenses whose mean ASR differs by less share the headline
_MANY, _LONG = 7, 22  # with more defenses, or letters of a name, the heads of a heat map stand upright
_COMPLETE = "complete"
_LEAST_COST = 0.02  # a loss of main accuracy that a heat map shades in full, unless there are larger ones

Shown = list[tuple[Picture, str, str]]
"""Pictures, each with its title and its caption."""

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
        return f"{self.attack} against {self.defense}: {said}; {_counted(len(self.runs), 'run')}"


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


def write(directories: Sequence[Path], out: Path) -> Path:
    """See :func:`fedsim.report.write_grid_report`."""
    frame = recorded.collect(directories)
    if frame.empty:
        raise InputError(f"there are no runs in {', '.join(map(str, directories))}; name run directories")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(out, error) from error
    _write_pages(frame)
    recorded.write_results(frame, out)
    tables.write_tables(frame, out)
    grid = slices(frame, out)
    drawn = [pictures(part) for part in grid]
    for part, shown in zip(grid, drawn, strict=True):
        for picture, _, _ in shown:
            grid_figures.save(picture.figure(), out / "figures", f"{picture.name}{part.stem}")
        for measure in MEASURES:
            grid_figures.save(_heat(part, measure), out / "figures", f"heat_{measure['key']}{part.stem}")
    page = out / "report.html"
    write_text(page, render(frame, grid, drawn, out))
    return page


def _write_pages(frame: pd.DataFrame) -> None:
    """Give each finished run its own page, if it has none; those of a directory that is read-only stay without."""
    for run in frame.loc[frame["status"] == _COMPLETE, "run"]:
        if not (Path(run) / "report.html").exists():
            with contextlib.suppress(OSError):
                html.write(Path(run))


# ------------------------------------------------------------------------------------------------- the grid


def slices(frame: pd.DataFrame, out: Path) -> list[Slice]:
    """Cut the finished runs so that a slice has at most one row for an attack and a defense.

    Further axes cut only as far as that needs: a trigger that goes with its attack cuts nothing.
    """
    done = frame[frame["status"] == _COMPLETE]
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
    failed = frame[frame["status"] != _COMPLETE]
    if not cuts:
        return [_slice("", "", attacks, defenses, done, failed, out)]
    found: list[Slice] = []
    for values, runs in done.groupby(cuts, sort=False):
        label = _named(cuts, values)
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
        summary = _records(statistics.summary_by_row(chosen))[0]
        change: Interval | None = None
        if plain:
            both = one[one["attack"] == attack]
            change = statistics.paired(both, "main_accuracy", str(defense), plain, by=["seed"]).difference
        elif twins:
            change = _interval(summary, "stealth_final")
        found[str(attack), str(defense)] = (chosen, summary, change, part.sort_values(["seed", "run"]))
    longest = max((_number(summary["lifespan_50"]) for _, summary, _, _ in found.values()), default=0.0)
    dearest = max([_LEAST_COST, *(-change.median for _, _, change, _ in found.values() if change and change.median)])
    cells = {
        key: Cell(
            *key,
            {"asr": _share(summary), "life": _lifespan(summary, longest), "cost": _change(change, summary, dearest)},
            summary,
            chosen,
            [_link(run, out) for run in _records(part)],
        )
        for key, (chosen, summary, change, part) in found.items()
    }
    lost = set(zip(failed["attack"], failed["defense"], strict=True)) - set(cells)
    return Slice(label, stem, attacks, defenses, cells, lost, plain, against, longest, dearest)


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a table, by the names of its columns."""
    return [{str(key): value for key, value in row.items()} for row in frame.to_dict("records")]


def _number(value: Any) -> float:
    """A number of a summary; 0 where it is missing."""
    return 0.0 if pd.isna(value) else float(value)


def _interval(summary: Mapping[str, Any], column: str) -> Interval | None:
    """A column of a summary with its bounds; None where it is missing."""
    if pd.isna(summary[column]):
        return None
    low, high = (
        None if pd.isna(summary[f"{column}_{b}"]) else float(summary[f"{column}_{b}"]) for b in ("low", "high")
    )
    return Interval(float(summary[column]), low, high, int(summary[f"{column}_n"]))


def _share(summary: Mapping[str, Any], column: str = "asr") -> Value:
    """A share in percent, with its interval."""
    found = _interval(summary, column)
    if found is None or found.median is None:
        return Value(words.ABSENT)
    note = "" if found.low is None or found.high is None else f"{100 * found.low:.1f} – {100 * found.high:.1f}"
    return Value(words.percent(found.median), note, found.median, found.median)


def _change(found: Interval | None, summary: Mapping[str, Any], worst: float) -> Value:
    """A difference of main accuracies; below it the accuracy itself."""
    accuracy = _share(summary, "main_accuracy").text
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


# ------------------------------------------------------------------------------------------------- figures


def pictures(part: Slice) -> Shown:
    """The figures of a slice that there are numbers for."""
    styles = grid_figures.lines(part.defenses, part.plain)
    scored = {run["run"]: found for cell in part.having() for run in _records(cell.frame) if (found := _scored(run))}
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
    picture = Picture("survival", panels, grid_figures.line_keys(styles))
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
    picture = Picture("asr_curves", panels, grid_figures.line_keys(styles))
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
    first, last = max(one.index[0] for one in series), min(one.index[-1] for one in series)
    seen = np.unique(np.concatenate([one.index.to_numpy() for one in series]))
    rounds = seen[(seen >= first) & (seen <= last)]
    if not len(rounds):
        return None
    values = np.array([np.interp(rounds, one.index.to_numpy(), one.to_numpy()) for one in series])
    outer = (0, 100) if len(series) <= _FEW else (25, 75)
    kept = [pd.Series(q, index=rounds) for q in (np.median(values, axis=0), *np.percentile(values, outer, axis=0))]
    (x, middle), (_, low), (_, high) = map(drawing.stretches, kept)
    return Band(x, middle, low, high)


def _prices(part: Slice, styles: Mapping[str, Line]) -> Shown:
    """Main metric against ASR, a point a row."""
    points = []
    for cell in part.having():
        x, y = _interval(cell.summary, "main_accuracy"), _interval(cell.summary, "asr")
        if x is not None and y is not None:
            points.append(Point(cell.attack, cell.defense, x, y))
    if not points:
        return []
    shapes = grid_figures.markers(list(dict.fromkeys(point.attack for point in points)))
    label = f"Main accuracy against attack success rate at the end, {_counted(len(points), 'row')}"
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
    keys = grid_figures.line_keys({name: line for name, line in styles.items() if name not in silent})
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


def _heat(part: Slice, measure: Mapping[str, str]) -> Any:
    """The heat map of one measure, for the files."""
    values = {key: cell.values[measure["key"]] for key, cell in part.cells.items()}
    shaded = {key: (math.nan if math.isnan(v.number) else v.shade, v.text) for key, v in values.items()}
    return grid_figures.heat(part.attacks, part.defenses, shaded, measure["name"])


# ------------------------------------------------------------------------------------------------- the page


def render(frame: pd.DataFrame, grid: Sequence[Slice], drawn: Sequence[Shown], out: Path) -> str:
    """The page. drawn: the pictures of each slice."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["breakable"] = _breakable
    script = (_HERE / "grid.js").read_text(encoding="utf-8")
    style = "\n".join((_HERE / name).read_text(encoding="utf-8") for name in ("report.css", "grid.css"))
    headline, detail = _verdict(frame, grid)
    return environment.get_template("grid.html.jinja").render(
        style=style,
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        title=_title(frame, out),
        subtitle=_subtitle(frame),
        headline=headline,
        detail=detail,
        tiles=_tiles(frame, grid),
        measures=MEASURES,
        slices=[_shown(part, i, shown) for i, (part, shown) in enumerate(zip(grid, drawn, strict=True))],
        ranks=_ranks(frame),
        table=_rows(grid),
        failed=_failed(frame, out),
        total=len(frame),
        against=next((part.against for part in grid if part.against), ""),
    )


def _breakable(name: str) -> Markup:
    """A name that may be broken after an underscore."""
    return Markup(re.sub(r"([_/=])", r"\1<wbr>", str(escape(name))))


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _and(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _title(frame: pd.DataFrame, out: Path) -> str:
    """The name that all runs share, or those of few; else the name of the report's directory."""
    names = [name for name in frame["name"].unique() if name]
    return ", ".join(names) if 0 < len(names) <= 3 else out.resolve().name


def _subtitle(frame: pd.DataFrame) -> list[str]:
    """What all runs have in common."""
    parts = []
    for column in ("task", "model", "trigger", "schedule", "partition", "attack", "defense"):
        values = frame[column].unique()
        if len(values) == 1 and values[0]:
            parts.append(f"{column} {values[0]}" if column != "task" else values[0])
    rounds = frame["rounds"].dropna().unique()
    if len(rounds) == 1:
        parts.append(words.rounds(int(rounds[0])))
    return [words.without_paths(str(part)) for part in parts]


def _verdict(frame: pd.DataFrame, grid: Sequence[Slice]) -> tuple[str, str]:
    """The sentence a reader came for, and how it was found."""
    size = (
        f"{_counted(frame['attack'].nunique(), 'attack')} × {_counted(frame['defense'].nunique(), 'defense')} × "
        f"{_counted(frame['seed'].nunique(), 'seed')}"
    )
    means = _means(grid, "asr")
    if len(means) < 2:
        return size, "Too few defenses have met every attack to be compared by one number."
    best = min(means.values())
    leaders = [name for name, value in means.items() if value - best < _SAME]
    plain = next((part.plain for part in grid if part.plain in means), None)
    detail = f"{size}. Mean over the attacks of the median ASR at the end: {_and(leaders)} {words.percent(best)}"
    if plain is not None and plain not in leaders:
        detail += f", {plain} (no defense) {words.percent(means[plain])}"
    prices = _means(grid, "cost")
    if len(leaders) == 1 and leaders[0] in prices:
        against = next(part.against for part in grid)
        detail += f". Its main accuracy against {against}: {words.points(prices[leaders[0]])}"
    if len(leaders) > 3 or len(leaders) == len(means):
        return "No defense stands out", f"{detail}."
    return f"{_and(leaders)} {'leaves' if len(leaders) == 1 else 'leave'} the least of the backdoors", f"{detail}."


def _means(grid: Sequence[Slice], measure: str) -> dict[str, float]:
    """For each defense that has met every attack of every slice, the mean of a measure of its cells."""
    wanted = [(part, attack) for part in grid for attack in part.attacks if _measured(part, attack)]
    means = {}
    for defense in dict.fromkeys(name for part in grid for name in part.defenses):
        cells = [part.cells.get((attack, defense)) for part, attack in wanted]
        values = [math.nan if cell is None else cell.values[measure].number for cell in cells]
        if values and not any(map(math.isnan, values)):
            means[defense] = float(np.mean(values))
    return means


def _measured(part: Slice, attack: str) -> bool:
    """Whether any cell of an attack has an ASR; a row without an attack has none."""
    return any(not math.isnan(cell.values["asr"].number) for cell in part.having(attack))


def _tiles(frame: pd.DataFrame, grid: Sequence[Slice]) -> list[tuple[str, str, str]]:
    """Label, value and note of the numbers beside the headline."""
    failed = int((frame["status"] != _COMPLETE).sum())
    seeds = frame["seed"].nunique()
    in_slices = f" in {len(grid)} slices" if len(grid) > 1 else ""
    tiles = [
        ("runs", str(len(frame)), _counted(frame["row"].nunique(), "row") + in_slices),
        ("attacks", str(frame["attack"].nunique()), ""),
        ("defenses", str(frame["defense"].nunique()), ""),
        ("seeds", str(seeds), "a median of one is that one" if seeds == 1 else "medians over seeds"),
        ("failed", str(failed), "or not finished" if failed else ""),
    ]
    seconds = float(frame["seconds"].sum())
    if seconds > 0:
        tiles.append(("computed for", words.seconds(seconds), "summed over runs"))
    return tiles


def _shown(part: Slice, i: int, drawn: Shown) -> dict[str, Any]:
    """A slice as the template takes it."""
    captions = {
        "asr": "Attack success rate at the end of the run: the median over seeds, and its 95 % interval.",
        "life": "Rounds for which the backdoor stayed above κ = 50 % after the last malicious update: the Kaplan–Meier "
        "median over seeds.",
        "cost": f"Main accuracy at the end minus {part.against}, the median over seeds; below it the accuracy itself."
        if part.against
        else "What the main accuracy loses is not known: there are neither undefended runs nor clean twins.",
    }
    return {
        "label": part.label,
        "tall": len(part.defenses) > _MANY or max(map(len, part.defenses)) > _LONG,
        "attacks": part.attacks,
        "defenses": part.defenses,
        "cells": [
            [part.cells.get((a, d), "failed" if (a, d) in part.failed else None) for d in part.defenses]
            for a in part.attacks
        ],
        "captions": captions,
        "ramps": {
            "asr": ("0 %", "100 %"),
            "life": ("0", words.rounds(int(part.longest))),
            "cost": ("nothing lost", words.points(-part.dearest)),
        },
        "pictures": [
            {
                "name": picture.name,
                "title": title,
                "caption": caption,
                "keys": picture.keys,
                "panels": [
                    {"label": panel.label, "svg": svg}
                    for panel, svg in zip(picture.panels, picture.inline(f"{picture.name}-{i}"), strict=True)
                ],
            }
            for picture, title, caption in drawn
        ],
    }


def _ranks(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """A table of ranks for every combination of what the ranks are not summed over."""
    ranking = statistics.rank(frame[frame["status"] == _COMPLETE])
    if ranking.empty:
        return []
    own = ("defense", "rank", "attacks", "missing", "undefined")
    contexts = [str(c) for c in ranking if c not in own and ranking[c].nunique() > 1]
    found = []
    for values, rows in ranking.groupby(contexts, sort=False) if contexts else [((), ranking)]:
        found.append(
            {
                "label": _named(contexts, values),
                "rows": [
                    (
                        str(row["defense"]),
                        _signed(row["rank"]),
                        str(row["attacks"]),
                        str(row["missing"]),
                        str(row["undefined"]),
                    )
                    for row in _records(rows)
                ],
            }
        )
    return found


def _signed(value: float) -> str:
    """A rank with its sign: +1.25, 0.00, −0.30."""
    if math.isnan(value):
        return words.ABSENT
    text = f"{value:+.2f}".replace("-", "−")
    return "0.00" if text in ("+0.00", "−0.00") else text


def _named(axes: Sequence[str], values: Sequence[Any]) -> str:
    """What tells a slice from the others: each axis with its value."""
    return " · ".join(f"{axis.removeprefix('axis.')} {v or '(none)'}" for axis, v in zip(axes, values, strict=True))


def _rows(grid: Sequence[Slice]) -> dict[str, Any]:
    """The table of all rows: heads and cells."""
    cells = [cell for part in grid for cell in part.having()]
    columns = [c for c in cells[0].frame if c in statistics.cell_columns(cells[0].frame)] if cells else []
    axes = [c for c in columns if c not in ("attack", "defense") and len({cell.frame[c].iloc[0] for cell in cells}) > 1]
    words_of = any(not pd.isna(cell.summary["perplexity"]) for cell in cells)
    heads = [
        {"name": "attack", "title": "", "text": True},
        {"name": "defense", "title": "", "text": True},
        *({"name": axis.removeprefix("axis."), "title": "", "text": True} for axis in axes),
        {"name": "seeds", "title": "runs that the numbers are of", "text": False},
        {"name": "ASR", "title": "attack success rate at the end", "text": False},
        {"name": "lifespan", "title": "rounds above κ = 50 % after the last malicious update", "text": False},
        {"name": "main accuracy", "title": "at the end", "text": False},
        {"name": "Δ accuracy", "title": "against no defense; see the heat map", "text": False},
        *([{"name": "perplexity", "title": "at the end", "text": False}] if words_of else []),
        {"name": "TPR", "title": "malicious updates that were not accepted", "text": False},
        {"name": "FPR", "title": "benign updates that were not accepted", "text": False},
        {"name": "AUROC", "title": "of the defense’s score", "text": False},
    ]
    rows = []
    for cell in cells:
        perplexity = _interval(cell.summary, "perplexity")
        auroc = _interval(cell.summary, "auroc")
        numbers = [
            Value(str(cell.summary["seeds"]), number=float(cell.summary["seeds"])),
            cell.values["asr"],
            cell.values["life"],
            _share(cell.summary, "main_accuracy"),
            _bare(cell.values["cost"]),
            *([_plain(perplexity, words.perplexity)] if words_of else []),
            _bare(_share(cell.summary, "tpr")),
            _bare(_share(cell.summary, "fpr")),
            _bare(_plain(auroc, words.number)),
        ]
        texts = [cell.attack, cell.defense, *(str(cell.frame[axis].iloc[0]) for axis in axes)]
        rows.append(
            {
                "cells": [
                    *({"text": text, "note": "", "is_text": True} for text in texts),
                    *(
                        {
                            "text": value.text,
                            "note": value.note,
                            "is_text": False,
                            "value": "" if math.isnan(value.number) else f"{value.number:.6g}",
                        }
                        for value in numbers
                    ),
                ],
                "runs": cell.runs,
            }
        )
    return {"columns": heads, "rows": rows}


def _bare(value: Value) -> Value:
    """Without its note."""
    return replace(value, note="")


def _plain(found: Interval | None, say: Callable[[float | None], str]) -> Value:
    """A number with its interval in the given words."""
    if found is None or found.median is None:
        return Value(words.ABSENT)
    note = "" if found.low is None else f"{say(found.low)} – {say(found.high)}"
    return Value(say(found.median), note, found.median)


def _failed(frame: pd.DataFrame, out: Path) -> list[dict[str, str]]:
    """The runs that have no result, and why."""
    return [
        {
            "name": words.without_paths(os.path.relpath(str(run["run"]), out)),
            "what": f"{run['attack']} against {run['defense']}, seed {run['seed']}",
            "status": str(run["status"]),
            "message": words.without_paths(str(run["message"])) or words.ABSENT,
        }
        for run in _records(frame[frame["status"] != _COMPLETE])
    ]
