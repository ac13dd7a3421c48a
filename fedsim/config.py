"""The configuration: schema, merge and validation.

A config file is YAML. It may name parents (``defaults: base``, or a list), from which it takes everything but their
``name``; the command line overrides with ``key=value``. Everything wrong is reported together, before anything is
loaded. A section that chooses a plugin (``attack``, ``attack.trigger``, ``task.data`` …) holds its ``name`` with the
plugin's own parameters beside it; a plain string is short for ``{name: …}``. Choosing another name drops the
parameters of the one chosen before.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import difflib
import os
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedsim import plugins
from fedsim.errors import ConfigError, PluginError, Problem
from fedsim.plugins import Parameters, parameter


@dataclass
class Choice:
    """A plugin chosen by name, with its parameters; ``create()`` makes the instance."""

    kind: str
    name: str
    parameters: Parameters

    def create(self) -> Any:
        return plugins.get(self.kind, self.name)(self.parameters)

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, **dataclasses.asdict(self.parameters)}


def choice(kind: str, default: Any, doc: str) -> Any:
    """A field holding one plugin; ``default`` is what a config that says nothing gets (a name or a mapping)."""
    return field(default=None, metadata={"doc": doc, "plugin": kind, "plugin_default": default})


def choices(kind: str, doc: str) -> Any:
    """A field holding a list of plugins, empty by default."""
    return field(default_factory=list, metadata={"doc": doc, "plugins": kind})


@dataclass
class TaskConfig:
    """What is learnt."""

    name: str = parameter("vision", "task family")
    data: Choice = choice("dataset", "mnist5k", "data set: embedded, a directory of Parquet files, or a hub id")
    model: Choice = choice("model", "cnn", "network")
    train_examples: int | None = parameter(None, "use only this many training examples (seeded draw)", ge=1)
    test_examples: int | None = parameter(None, "use only this many test examples (seeded draw)", ge=1)


@dataclass
class FederationConfig:
    """Who takes part."""

    clients: int = parameter(40, "clients in the population", ge=1)
    clients_per_round: int = parameter(10, "clients sampled in a round, n", ge=1)
    rounds: int = parameter(100, "rounds", ge=1)
    partition: Choice = choice("partition", {"name": "dirichlet", "alpha": 1.0}, "how data is split over clients")
    dropout: float = parameter(0.0, "probability that a sampled client never replies", ge=0, lt=1)
    stragglers: float = parameter(0.0, "probability that a client replies too late and is left out", ge=0, lt=1)
    weighting: str = parameter("examples", "weight of a client in the mean", choices=("examples", "uniform"))
    server_lr: float = parameter(1.0, "server learning rate η: global ← global + η · aggregate", gt=0)


@dataclass
class TrainingConfig:
    """How an honest client trains (SGD)."""

    lr: float = parameter(0.05, "learning rate of round 1", gt=0)
    lr_decay: float = parameter(1.0, "factor on the learning rate per round, γ", gt=0, le=1)
    momentum: float = parameter(0.9, "SGD momentum, reset every round", ge=0, lt=1)
    weight_decay: float = parameter(0.0, "SGD weight decay", ge=0)
    local_epochs: int = parameter(2, "passes over the client's data per round", ge=1)
    local_steps: int | None = parameter(None, "optimiser steps per round, instead of local_epochs", ge=1)
    batch_size: int = parameter(32, "examples per batch", ge=1)
    augment: bool = parameter(False, "random crop (padding 4) and horizontal flip")
    amp: bool = parameter(False, "bf16 autocast")
    channels_last: bool = parameter(False, "channels-last inputs (faster convolutions on a GPU)")
    warm_start: str | None = parameter(None, "model.safetensors of an earlier run to start from")


@dataclass
class AttackConfig:
    """The adversary: trigger × schedule × attack. The attack's own parameters sit beside these keys."""

    name: str = parameter("none", "attack method; none: nobody attacks, but the trigger is still measured")
    trigger: Choice = choice("trigger", "pixel_pattern", "what the backdoor is")
    schedule: Choice = choice("schedule", {"name": "continuous"}, "when malicious clients take part")
    craft: list[Choice] = choices("craft", "steps after training, in order: scale (boost), project (norm ball)")
    poison_fraction: float = parameter(0.5, "share of each malicious batch that carries the trigger", ge=0, le=1)
    lr: float | None = parameter(None, "attacker's learning rate of round 1 (decays as training.lr); null: same", gt=0)
    local_epochs: int | None = parameter(None, "attacker's local epochs; null: as training.local_epochs", ge=1)
    local_steps: int | None = parameter(None, "attacker's steps; null: as its epochs say", ge=1)
    parameters: Parameters = field(default_factory=Parameters, metadata={"doc": "", "internal": True})


