"""From a mapping to the typed config: unknown keys, types, ranges and impossible values, all problems together."""

from __future__ import annotations

import dataclasses
import difflib
import os
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from functools import cache
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedsim import plugins
from fedsim.config.schema import Choice, Config, MethodSection, dataclass_in, hints_of
from fedsim.errors import ConfigError, PluginError, Problem
from fedsim.plugins import Parameters


def build(raw: Mapping[str, Any], source: str = "", *, possible: bool = True) -> Config:
    """The typed config of plain containers; all problems together.

    possible: also check what is well formed but cannot be, such as a file that is not there; a worker on another
    machine need not have the files that the driver has read.

    Raises
    ------
    ConfigError
    """
    problems: list[Problem] = []
    files = raw.get("plugins") or []
    try:
        plugins.load([str(file) for file in files if file is not None] if isinstance(files, list) else [])
    except PluginError as error:
        raise ConfigError([Problem("plugins", str(error).removeprefix("plugins: "))], source) from None
    config = _section(Config, raw, "", problems)
    if possible:
        problems += _impossible(config, {problem.path for problem in problems})
    if problems:
        raise ConfigError(problems, source)
    return typing.cast(Config, config)


_LONGEST = 200  # characters of a value in a message


def brief(value: object, *, quoted: bool = True) -> str:
    """A value as a message shows it: in one line, without what would steer a terminal, cut where it is long.

    quoted: as Python writes it (``'text'``); else as text.
    """
    try:
        text = repr(value) if quoted else str(value)
    except ValueError:  # Python writes no whole number of more than 4,300 digits
        return "a number of too many digits"
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def _section(cls: type, raw: Any, path: str, problems: list[Problem]) -> Any:
    """An instance of the section class from a mapping; problems are added to the list."""
    if raw is None:
        raw = {}
    if not isinstance(raw, Mapping):
        problems.append(Problem(path, f"expected a mapping of keys to values, got {brief(raw)}"))
        raw = {}
    known = {f.name: f for f in fields(cls) if not f.metadata.get("internal")}
    values: dict[str, Any] = {}
    leaves: dict[str, Any] = {}
    for name, f in known.items():
        here = _join(path, name)
        section = dataclass_in(hints_of(cls)[name])
        if "plugin" in f.metadata:
            values[name] = read_choice(
                f.metadata["plugin"], raw.get(name, f.metadata["plugin_default"]), here, problems
            )
        elif "plugins" in f.metadata:
            values[name] = _choice_list(f.metadata["plugins"], raw.get(name), here, problems)
        elif section is not None and issubclass(section, MethodSection):
            given = raw.get(name, {})
            optional = type(None) in typing.get_args(hints_of(cls)[name])
            values[name] = (
                None if given is None and optional else _method(section, {} if given is None else given, here, problems)
            )
        elif section is not None:
            values[name] = _section(section, raw.get(name), here, problems)
        elif name in raw:
            leaves[name] = raw[name]
    _report_unknown([key for key in raw if key not in known], list(known), path, problems)
    values.update(_leaves(cls, leaves, path, problems))
    return cls(**values)


def _method(cls: type[MethodSection], raw: Any, path: str, problems: list[Problem]) -> MethodSection:
    """A section with generic keys and the method's own parameters side by side."""
    if isinstance(raw, str):
        raw = {"name": raw}
    if not isinstance(raw, Mapping):
        problems.append(Problem(path, f"expected a mapping with a name, got {brief(raw)}"))
        raw = {}
    generic = {f.name for f in fields(cls)} - {"parameters"}
    own = {key: value for key, value in raw.items() if key not in generic}
    config: Any = _section(cls, {k: v for k, v in raw.items() if k in generic}, path, problems)
    if cls.method == "attack" and config.name == "none":
        _report_unknown(list(own), sorted(generic), path, problems)
    elif f"{path}.name" not in {problem.path for problem in problems}:
        config.parameters = _parameters(cls.method, config.name, own, path, problems, also=sorted(generic))
    return typing.cast(MethodSection, config)


def read_choice(kind: str, raw: Any, path: str, problems: list[Problem]) -> Choice:
    if isinstance(raw, str):
        raw = {"name": raw}
    if not isinstance(raw, Mapping) or not isinstance(raw.get("name"), str):
        there = ", ".join(plugins.names(kind))
        problems.append(Problem(path, f"expected a name, or a mapping with one, got {brief(raw)} (there are: {there})"))
        return Choice(kind, "", Parameters())
    own = {key: value for key, value in raw.items() if key != "name"}
    return Choice(kind, raw["name"], _parameters(kind, raw["name"], own, path, problems))


def _choice_list(kind: str, raw: Any, path: str, problems: list[Problem]) -> list[Choice]:
    if raw is None:
        return []
    if isinstance(raw, (str, Mapping)):
        raw = [raw]
    if not isinstance(raw, Sequence):
        problems.append(Problem(path, f"expected a list, each with a name, got {brief(raw)}"))
        return []
    return [read_choice(kind, item, _join(path, i), problems) for i, item in enumerate(raw)]


