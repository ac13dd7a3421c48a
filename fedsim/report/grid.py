"""The page of many runs: which defense stops which attack, at what price, for how long."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fedsim.errors import InputError
from fedsim.recording.files import disk_error, write_text
from fedsim.recording.portable import portable
from fedsim.recording.results import COMPLETE, collect, write_results
from fedsim.report import grid_panels, html, page, statistics, tables, words
from fedsim.report.grid_cut import MEASURES, Slice, Value, counted, interval, named, records, share, slices
from fedsim.report.grid_pictures import Shown, heat, pictures
from fedsim.report.statistics import Interval

_SAME = 5e-4  # defenses whose mean ASR differs by less share the headline
_MANY, _LONG = 7, 22  # with more defenses, or letters of a name, the heads of a heat map stand upright


def write(directories: Sequence[Path], out: Path) -> Path:
    """See :func:`fedsim.report.write_grid_report`."""
    frame = collect(directories)
    if frame.empty:
        raise InputError(f"there are no runs in {', '.join(map(str, directories))}; name run directories")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(out, error) from error
    _write_pages(frame)
    write_results(frame, out)
    tables.write_tables(frame, out)
    grid = slices(frame, out)
    drawn = [pictures(part) for part in grid]
    for part, shown in zip(grid, drawn, strict=True):
        for picture, _, _ in shown:
            grid_panels.save(picture.figure(), out / "figures", f"{picture.name}{part.stem}")
        for measure in MEASURES:
            grid_panels.save(heat(part, measure), out / "figures", f"heat_{measure['key']}{part.stem}")
    path = out / "report.html"
    write_text(path, render(frame, grid, drawn, out))
    return path


def _write_pages(frame: pd.DataFrame) -> None:
    """Give each finished run its own page, if it has none; those of a directory that is read-only stay without."""
    for run in frame.loc[frame["status"] == COMPLETE, "run"]:
        if not (Path(run) / "report.html").exists():
            with contextlib.suppress(OSError):
                html.write(Path(run))


def render(frame: pd.DataFrame, grid: Sequence[Slice], drawn: Sequence[Shown], out: Path) -> str:
    """The page. drawn: the pictures of each slice."""
    headline, detail = _verdict(frame, grid)
    return page.render(
        "grid",
        styles=("report.css", "grid.css"),
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
    return [portable(str(part)) for part in parts]


def _verdict(frame: pd.DataFrame, grid: Sequence[Slice]) -> tuple[str, str]:
    """The sentence a reader came for, and how it was found."""
    size = (
        f"{counted(frame['attack'].nunique(), 'attack')} × {counted(frame['defense'].nunique(), 'defense')} × "
        f"{counted(frame['seed'].nunique(), 'seed')}"
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
    failed = int((frame["status"] != COMPLETE).sum())
    seeds = frame["seed"].nunique()
    in_slices = f" in {len(grid)} slices" if len(grid) > 1 else ""
    tiles = [
        ("runs", str(len(frame)), counted(frame["row"].nunique(), "row") + in_slices),
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
    ranking = statistics.rank(frame[frame["status"] == COMPLETE])
    if ranking.empty:
        return []
    own = ("defense", "rank", "attacks", "missing", "undefined")
    contexts = [str(c) for c in ranking if c not in own and ranking[c].nunique() > 1]
    found = []
    for values, rows in ranking.groupby(contexts, sort=False) if contexts else [((), ranking)]:
        found.append(
            {
                "label": named(contexts, values),
                "rows": [
                    (
                        str(row["defense"]),
                        _signed(row["rank"]),
                        str(row["attacks"]),
                        str(row["missing"]),
                        str(row["undefined"]),
                    )
                    for row in records(rows)
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
        perplexity = interval(cell.summary, "perplexity")
        auroc = interval(cell.summary, "auroc")
        numbers = [
            Value(str(cell.summary["seeds"]), number=float(cell.summary["seeds"])),
            cell.values["asr"],
            cell.values["life"],
            share(cell.summary, "main_accuracy"),
            _bare(cell.values["cost"]),
            *([_plain(perplexity, words.perplexity)] if words_of else []),
            _bare(share(cell.summary, "tpr")),
            _bare(share(cell.summary, "fpr")),
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
            "name": portable(os.path.relpath(str(run["run"]), out)),
            "what": f"{run['attack']} against {run['defense']}, seed {run['seed']}",
            "status": str(run["status"]),
            "message": portable(str(run["message"])) or words.ABSENT,
        }
        for run in records(frame[frame["status"] != COMPLETE])
    ]