@dataclass
class EvaluationConfig:
    """What is measured, and when."""

    every: int = parameter(1, "evaluate every this many rounds (the last one always)", ge=1)
    batch_size: int = parameter(256, "examples per evaluation batch", ge=1)
    twin: bool = parameter(False, "also run the clean twin: same seeds, the malicious clients train honestly")


@dataclass
class EngineConfig:
    """What it runs on. Results do not depend on anything here (on CPU)."""

    name: str = parameter("ray", "ray: actors in processes; serial: in this process", choices=("ray", "serial"))
    workers: int | str = parameter("auto", "worker processes; auto: as many as the cores (or GPU shares) allow")
    cpus_per_worker: float = parameter(1.0, "cores a worker reserves", gt=0)
    gpus_per_worker: float | None = parameter(None, "share of a GPU per worker; null: share the GPUs evenly", ge=0)
    address: str | None = parameter(None, "address of a running Ray cluster; null: start one")
    device: str = parameter("auto", "auto: a GPU if there is one", choices=("auto", "cpu", "cuda"))
    retries: int = parameter(2, "times a client's round is run again after its worker died", ge=0)


@dataclass
class OutputConfig:
    """What is written."""

    dir: str = parameter("runs", "parent of the run directories: <dir>/<name>/<run id>")
    checkpoint_every: int = parameter(10, "rounds between checkpoints", ge=1)
    report: bool = parameter(True, "write report.html and the figures")
    tensorboard: bool = parameter(False, "write TensorBoard event files")


