"""From the definition of a benchmark to the configs of all its cells; every problem is found before any compute."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from fedsim.benchmark.definition import Definition, Entry, key_of, read_definition
from fedsim.config import Config, build
from fedsim.config.reading import lay_over, resolve
from fedsim.errors import ConfigError, Problem
from fedsim.federation.schedule import plan, plan_problems
from fedsim.recording.identity import config_hash

_SAFE_LABEL = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.+=]|-(?!-))*")
_LONGEST_LABEL = 60  # characters in a file name


@dataclass(frozen=True)
class Cell:
    """One experiment of the grid. labels: axis → label."""

    labels: Mapping[str, str]
    seed: int
    config: Config

    @property
    def name(self) -> str:
        """Its directory: the labels and the seed, readable, and a safe file name."""
        return f"{'--'.join(map(file_name, self.labels.values()))}-seed{self.seed}"

    @property
    def title(self) -> str:
        return f"{' · '.join(self.labels.values())} · seed {self.seed}"

    @cached_property
    def hash(self) -> str:
        """Of what its result depends on."""
        return config_hash(self.config)


@dataclass(frozen=True)
class Grid:
    """A definition, its cells, and everything that is wrong.

    Of the cells with a problem only those are among ``cells`` to which nothing but a file on this machine is missing.
    """

    definition: Definition
    cells: list[Cell]
    problems: list[Problem]
    source: str

    def check(self) -> None:
        """Raises ConfigError if anything is wrong."""
        if self.problems:
            raise ConfigError(self.problems, self.source)


def load_grid(path_or_name: str | Path | Mapping[str, Any], overrides: Iterable[str] = ()) -> Grid:
    """Read a definition and make its cells.

    Parameters
    ----------
    path_or_name: a YAML file, the name of a shipped benchmark (``quick``), or a mapping.
    overrides: ``training.lr=0.1`` holds for all cells; ``seeds=[1, 2]`` or ``grid.defense=[krum, flame]`` change the
        definition.

    Raises
    ------
    ConfigError: there is no such file, it is not YAML, or an override is not ``key=value``. What else is wrong
        is in ``problems`` of the grid.
    """
    problems: list[Problem] = []
    definition, source = read_definition(path_or_name, overrides, problems)
    return Grid(definition, [] if definition.base is None else _expand(definition, problems), problems, source)


def _expand(definition: Definition, problems: list[Problem]) -> list[Cell]:
    """The cells that are right; what is wrong with the others is added to the problems, each thing once."""
    chosen = [labels for labels in _combinations(definition.grid) if not _is_excluded(labels, definition.exclude)]
    if not chosen and definition.grid:
        problems.append(Problem("exclude", "every cell of the grid is excluded; nothing is left to play"))
    wrong: dict[tuple[str, str, bool], list[str]] = {}
    cells = []
    for labels in chosen:
        made, found = _cells(definition, labels)
        cells += made
        for p in dict.fromkeys(found):
            wrong.setdefault((p.path, p.message, p.absent), []).append(" · ".join(labels.values()))
    for (path, message, absent), where in wrong.items():
        told = "all cells" if len(where) == len(chosen) > 1 else where[0]
        more = f" and {len(where) - 1} more" if 1 < len(where) < len(chosen) else ""
        problems.append(Problem(path, f"{message} (in {told}{more})", absent))
    if not wrong:
        problems += _without_effect(definition, chosen)
    problems += _twice(cells, "hash", "are the same experiment; change one, or leave it out")
    problems += _twice(cells, "name", "would lie in the same directory; choose other labels")
    return cells


def _combinations(grid: Mapping[str, Mapping[str, Entry]]) -> list[dict[str, str]]:
    return [dict(zip(grid, labels, strict=True)) for labels in itertools.product(*grid.values())] if grid else []


def _is_excluded(labels: Mapping[str, str], exclude: Sequence[Mapping[str, tuple[str, ...]]]) -> bool:
    return any(all(labels.get(axis) in among for axis, among in one.items()) for one in exclude)


def _cells(definition: Definition, labels: Mapping[str, str]) -> tuple[list[Cell], list[Problem]]:
    """The cells of one combination of labels, a seed each, and what is wrong with them."""
    try:
        raw = lay_over(_raw(definition, labels), {"evaluation.twin": definition.twin})
        name = {"name": " · ".join(labels.values())}
        first, *others = [{**resolve({**raw, "seed": seed, "name": ""}), **name} for seed in definition.seeds]
        config, problems = _build(first)
        configs = [config]
        for other in others:
            if {**other, "seed": 0} == {**first, "seed": 0}:  # a seed alone is nothing to check anew
                configs.append(replace(config, seed=other["seed"]))
            else:
                config, found = _build(other)
                configs.append(config)
                problems += found
    except ConfigError as error:
        return [], error.problems
    for config in configs:
        if config.federation.dropout or config.federation.stragglers:
            problems += plan_problems(config, plan(config))
    return [Cell(labels, config.seed, config) for config in configs], problems


def _raw(definition: Definition, labels: Mapping[str, str]) -> dict[str, Any]:
    """What was written for a combination of labels, laid together: the base, what holds for all, axis after axis."""
    raw = lay_over(dict(definition.base or {}), definition.set)
    for axis, label in labels.items():
        entry, key = definition.grid[axis][label], key_of(axis)
        if entry.given:
            former = _at(raw, key.split("."))
            if _names_method(entry.value) and _names_method(former) and isinstance(former, dict):
                raw = lay_over(raw, {f"{key}.name": ""})  # its parameters go, even if the same method is named again
            raw = lay_over(raw, {key: entry.value})
        raw = lay_over(raw, entry.changes)
    return raw


def _names_method(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, Mapping) and "name" in value)


def _build(raw: dict[str, Any]) -> tuple[Config, list[Problem]]:
    """The config, and the files it names that are not on this machine.

    Raises
    ------
    ConfigError: anything else is wrong.
    """
    try:
        return build(raw), []
    except ConfigError as error:
        if any(not problem.absent for problem in error.problems):
            raise
        return build(raw, possible=False), error.problems


def _without_effect(definition: Definition, chosen: Sequence[Mapping[str, str]]) -> list[Problem]:
    """Changes for all cells to a method that no cell uses: an axis replaces it."""
    found = []
    for key in definition.set:
        above = [axis for axis in definition.grid if key.startswith(f"{key_of(axis)}.")]
        without = replace(definition, set={other: value for other, value in definition.set.items() if other != key})
        if above and all(_raw(definition, labels) == _raw(without, labels) for labels in chosen):
            message = f"it changes no cell, since {above[0]!r} is an axis; change its entries (grid.{above[0]})"
            found.append(Problem(f"set.{key}", message))
    return found


def _at(value: Any, keys: Sequence[str]) -> Any:
    """What lies under a key path of plain containers; None if there is nothing."""
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _twice(cells: Sequence[Cell], attribute: str, message: str) -> list[Problem]:
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(str(getattr(cell, attribute)).casefold(), []).append(cell)
    return [Problem("grid", f"{' and '.join(c.title for c in same)} {message}") for same in groups.values() if same[1:]]


def file_name(label: str) -> str:
    """A label as part of a file name; one that is changed for it gets a few digits that keep it apart."""
    if _SAFE_LABEL.fullmatch(label) and len(label) <= _LONGEST_LABEL and not label.endswith("-"):
        return label
    plain = re.sub(r"[^A-Za-z0-9_.+=]+", "_", label)[: _LONGEST_LABEL - 9].lstrip(".") or "_"
    return f"{plain}-{hashlib.sha256(label.encode()).hexdigest()[:8]}"
