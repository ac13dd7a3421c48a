"""The definition of a benchmark as it was written; every problem with it is told together."""

from __future__ import annotations

import copy
import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from fedsim.config import Config
from fedsim.config.checking import brief
from fedsim.config.reading import find, is_benchmark, parse_overrides, read_file, read_with_parents, shipped
from fedsim.config.schema import ConfigDumper
from fedsim.errors import ConfigError, Problem

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

_EXPERIMENT = (
    "this is one experiment, not a benchmark; play it with fedsim run, or name it in a benchmark (base: …, grid: …)"
)


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

    base: the experiment, merged with its parents and not yet checked; None where it cannot be made out.
    grid: axis → label → entry. exclude: cells whose labels are among all of one of these are left out.
    """

    name: str
    base: Mapping[str, Any] | None
    set: Mapping[str, Any]
    seeds: tuple[int, ...]
    twin: bool
    grid: Mapping[str, Mapping[str, Entry]]
    exclude: tuple[Mapping[str, tuple[str, ...]], ...] = ()

    def to_yaml(self) -> str:
        """A file that reads back to the same benchmark."""
        plain = {
            "name": self.name,
            "base": dict(self.base or {}),
            "set": dict(self.set),
            "seeds": list(self.seeds),
            "twin": self.twin,
            "grid": {axis: {label: e.to_plain() for label, e in made.items()} for axis, made in self.grid.items()},
            "exclude": [{axis: list(labels) for axis, labels in one.items()} for one in self.exclude],
        }
        return yaml.dump(plain, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


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


def read_definition(
    path_or_name: str | Path | Mapping[str, Any], overrides: Iterable[str], problems: list[Problem]
) -> tuple[Definition, str]:
    """The definition, as far as it can be made out, and what to call its source; its problems are added to the list.

    Raises
    ------
    ConfigError: there is no such file, it is not YAML or one experiment, or an override is not ``key=value``.
    """
    parsed = parse_overrides(overrides)
    if isinstance(path_or_name, Mapping):
        raw, source, beside, stem = copy.deepcopy(dict(path_or_name)), "the given mapping", None, "benchmark"
    else:
        source = str(path_or_name)
        try:
            path = find(path_or_name, benches=True)
        except ConfigError:
            if source in shipped():
                raise ConfigError([Problem("", _EXPERIMENT)], source) from None
            raise
        raw, beside, stem = read_file(path), path.parent, path.stem
        if not {"base", "grid"} & raw.keys() and {f.name for f in fields(Config)} & raw.keys() - KEYS.keys():
            raise ConfigError([Problem("", _EXPERIMENT)], source)
    for key, value in parsed.items():
        _override(raw, key, value, problems)
    base = _base(raw.get("base"), beside, problems)
    return _read(raw, stem, base, problems), source


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
        grid = raw.get("grid") or {}
        if isinstance(grid, Mapping):  # what is wrong with it otherwise is told where it is read
            raw["grid"] = _override_axis({str(axis): entries for axis, entries in grid.items()}, rest, value)
    else:
        problems.append(Problem(key, f"write {head}=… as a whole" if head != "base" else f"write {rest}=…"))


def _override_axis(axes: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """The axes with one of them, or one entry of one (``path``: AXIS or AXIS.LABEL), replaced or added."""
    axis = next((axis for axis in axes if path.startswith(f"{axis}.")), path)
    if axis == path:
        return {**axes, axis: value}
    entries = axes[axis] or {}
    if isinstance(entries, list):
        entries = {_label(entry): entry for entry in entries}
    if not isinstance(entries, Mapping):
        return axes
    return {**axes, axis: {**entries, path.removeprefix(f"{axis}."): value}}


def _read(raw: Mapping[str, Any], stem: str, base: dict[str, Any] | None, problems: list[Problem]) -> Definition:
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
        elif key_of(str(axis)) in map(key_of, axes):
            problems.append(Problem(path, f"another axis changes {key_of(str(axis))} already"))
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
        if key_of(axis) == "defense" and entry.given:
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
    taken = {key_of(axis): axis for axis in grid}
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


def key_of(axis: str) -> str:
    """The config key that an axis changes."""
    return SHORT.get(axis, axis)


def _label(value: Any) -> str:
    """What an entry without a label is called: its method's name, or the value."""
    if isinstance(value, Mapping):
        return str(value.get("name", json.dumps(value, default=str)))
    if isinstance(value, list):
        return "+".join(map(_label, value)) or "none"
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


class _Dumper(ConfigDumper):
    """Writes interpolations as they are: the definition is read as it was written."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    quote = "'" if text[:1] in tuple("0123456789+-.") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=quote)


_Dumper.add_representer(str, _text)
