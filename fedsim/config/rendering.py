"""``configs/base.yaml``, written from the schema."""

from __future__ import annotations

import dataclasses
from dataclasses import fields
from typing import Any

import yaml

from fedsim import plugins
from fedsim.config.checking import read_choice
from fedsim.config.schema import Config, ConfigDumper

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
            chosen = read_choice(f.metadata["plugin"], f.metadata["plugin_default"], f.name, [])
            lines += [f"{indent}{f.name}:  # {comment}", f"{indent}  name: {chosen.name}"]
            lines += _rendered(chosen.parameters, f"{indent}  ")
        elif dataclasses.is_dataclass(value):
            head = " ".join((value.__doc__ or "").split())
            lines += [f"\n{indent}{f.name}:  # {head}", *_rendered(value, f"{indent}  ")]
        else:
            text = yaml.dump({f.name: value}, Dumper=ConfigDumper, allow_unicode=True, width=1000).strip()
            allowed = plugins.allowed(f)
            gap = "\n" if "plugins" in f.metadata and not indent else ""
            lines.append(f"{gap}{indent}{text}  # {comment}{f'; {allowed}' if allowed else ''}")
    return lines
