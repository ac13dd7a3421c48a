"""Whether two configs are of one experiment: the keys that a result depends on."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from fedsim.config import Config

NO_INFLUENCE = re.compile(r"(name|engine|output)(\.|$)|evaluation\.twin$")
"""Keys of a config on which no result depends (on CPU)."""


def relevant(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config in plain containers without the keys of ``NO_INFLUENCE``; with a section ``evaluation``, if empty."""
    rest = {key: value for key, value in config.items() if not NO_INFLUENCE.match(key)}
    evaluation = config.get("evaluation")
    entries = evaluation.items() if isinstance(evaluation, Mapping) else ()
    return rest | {"evaluation": {k: v for k, v in entries if not NO_INFLUENCE.match(f"evaluation.{k}")}}


def config_hash(config: Config) -> str:
    """SHA-256 of what a result depends on: everything but the engine and where it is written."""
    return hashlib.sha256(json.dumps(relevant(config.to_dict()), sort_keys=True).encode()).hexdigest()


def differing(one: Config, other: Config) -> list[str]:
    """The keys, of those a result depends on, in which two configs differ."""
    first, second = flat(one.to_dict()), flat(other.to_dict())
    return [
        key for key in sorted({*first, *second}) if not NO_INFLUENCE.match(key) and first.get(key) != second.get(key)
    ]


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """Containers as key paths, ``defense.0.bound``, with the values there; an empty container is a value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found: dict[str, Any] = {} if items else {path: value}
    for key, item in items:
        found.update(flat(item, f"{path}.{key}" if path else str(key)))
    return found
