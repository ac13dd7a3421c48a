"""Run directories compared byte by byte, and plugins that a test's configs name."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from fedsim import plugins

TABLES = ("rounds.parquet", "clients.parquet", "model.safetensors")
"""What the same config and seed make the same, whatever the clean twin."""
RESULTS = (*TABLES, "summary.json")
SUMMARY_KEYS = {
    "t0",
    "lifespan",
    "half_life",
    "area",
    "asr_at",
    "time_to_inject",
    "final",
    "stealth",
    "detection",
    "floor",
}
"""Of every summary.json."""
STATEFUL = Path(__file__).parents[1] / "stateful_plugins.py"
"""Plugins that make everything a run must keep visible."""


def contents(directory: Path, names: tuple[str, ...] = TABLES) -> dict[str, bytes]:
    """Some files of a run by name."""
    return {name: (directory / name).read_bytes() for name in names}


def differing(directory: Path, wanted: dict[str, bytes]) -> list[str]:
    """The files of a run that are not as wanted."""
    return [name for name, made in contents(directory, tuple(wanted)).items() if made != wanted[name]]


@contextlib.contextmanager
def forgotten(path: Path) -> Iterator[None]:
    """Other tests do not meet the plugins, called test_…, of this file."""
    yield
    for kind in plugins._registry.values():
        for name in [name for name in kind if name.startswith("test_")]:
            del kind[name]
    plugins._loaded.discard(str(path))
