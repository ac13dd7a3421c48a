"""Texts without absolute paths: what a run leaves behind and shows names no machine and no user."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_QUOTED = re.compile(r"(['\"`])((?:~[\w.-]*)?/[^'\"`\n]*|[A-Za-z]:\\[^'\"`\n]*)\1")
_UNIX = re.compile(r"(?<![\w./~…])(?:file://)?(?:~[\w.-]*)?/(?:[^/\s'\",:;()]+/)+[^/\s'\",:;()]*")
_WINDOWS = re.compile(r"\b[A-Za-z]:\\[^\s'\"]*")


def portable(value: Any) -> Any:
    """Plain containers with every absolute path in their texts cut down to its last part.

    ``/home/somebody/data`` becomes ``…/data``, also within a message. What is needed to play the run again, paths as
    they were given, is in ``config.yaml``.
    """
    if isinstance(value, Mapping):
        return {portable(key): portable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [portable(item) for item in value]
    if not isinstance(value, str):
        return value
    if value.startswith(("/", "~")) or _WINDOWS.match(value):
        return _last_part(value) if "\n" not in value else _cut(value)
    return _cut(value)


def _cut(text: str) -> str:
    text = _QUOTED.sub(lambda found: f"{found[1]}{_last_part(found[2])}{found[1]}", text)
    for pattern in (_WINDOWS, _UNIX):
        text = pattern.sub(lambda found: _last_part(found[0]), text)
    return text


def _last_part(path: str) -> str:
    parts = [part for part in re.split(r"[/\\]", path) if part]
    return f"…/{parts[-1]}" if parts and (len(parts) > 1 or path.startswith("/")) else path
