"""Two runs, or two sets of runs, side by side: first what was different about them, then their numbers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fedsim.errors import InputError
from fedsim.recording.identity import NO_INFLUENCE, flat
from fedsim.recording.labels import brief
from fedsim.recording.results import COMPLETE, SPANS, tabulate
from fedsim.recording.runs import RunFiles, read_runs
from fedsim.recording.summary import HORIZONS, KAPPAS
from fedsim.report import statistics, words

_MOST_VALUES = 6  # of a key are listed
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]+")


@dataclass(frozen=True)
class Measure:
    """A line of the comparison. show: a value in words. change: a difference in words."""

    column: str
    name: str
    show: Callable[[float], str]
    change: Callable[[float], str]


def _signed(value: float, digits: int = 3) -> str:
    return "0" if value == 0 else f"{value:+.{digits}g}".replace("-", "−")


def _whole(value: float) -> str:
    return f"{value:g}"


def _measures() -> Iterator[Measure]:
    def shares(*pairs: tuple[str, str]) -> Iterator[Measure]:
        return (Measure(column, name, words.percent, words.points) for column, name in pairs)

    kappas = [(round(100 * k), words.percent(k, 0)) for k in KAPPAS]
    yield from shares(("main_accuracy", "main accuracy"))
    yield Measure("main_loss", "main loss", words.number, _signed)
    yield Measure("perplexity", "perplexity", words.perplexity, _signed)
    yield from shares(("asr", "ASR at the end"), ("asr_floor", "ASR floor (clean twin)"))
    for column, name in (("lifespan", "lifespan"), ("crossing", "first fall")):
        yield from (Measure(f"{column}_{key}", f"{name}, κ = {k}", _whole, _signed) for key, k in kappas)
    yield Measure("half_life", "half-life", _whole, _signed)
    yield from shares(*((f"area_{h}", f"mean ASR to age {h}") for h in HORIZONS))
    yield from shares(*((f"asr_at_{h}", f"ASR at age {h}") for h in HORIZONS))
    for key, k in kappas:
        yield Measure(f"time_to_inject_{key}", f"submissions to inject, κ = {k}", _whole, _signed)
    for column, name in (("attack_rounds", "over attack rounds"), ("final", "at the end")):
        yield Measure(f"stealth_{column}", f"main accuracy − twin’s, {name}", words.points, words.points)
    yield from shares(("tpr", "TPR"), ("fpr", "FPR"), ("fpr_attack_rounds", "FPR under attack"))
    yield from shares(("malicious_weight", "malicious weight"))
    yield Measure("auroc", "AUROC of the main score", words.number, _signed)
    yield Measure("seconds", "wall time", words.seconds, lambda value: f"{_signed(value)} s")


def compare(a: Path, b: Path) -> RenderableType:
    """Two run directories, or two directories of runs, side by side, for the terminal.

    Raises
    ------
    InputError: one of them holds no run, both hold the same one, or a file is damaged.
    """
    sides = [read_runs([a]), read_runs([b])]
    paths = [{run.path.resolve() for run in side} for side in sides]
    if paths[0] & paths[1]:
        raise InputError(f"{min(paths[0] & paths[1])} is on both sides; give two directories that share no run")
    frame = tabulate([*sides[0], *sides[1]])
    mine = {str(run.path) for run in sides[0]}
    frame = frame.assign(side=["A" if run in mine else "B" for run in frame["run"]])
    parts: list[RenderableType] = [_head(a, b, sides), Text(), _config_table(sides)]
    single = all(len(side) == 1 for side in sides)
    said = _caveats(sides, frame)
    numbers = _two_runs(frame) if single else _two_sets(frame, said)
    if said:
        parts += [Text(), Text("Mind", style="bold"), *(Text(f"• {line}") for line in said)]
    return Group(*parts, Text(), numbers)


def _head(a: Path, b: Path, sides: Sequence[Sequence[RunFiles]]) -> Table:
    table = Table.grid(padding=(0, 2))
    for letter, path, side in zip("AB", (a, b), sides, strict=True):
        seeds = len({run.config.get("seed") for run in side})
        count = "" if len(side) == 1 else f"{len(side)} runs, {seeds} seed{'' if seeds == 1 else 's'}"
        table.add_row(Text(letter, style="bold"), _safe(str(path)), count)
    return table


# ---------------------------------------------------------------------------------------------- what differs


def _config_table(sides: Sequence[Sequence[RunFiles]]) -> RenderableType:
    """The keys whose values are not the same on both sides."""
    held = [_values(side) for side in sides]
    keys = dict.fromkeys(key for side in held for key in side)
    differing = [key for key in keys if held[0].get(key) != held[1].get(key)]
    idle = [key for key in differing if NO_INFLUENCE.match(key)]
    telling = [key for key in differing if key not in idle]
    parts: list[RenderableType] = []
    if telling:
        table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
        table.add_column("config", overflow="fold")
        for letter in "AB":
            table.add_column(letter, overflow="fold")
        for key in telling:
            table.add_row(_safe(key), *(_listed(side.get(key, set())) for side in held))
        parts.append(table)
    else:
        parts.append(Text("The configs do not differ in anything a result depends on."))
    if idle:
        parts.append(_safe(f"without influence on results: {', '.join(idle)}", style="dim"))
    return Group(*parts)


def _values(side: Sequence[RunFiles]) -> dict[str, set[str]]:
    """Key path → the values it has in the runs of a side; a run that lacks it counts as one more value."""
    configs = [{key: brief(value) for key, value in flat(run.config).items()} for run in side]
    keys = dict.fromkeys(key for config in configs for key in config)
    return {key: {config.get(key, words.ABSENT) for config in configs} for key in keys}


def _listed(values: set[str]) -> Text:
    shown = sorted(values)[:_MOST_VALUES]
    more = f", … ({len(values)} in all)" if len(values) > _MOST_VALUES else ""
    return _safe(", ".join(shown) + more if values else words.ABSENT)


def _caveats(sides: Sequence[Sequence[RunFiles]], frame: pd.DataFrame) -> list[str]:
    """What stands in the way of comparing the numbers, in sentences."""
    said = []

    def differ(column: str) -> bool:
        a, b = (set(frame.loc[(frame["side"] == side) & frame[column].notna(), column]) for side in "AB")
        return a != b

    def of(run: RunFiles, section: str, key: str) -> Any:
        part = run.manifest.get(section)
        return part.get(key) if isinstance(part, dict) else None

    def known(section: str, key: str) -> list[set[str]]:
        return [{str(v) for v in (of(run, section, key) for run in side) if v is not None} for side in sides]

    if differ("task"):
        said.append("Different tasks or data: accuracy and ASR are not shares of the same examples.")
    else:
        a, b = known("data", "fingerprint")
        if a and b and a != b:
            said.append("The data were not the same bytes, though the configs name the same data.")
    if differ("trigger"):
        said.append("Different triggers: ASR is measured on different test examples.")
    if differ("schedule") or differ("t0"):
        said.append("The last malicious update was not in the same rounds: ages are counted from there.")
    if differ("rounds"):
        said.append("Different numbers of rounds: “at the end” and censoring mean different rounds.")
    if len({frame.loc[frame["side"] == side, "asr_floor"].isna().all() for side in "AB"}) > 1:
        said.append("Only one side has clean twins: floors, half-lives and stealth cannot be compared.")
    scores = [set(frame.loc[frame["side"] == side, "auroc_score"]) - {""} for side in "AB"]
    if scores[0] != scores[1] and all(scores):
        said.append(f"AUROC is of different scores: {', '.join(sorted(scores[0]))}; {', '.join(sorted(scores[1]))}.")
    a, b = (set(frame.loc[frame["side"] == side, "seed"]) for side in "AB")
    if not a & b:
        said.append("No seed is on both sides: part of every difference is the luck of the seed.")
    for name in ("fedsim-backdoor", "torch"):
        old, new = known("versions", name)
        if old and new and old != new:
            said.append(f"Made with different versions of {name}: {', '.join(sorted(old))}; {', '.join(sorted(new))}.")
    devices = [{str(run.manifest["device"]) for run in side if "device" in run.manifest} for side in sides]
    if devices[0] != devices[1] and all(devices):
        said.append("Made on different devices: a GPU does not give the same bytes.")
    for side in "AB":
        unfinished = frame[(frame["side"] == side) & (frame["status"] != COMPLETE)]
        if len(unfinished):
            states = ", ".join(sorted(unfinished["status"].unique()))
            said.append(f"{len(unfinished)} of the runs of {side} did not finish ({states}); they may have no numbers.")
    return said


# ------------------------------------------------------------------------------------------------- the numbers


def _two_runs(frame: pd.DataFrame) -> RenderableType:
    """Two runs: every number either has, and the difference."""
    a, b = (frame[frame["side"] == side].iloc[0] for side in "AB")
    table = _table("", "A", "B", "B − A")
    for measure in _measures():
        x, y = float(a[measure.column]), float(b[measure.column])
        if x != x and y != y:
            continue
        cut = [bool(run.get(f"{measure.column}_censored", False)) for run in (a, b)]
        shown = [_value(measure, value, c) for value, c in zip((x, y), cut, strict=True)]
        table.add_row(measure.name, *shown, words.ABSENT if x != x or y != y else _change(measure, y - x, *cut))
    return table if table.row_count else Text("Neither run has numbers yet.")


def _two_sets(frame: pd.DataFrame, said: list[str]) -> RenderableType:
    """Two sets of runs: medians over all runs of a side; where cells and seeds match, the paired differences."""
    by = _pairing(frame, said)
    medians, pairs = _table("", "A", "B"), _table("B − A, paired", "difference", "pairs", "effect", "p")
    for measure in _measures():
        sides = [frame[(frame["side"] == s) & frame[measure.column].notna()] for s in "AB"]
        if not len(sides[0]) and not len(sides[1]):
            continue
        medians.add_row(measure.name, *(_median(measure, side) for side in sides))
        found = by and statistics.paired(frame, measure.column, "B", "A", column="side", by=by)
        if found and found.pairs > 1:
            pairs.add_row(measure.name, *_paired(measure, found))
    if not medians.row_count:
        return Text("No run has numbers yet.")
    notes = (
        "Median over the runs [95 % bootstrap interval]; of lifespans, first falls and half-lives the Kaplan–Meier "
        "median, “> s” where it is not reached."
    )
    if frame.groupby("side")["seed"].nunique().min() < statistics.FEWEST_PAIRS:
        notes += " An interval over so few seeds covers less than it says."
    parts: list[RenderableType] = [medians, Text(), Text(notes, style="dim")]
    if pairs.row_count:
        notes = (
            "effect: share of pairs in which B is larger minus the share in which A is. p: Wilcoxon’s signed-rank "
            "test; of lifespans, first falls and half-lives the log-rank test; — where fewer than "
            f"{statistics.FEWEST_PAIRS} pairs differ. censored: a run ended first, so that the difference is not known."
        )
        parts += [Text(), pairs, Text(), Text(notes, style="dim")]
    return Group(*parts)


def _pairing(frame: pd.DataFrame, said: list[str]) -> list[str] | None:
    """The columns by which runs of the two sides are paired, or None where that would be arbitrary."""
    sides = [frame[frame["side"] == side] for side in "AB"]
    columns = statistics.cell_columns(frame)
    shared = [c for c in columns if set(sides[0][c]) & set(sides[1][c])]
    by = [*shared, "seed"]
    for letter, side in zip("AB", sides, strict=True):
        many = [c for c in columns if c not in shared and statistics.one_a_seed(side)[c].nunique() > 1]
        if statistics.one_a_seed(side).duplicated(by).any():
            said.append(
                f"Nothing is paired: {letter} holds runs of the same seed that differ in {', '.join(many)}, where the "
                f"sides have nothing in common; give directories that hold one {many[0] if many else 'cell'} each."
            )
            return None
    pairs = sides[0][by].drop_duplicates().merge(sides[1][by].drop_duplicates(), on=by)
    if pairs.empty:
        said.append("Nothing is paired: no run of A has a counterpart in B with the same seed.")
        return None
    for letter, side in zip("AB", sides, strict=True):
        alone = len(side[by].drop_duplicates()) - len(pairs)
        if alone:
            said.append(f"{alone} of the runs of {letter} have no counterpart on the other side and are not paired.")
    return by


def _table(*heads: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for i, head in enumerate(heads):
        table.add_column(head, justify="right" if i else "left", no_wrap=i > 0)
    return table


def _value(measure: Measure, value: float, censored: bool) -> str:
    if value != value:
        return words.ABSENT
    return f"> {measure.show(value)}" if censored else measure.show(value)


def _change(measure: Measure, difference: float, a_censored: bool, b_censored: bool) -> str:
    """The difference b − a in words; a bound where one of the two is a lower bound, unknown where both are."""
    if a_censored and b_censored:
        return "unknown"
    sign = "> " if b_censored else "< " if a_censored else ""
    return sign + measure.change(difference)


def _median(measure: Measure, side: pd.DataFrame) -> str:
    if not len(side):
        return words.ABSENT
    if measure.column in SPANS:
        curve = statistics.survival(side[measure.column], side[f"{measure.column}_censored"])
        if curve.median is None:
            return _interval(measure.show, curve.longest, curve.median_low, curve.median_high, "> ")
        return _interval(measure.show, curve.median, curve.median_low, curve.median_high)
    found = statistics.median_interval(side[measure.column])
    return _interval(measure.show, found.median, found.low, found.high)


def _paired(measure: Measure, found: statistics.Paired) -> list[str]:
    d = found.difference
    change = "censored" if d is None else _interval(measure.change, d.median, d.low, d.high)
    p = found.logrank_p if measure.column in SPANS else found.wilcoxon_p
    effect = words.ABSENT if found.effect is None else _signed(found.effect, 2)
    return [change, str(found.pairs), effect, words.ABSENT if p is None else f"{p:.2g}"]


def _interval(
    show: Callable[[float], str], middle: float | None, low: float | None, high: float | None, sign: str = ""
) -> str:
    """``94.0 [93.0, 96.5] %``: the unit is written once if all three have the same."""
    shown = [words.ABSENT if value is None else show(value) for value in (middle, low, high)]
    if low is None and high is None:
        return sign + shown[0]
    parts = [text.partition("\u202f") for text in shown if text != words.ABSENT]
    unit = parts[0][2]
    if unit and all(part[2] == unit for part in parts):
        shown = [text.removesuffix(f"\u202f{unit}") for text in shown]
        return f"{sign}{shown[0]} [{shown[1]}, {shown[2]}]\u202f{unit}"
    return f"{sign}{shown[0]} [{shown[1]}, {shown[2]}]"


def _safe(text: str, style: str = "") -> Text:
    """Text from a config: shown as it is, without characters that would steer a terminal."""
    return Text(_CONTROL.sub("�", text), style=style, overflow="fold")
