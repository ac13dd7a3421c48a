"""From the definition of a benchmark to the configs of all its cells; every problem is found before any compute."""

from __future__ import annotations

import copy
import difflib
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from fedsim.config import Config, build
from fedsim.config.checking import brief
from fedsim.config.reading import (
    find,
    is_benchmark,
    lay_over,
    parse_overrides,
    read_file,
    read_with_parents,
    resolve,
    shipped,
)
from fedsim.config.schema import ConfigDumper
from fedsim.errors import ConfigError, Problem
from fedsim.experiment import config_hash
from fedsim.federation.schedule import plan, plan_problems

KEYS = {
    "name": "name of the benchmark; default: the file's name",
    "base": "the experiment every cell starts from: a name, a file, or the config itself",
    "set": "changes to it for all cells: {KEY.PATH: value}",
    "seeds": "seeds of every cell: [1, 2]",
    "twin": "whether every cell is measured against its clean twin; default: true",
    "grid": "axes: {AXIS: {LABEL: value, …}} or {AXIS: [value, …]}",
    "exclude": "cells to leave out: [{AXIS: LABEL, …}, …]",
}
"""The keys of a definition."""

SHORT = {"trigger": "attack.trigger", "schedule": "attack.schedule", "partition": "federation.partition"}
"""Axes with a shorter name than the key they change."""

_SAFE_LABEL = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.+=]|-(?!-))*")
_LONGEST_LABEL = 60  # characters in a file name


@dataclass(frozen=True)
class Entry:
    """What one label of an axis stands for. value: of the axis' key, if ``given``. changes: of any other keys."""

    value: Any = None
    given: bool = True
    changes: Mapping[str, Any] = field(default_factory=dict)

    def to_plain(self) -> Any:
        if not self.changes:
            return self.value
        return {**(self.value if self.given else {}), "set": dict(self.changes)}


