"""From files, parents and the command line to one mapping, and on to the checked config."""

from __future__ import annotations

import contextlib
import copy
import difflib
import io
import re
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedsim.config.checking import brief, build
from fedsim.config.schema import Config, MethodSection, section_class
from fedsim.errors import ConfigError, Problem


def config_directory() -> Path:
    """Where the shipped configs lie: package data in a wheel, ``configs/`` beside the package in a checkout."""
    here = Path(__file__).resolve().parent.parent
    return here / "configs" if (here / "configs").is_dir() else here.parent / "configs"


_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where PyYAML was built with it
_MOST_BYTES = 2**20
_DEEPEST = 50
"""Mappings and lists in each other; a config needs eight. Parsers call themselves, and a process ends at some depth."""
_MOST_BITS = 10_000  # Python does not write out much longer numbers
_MOST_REFERENCES = 1_000
_LONGEST = 100_000
"""Characters that interpolations may make of a text; a few lines of them can stand for gigabytes."""
_REFERENCE = re.compile(r"\$\{\s*([\w.\[\]-]*)(:?)")  # the name of a key or a resolver; with a colon it is the latter

BENCHES = "bench"
"""Where the shipped benchmarks lie among the configs; they are no configs of one experiment."""


def is_benchmark(raw: Mapping[str, Any]) -> bool:
    """Whether a file's content defines a benchmark rather than one experiment."""
    return "grid" in raw


def shipped(*, benches: bool = False) -> list[str]:
    """Names of the shipped configs, or of the shipped benchmarks."""
    root = config_directory()
    found = [p.relative_to(root) for p in root.rglob("*.yaml")]
    kept = [p.relative_to(BENCHES) if benches else p for p in found if (p.parts[0] == BENCHES) == benches]
    return sorted(p.with_suffix("").as_posix() for p in kept)


