"""The results of many runs as tables for a paper: attack × defense, in Markdown and in LaTeX (booktabs)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from fedsim.recording.files import write_text
from fedsim.report import statistics

ABSENT = "–"


@dataclass(frozen=True)
class Metric:
    """What a table is about. best: "least", "most" or "" (nothing is marked). scale: 100 for percentages."""

    column: str
    title: str
    definition: str
    best: str
    scale: float = 100.0
    digits: int = 1


METRICS = (
    Metric("asr", "ASR at the end, %", "attack success rate at the last evaluated round", "least"),
    Metric("main_accuracy", "Main accuracy, %", "on clean held-out data at the last evaluated round", "most"),
    Metric("perplexity", "Perplexity", "on clean held-out data at the last evaluated round", "least", 1.0),
    Metric(
        "stealth_final",
        "Main accuracy minus the clean twin's, points",
        "at the last evaluated round; negative: the attack costs accuracy",
        "",
    ),
    Metric(
        "lifespan_50",
        "Lifespan at κ = 50 %, rounds",
        "largest age, in rounds since the last malicious update, at which ASR was above κ",
        "least",
        1.0,
        0,
    ),
    Metric("tpr", "TPR, %", "malicious updates that were not accepted", "most"),
    Metric("fpr", "FPR, %", "benign updates that were not accepted", "least"),
    Metric(
        "auroc",
        "AUROC of the defense's scores",
        "chance that a malicious client scores above a benign one",
        "most",
        1.0,
        3,
    ),
)
_CONTEXT = ("task", "model", "partition", "settings")


@dataclass(frozen=True)
class Entry:
    """A cell of a table: the value, what stands behind it (interval, number of seeds), whether it is the best."""

    value: str
    detail: str = ""
    best: bool = False


@dataclass(frozen=True)
class Grid:
    """A table: one row a defense, one column an attack. about: what else was the same in all its runs.

    title, notes and the details of entries are our own words; the rest comes from configs and is escaped.
    """

    title: str
    about: str
    notes: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Entry, ...]], ...]


def grids(results: pd.DataFrame) -> list[Grid]:
    """The tables of a collection of runs: for each task, model, partition and setting one for every metric."""
    summary = statistics.summary_by_row(results)
    ranking = statistics.rank(results)
    contexts = [c for c in statistics.cell_columns(summary) if c in _CONTEXT or c.startswith("axis.")]
    shown = [c for c in contexts if c in ("task", "model") or summary[c].nunique() > 1]
    found = []
    for context, cells in _groups(summary, contexts):
        about = ", ".join(_called(c, cells[c].iloc[0]) for c in shown if cells[c].iloc[0])
        cells = cells.assign(_attack=_attacks(cells))
        for metric in METRICS:
            if metric.column in cells and cells[metric.column].notna().any():
                found.append(_grid(metric, about, cells, _states(results, contexts, context)))
        own = ranking
        for column, value in zip(contexts, context, strict=True):
            own = own[own[column] == value]
        if own["rank"].notna().any():
            found.append(_ranks(own, about))
    return found


def markdown(results: pd.DataFrame) -> str:
    """The tables in Markdown, the best value of each column in bold."""
    return "\n".join(_markdown(grids(results)))


def latex(results: pd.DataFrame) -> str:
    """The tables in LaTeX, for a document that loads booktabs; the best value of each column in bold."""
    return "\n".join(_latex(grids(results)))


def write_tables(results: pd.DataFrame, directory: Path) -> None:
    """Write ``tables.md`` and ``tables.tex``.

    Raises
    ------
    RunError: the disk is full, or the directory cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    made = grids(results)
    write_text(directory / "tables.md", "\n".join(_markdown(made)))
    write_text(directory / "tables.tex", "\n".join(_latex(made)))


# ------------------------------------------------------------------------------------------------ the tables


def _groups(frame: pd.DataFrame, columns: list[str]) -> Iterator[tuple[tuple[Any, ...], pd.DataFrame]]:
    if not columns:
        yield (), frame
        return
    for key, group in frame.groupby(columns, sort=True):
        yield key if isinstance(key, tuple) else (key,), group


def _called(column: str, value: str) -> str:
    return f"{column.removeprefix('axis.')} {value}" if column.startswith("axis.") else value


def _attacks(cells: pd.DataFrame) -> list[str]:
    """What the columns are called: the attack, with trigger and schedule where it does not imply them."""
    parts = ["attack"]
    for column in ("trigger", "schedule"):
        if column in cells and len(cells.drop_duplicates([*parts, column])) > len(cells.drop_duplicates(parts)):
            parts.append(column)
    return [" × ".join(row) for row in cells[parts].astype("str").itertuples(index=False)]