def _parameters(
    kind: str, name: str, raw: Mapping[str, Any], path: str, problems: list[Problem], also: Sequence[str] = ()
) -> Parameters:
    try:
        cls = plugins.get(kind, name).Parameters
    except PluginError:
        problems.append(Problem(_join(path, "name"), plugins.unknown(kind, name)))
        return Parameters()
    known = {f.name for f in fields(cls)}
    _report_unknown([key for key in raw if key not in known], [*sorted(known), *also], path, problems)
    before = len(problems)
    values = _leaves(cls, {key: value for key, value in raw.items() if key in known}, path, problems)
    for f in fields(cls):
        if f.name not in values and f.default is MISSING and f.default_factory is MISSING:
            if f.name not in raw:
                problems.append(Problem(_join(path, f.name), f"is required by {kind} {name!r}: {f.metadata['doc']}"))
            return Parameters()
    return cls(**values) if len(problems) == before else Parameters()


def _report_unknown(keys: Sequence[Any], known: Sequence[str], path: str, problems: list[Problem]) -> None:
    for key in keys:
        near = difflib.get_close_matches(str(key), known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        where = _join(path, brief(key, quoted=False) or "''")
        problems.append(Problem(where, f"unknown key; {hint}allowed here: {', '.join(known) or 'none'}"))


def _as_it_is(hint: Any, value: Any) -> bool:
    """Whether OmegaConf would give back the very value: a plain one of just that type, without an interpolation."""
    kind = type(value)
    if kind is str and "${" in value:
        return False
    either = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    return kind in (bool, int, float, str, type(None)) and kind in either


def _converted(hint: Any, default: Any, value: Any) -> Any:
    """The value as OmegaConf turns it into the type of the hint.

    Raises
    ------
    OmegaConfBaseException: it cannot be.
    """
    node = OmegaConf.structured(_leaf(hint)(value=default))
    OmegaConf.update(node, "value", value)
    return OmegaConf.to_container(node)["value"]  # type: ignore[index,call-overload]


def _leaves(cls: type, raw: Mapping[str, Any], path: str, problems: list[Problem]) -> dict[str, Any]:
    """Values of plain fields, converted and checked for type (by OmegaConf) and range."""
    hints = hints_of(cls)
    by_name: dict[str, Field[Any]] = {f.name: f for f in fields(cls)}
    result: dict[str, Any] = {}
    for name, value in raw.items():
        here, hint = _join(path, name), hints[name]
        try:
            converted = value if _as_it_is(hint, value) else _converted(hint, _default_for(by_name[name]), value)
            if isinstance(converted, bool) and not isinstance(value, (bool, str)):
                raise OmegaConfBaseException  # to OmegaConf 7 is true
            if isinstance(converted, list) and any(isinstance(item, (list, dict)) for item in converted):
                raise OmegaConfBaseException  # it does not look into them
        except OmegaConfBaseException:
            problems.append(Problem(here, f"expected {type_name(hint)}, got {brief(value)}"))
            continue
        if _missing(converted):
            problems.append(Problem(here, f"expected {type_name(hint)}, got ??? (a value still to be filled in)"))
            continue
        try:
            problem = plugins.range_problem(by_name[name], converted)
        except ValueError:  # it cannot even be written out
            problem = "a number of too many digits; use a finite number"
        if problem:
            problems.append(Problem(here, problem))
        else:
            result[name] = converted
    return result


@cache
def _leaf(hint: Any) -> Any:
    """A class with one field of that type: what OmegaConf checks a value against."""
    return dataclasses.make_dataclass("Leaf", [("value", hint)])


def _missing(value: Any) -> bool:
    """Whether OmegaConf's mark for a value still to come is anywhere in it."""
    if isinstance(value, (list, dict)):
        return any(_missing(item) for item in (value.values() if isinstance(value, dict) else value))
    return isinstance(value, str) and value == "???"


def _default_for(f: Field[Any]) -> Any:
    if f.default is not MISSING:
        return f.default
    return f.default_factory() if f.default_factory is not MISSING else "???"


def type_name(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    if isinstance(hint, types.UnionType):
        return " or ".join(type_name(option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is list:
        return "a list"
    if typing.get_origin(hint) is dict or hint is dict:
        return "a mapping"
    return names.get(hint, str(hint))


_SIZED_KINDS = ("attack", "defense", "partition", "schedule")
"""Plugins that may measure themselves against the number of clients or rounds."""
_MOST_PLANNED = 10_000_000
"""Rounds, and clients: who takes part in every round is drawn before the first one."""
_SIZES = {"federation", "federation.clients", "federation.clients_per_round", "federation.rounds"}


def _impossible(config: Config, broken: set[str]) -> list[Problem]:
    """What is well formed but cannot be: checks across sections, and each plugin's own.

    ``broken`` holds the paths that are wrong already: nothing is concluded from them.
    """
    problems: list[Problem] = []
    federation, engine = config.federation, config.engine
    sized = not broken & _SIZES
    if sized and federation.clients_per_round > federation.clients:
        problems.append(
            Problem(
                "federation.clients_per_round",
                f"{federation.clients_per_round} cannot be sampled from {federation.clients} clients; "
                f"use at most federation.clients",
            )
        )
    for key in ("clients", "rounds"):
        count = getattr(federation, key)
        if f"federation.{key}" not in broken and count > _MOST_PLANNED:
            problems.append(Problem(f"federation.{key}", f"{count} cannot be planned; use at most {_MOST_PLANNED}"))
    if isinstance(engine.workers, str) and engine.workers != "auto":
        problems.append(Problem("engine.workers", f"use a whole number >= 1 or auto, not {engine.workers!r}"))
    if isinstance(engine.workers, int) and engine.workers < 1:
        problems.append(Problem("engine.workers", f"use a whole number >= 1 or auto, not {engine.workers}"))
    if engine.client_timeout is not None and engine.name == "serial":
        problems.append(
            Problem(
                "engine.client_timeout", "a client of this process cannot be stopped; use engine.name: ray, or null"
            )
        )
    start = config.training.warm_start
    if start is not None and not os.path.isfile(start):
        problems.append(
            Problem("training.warm_start", f"no such file: {start!r}; give a model.safetensors", absent=True)
        )
    combiners = 0
    for i, stage in enumerate(config.defense):
        if _touches(broken, f"defense.{i}"):
            continue
        cls: Any = plugins.get("defense", stage.name)
        if cls.needs_data and config.server_data.examples == 0 and not _touches(broken, "server_data"):
            message = f"{stage.name!r} needs data at the server; set some aside: server_data: {{examples: 100}}"
            problems.append(Problem("server_data.examples", message))
        combiners += cls.aggregates()
        if cls.aggregates() and combiners > 1:
            problems.append(Problem(f"defense.{i}", "only one stage of a pipeline may bring an aggregation rule"))
    for path, kind, name, parameters in _all_plugins(config):
        if _touches(broken, path) or (not sized and kind in _SIZED_KINDS):
            continue
        cls = plugins.get(kind, name)
        if cls.tasks and config.task.name not in cls.tasks and "task.name" not in broken:
            fitting = [
                n for n in plugins.names(kind) if config.task.name in (plugins.get(kind, n).tasks or [config.task.name])
            ]
            message = f"{kind} {name!r} is for task {' and '.join(cls.tasks)}, task.name is {config.task.name!r}"
            problems.append(Problem(f"{path}.name", f"{message}; use one of: {', '.join(fitting)}"))
            continue
        try:
            found = cls.problems(parameters, config)
        except (OSError, ValueError, RuntimeError) as error:  # a path that no file system takes
            found = [Problem("", f"cannot be checked: {error}")]
        problems += [Problem(_join(path, p.path) if p.path else path, p.message, p.absent) for p in found]
    refused = broken | {problem.path for problem in problems}
    for i, stage in enumerate(config.defense):
        if _touches(refused, f"defense.{i}"):
            continue  # the method has said more precisely what it needs
        need = typing.cast(Any, plugins.get("defense", stage.name)).required_clients(stage.parameters)
        if sized and need > federation.clients_per_round:
            problems.append(
                Problem(
                    f"defense.{i}.name",
                    f"{stage.name!r} with these parameters needs at least {need} clients a round; "
                    f"federation.clients_per_round is {federation.clients_per_round}",
                )
            )
    return problems


def _touches(broken: set[str], path: str) -> bool:
    """Whether something in the section ``path`` is wrong (or all of a section above it)."""
    return any(b == path or b.startswith(f"{path}.") or path.startswith(f"{b}.") for b in broken)


def _all_plugins(config: Config) -> Iterable[tuple[str, str, str, Parameters]]:
    yield "task", "task", config.task.name, config.task.parameters
    for path, one in (
        ("task.data", config.task.data),
        ("task.model", config.task.model),
        ("federation.partition", config.federation.partition),
        *([("server_data.other", config.server_data.other)] if config.server_data.source == "other" else []),
    ):
        yield path, one.kind, one.name, one.parameters
    if config.attack is not None:
        if config.attack.name != "none":
            yield "attack", "attack", config.attack.name, config.attack.parameters
        for path, one in (
            ("attack.trigger", config.attack.trigger),
            ("attack.schedule", config.attack.schedule),
        ):
            yield path, one.kind, one.name, one.parameters
        for i, one in enumerate(config.attack.craft):
            yield f"attack.craft.{i}", one.kind, one.name, one.parameters
    for i, one in enumerate(config.defense):
        yield f"defense.{i}", one.kind, one.name, one.parameters