def find(path_or_name: str | Path, *, beside: Path | None = None, benches: bool = False) -> Path:
    """The file meant by a path, or by the name of a shipped config (or benchmark).

    Raises
    ------
    ConfigError: there is no such file and no shipped config of that name.
    """
    text = str(path_or_name)
    root = config_directory() / BENCHES if benches else config_directory()
    named = root / (text if text.endswith((".yaml", ".yml")) else f"{text}.yaml")
    for candidate in [*([beside / text, beside / f"{text}.yaml"] if beside else []), Path(text), named]:
        with contextlib.suppress(OSError, ValueError):  # a name no file system takes, a directory nobody may enter
            if candidate.is_file():
                return candidate
    there = shipped(benches=benches)
    near = difflib.get_close_matches(text.removesuffix(".yaml"), there, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    kind = "benchmark" if benches else "config"
    message = f"no such file, and no shipped {kind} of that name{hint} (shipped: {', '.join(there)})"
    raise ConfigError([Problem(brief(text, quoted=False), message)])


def read_file(path: Path) -> dict[str, Any]:
    """One file as plain containers (safe YAML, duplicate keys refused).

    Raises
    ------
    ConfigError: it cannot be read, or is no YAML, or what no config is: too large, too deep, no mapping.
    """
    try:
        with path.open("rb") as handle:
            raw = handle.read(_MOST_BYTES + 1)
        if len(raw) > _MOST_BYTES:
            raise ConfigError(
                [Problem("", f"it is larger than {_MOST_BYTES // 2**20} MiB; that is no config")], str(path)
            )
        plain = _parsed(raw.decode())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([Problem("", f"cannot be read: {error}")], str(path)) from None
    except _Unreadable as error:
        raise ConfigError([error.problem], str(path)) from None
    if not isinstance(plain, dict):
        raise ConfigError([Problem("", "a config is a mapping of keys to values")], str(path))
    return {str(key): value for key, value in plain.items()}


class _Unreadable(Exception):
    """Text that is no YAML, or YAML that is no config."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.message)
        self.problem = problem


def _parsed(text: str) -> Any:
    """YAML text as plain containers, by the safe loader; interpolations are left as they are.

    Raises
    ------
    _Unreadable: it is not valid, or stands for more than a config can be. OSError: it is neither mapping nor list.
    """
    try:
        refuse_deep(text)
        plain = OmegaConf.to_container(OmegaConf.load(io.StringIO(text)), resolve=False)
        for path, value in _flat(plain, ""):
            if isinstance(value, int) and value.bit_length() > _MOST_BITS:
                raise _Unreadable(Problem(brief(path, quoted=False), "a number of too many digits"))
        return plain
    except yaml.YAMLError as error:
        raise _Unreadable(Problem("", f"not valid YAML: {_yaml_words(error)}")) from None
    except OmegaConfBaseException as error:
        raise _Unreadable(_omegaconf_problem(error)) from None
    except (ValueError, LookupError, TypeError, AttributeError) as error:  # !!int of a word, a number of 5,000 digits
        raise _Unreadable(Problem("", f"not valid YAML: a value is not what its tag says ({brief(error)})")) from None
    except RecursionError:
        raise _Unreadable(Problem("", "mappings and lists lie in each other too deep")) from None


def refuse_deep(text: str) -> None:
    """Look whether YAML text may be given to a parser: those in C end the process where it is nested without end.

    Raises
    ------
    yaml.YAMLError: mappings and lists lie in each other more than 50 deep, or it is not valid.
    """
    depth = 0
    for event in yaml.parse(text, Loader=_LOADER):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST:
            where = "" if event.start_mark is None else f" (line {event.start_mark.line + 1})"
            raise yaml.YAMLError(f"mappings and lists lie in each other more than {_DEEPEST} deep{where}")


def _yaml_words(error: yaml.YAMLError) -> str:
    """What is wrong, in one line, with its place."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark, said = error.problem_mark, ", ".join(filter(None, (error.context, error.problem)))
        return f"{said} (line {mark.line + 1}, column {mark.column + 1})"
    return " ".join(str(error).split())


def _omegaconf_problem(error: OmegaConfBaseException) -> Problem:
    """OmegaConf's message, without what it says of its own types."""
    said = brief(str(error).partition("\n")[0], quoted=False)
    return (
        Problem(brief(error.full_key, quoted=False), said) if error.full_key else Problem("", f"not valid YAML: {said}")
    )


_GENERATIONS = 10
"""Parents of parents: enough for anybody, and few enough where each names several."""


def read_with_parents(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A config file laid over its parents, as plain containers that nothing is checked in."""
    given, path = path, path.resolve()
    if path in seen:
        chain = " → ".join(p.name for p in (*seen, path))
        raise ConfigError([Problem("defaults", f"the configs inherit from each other in a circle: {chain}")])
    if len(seen) > _GENERATIONS:
        raise ConfigError([Problem("defaults", f"more than {_GENERATIONS} generations of parents; name fewer")])
    own = _plugins_beside(read_file(given), given.parent)
    parents = own.pop("defaults", None)
    parents = [] if parents is None else [parents] if isinstance(parents, str) else parents
    if not isinstance(parents, list) or not all(isinstance(p, str) for p in parents):
        raise ConfigError([Problem("defaults", "name one parent config, or a list of them")], str(path))
    merged: dict[str, Any] = {}
    for parent in parents:
        inherited = read_with_parents(find(parent, beside=path.parent), (*seen, path))
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
    methods = cls is None or issubclass(cls, MethodSection)
    if "name" in overlay and overlay["name"] != base.get("name") and methods:
        kept = cls.kept() if cls is not None and issubclass(cls, MethodSection) else set()
        result = {key: value for key, value in base.items() if key in kept}
    for key, value in overlay.items():
        result[key] = merge(base[key], value, section_class(cls, key)) if key in result else copy.deepcopy(value)
    return result


def parse_overrides(overrides: Iterable[str] | Mapping[str, Any]) -> dict[str, Any]:
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
        if key.count(".") > _DEEPEST:
            problems.append(Problem(brief(key, quoted=False), f"keys lie in each other more than {_DEEPEST} deep"))
            continue
        try:
            made = _parsed(f"value: {value}" if value.strip() else "value: null")
            if made.keys() != {"value"}:
                raise _Unreadable(Problem("", "not valid YAML: it holds more than one value"))
            result[key.strip()] = made["value"]
        except _Unreadable as error:
            problems.append(Problem(brief(key, quoted=False), f"the value is {error.problem.message}"))
    if problems:
        raise ConfigError(problems, "the command line")
    return result


def _override(base: Any, keys: Sequence[str], value: Any, cls: type | None, path: str) -> Any:
    """Lay ``value`` over what lies under ``keys`` in ``base``; a number indexes a list (``defense.0.bound``)."""
    if not any(key.isdecimal() for key in keys):
        for key in reversed(keys):
            value = {key: value}
        return merge(base, value, cls)
    key, rest = keys[0], keys[1:]
    if not key.isdecimal():
        inner = base.get(key) if isinstance(base, dict) else None
        laid = _override(inner, rest, value, section_class(cls, key), path)
        return {**base, key: laid}
    items = list(base) if isinstance(base, list) else [base] if isinstance(base, (str, dict)) else []
    if len(key) > 9 or int(key) >= len(items):
        message = f"there is no entry {brief(key, quoted=False)} to override; the list has {len(items)}"
        raise ConfigError([Problem(brief(path, quoted=False), message)])
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
        source, raw, stem = str(path_or_name), read_with_parents(path), path.stem
    if is_benchmark(raw):
        message = "this defines a benchmark, not one experiment; play it with fedsim bench"
        raise ConfigError([Problem("grid", message)], source)
    raw = lay_over(raw, parse_overrides(overrides))
    raw.setdefault("name", stem)
    return build(resolve(raw, source), source)


def lay_over(raw: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """``raw`` with the values of key paths laid over it.

    Raises
    ------
    ConfigError: a path leads to an entry that a list does not have.
    """
    # A section before its keys, so that parameters given beside a plugin's name are kept in any order.
    for key, value in sorted(overrides.items(), key=lambda item: _depth(item[0])):
        if key.partition(".")[0].isdecimal():
            raise ConfigError([Problem(brief(key, quoted=False), "a config has no entries by number, but keys")])
        raw = _override(raw, key.split("."), value, Config, key)
    return raw


def resolve(raw: Mapping[str, Any], source: str = "") -> dict[str, Any]:
    """``raw`` with its interpolations (``${oc.env:FEDSIM_DATA}``) filled in.

    Raises
    ------
    ConfigError: one of them leads nowhere.
    """
    try:
        bomb = _too_long(raw)
        if bomb is not None:
            message = f"too many interpolations, or such that make a text of more than {_LONGEST:,} characters"
            raise ConfigError([Problem(bomb, message)], source)
        resolved = OmegaConf.to_container(OmegaConf.create(dict(raw)), resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError([_omegaconf_problem(error)], source) from None
    except RecursionError:
        raise ConfigError(
            [Problem("", "mappings, lists or interpolations lie in each other too deep")], source
        ) from None
    return typing.cast(dict[str, Any], resolved)


def _too_long(raw: Mapping[str, Any]) -> str | None:
    """The key of a text that its interpolations would make too long; None if there is none.

    An upper bound is computed, without resolving anything: the length of each text plus, for each reference in it, the
    bound of what is referred to, or the largest bound where that cannot be read off (``${..x}``, ``${a.${b}}``).
    """
    texts = {path: value for path, value in _flat(raw, "") if isinstance(value, str)}
    bound = {path: len(text) for path, text in texts.items()}
    held = [path for path, text in texts.items() if "${" in text]
    if sum(texts[path].count("${") for path in held) > _MOST_REFERENCES:
        return max(held, key=lambda path: texts[path].count("${"))
    for _ in held:  # so many steps are enough, unless they lead in a circle
        grown = {
            path: len(texts[path]) + sum(_reach(name, colon, bound) for name, colon in _REFERENCE.findall(texts[path]))
            for path in held
        }
        worst = max(grown, key=grown.__getitem__)
        if grown[worst] > _LONGEST:
            return worst
        if all(bound[path] == length for path, length in grown.items()):
            break
        bound |= grown
    return None


def _reach(name: str, colon: str, bound: Mapping[str, int]) -> int:
    """The bound of what one reference stands for."""
    if colon:
        return 0 if name == "oc.env" else max(bound.values())
    path = name.replace("[", ".").replace("]", "")
    if not path or path.startswith("."):
        return max(bound.values())
    return bound[path] if path in bound else sum(n for key, n in bound.items() if key.startswith(f"{path}."))


def _flat(value: Any, path: str) -> Iterable[tuple[str, Any]]:
    """Every value of nested containers that is no container itself, with its key path."""
    if not isinstance(value, (Mapping, list)):
        yield path, value
        return
    for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
        yield from _flat(item, f"{path}.{key}" if path else str(key))


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