@dataclass(frozen=True)
class Definition:
    """A benchmark as it was written, with everything it names read in.

    base: the experiment, merged with its parents and not yet checked. grid: axis → label → entry.
    exclude: cells whose labels are among all of one of these are left out.
    """

    name: str
    base: Mapping[str, Any]
    set: Mapping[str, Any]
    seeds: tuple[int, ...]
    twin: bool
    grid: Mapping[str, Mapping[str, Entry]]
    exclude: tuple[Mapping[str, tuple[str, ...]], ...] = ()

    def to_yaml(self) -> str:
        """A file that reads back to the same benchmark."""
        plain = {
            "name": self.name,
            "base": dict(self.base),
            "set": dict(self.set),
            "seeds": list(self.seeds),
            "twin": self.twin,
            "grid": {axis: {label: e.to_plain() for label, e in made.items()} for axis, made in self.grid.items()},
            "exclude": [{axis: list(labels) for axis, labels in one.items()} for one in self.exclude],
        }
        return yaml.dump(plain, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


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


def is_definition(path_or_name: str | Path) -> bool:
    """Whether a file, or what is shipped under the name, defines a benchmark; false where there is nothing to read."""
    try:
        path = find(path_or_name)
    except ConfigError:
        return str(path_or_name) in shipped(benches=True)
    try:
        return is_benchmark(read_file(path))
    except ConfigError:
        return False


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
    parsed = parse_overrides(overrides)
    if isinstance(path_or_name, Mapping):
        raw, source, beside, stem = copy.deepcopy(dict(path_or_name)), "the given mapping", None, "benchmark"
    else:
        path = find(path_or_name, benches=True)
        raw, source, beside, stem = read_file(path), str(path_or_name), path.parent, path.stem
    problems: list[Problem] = []
    for key, value in parsed.items():
        _override(raw, key, value, problems)
    base = _base(raw.get("base"), beside, problems)
    definition = _read(raw, stem, base or {}, problems)
    return Grid(definition, [] if base is None else _expand(definition, problems), problems, source)


# ------------------------------------------------------------------------------------------ the definition


def _override(raw: dict[str, Any], key: str, value: Any, problems: list[Problem]) -> None:
    """Lay one ``key=value`` of the command line over the definition: its own keys, or else a change for all cells."""
    head, _, rest = key.partition(".")
    if head not in KEYS or (head == "set" and rest):
        own = raw.get("set")
        if own is None or isinstance(own, Mapping):
            raw["set"] = {**(own or {}), (rest if head == "set" else key): value}
    elif not rest:
        raw[key] = value
    elif head == "grid":
        axes = {str(axis): entries for axis, entries in (raw.get("grid") or {}).items()}
        axis = next((axis for axis in axes if rest.startswith(f"{axis}.")), rest)
        entries = axes.get(axis)
        if axis != rest:  # one entry of an axis
            entries = {_label(e): e for e in entries} if isinstance(entries, list) else dict(entries or {})
            entries[rest.removeprefix(f"{axis}.")] = value
        raw["grid"] = {**axes, axis: value if axis == rest else entries}
    else:
        problems.append(Problem(key, f"write {head}=… as a whole" if head != "base" else f"write {rest}=…"))


def _read(raw: Mapping[str, Any], stem: str, base: dict[str, Any], problems: list[Problem]) -> Definition:
    """The definition, as far as it can be made out; what is wrong is added to the problems."""
    for key in raw:
        if key not in KEYS:
            near = difflib.get_close_matches(str(key), KEYS, n=1)
            where = any(f.name == key for f in fields(Config))
            hint = f"did you mean {near[0]!r}? " if near else f"to change the experiment: set.{key}; " if where else ""
            problems.append(Problem(str(key), f"unknown key; {hint}allowed here: {', '.join(KEYS)}"))
    twin = raw.get("twin", True)
    if not isinstance(twin, bool):
        problems.append(Problem("twin", f"expected true or false, got {brief(twin)}"))
    grid = _axes(raw.get("grid"), problems)
    return Definition(
        name=str(raw.get("name") or stem),
        base=base,
        set=_changes(raw.get("set"), "set", grid, problems),
        seeds=_seeds(raw.get("seeds", [0]), problems),
        twin=twin is not False,
        grid=grid,
        exclude=_exclude(raw.get("exclude"), grid, problems),
    )


def _base(given: Any, beside: Path | None, problems: list[Problem]) -> dict[str, Any] | None:
    """The experiment as written, with its parents; None if there is none."""
    if isinstance(given, Mapping):
        return dict(given)
    if not isinstance(given, str):
        problems.append(
            Problem("base", "name the experiment that every cell starts from, for example base: quickstart")
        )
        return None
    try:
        return read_with_parents(find(given, beside=beside))
    except ConfigError as error:
        at = f"base, {error.source}" if error.source else "base"
        problems += [Problem(f"{at}, {p.path}" if p.path not in ("", given) else at, p.message) for p in error.problems]
        return None


def _seeds(given: Any, problems: list[Problem]) -> tuple[int, ...]:
    if not isinstance(given, list) or not given:
        problems.append(Problem("seeds", f"expected a list of at least one whole number >= 0, got {brief(given)}"))
        return (0,)
    wrong = [seed for seed in given if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63]
    if wrong:
        problems.append(Problem("seeds", f"expected whole numbers >= 0, got {', '.join(map(brief, wrong))}"))
    right = [seed for seed in given if seed not in wrong]
    twice = sorted({seed for seed in right if right.count(seed) > 1})
    if twice:
        problems.append(Problem("seeds", f"{', '.join(map(str, twice))} appear more than once"))
    return tuple(dict.fromkeys(right)) or (0,)


def _axes(given: Any, problems: list[Problem]) -> dict[str, dict[str, Entry]]:
    if not isinstance(given, Mapping) or not given:
        example = "grid: {attack: [data_poisoning, neurotoxin], defense: {fedavg: [], krum: {name: krum, f: 1}}}"
        wrong = f"expected axes, got {brief(given)}" if given else "the grid is empty"
        problems.append(Problem("grid", f"{wrong}; name at least one axis with its entries, for example {example}"))
        return {}
    axes: dict[str, dict[str, Entry]] = {}
    for axis, entries in given.items():
        path = f"grid.{axis}"
        if str(axis) in ("seed", "seeds"):
            problems.append(Problem(path, "give seeds: [1, 2], not an axis"))
        elif _key(str(axis)) in map(_key, axes):
            problems.append(Problem(path, f"another axis changes {_key(str(axis))} already"))
        elif not isinstance(entries, (Mapping, list)) or not entries:
            problems.append(
                Problem(path, f"expected {{LABEL: value, …}} or [value, …] with entries, got {brief(entries)}")
            )
        else:
            axes[str(axis)] = _entries(entries, str(axis), path, problems)
    return axes


def _entries(given: Any, axis: str, path: str, problems: list[Problem]) -> dict[str, Entry]:
    if isinstance(given, list):
        named = [(_label(item), item) for item in given]
        labels = [label for label, _ in named]
        for label in sorted({label for label in labels if labels.count(label) > 1}):
            problems.append(
                Problem(path, f"two entries are called {brief(label)}; write the axis as {{LABEL: value, …}}")
            )
        given = dict(named)
    made = {}
    for label, item in given.items():
        entry = Entry(item)
        if isinstance(item, Mapping) and "set" in item:
            rest = {key: value for key, value in item.items() if key != "set"}
            changes = _changes(item["set"], f"{path}.{label}.set", {}, problems)
            entry = Entry(rest or None, bool(rest), changes)
        if _key(axis) == "defense" and entry.given:
            one = entry.value
            entry = replace(entry, value=[] if one is None else one if isinstance(one, list) else [one])
        made[str(label)] = entry
    return made


def _changes(given: Any, path: str, grid: Mapping[str, Any], problems: list[Problem]) -> dict[str, Any]:
    """A mapping of key paths to values."""
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        problems.append(Problem(path, f"expected {{KEY.PATH: value, …}}, got {brief(given)}"))
        return {}
    changes = {str(key): value for key, value in given.items()}
    taken = {_key(axis): axis for axis in grid}
    for key in list(changes):
        if key == "seed":
            problems.append(Problem(f"{path}.seed", "give seeds: [1, 2] for all cells"))
            del changes[key]
        elif key in taken:
            axis = taken[key]
            problems.append(
                Problem(f"{path}.{key}", f"it is an axis of the grid, and an axis decides; use grid.{axis}")
            )
            del changes[key]
    return changes


def _exclude(
    given: Any, grid: Mapping[str, Mapping[str, Entry]], problems: list[Problem]
) -> tuple[Mapping[str, tuple[str, ...]], ...]:
    if given is None:
        return ()
    if not isinstance(given, list) or not all(isinstance(one, Mapping) and one for one in given):
        problems.append(Problem("exclude", f"expected [{{AXIS: LABEL, …}}, …], got {brief(given)}"))
        return ()
    made = []
    for i, one in enumerate(given):
        right: dict[str, tuple[str, ...]] = {}
        for axis, wanted in one.items():
            labels = [str(label) for label in (wanted if isinstance(wanted, list) else [wanted])]
            known: Iterable[str] = grid.get(str(axis), {})
            if axis not in grid:
                problems.append(Problem(f"exclude.{i}.{axis}", _unknown("axis", str(axis), grid)))
            for label in labels:
                if axis in grid and label not in known:
                    problems.append(Problem(f"exclude.{i}.{axis}", _unknown("label", label, known)))
            right[str(axis)] = tuple(labels)
        made.append(right)
    return tuple(made)


def _unknown(what: str, name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"there is no {what} {brief(name)}{hint} (there are: {', '.join(known) or 'none'})"


def _key(axis: str) -> str:
    """The config key that an axis changes."""
    return SHORT.get(axis, axis)


def _label(value: Any) -> str:
    """What an entry without a label is called: its method's name, or the value."""
    if isinstance(value, Mapping):
        return str(value.get("name", json.dumps(value, default=str)))
    if isinstance(value, list):
        return "+".join(map(_label, value)) or "none"
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


# ---------------------------------------------------------------------------------------------- the cells


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
    raw = lay_over(dict(definition.base), definition.set)
    for axis, label in labels.items():
        entry, key = definition.grid[axis][label], _key(axis)
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
        above = [axis for axis in definition.grid if key.startswith(f"{_key(axis)}.")]
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


class _Dumper(ConfigDumper):
    """Writes interpolations as they are: the definition is read as it was written."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    quote = "'" if text[:1] in tuple("0123456789+-.") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=quote)


_Dumper.add_representer(str, _text)
