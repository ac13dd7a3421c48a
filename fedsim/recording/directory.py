"""A run directory: its name, what is complete in it, and the lock that keeps a second run out of it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import IO

from fedsim.config import Config
from fedsim.errors import FedsimError, InputError
from fedsim.recording.files import disk_error
from fedsim.recording.tables import JOURNAL

TWIN = "twin"
"""Sub-directory of the clean twin's tables."""

_STALE = ".*.tmp"
"""What a killed run was about to put in place."""


def new_directory(config: Config) -> Path:
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    base = Path(config.output.dir) / config.name / f"{stamp}-seed{config.seed}"
    candidate, i = base, 1
    while candidate.exists():
        i += 1
        candidate = base.with_name(f"{base.name}-{i}")
    return candidate


@contextlib.contextmanager
def locked(directory: Path, resume: bool) -> Iterator[None]:
    """Create the run directory and hold its lock.

    Raises
    ------
    InputError: it holds something already, or another run is at work in it.
    """
    fresh = not directory.exists()
    if directory.exists() and not directory.is_dir():
        raise InputError(f"{directory} is a file; give a directory")
    occupied = directory.exists() and any(p.name != ".lock" and not p.match(_STALE) for p in directory.iterdir())
    if occupied and not resume:
        raise InputError(f"{directory} is not empty; give another --out, or continue the run there with --resume")
    if occupied and not (directory / "config.yaml").exists():
        raise InputError(f"{directory} holds files, but no run; give another --out")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        handle: IO[str] = (directory / ".lock").open("w")
    except OSError as error:
        raise disk_error(directory, error) from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(handle.fileno()).st_nlink == 0:  # its holder has removed it meanwhile
            raise BlockingIOError
    except OSError:
        handle.close()
        raise InputError(f"another run is at work in {directory}; give another --out") from None
    for stale in directory.rglob(_STALE):
        stale.unlink(missing_ok=True)
    try:
        yield
    except FedsimError:
        if fresh and not (directory / "config.yaml").exists():  # nothing was begun: leave nothing behind
            (directory / ".lock").unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                directory.rmdir()
        raise
    finally:
        (directory / ".lock").unlink(missing_ok=True)  # while it is held: nobody else's is taken away
        handle.close()


def is_finished(directory: Path, config: Config) -> bool:
    """Whether the run in the directory has written its last file: the report, where it writes one."""
    try:
        manifest = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
        reported = not config.output.report or (directory / "report.html").is_file()
        return reported and (directory / "summary.json").is_file() and manifest.get("status") == "finished"
    except (OSError, ValueError, AttributeError):
        return False


def is_played(directory: Path) -> bool:
    """Whether all rounds of a run, or of its twin, are in the tables there (the journal goes with the last)."""
    return (directory / "rounds.parquet").exists() and not (directory / JOURNAL).exists()