@dataclass
class Config:
    """One experiment."""

    name: str = parameter("experiment", "name of the experiment; default: the file's name")
    seed: int = parameter(0, "seed of every random stream of the run", ge=0)
    plugins: list[str] = parameter([], "Python files with plugins of your own")
    task: TaskConfig = field(default_factory=TaskConfig)
    federation: FederationConfig = field(default_factory=FederationConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    attack: AttackConfig | None = field(default_factory=AttackConfig)
    defense: list[Choice] = choices("defense", "stages of the server's pipeline, in order; empty: plain FedAvg")
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    output: OutputConfig = field(default_factory=OutputConfig)

    def to_dict(self) -> dict[str, Any]:
        """Plain containers that load back to the same config."""
        result: dict[str, Any] = _plain(self)
        return result

    def to_yaml(self) -> str:
        """A file that loads back to the same config."""
        return yaml.dump(self.to_dict(), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Dumper(yaml.SafeDumper):
    """Writes text so that OmegaConf reads it as text: ``1e-3`` is a number to it, ``${`` opens an interpolation."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    quote = "'" if text[:1] in tuple("0123456789+-.") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text.replace("${", "\\${"), style=quote)


_Dumper.add_representer(str, _text)


def _plain(value: Any) -> Any:
    if isinstance(value, Choice):
        return value.to_dict()
    if isinstance(value, AttackConfig):
        own = {f.name: _plain(getattr(value, f.name)) for f in fields(value) if f.name != "parameters"}
        return {"name": own.pop("name"), **dataclasses.asdict(value.parameters), **own}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


# ---------------------------------------------------------------------------------------------- reading


def config_directory() -> Path:
    """Where the shipped configs lie: package data in a wheel, ``configs/`` beside the package in a checkout."""
    here = Path(__file__).resolve().parent
    return here / "configs" if (here / "configs").is_dir() else here.parent / "configs"


def shipped() -> list[str]:
    """Names of the shipped configs."""
    root = config_directory()
    return sorted(p.relative_to(root).with_suffix("").as_posix() for p in root.rglob("*.yaml"))


def find(path_or_name: str | Path, *, beside: Path | None = None) -> Path:
    """The file meant by a path, or by the name of a shipped config.

    Raises
    ------
    ConfigError: there is no such file and no shipped config of that name.
    """
    text = str(path_or_name)
    named = config_directory() / (text if text.endswith((".yaml", ".yml")) else f"{text}.yaml")
    for candidate in [*([beside / text, beside / f"{text}.yaml"] if beside else []), Path(text), named]:
        with contextlib.suppress(OSError, ValueError):  # a name no file system takes, a directory nobody may enter
            if candidate.is_file():
                return candidate
    near = difflib.get_close_matches(text.removesuffix(".yaml"), shipped(), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    message = f"no such file, and no shipped config of that name{hint} (shipped: {', '.join(shipped())})"
    raise ConfigError([Problem(text, message)])


def _read(path: Path) -> dict[str, Any]:
    """One file as plain containers (safe YAML, duplicate keys refused)."""
    try:
        loaded = OmegaConf.load(path)
    except yaml.YAMLError as error:
        raise ConfigError([Problem("", f"not valid YAML: {' '.join(str(error).split())}")], str(path)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([Problem("", f"cannot be read: {error}")], str(path)) from None
    except OmegaConfBaseException as error:
        raise ConfigError([Problem("", " ".join(str(error).split()))], str(path)) from None
    plain = OmegaConf.to_container(loaded, resolve=False)
    if not isinstance(plain, dict):
        raise ConfigError([Problem("", "a config is a mapping of keys to values")], str(path))
    return {str(key): value for key, value in plain.items()}


def _read_with_parents(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    given, path = path, path.resolve()
    if path in seen:
        chain = " → ".join(p.name for p in (*seen, path))
        raise ConfigError([Problem("defaults", f"the configs inherit from each other in a circle: {chain}")])
    own = _plugins_beside(_read(given), given.parent)
    parents = own.pop("defaults", None)
    parents = [] if parents is None else [parents] if isinstance(parents, str) else parents
    if not isinstance(parents, list) or not all(isinstance(p, str) for p in parents):
        raise ConfigError([Problem("defaults", "name one parent config, or a list of them")], str(path))
    merged: dict[str, Any] = {}
    for parent in parents:
        inherited = _read_with_parents(find(parent, beside=path.parent), (*seen, path))
        inherited.pop("name", None)  # a name is a file's own
        merged = merge(merged, inherited)
    return merge(merged, own)  # type: ignore[no-any-return]


def merge(base: Any, overlay: Any, cls: type | None = Config) -> Any:
    """``overlay`` laid over ``base``; a section that names another plugin loses the former one's parameters.

    ``cls`` is the schema class of the section, where it has one.
    """
    if isinstance(base, str) and isinstance(overlay, dict) and cls is None:
        base = {"name": base}
    if isinstance(overlay, str) and isinstance(base, dict):
        overlay = {"name": overlay}
    if not isinstance(base, dict) or not isinstance(overlay, dict):
        return copy.deepcopy(overlay)
    result = dict(base)
    if "name" in overlay and overlay["name"] != base.get("name") and cls in (None, AttackConfig):
        generic = {f.name for f in fields(AttackConfig)} if cls is AttackConfig else set()
        result = {key: value for key, value in base.items() if key in generic}
    for key, value in overlay.items():
        result[key] = merge(base[key], value, section_class(cls, key)) if key in result else copy.deepcopy(value)
    return result


def section_class(cls: type | None, key: str) -> type | None:
    if cls is None or key not in {f.name for f in fields(cls)}:
        return None
    return _dataclass_in(_hints(cls)[key])


@cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _dataclass_in(hint: Any) -> type | None:
    """The section class a type hint names (``X`` or ``X | None``), if it is one."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for option in options:
        if isinstance(option, type) and dataclasses.is_dataclass(option) and option not in (Choice, Parameters):
            return option
    return None


def _parse_overrides(overrides: Iterable[str] | Mapping[str, Any]) -> dict[str, Any]:
    """``key.path=value`` strings (values in YAML), or a mapping of key paths, as (path, value) pairs."""
    if isinstance(overrides, Mapping):
        return {str(key): value for key, value in overrides.items()}
    result: dict[str, Any] = {}
    problems = []
    for text in overrides:
        key, sign, value = text.partition("=")
        if not sign or not key.strip():
            problems.append(Problem(text, "write an override as key=value, for example training.lr=0.1"))
            continue
        try:
            node = OmegaConf.create(f"value: {value}" if value.strip() else "value: null")
            result[key.strip()] = OmegaConf.to_container(node, resolve=False)["value"]  # type: ignore[index,call-overload]
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            problems.append(Problem(key, f"the value is not valid YAML: {' '.join(str(error).split())}"))
    if problems:
        raise ConfigError(problems, "the command line")
    return result


def _override(base: Any, keys: Sequence[str], value: Any, cls: type | None, path: str) -> Any:
    """Lay ``value`` over what lies under ``keys`` in ``base``; a number indexes a list (``defense.0.bound``)."""
    if not any(key.isdigit() for key in keys):
        for key in reversed(keys):
            value = {key: value}
        return merge(base, value, cls)
    key, rest = keys[0], keys[1:]
    if not key.isdigit():
        inner = base.get(key) if isinstance(base, dict) else None
        laid = _override(inner, rest, value, section_class(cls, key), path)
        return {**base, key: laid}
    items = list(base) if isinstance(base, list) else [base] if isinstance(base, (str, dict)) else []
    if int(key) >= len(items):
        raise ConfigError([Problem(path, f"there is no entry {key} to override; the list has {len(items)}")])
    items[int(key)] = _override(items[int(key)], rest, value, None, path)
    return items


def _depth(path: str) -> int:
    """How deep an override reaches; a section's name counts as the section itself."""
    return path.removesuffix(".name").count(".")


def load_config(
    path_or_name: str | Path | Mapping[str, Any], overrides: Iterable[str] | Mapping[str, Any] = ()
) -> Config:
    """Read, merge and check a config.

    Parameters
    ----------
    path_or_name: a YAML file, the name of a shipped config (``quickstart``), or a mapping.
    overrides: ``["training.lr=0.1", …]`` or ``{"training.lr": 0.1}``.

    Raises
    ------
    ConfigError: everything that is wrong, each with its key's path and what is allowed.
    """
    if isinstance(path_or_name, Mapping):
        source, raw, stem = "the given mapping", copy.deepcopy(dict(path_or_name)), "experiment"
    else:
        path = find(path_or_name)
        source, raw, stem = str(path_or_name), _read_with_parents(path), path.stem
    parsed = _parse_overrides(overrides)
    # A section before its keys, so that parameters given beside a plugin's name are kept in any order.
    for key, value in sorted(parsed.items(), key=lambda item: _depth(item[0])):
        raw = _override(raw, key.split("."), value, Config, key)
    raw.setdefault("name", stem)
    try:
        resolved = OmegaConf.to_container(OmegaConf.create(raw), resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError([Problem("", " ".join(str(error).split()))], source) from None
    return build(typing.cast(dict[str, Any], resolved), source)


def _plugins_beside(raw: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Plugin files that lie beside the config, not in the working directory, are found there."""
    files = raw.get("plugins")
    if not isinstance(files, list):
        return raw

    def found(file: Any) -> Any:
        with contextlib.suppress(OSError, ValueError):  # a name no file system takes
            if isinstance(file, str) and not Path(file).exists() and (directory / file).exists():
                return str(directory / file)
        return file

    return {**raw, "plugins": [found(file) for file in files]}


# ------------------------------------------------------------------------------------------- validation


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


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def _section(cls: type, raw: Any, path: str, problems: list[Problem]) -> Any:
    """An instance of the section class from a mapping; problems are added to the list."""
    if raw is None:
        raw = {}
    if not isinstance(raw, Mapping):
        problems.append(Problem(path, f"expected a mapping of keys to values, got {raw!r}"))
        raw = {}
    known = {f.name: f for f in fields(cls) if not f.metadata.get("internal")}
    values: dict[str, Any] = {}
    leaves: dict[str, Any] = {}
    for name, f in known.items():
        here = _join(path, name)
        section = _dataclass_in(_hints(cls)[name])
        if "plugin" in f.metadata:
            values[name] = _choice(f.metadata["plugin"], raw.get(name, f.metadata["plugin_default"]), here, problems)
        elif "plugins" in f.metadata:
            values[name] = _choice_list(f.metadata["plugins"], raw.get(name), here, problems)
        elif section is AttackConfig:
            given = raw.get(name, {})
            values[name] = None if given is None else _attack(given, here, problems)
        elif section is not None:
            values[name] = _section(section, raw.get(name), here, problems)
        elif name in raw:
            leaves[name] = raw[name]
    _report_unknown([key for key in raw if key not in known], list(known), path, problems)
    values.update(_leaves(cls, leaves, path, problems))
    return cls(**values)


def _attack(raw: Any, path: str, problems: list[Problem]) -> AttackConfig:
    """The attack section: generic keys and the method's own parameters side by side."""
    if isinstance(raw, str):
        raw = {"name": raw}
    if not isinstance(raw, Mapping):
        problems.append(Problem(path, f"expected a mapping with a name, got {raw!r}"))
        raw = {}
    generic = {f.name for f in fields(AttackConfig)} - {"parameters"}
    own = {key: value for key, value in raw.items() if key not in generic}
    config = typing.cast(
        AttackConfig, _section(AttackConfig, {k: v for k, v in raw.items() if k in generic}, path, problems)
    )
    if config.name == "none":
        _report_unknown(list(own), sorted(generic), path, problems)
        return config
    config.parameters = _parameters("attack", config.name, own, path, problems, also=sorted(generic))
    return config


def _choice(kind: str, raw: Any, path: str, problems: list[Problem]) -> Choice:
    if isinstance(raw, str):
        raw = {"name": raw}
    if not isinstance(raw, Mapping) or not isinstance(raw.get("name"), str):
        there = ", ".join(plugins.names(kind))
        problems.append(Problem(path, f"expected a name, or a mapping with one, got {raw!r} (there are: {there})"))
        return Choice(kind, "", Parameters())
    own = {key: value for key, value in raw.items() if key != "name"}
    return Choice(kind, raw["name"], _parameters(kind, raw["name"], own, path, problems))


def _choice_list(kind: str, raw: Any, path: str, problems: list[Problem]) -> list[Choice]:
    if raw is None:
        return []
    if isinstance(raw, (str, Mapping)):
        raw = [raw]
    if not isinstance(raw, Sequence):
        problems.append(Problem(path, f"expected a list, each with a name, got {raw!r}"))
        return []
    return [_choice(kind, item, _join(path, i), problems) for i, item in enumerate(raw)]


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
        problems.append(Problem(_join(path, key), f"unknown key; {hint}allowed here: {', '.join(known) or 'none'}"))


def _leaves(cls: type, raw: Mapping[str, Any], path: str, problems: list[Problem]) -> dict[str, Any]:
    """Values of plain fields, converted and checked for type (by OmegaConf) and range."""
    hints = _hints(cls)
    by_name: dict[str, Field[Any]] = {f.name: f for f in fields(cls)}
    result: dict[str, Any] = {}
    for name, value in raw.items():
        here, hint = _join(path, name), hints[name]
        shape = dataclasses.make_dataclass("Leaf", [("value", hint, field(default=dataclasses.MISSING))])
        try:
            node = OmegaConf.structured(shape(value=_default_for(by_name[name])))
            OmegaConf.update(node, "value", value)
            converted = OmegaConf.to_container(node)["value"]  # type: ignore[index,call-overload]
            if isinstance(converted, bool) and not isinstance(value, (bool, str)):
                raise OmegaConfBaseException  # to OmegaConf 7 is true
        except OmegaConfBaseException:
            problems.append(Problem(here, f"expected {type_name(hint)}, got {value!r}"))
            continue
        if _missing(converted):
            problems.append(Problem(here, f"expected {type_name(hint)}, got ??? (a value still to be filled in)"))
            continue
        problem = plugins.range_problem(by_name[name], converted)
        if problem:
            problems.append(Problem(here, problem))
        else:
            result[name] = converted
    return result


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
    if "task.name" not in broken and config.task.name not in plugins.names("task"):
        problems.append(Problem("task.name", plugins.unknown("task", config.task.name)))
    if isinstance(engine.workers, str) and engine.workers != "auto":
        problems.append(Problem("engine.workers", f"use a whole number >= 1 or auto, not {engine.workers!r}"))
    if isinstance(engine.workers, int) and engine.workers < 1:
        problems.append(Problem("engine.workers", f"use a whole number >= 1 or auto, not {engine.workers}"))
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
        combiners += cls.aggregates()
        if cls.aggregates() and combiners > 1:
            problems.append(Problem(f"defense.{i}", "only one stage of a pipeline may bring an aggregation rule"))
    for path, kind, name, parameters in _all_plugins(config):
        if _touches(broken, path) or (not sized and kind in _SIZED_KINDS):
            continue
        try:
            found = plugins.get(kind, name).problems(parameters, config)
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
    for path, one in (
        ("task.data", config.task.data),
        ("task.model", config.task.model),
        ("federation.partition", config.federation.partition),
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


# ------------------------------------------------------------------------------------------- every default

_BASE_HEAD = """\
# Every key of a config with its default; what a config leaves out is as here.
# Generated from the schema, so do not edit: fedsim describe base > configs/base.yaml
# Other methods and their parameters: fedsim list, fedsim describe KIND NAME
"""


def render_base() -> str:
    """The text of ``configs/base.yaml``: every default, each with the line that documents it."""
    return _BASE_HEAD + "\n".join(_rendered(Config(), "")) + "\n"


def _rendered(section: Any, indent: str) -> list[str]:
    """The lines of one section: a config dataclass or a plugin's parameters."""
    lines = []
    for f in fields(section):
        if f.metadata.get("internal"):
            continue
        value, comment = getattr(section, f.name), f.metadata.get("doc", "")
        if "plugin" in f.metadata:
            chosen = _choice(f.metadata["plugin"], f.metadata["plugin_default"], f.name, [])
            lines += [f"{indent}{f.name}:  # {comment}", f"{indent}  name: {chosen.name}"]
            lines += _rendered(chosen.parameters, f"{indent}  ")
        elif dataclasses.is_dataclass(value):
            head = " ".join((value.__doc__ or "").split())
            lines += [f"\n{indent}{f.name}:  # {head}", *_rendered(value, f"{indent}  ")]
        else:
            text = yaml.dump({f.name: value}, Dumper=_Dumper, allow_unicode=True, width=1000).strip()
            allowed = plugins.allowed(f)
            gap = "\n" if "plugins" in f.metadata and not indent else ""
            lines.append(f"{gap}{indent}{text}  # {comment}{f'; {allowed}' if allowed else ''}")
    return lines
