"""The one registry: every attack, defense, trigger, schedule, craft step, task, dataset, model and partition.

A plugin is a class with a ``name``, a frozen dataclass of ``Parameters`` with documented ranges, and a paper.
Built-in methods live in the packages ``attacks`` and ``defenses`` and in fedsim's own rooms; third parties
publish theirs as entry points (group ``fedsim.attacks``, ``fedsim.defenses``, ``fedsim.triggers``,
``fedsim.tasks``) or name a Python file in the config's ``plugins`` list.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.metadata
import importlib.util
import math
import os
import pkgutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, TypeVar

from fedsim.errors import PluginError, Problem

SENTINEL = "fedsim-backdoor"
"""What ``__fedsim__`` holds in our own ``attacks`` and ``defenses`` packages (the names are generic)."""

KINDS = ("attack", "defense", "trigger", "schedule", "craft", "task", "model", "dataset", "partition")
_WRITTEN = {
    "attack": "attack.name: {}",
    "defense": "defense: [{}]",
    "trigger": "attack.trigger: {}",
    "schedule": "attack.schedule: {}",
    "craft": "attack.craft: [{}]",
    "task": "task.name: {}",
    "model": "task.model: {}",
    "dataset": "task.data: {}",
    "partition": "federation.partition: {}",
}
"""How a config names a plugin of each kind."""
ENTRY_POINT_GROUPS = ("fedsim.attacks", "fedsim.defenses", "fedsim.triggers", "fedsim.tasks")
_ROOMS = ("fedsim.tasks", "fedsim.federation.schedule", "fedsim.trigger", "fedsim.attack")


def parameter(
    default: Any = MISSING,
    doc: str = "",
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    choices: Iterable[Any] | None = None,
) -> Any:
    """A dataclass field with one line of documentation and the values it may take.

    ``ge``, ``gt``, ``le``, ``lt`` bound a number (or each number of a list); ``choices`` lists what is allowed.
    """
    rules = {"ge": ge, "gt": gt, "le": le, "lt": lt, "choices": None if choices is None else tuple(choices)}
    metadata = {"doc": doc, **{key: value for key, value in rules.items() if value is not None}}
    if isinstance(default, (list, dict)):
        value = default
        return field(default_factory=lambda: type(value)(value), metadata=metadata)
    if default is MISSING:
        return field(metadata=metadata)
    return field(default=default, metadata=metadata)


def allowed(f: Field[Any]) -> str:
    """In words, what a field may hold: ``in [0, 1]``, ``> 0``, ``one of a, b``; empty if anything."""
    m = f.metadata
    if "choices" in m:
        return "one of " + ", ".join("null" if c is None else str(c) for c in m["choices"])
    low = f"[{m['ge']:g}" if "ge" in m else f"({m['gt']:g}" if "gt" in m else ""
    high = f"{m['le']:g}]" if "le" in m else f"{m['lt']:g})" if "lt" in m else ""
    if low and high:
        return f"in {low}, {high}"
    if low:
        return f">= {m['ge']:g}" if "ge" in m else f"> {m['gt']:g}"
    if high:
        return f"<= {m['le']:g}" if "le" in m else f"< {m['lt']:g}"
    return ""


def range_problem(f: Field[Any], value: Any) -> str | None:
    """What is wrong with ``value`` for the field's range, or None. Null passes where the default is null."""
    if value is None:
        return None
    m = f.metadata
    if "choices" in m and not isinstance(value, list):
        return None if value in m["choices"] else f"{value!r} is not allowed; use {allowed(f)}"
    for item in value if isinstance(value, list) else [value]:
        if not isinstance(item, (int, float)) or isinstance(item, bool):
            continue
        inside = abs(item) < (2**63 if isinstance(item, int) else math.inf) and (
            ("ge" not in m or item >= m["ge"])
            and ("gt" not in m or item > m["gt"])
            and ("le" not in m or item <= m["le"])
            and ("lt" not in m or item < m["lt"])
        )
        if not inside:  # beyond 64 bits, infinite, or NaN, which fails every comparison
            return f"{item!r} is out of range; use a finite number {allowed(f)}".rstrip()
    return None


@dataclass(frozen=True)
class Parameters:
    """Base of every plugin's parameters: a frozen dataclass whose fields come from :func:`parameter`."""


class Plugin:
    """Base of everything the registry holds.

    Class attributes
    ----------------
    kind: one of ``KINDS``, set by the interface.
    name: the short name configs and checkpoints hold; set by :func:`register`.
    paper: where the method comes from (title, arXiv number or venue).
    tasks: names of the task families it is for; empty: any.
    cost: of methods, in a few words: what time and memory grow with (N clients, D weights).
    Parameters: a frozen dataclass of the method's own parameters.
    """

    kind: ClassVar[str] = ""
    name: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    tasks: ClassVar[tuple[str, ...]] = ()
    cost: ClassVar[str] = ""
    Parameters: ClassVar[type[Parameters]] = Parameters

    def __init__(self, parameters: Any = None) -> None:
        self.parameters: Any = self.Parameters() if parameters is None else parameters

    @classmethod
    def problems(cls, parameters: Any, experiment: Any) -> list[Problem]:
        """What is impossible about ``parameters`` in ``experiment`` (the whole config, already typed).

        Called before anything is loaded; the paths of the problems are relative to the plugin's own section.
        """
        return []

    @classmethod
    def summary(cls) -> str:
        """First line of the docstring."""
        return (cls.__doc__ or "").strip().split("\n")[0]


