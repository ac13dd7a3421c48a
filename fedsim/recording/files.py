"""Writing files so that they are whole or absent: a temporary file, fsync, rename."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedsim.errors import RunError


def write_atomic(path: Path, write: Callable[[Path], object], *, sync: bool = True) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then put it in place.

    sync: make sure that it survives a power cut (a killed process it survives anyway).

    Raises
    ------
    RunError: the disk is full, or the directory cannot be written; what was there stays whole.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        if sync:
            with temporary.open("rb+") as handle:
                os.fsync(handle.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise disk_error(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def disk_error(path: Path, error: OSError) -> RunError:
    """The message for a write that failed."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return RunError(f"the disk is full: {path.name} could not be written; free some room, then run with --resume")
    return RunError(f"{path} could not be written: {error.strerror or error}")


def write_text(path: Path, text: str) -> None:
    """Write text atomically."""
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically; NaN is refused (use null)."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n")
