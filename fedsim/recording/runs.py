"""Run directories: where they are, and what each says of itself (its tables are read elsewhere)."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fedsim.config.reading import refuse_deep
from fedsim.errors import InputError

CELL = "cell.json"
"""What a grid leaves in the directory of a cell: ``{"labels": {axis: label}, "seed": k}``."""

_SAFE: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where PyYAML was built with it
_MOST_BYTES = 16 * 2**20
_MOST_VALUES = 20_000  # in a config; a few lines of aliases can stand for millions


@dataclass(frozen=True)
class RunFiles:
    """What a run directory says of itself. summary: None while there is none. axes: axis → label, of a grid."""

    path: Path
    config: dict[str, Any]
    manifest: dict[str, Any]
    summary: dict[str, Any] | None
    axes: dict[str, str]

    @property
    def stages(self) -> list[Any]:
        """The stages of its defense, as the config has them."""
        stages = self.config.get("defense") or []
        return stages if isinstance(stages, list) else [stages]


def read_runs(directories: Sequence[Path]) -> list[RunFiles]:
    """What the runs at or below the directories hold, sorted by path; a run that is found twice is there once.

    Raises
    ------
    InputError: a directory is missing or holds no run; a file is damaged or not what a run writes.
    """
    found: dict[Path, Path] = {}
    for directory in directories:
        runs = list(run_directories(Path(directory)))
        if not runs:
            raise InputError(f"{directory} holds no run: no config.yaml beside a rounds.parquet, here or below")
        for path in runs:
            found.setdefault(path.resolve(), path)
    return [read_run(path) for path in sorted(found.values())]


def run_directories(directory: Path) -> Iterator[Path]:
    """The run directories at or below ``directory``.

    Raises
    ------
    InputError: there is no such directory, or it cannot be read.
    """
    if not directory.is_dir():
        raise InputError(f"there is no directory {directory}; give the directory of a run, or one that holds runs")
    if _is_run(directory):
        yield directory
        return
    try:
        below = sorted(entry.name for entry in os.scandir(directory) if entry.is_dir(follow_symlinks=False))
    except OSError as error:
        raise InputError(f"{directory} cannot be read: {error.strerror or error}") from None
    for name in below:
        if name != "twins" and not name.startswith("."):
            yield from run_directories(directory / name)


def _is_run(directory: Path) -> bool:
    if not (directory / "config.yaml").is_file():
        return False
    if (directory / "rounds.parquet").is_file():
        return True
    manifest = directory / "manifest.json"
    return manifest.is_file() and "config_sha256" in _json(manifest)


def read_run(directory: Path) -> RunFiles:
    """What a run directory holds, without its tables.

    Raises
    ------
    InputError: a file is damaged or not what a run writes.
    """
    manifest, summary, cell = (directory / name for name in ("manifest.json", "summary.json", CELL))
    axes = _json(cell).get("labels", {}) if cell.is_file() else {}
    if not isinstance(axes, dict) or not all(isinstance(label, str) for label in axes.values()):
        raise InputError(f"{cell} is not what a grid writes: labels must map axes to texts")
    return RunFiles(
        directory,
        _config(directory / "config.yaml"),
        _json(manifest) if manifest.is_file() else {},
        _json(summary) if summary.is_file() else None,
        axes,
    )


def section(mapping: Mapping[str, Any], key: str) -> dict[str, Any]:
    """A section of a config, a manifest or a summary; empty if it is not one."""
    value = mapping.get(key)
    return value if isinstance(value, dict) else {}


def _text(path: Path) -> str:
    try:
        with path.open("rb") as handle:
            raw = handle.read(_MOST_BYTES + 1)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from None
    if len(raw) > _MOST_BYTES:
        raise InputError(f"{path} is larger than {_MOST_BYTES // 2**20} MiB; that is no file of a run")
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8: {error}") from None


def _json(path: Path) -> dict[str, Any]:
    try:
        loaded = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(loaded, dict):
        raise InputError(f"{path} is not what a run writes: it holds no mapping")
    return loaded


def _config(path: Path) -> dict[str, Any]:
    """A run's config as plain containers, with keys of text."""
    try:
        text = _text(path)
        refuse_deep(text)
        loaded = yaml.load(text, Loader=_SAFE)  # noqa: S506
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(loaded, dict):
        raise InputError(f"{path} is not the config of a run: it holds no mapping of keys to values")
    pending: list[Any] = [loaded]
    count = 0
    while pending:
        value = pending.pop()
        count += 1
        if count > _MOST_VALUES:
            raise InputError(f"{path} is not the config of a run: it holds more than {_MOST_VALUES} values")
        if isinstance(value, dict):
            if not all(isinstance(key, str) for key in value):
                raise InputError(f"{path} is not the config of a run: it holds a key that is no text")
            pending += value.values()
        elif isinstance(value, list):
            pending += value
    return loaded