def _states(results: pd.DataFrame, contexts: list[str], context: tuple[Any, ...]) -> dict[tuple[str, ...], str]:
    """Why a cell has no numbers: cell → failed or unfinished."""
    if "status" not in results:
        return {}
    for column, value in zip(contexts, context, strict=True):
        results = results[results[column] == value]
    keys = [c for c in ("attack", "trigger", "schedule", "defense") if c in results]
    return {
        tuple(map(str, key)): "failed" if (cell["status"] == "failed").any() else "unfinished"
        for key, cell in results.groupby(keys)
    }


def _grid(metric: Metric, about: str, cells: pd.DataFrame, states: dict[tuple[str, ...], str]) -> Grid:
    column = metric.column
    seeds = cells.loc[cells[column].notna(), f"{column}_n"].astype(int)
    usual = Counter(seeds.tolist()).most_common(1)[0][0]
    attacks, defenses = sorted(cells["_attack"].unique()), _defenses(cells)
    keys = [c for c in ("attack", "trigger", "schedule", "defense") if c in cells]
    entries: dict[tuple[str, str], Entry] = {}
    for attack in attacks:
        own = cells[cells["_attack"] == attack]
        best = _best(metric, own)
        for (_, cell), marked in zip(own.iterrows(), best, strict=True):
            state = states.get(tuple(str(cell[key]) for key in keys), "")
            entries[str(cell["defense"]), attack] = _entry(metric, cell, usual, marked, state)
    rows = tuple((d, tuple(entries.get((d, attack), Entry(ABSENT)) for attack in attacks)) for d in defenses)
    return Grid(metric.title, about, _notes(metric, usual, entries), tuple(attacks), rows)


def _defenses(cells: pd.DataFrame) -> list[str]:
    """In order: FedAvg first, then by name."""
    plain = set(cells.loc[cells["undefended"].astype(bool), "defense"]) if "undefended" in cells else set()
    return sorted(map(str, cells["defense"].unique()), key=lambda name: (name not in plain, name))


def _entry(metric: Metric, cell: pd.Series[Any], usual: int, best: bool, state: str) -> Entry:
    column = metric.column
    if pd.isna(cell[column]):
        return Entry(state if state and not cell["seeds"] else ABSENT)
    n = int(cell[f"{column}_n"])
    value = _number(cell[column], metric)
    if cell.get(f"{column}_censored", False):
        value = f"> {value}"
    bounds = [cell[f"{column}_low"], cell[f"{column}_high"]]
    details = []
    if n > 1 and any(pd.notna(bound) for bound in bounds):
        details.append("[" + ", ".join(ABSENT if pd.isna(b) else _number(b, metric) for b in bounds) + "]")
    if n != usual:
        details.append(f"(n = {n})")
    return Entry(value, " ".join(details), best)


def _number(value: float, metric: Metric) -> str:
    text = f"{metric.scale * float(value):.{metric.digits}f}"
    return text.lstrip("-") if not float(text) else text.replace("-", "−")


def _best(metric: Metric, cells: pd.DataFrame) -> list[bool]:
    """Which of the cells hold the best value as printed; none where that is not certain or all are the same.

    A censored number is only a lower bound. A defense that turns nobody away takes no part in TPR and FPR: its
    FPR of 0 is no merit.
    """
    values = [metric.scale * float(v) for v in cells[metric.column]]
    rounded = [round(v, metric.digits) if v == v else None for v in values]
    cut = cells.get(f"{metric.column}_censored", pd.Series(False, index=cells.index)).astype(bool).tolist()
    if metric.column in ("tpr", "fpr"):
        idle = ((cells["tpr"] == 0) & (cells["fpr"] == 0)).tolist()
        rounded = [None if out else v for v, out in zip(rounded, idle, strict=True)]
    known = [v for v in rounded if v is not None]
    if not metric.best or len(known) < 2:
        return [False] * len(rounded)
    certain = [v for v, c in zip(rounded, cut, strict=True) if v is not None and not c]
    if not certain:
        return [False] * len(rounded)
    winner = min(certain) if metric.best == "least" else max(certain)
    bounds = [v for v, c in zip(rounded, cut, strict=True) if v is not None and c]
    if any(v < winner for v in bounds) or (len(certain) == len(known) and min(known) == max(known)):
        return [False] * len(rounded)
    return [v == winner and not c for v, c in zip(rounded, cut, strict=True)]


