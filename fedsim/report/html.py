"""The page of one run: self-contained, offline, readable without scripts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from matplotlib.figure import Figure

from fedsim.errors import InputError
from fedsim.recording.directory import TWIN
from fedsim.recording.files import write_text
from fedsim.recording.portable import portable
from fedsim.recording.runs import read_run, section
from fedsim.recording.summary import SUBMITTED, score_table, summarise, under_attack
from fedsim.report import drawing, figures, page, words

_ROUNDS = ("round", "main_accuracy", "main_loss", "asr", "malicious_submitted")
_CLIENTS = ("round", "malicious", "accepted", "weight", "update_norm")
_SECTIONS = ("lifespan", "area", "asr_at", "time_to_inject", "final", "detection")
_MOST_SCORES = 12
_MOST_POINTS = 2000
_MOST_KEYS = 16


@dataclass(frozen=True)
class Run:
    """What a run directory holds. finished: whether the run wrote its summary itself."""

    name: str
    config: dict[str, Any]
    manifest: dict[str, Any]
    rounds: pd.DataFrame
    clients: pd.DataFrame
    timings: pd.DataFrame | None
    twin: pd.DataFrame | None
    summary: Mapping[str, Any]
    finished: bool


def read(directory: Path) -> Run:
    """The contents of a run directory.

    Raises
    ------
    InputError: the directory holds no run, or no round of it has ended.
    """
    for needed in ("rounds.parquet", "clients.parquet", "config.yaml"):
        if not (directory / needed).is_file():
            raise InputError(f"{directory} is not the directory of a run: it has no {needed}")
    rounds = _table(directory / "rounds.parquet", _ROUNDS).sort_values("round", ignore_index=True)
    if rounds.empty:
        raise InputError(f"there is nothing to report in {directory}: no round has ended yet")
    clients = _table(directory / "clients.parquet", _CLIENTS, ("status", "scores"))
    timings, twin = directory / "timings.parquet", directory / TWIN / "rounds.parquet"
    twin_rounds = _table(twin, _ROUNDS) if twin.is_file() else None
    said = read_run(directory)
    if said.summary is not None:
        wrong = [key for key in _SECTIONS if not isinstance(said.summary.get(key), dict)]
        if wrong or not isinstance(said.summary.get("t0", ""), int | None):
            raise InputError(f"{directory / 'summary.json'} is not the summary of a run: look at {(*wrong, 't0')[0]!r}")
    return Run(
        name=directory.resolve().name,
        config=said.config,
        manifest=said.manifest,
        rounds=rounds,
        clients=clients,
        timings=_table(timings, ("round",)) if timings.is_file() else None,
        twin=twin_rounds,
        summary=summarise(rounds, clients, twin=twin_rounds) if said.summary is None else said.summary,
        finished=said.summary is not None,
    )


def write(directory: Path) -> Path:
    """See :func:`fedsim.report.write_report`."""
    run = read(directory)
    drawn = _figures(run)
    for stem, (wide, _) in drawn.items():
        drawing.save(wide, directory / "figures", stem)
    path = directory / "report.html"
    write_text(path, render(run, drawn))
    return path


def render(run: Run, drawn: Mapping[str, tuple[Figure, Figure]]) -> str:
    """The page. drawn: name of a figure → the figure for wide and for narrow windows."""
    timed = run.timings is not None and len(run.timings) > 0
    return page.render(
        "report",
        styles=("report.css",),
        title=str(run.config.get("name") or run.name),
        subtitle=_subtitle(run),
        finished=run.finished,
        last_round=int(run.rounds["round"].max()),
        verdict=words.verdict(run.summary),
        attacked=run.summary["t0"] is not None,
        tiles=_tiles(run),
        baseline=words.baseline(section(run.manifest, "data")),
        persistence=words.persistence_sections(run.summary, words.counted(run.config)),
        classes=_classes(run),
        stealth=words.stealth_sections(run.summary),
        plots={name: _plots(name, *pair) for name, pair in drawn.items()},
        alternative=_alternative(run),
        points=_points(run),
        hidden_scores=max(0, len(run.summary["detection"]["auroc"]) - _MOST_SCORES),
        phases=_phases(run.timings) if timed and run.timings is not None else [],
        config=yaml.safe_dump(portable(run.config), sort_keys=False, allow_unicode=True),
        facts=_facts(run.manifest),
    )


def _table(path: Path, numbers: Sequence[str], others: Sequence[str] = ()) -> pd.DataFrame:
    """A table of a run; ``numbers`` are the columns of numbers and truths that it has to have."""
    try:
        table = pd.read_parquet(path)
    except (OSError, ValueError) as error:  # what pyarrow raises derives from these
        raise InputError(f"{path} cannot be read: {error}") from None
    for name in (*numbers, *others):
        if name not in table or (name in numbers and not pd.api.types.is_numeric_dtype(table[name])):
            raise InputError(f"{path} is not what a run writes: it has no column {name!r}, or another under that name")
    return table


def _figures(run: Run) -> dict[str, tuple[Figure, Figure]]:
    """The figures this run has something for, each for wide and for narrow windows."""
    draw: dict[str, Callable[[bool], Figure]] = {
        "backdoor": lambda narrow: figures.backdoor(
            run.rounds, run.summary, twin=run.twin, of=words.counted(run.config).of, narrow=narrow
        ),
    }
    sent = run.clients[run.clients["status"].isin(SUBMITTED)]
    if len(sent):
        draw["acceptance"] = lambda narrow: figures.acceptance(sent, narrow=narrow)
        draw["norms"] = lambda narrow: figures.norms(sent, narrow=narrow)
    table = score_table(sent[under_attack(sent)]).replace([np.inf, -np.inf], np.nan).dropna(axis="columns", how="all")
    if table.shape[1]:
        shown, aurocs = table.iloc[:, :_MOST_SCORES], run.summary["detection"]["auroc"]
        draw["scores"] = lambda narrow: figures.scores(shown, sent["malicious"].astype(bool), aurocs, narrow=narrow)
    if run.timings is not None and len(run.timings):
        timings = run.timings
        draw["timings"] = lambda narrow: figures.timings(timings, narrow=narrow)
    return {name: (function(False), function(True)) for name, function in draw.items()}


def _plots(name: str, wide: Figure, narrow: Figure) -> list[dict[str, Any]]:
    """A figure for wide and narrow windows, each with where its axes lie (in percent of the figure)."""
    plots = []
    for width, figure in (("wide", wide), ("narrow", narrow)):
        svg = drawing.inline(figure, f"{name}-{width}")
        ax = figure.axes[0]
        box, limits = ax.get_position(), ax.get_xlim()  # after drawing: the layout is made then
        frame = {
            "left": 100 * box.x0,
            "width": 100 * box.width,
            "top": 100 * (1 - box.y1),
            "height": 100 * box.height,
            "from": limits[0],
            "to": limits[1],
        }
        plots.append({"width": width, "svg": svg, "frame": {key: round(v, 3) for key, v in frame.items()}})
    return plots


def _subtitle(run: Run) -> list[str]:
    """Task, attack, defense, seed: what tells one run from its neighbours."""

    task, attack, named = section(run.config, "task"), section(run.config, "attack"), words.named
    parts = [" / ".join(part for part in (named(task.get("data")), named(task.get("model"))) if part)]
    if attack:
        choices = (named(attack), named(attack.get("trigger")), named(attack.get("schedule")))
        parts.append("attack " + " × ".join(part for part in choices if part))
    parts.append("defense " + (named(run.config.get("defense")) or "none"))
    if "seed" in run.config:
        parts.append(f"seed {run.config['seed']}")
    return [portable(part) for part in parts if part]


def _classes(run: Run) -> words.Section | None:
    """The accuracy per class at the end of the run, with names as far as the manifest has them."""
    names = section(run.manifest, "data").get("class_names")
    target = section(section(run.config, "attack"), "trigger").get("target")
    return words.class_section(
        run.summary["final"].get("class_accuracy"),
        names if isinstance(names, list) else (),
        target if isinstance(target, int) else None,
    )


def _tiles(run: Run) -> list[tuple[str, str, str]]:
    """Label, value and note of the numbers beside the headline."""
    summary = run.summary
    headline, final, stealth = words.threshold(summary), summary["final"], summary["stealth"]
    tiles = []
    if summary["t0"] is not None:
        for key in sorted(summary["lifespan"], key=float):
            if key != headline:
                tiles.append(
                    (
                        f"lifespan, κ = {words.percent(float(key), 0)}",
                        words.span(summary["lifespan"][key]),
                        "rounds",
                    )
                )
        tiles.append(("half-life", words.span(summary["half_life"]), f"rounds; floor: {summary['floor']}"))
    ended = "" if final["round"] is None else f"round {final['round']}"
    tiles.append(("ASR at the end", words.percent(final["asr"]), ended))
    cost = ended if stealth is None else f"{words.points(stealth['final'])} vs. clean twin"
    if words.named(run.config.get("task")) == "next_word":
        cost = f"top-1 next word; {cost}"
    tiles.append(("main accuracy", words.percent(final["main_accuracy"]), cost))
    if final.get("perplexity") is not None:
        tiles.append(("perplexity", words.perplexity(final["perplexity"]), ended))
    return tiles


def _alternative(run: Run) -> str:
    """What the main figure shows, for those who do not see it."""
    answer = words.verdict(run.summary)
    final = run.summary["final"]
    return (
        f"Attack success rate and main accuracy over {words.rounds(int(run.rounds['round'].max()))}. "
        f"{answer.headline}. {answer.detail} At the end the attack success rate is "
        f"{words.percent(final['asr'])} and the main accuracy {words.percent(final['main_accuracy'])}."
    )


def _points(run: Run) -> dict[str, Any]:
    """The main figure's numbers, for reading a round off it."""
    table = run.rounds.set_index("round")[["asr", "main_accuracy"]].astype("float64")
    if run.twin is not None:
        table["twin"] = run.twin.set_index("round")["asr"].astype("float64")
    table = table.dropna(how="all")
    table = table.iloc[:: max(1, -(-len(table) // _MOST_POINTS))]
    columns = {str(key): [None if np.isnan(v) else round(v, 4) for v in table[key]] for key in table}
    return {"t0": run.summary["t0"], "round": [int(t) for t in table.index], **columns}


def _phases(timings: pd.DataFrame) -> list[tuple[str, str, str, str]]:
    """Phase, total, median a round and share of the whole."""
    columns = [str(c) for c in timings if str(c).startswith("seconds_")]
    whole = float(timings["seconds_total"].sum()) if "seconds_total" in timings else 0.0
    rows = []
    for column in columns:
        total = float(timings[column].sum())
        share = words.percent(total / whole if whole > 0 else None)
        name = column.removeprefix("seconds_")
        rows.append((name, words.seconds(total), words.seconds(float(timings[column].median())), share))
    return rows


def _facts(manifest: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """The manifest as groups of key and value; single values first."""
    single = {key: value for key, value in manifest.items() if not isinstance(value, Mapping)}
    groups = [("run", _flat(single))]
    groups += [(str(key), _flat(value)) for key, value in manifest.items() if isinstance(value, Mapping)]
    return [group for group in groups if group[1]]


def _flat(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Key and value a line, nested keys joined by dots; a table of many keys (who attacked when) is one line."""
    rows: list[tuple[str, str]] = []
    for key, item in value.items():
        name = portable(f"{prefix}{key}")
        if isinstance(item, Mapping) and len(item) <= _MOST_KEYS:
            rows += _flat(item, f"{prefix}{key}.")
        else:
            rows.append((name, words.plain(item)))
    return rows
