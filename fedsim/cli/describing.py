"""What ``list`` and ``describe`` say of methods and of the config."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from typing import Any

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from fedsim import plugins
from fedsim.cli.console import out

LISTS = {
    "attacks": "attack",
    "defenses": "defense",
    "triggers": "trigger",
    "tasks": "task",
    "models": "model",
    "datasets": "dataset",
    "schedules": "schedule",
    "partitions": "partition",
    "crafts": "craft",
}


def methods(plural: str, *, alone: bool) -> Table:
    """All methods of a kind; where the table stands alone, with what each knows or needs, its cost and paper."""
    kind = LISTS[plural]
    table = Table(box=None, padding=(0, 2, 0, 0), title=None if alone else plural, title_justify="left")
    table.add_column("name", style="bold", no_wrap=True)
    table.add_column("what it is")
    for name in plugins.names(kind):
        cls = plugins.get(kind, name)
        facts = _facts(cls) if alone else []
        table.add_row(name, Text.assemble(cls.summary(), *[("\n" + line, "dim") for line in facts]))
    return table


def describe_method(kind: str, name: str) -> None:
    """Print everything about one method."""
    cls: Any = plugins.get(kind, name)
    out.print(Text(f"{kind} {name}", style="bold"))
    out.print(Text(inspect.cleandoc(cls.__doc__ or "")), soft_wrap=True)
    out.print()
    facts = {"paper": cls.paper, "cost": cls.cost, "tasks": ", ".join(cls.tasks)}
    if kind == "attack":
        facts |= {"knows": knowledge(cls), "backdoor": _yes(cls.backdoor)}
    if kind == "defense":
        facts |= {"needs": needs(cls), "own aggregation rule": _yes(cls.aggregates())}
    for fact, value in facts.items():
        if value:
            out.print(Text(f"{fact}: {value}"), soft_wrap=True)
    out.print()
    _parameters_table(cls.Parameters)


def describe_section(cls: type, path: str = "") -> None:
    """Print every key of a section of the config, with its default; ``path``: the section's own key."""
    from fedsim.config import section_class

    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        if f.metadata.get("internal"):
            continue
        key = f"{path}.{f.name}" if path else f.name
        section = section_class(cls, f.name)
        if section is not None:
            out.print(Text(f"\n{key}:  {(section.__doc__ or '').strip()}", style="bold"))
            describe_section(section, key)
        elif "plugin" in f.metadata or "plugins" in f.metadata:
            kind = f.metadata.get("plugin") or f.metadata["plugins"]
            default = f.metadata.get("plugin_default", [])
            out.print(Text(f"  {key} = {default}   {f.metadata['doc']} (fedsim list {kind}s)"), soft_wrap=True)
        else:
            default, type_text, allowed, doc = _field_row(f, hints[f.name])
            note = f"{type_text}{', ' + allowed if allowed else ''}"
            out.print(Text(f"  {key} = {default}   {doc} ({note})"), soft_wrap=True)


def _defaults(cls: Any) -> Any:
    """The default parameters of a plugin; None where one of them has no default."""
    try:
        return cls.Parameters()
    except TypeError:
        return None


def knowledge(cls: Any) -> str:
    """What an attack sees with its default parameters, and what others may add."""
    defaults = _defaults(cls)
    usual = cls.knows if defaults is None else cls.knowledge(defaults)
    more = sorted(str(k) for k in cls.knows - usual)
    return ", ".join(sorted(str(k) for k in usual)) + (f"; by its parameters also {', '.join(more)}" if more else "")


def needs(cls: Any) -> str:
    """What a defense needs besides updates, with its default parameters."""
    defaults = _defaults(cls)
    least = cls.min_clients if defaults is None else cls.required_clients(defaults)
    parts = {
        f"{least} clients or more": least > 1,
        "the network at the server": cls.needs_network or cls.needs_data,
        "data at the server": cls.needs_data,
        "honest clients that take part in it": cls.client_side(),
    }
    return ", ".join(part for part, needed in parts.items() if needed) or "the updates only"


def _facts(cls: Any) -> list[str]:
    """In two lines: what a method knows or needs and what it costs; its paper."""
    wanted = (
        f"knows {knowledge(cls)}" if cls.kind == "attack" else f"needs {needs(cls)}" if cls.kind == "defense" else ""
    )
    cost = f"cost: {cls.cost}" if cls.cost else ""
    return [line for line in (" · ".join(filter(None, (wanted, cost))), cls.paper) if line]


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _show(value: Any) -> str:
    """A default as it is written in a config."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _field_row(f: dataclasses.Field[Any], hint: Any) -> tuple[str, str, str, str]:
    from fedsim.config import type_name
    from fedsim.plugins import allowed

    if f.default is not dataclasses.MISSING:
        default = _show(f.default)
    elif f.default_factory is not dataclasses.MISSING:
        default = _show(f.default_factory())
    else:
        default = "required"
    return default, type_name(hint), allowed(f), f.metadata.get("doc", "")


def _parameters_table(cls: type) -> None:
    if not dataclasses.fields(cls):
        out.print("no parameters of its own")
        return
    hints = typing.get_type_hints(cls)
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("parameter", style="bold", no_wrap=True)
    table.add_column("default", max_width=24)
    table.add_column("meaning (what is allowed)")
    for f in dataclasses.fields(cls):
        default, type_text, allowed, doc = _field_row(f, hints[f.name])
        note = allowed if allowed.startswith("one of") else ", ".join(part for part in (type_text, allowed) if part)
        table.add_row(f.name, default, escape(f"{doc} ({note})"))
    out.print(table)