P = TypeVar("P", bound=type[Plugin])
_registry: dict[str, dict[str, type[Plugin]]] = {kind: {} for kind in KINDS}
_loaded: set[str] = set()


def register(name: str) -> Callable[[P], P]:
    """Class decorator: enter a plugin into the registry under its kind and ``name``.

    Raises
    ------
    PluginError: the name is taken by another class, or the class has no kind.
    """

    def enter(cls: P) -> P:
        if cls.kind not in _registry:
            raise PluginError(f"{cls.__qualname__} is no plugin: derive it from one of fedsim's interfaces")
        known = _registry[cls.kind].get(name)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise PluginError(
                f"two {cls.kind} plugins are called {name!r}: {known.__module__}.{known.__qualname__} "
                f"and {cls.__module__}.{cls.__qualname__}; rename one"
            )
        cls.name = name
        _registry[cls.kind][name] = cls
        return cls

    return enter


def _import_all(package: ModuleType) -> None:
    for info in pkgutil.iter_modules(getattr(package, "__path__", [])):
        importlib.import_module(f"{package.__name__}.{info.name}")


def _import_guarded(name: str) -> None:
    """Import our generic package ``name`` and refuse a stranger of the same name."""
    home = Path(__file__).resolve().parent.parent
    module = importlib.import_module(name)
    found = Path(getattr(module, "__file__", None) or next(iter(module.__path__), "?")).resolve()
    if getattr(module, "__fedsim__", None) != SENTINEL or found.parent.parent != home:
        raise PluginError(
            f"the Python package {name!r} found at {found} is not fedsim's (expected {home / name}); "
            f"remove it from PYTHONPATH or the working directory, or run from elsewhere"
        )
    _import_all(module)


def load(files: Iterable[str] = ()) -> None:
    """Import every built-in plugin, every entry point, and the Python ``files`` named; repeated calls are cheap.

    Raises
    ------
    PluginError: a stranger's ``attacks`` or ``defenses`` shadows ours, or a plugin cannot be imported.
    """
    if "builtin" not in _loaded:
        for room in _ROOMS:
            module = importlib.import_module(room)
            if hasattr(module, "__path__"):
                _import_all(module)
        for package in ("attacks", "defenses"):
            _import_guarded(package)
        for group in ENTRY_POINT_GROUPS:
            for point in importlib.metadata.entry_points(group=group):
                try:
                    point.load()
                except Exception as error:
                    raise PluginError(f"the plugin {point.name!r} ({point.value}) fails to import: {error}") from error
        _loaded.add("builtin")
    for file in files:
        try:
            path = str(Path(file).expanduser().resolve())
        except (OSError, ValueError, RuntimeError) as error:
            raise PluginError(f"plugins: {file!r} is no path: {error}") from None
        if path not in _loaded:
            _load_file(Path(path))
            _loaded.add(path)


def _load_file(path: Path) -> None:
    if not os.path.isfile(path):  # false, too, for a name no file system takes
        raise PluginError(f"plugins: no such file: {path}")
    module_name = f"fedsim_plugin_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise PluginError(f"plugins: {path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except PluginError:
        raise
    except Exception as error:
        del sys.modules[module_name]
        raise PluginError(f"plugins: {path} fails to import: {type(error).__name__}: {error}") from error


def names(kind: str) -> list[str]:
    """The registered names of ``kind``, sorted."""
    load()
    return sorted(_registry[kind])


def get(kind: str, name: str) -> type[Plugin]:
    """The class registered as ``name``.

    Raises
    ------
    PluginError: no such plugin; the message lists what there is and the nearest name.
    """
    load()
    if name not in _registry[kind]:
        raise PluginError(unknown(kind, name))
    return _registry[kind][name]


def unknown(kind: str, name: object) -> str:
    """The message for a name nobody registered; where it is that of another kind, it says what to write."""
    known = names(kind)
    elsewhere = [other for other in KINDS if str(name) in _registry[other]]
    near = difflib.get_close_matches(str(name), known, n=1)
    if elsewhere:
        hint = "".join(f"; it is {_a(other)}: write {_WRITTEN[other].format(name)}" for other in elsewhere)
    else:
        hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"no {kind} is called {name!r}{hint} (there are: {', '.join(known)})"


def _a(kind: str) -> str:
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


def create(kind: str, name: str, **values: Any) -> Any:
    """An instance of the plugin with parameters given as keywords; the ranges are checked.

    Raises
    ------
    PluginError: an unknown name or parameter, or a value out of range.
    """
    cls = get(kind, name)
    known = {f.name: f for f in fields(cls.Parameters)}
    for key, value in values.items():
        if key not in known:
            raise PluginError(f"{kind} {name!r} has no parameter {key!r}; it has: {', '.join(known) or 'none'}")
        problem = range_problem(known[key], value)
        if problem:
            raise PluginError(f"{kind} {name!r}, {key}: {problem}")
    for key, f in known.items():
        if key not in values and f.default is MISSING and f.default_factory is MISSING:
            raise PluginError(f"{kind} {name!r} needs {key}: {f.metadata['doc']}")
    return cls(cls.Parameters(**values))
