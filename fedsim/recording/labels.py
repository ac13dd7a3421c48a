"""What was run, in words: of each method its name, with those parameters in which the runs at hand differ."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedsim.recording.identity import relevant
from fedsim.recording.portable import portable
from fedsim.recording.runs import RunFiles, section

LABELS = ("task", "model", "attack", "trigger", "schedule", "defense", "partition")
"""The columns that say in words what was run; a grid's further axes are columns ``axis.<name>``."""

_LONGEST = 48  # characters of a value in a label
_ABSENT = object()


def described(runs: Sequence[RunFiles]) -> dict[str, list[str]]:
    """The columns in words, ``LABELS`` and ``settings``: of each a text a run."""
    sections: dict[str, list[Any]] = defaultdict(list)
    rests = []
    for run in runs:
        task, attack, federation = (section(run.config, key) for key in ("task", "attack", "federation"))
        sections["task"].append({key: value for key, value in task.items() if key != "model"})
        sections["model"].append(task.get("model"))
        sections["attack"].append({key: v for key, v in attack.items() if key not in ("trigger", "schedule")})
        sections["trigger"].append(attack.get("trigger"))
        sections["schedule"].append(attack.get("schedule"))
        sections["defense"].append(run.stages)
        sections["partition"].append(federation.get("partition"))
        told = ("seed", "task", "attack", "defense")
        rest = {key: value for key, value in relevant(run.config).items() if key not in told}
        rest["federation"] = {key: value for key, value in federation.items() if key != "partition"}
        rests.append(rest)
    words = {column: _labels(column, sections[column], runs) for column in LABELS}
    return {**words, "settings": _joined(_differences(rests), runs)}


def _labels(column: str, sections: Sequence[Any], runs: Sequence[RunFiles]) -> list[str]:
    """A label a run: the grid's own, or the method's name; with the parameters in which namesakes differ."""
    given = [run.axes.get(column) for run in runs]
    ours = [i for i, label in enumerate(given) if label is not None]
    others = [i for i, label in enumerate(given) if label is None]
    named = _told_apart([str(given[i]) for i in ours], [sections[i] for i in ours], [runs[i] for i in ours])
    labels = dict(zip(ours, named, strict=True))
    if column == "defense":
        stages = [(i, stage) for i in others for stage in sections[i]]
        texts = _told_apart([name_of(stage) for _, stage in stages], [stage for _, stage in stages])
        pipelines: dict[int, list[str]] = {i: [] for i in others}
        for (i, _), text in zip(stages, texts, strict=True):
            pipelines[i].append(text)
        labels |= {i: " + ".join(pipeline) or "fedavg" for i, pipeline in pipelines.items()}
    else:
        bases = [name_of(sections[i]) for i in others]
        if column == "task":
            bases = [f"{base} / {name_of(sections[i].get('data'))}" for base, i in zip(bases, others, strict=True)]
        labels |= dict(zip(others, _told_apart(bases, [sections[i] for i in others]), strict=True))
    return [labels[i] for i in range(len(runs))]


def _told_apart(bases: Sequence[str], sections: Sequence[Any], runs: Sequence[RunFiles] = ()) -> list[str]:
    """Each base; where sections of one base differ, with the keys and values in which they do.

    runs: whose the sections are, if their grids' labels are to count as telling.
    """
    members = defaultdict(list)
    for i, base in enumerate(bases):
        members[base].append(i)
    labels = list(bases)
    for base, indices in members.items():
        found = _differences([sections[i] for i in indices])
        whose = [runs[i] if runs else None for i in indices]
        for i, text in zip(indices, _joined(found, whose), strict=True):
            labels[i] = f"{base} ({text})" if text else base
    return labels


def _joined(differences: Sequence[tuple[str, Sequence[str]]], runs: Sequence[RunFiles | None]) -> list[str]:
    """The differences of each of the runs in one line, without those that a grid's labels tell already."""
    parts: list[list[str]] = [[] for _ in runs]
    for key, texts in differences:
        for part, text, told in zip(parts, texts, _told_by_grid(runs, texts), strict=True):
            if not told:
                part.append(f"{key}={text}" if key else text)
    return [", ".join(part) for part in parts]


def _told_by_grid(runs: Sequence[RunFiles | None], texts: Sequence[str]) -> list[bool]:
    """Which runs lie in a grid (a directory of cells) that itself varies what the texts say, by its labels."""
    grids: dict[Path, dict[tuple[tuple[str, str], ...], set[str]]] = defaultdict(lambda: defaultdict(set))
    for run, text in zip(runs, texts, strict=True):
        if run is not None and run.axes:
            grids[run.path.parent][tuple(sorted(run.axes.items()))].add(text)
    telling = {
        grid
        for grid, cells in grids.items()
        if len(set().union(*cells.values())) > 1 and all(len(found) == 1 for found in cells.values())
    }
    return [run is not None and bool(run.axes) and run.path.parent in telling for run in runs]


def _differences(values: Sequence[Any], path: str = "") -> list[tuple[str, list[str]]]:
    """Where ``values`` differ: key path and the text of each value there.

    Two plugins of different names differ as wholes, not key by key.
    """
    if not values or all(value is values[0] or value == values[0] for value in values[1:]):
        return []
    head = f"{path}." if path else ""
    if all(isinstance(value, dict) for value in values) and len({str(value.get("name")) for value in values}) == 1:
        keys = dict.fromkeys(key for value in values for key in value)
        parts = [_differences([value.get(key, _ABSENT) for value in values], f"{head}{key}") for key in keys]
        return [difference for part in parts for difference in part]
    if all(isinstance(value, list) and all(isinstance(item, dict) for item in value) for value in values):
        lengths = {len(value) for value in values}
        if len(lengths) == 1:
            count = lengths.pop()
            heads = [path] if count == 1 else [f"{head}{i}" for i in range(count)]  # a single entry needs no number
            parts = [_differences([value[i] for value in values], where) for i, where in enumerate(heads)]
            return [difference for part in parts for difference in part]
    return [(path, [_cut(*_without_paths(value)) for value in values])]


def brief(value: Any) -> str:
    """A value of a config in one line: ``krum(f=2)`` for a plugin, its name alone where it has no parameters."""
    if value is _ABSENT:
        return "unset"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, dict):
        inner = ", ".join(f"{key}={brief(item)}" for key, item in value.items() if key != "name")
        return f"{value.get('name', '')}({inner})" if inner else str(value.get("name", ""))
    if isinstance(value, list):
        return " + ".join(map(brief, value)) or "none"
    return str(value)


def _without_paths(value: Any) -> tuple[str, str]:
    """The text of a value, with and without the directories in it."""
    return brief(value), brief(portable(value))


def _cut(whole: str, text: str) -> str:
    """A text that is too long for a label loses its end, and a path its beginning, but not its identity."""
    if len(text) <= _LONGEST and text == whole:
        return text
    short = text if len(text) <= _LONGEST - 6 else f"{text[: _LONGEST - 8]}…"
    return f"{short} #{hashlib.sha256(whole.encode()).hexdigest()[:4]}"


def name_of(choice: Any) -> str:
    """The name of a choice of a config, which is a mapping with a name or the name alone; ``none`` without one."""
    return str((choice.get("name") if isinstance(choice, Mapping) else choice) or "none")