def _notes(metric: Metric, usual: int, entries: dict[tuple[str, str], Entry]) -> str:
    spans = metric.column.startswith("lifespan")
    intervals = any("[" in entry.detail for entry in entries.values())
    said = [f"{metric.definition[0].upper()}{metric.definition[1:]}."]
    if usual == 1:
        said.append("One seed.")
    elif spans:
        said.append(f"Kaplan–Meier median over {usual} seeds" + (" [95 % interval]." if intervals else "."))
    else:
        said.append(f"Median over {usual} seeds" + (" [95 % bootstrap interval]." if intervals else "."))
    if intervals and usual < statistics.FEWEST_PAIRS:
        said.append("An interval over so few seeds covers less than it says.")
    if spans and any(e.value.startswith(">") for e in entries.values()):
        said.append("> s: still alive when the runs ended.")
    if spans and any(ABSENT in e.detail for e in entries.values()):
        said.append(f"[s, {ABSENT}]: the bound was not reached.")
    return " ".join(said)


def _ranks(ranking: pd.DataFrame, about: str) -> Grid:
    top = ranking["rank"].round(2).max()
    rows = tuple(
        (
            str(row["defense"]),
            (
                Entry(
                    ABSENT if pd.isna(row["rank"]) else f"{row['rank']:+.2f}".replace("-", "−"),
                    best=len(ranking) > 1 and round(float(row["rank"]), 2) == top,
                ),
                Entry(str(row["attacks"]), f"({row['missing']} missing)" if row["missing"] else ""),
            ),
        )
        for _, row in ranking.iterrows()
    )
    notes = "Sum over attacks of ΔMA/MA₀ − ΔBA/BA₀ against FedAvg, MA the main accuracy, BA the ASR; larger is better."
    left_out = int(ranking["undefined"].max())
    if left_out:
        notes += f" Without {left_out} attack{'s' if left_out > 1 else ''} whose ASR under FedAvg is 0."
    return Grid("Rank over attacks", about, notes, ("rank", "attacks"), rows)


# --------------------------------------------------------------------------------------------------- writing


def _markdown(made: list[Grid]) -> list[str]:
    lines: list[str] = [] if made else ["No run has numbers yet.", ""]
    about = None
    for grid in made:
        if grid.about != about:
            about = grid.about
            lines += [f"## {markdown_text(about)}", ""] if about else []
        lines += [f"### {grid.title}", ""]
        lines.append("| defense | " + " | ".join(map(markdown_text, grid.columns)) + " |")
        lines.append("|:--|" + "--:|" * len(grid.columns))
        for name, entries in grid.rows:
            values = [f"**{markdown_text(e.value)}**" if e.best else markdown_text(e.value) for e in entries]
            texts = [_joined(value, e.detail) for value, e in zip(values, entries, strict=True)]
            lines.append(f"| {markdown_text(name)} | " + " | ".join(texts) + " |")
        lines += ["", grid.notes, ""]
    return lines


def _latex(made: list[Grid]) -> list[str]:
    lines = ["% needs \\usepackage{booktabs}" if made else "% no run has numbers yet", ""]
    for grid in made:
        caption = f"{grid.title}{f' ({grid.about})' if grid.about else ''}. {grid.notes}"
        lines += ["\\begin{table}", "  \\centering", f"  \\caption{{{latex_text(caption)}}}"]
        lines += [f"  \\begin{{tabular}}{{l{'r' * len(grid.columns)}}}", "    \\toprule"]
        lines.append("    " + " & ".join(["defense", *map(latex_text, grid.columns)]) + " \\\\")
        lines.append("    \\midrule")
        for name, entries in grid.rows:
            values = [f"\\textbf{{{latex_text(e.value)}}}" if e.best else latex_text(e.value) for e in entries]
            details = [e.detail.replace("−", "$-$").replace("–", "--") for e in entries]
            texts = list(map(_joined, values, details))
            lines.append("    " + " & ".join([latex_text(name), *texts]) + " \\\\")
        lines += ["    \\bottomrule", "  \\end{tabular}", "\\end{table}", ""]
    return lines


def _joined(value: str, detail: str) -> str:
    return f"{value} {detail}" if detail else value


_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")
_LATEX = {
    "\\": "\\textbackslash{}",
    **{c: f"\\{c}" for c in "{}$&#_%"},
    "^": "\\textasciicircum{}",
    "~": "\\textasciitilde{}",
    "<": "\\textless{}",
    ">": "\\textgreater{}",
    "|": "\\textbar{}",
    "[": "{[}",  # after a line's end a bracket or a star would be read as its option
    "]": "{]}",
    "*": "{*}",
    "κ": "$\\kappa$",
    "Δ": "$\\Delta$",
    "₀": "$_0$",
    "×": "$\\times$",
    "−": "$-$",
    "–": "--",
}


def markdown_text(text: str) -> str:
    """Any text as one line of Markdown that shows just that text."""
    text = _CONTROL.sub(" ", text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]#|~])", r"\\\1", text)


def latex_text(text: str) -> str:
    """Any text as LaTeX that shows just that text, on one line."""
    return "".join(_LATEX.get(character, character) for character in _CONTROL.sub(" ", text))
