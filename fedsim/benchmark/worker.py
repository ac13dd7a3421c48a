"""One run of a benchmark as a Ray task plays it, in a process of its own."""

from __future__ import annotations

import contextlib
import logging
import os
import traceback
from pathlib import Path
from typing import Any

import torch

from fedsim.config import build
from fedsim.errors import FedsimError
from fedsim.experiment import Silent, run
from fedsim.recording.files import write_json
from fedsim.recording.runs import CELL


class _Mark(Silent):
    """Says in the run's directory which cell it is, as soon as there is one."""

    def __init__(self, directory: Path, cell: dict[str, Any] | None) -> None:
        self.directory, self.cell = directory, cell

    def begin(self, what: str, rounds: int, done: int) -> None:
        self.write()

    def write(self) -> None:
        path = self.directory / CELL
        if self.cell is not None and not path.is_file():
            write_json(path, self.cell)


def play_one(
    raw: dict[str, Any],
    out: str,
    *,
    twin: str | None,
    own_twin: bool,
    clients_of: dict[str, Any] | None,
    cell: dict[str, Any] | None,
    threads: int,
    started_in: str,
) -> tuple[str, str]:
    """Play one run, or what is missing of it; ("", "") or what went wrong: (message, traceback).

    raw: the config. twin: the directory of the shared clean twin. cell: what is written into ``cell.json``.
    started_in: the directory that paths in the config are relative to. The others: see :func:`fedsim.experiment.run`.
    """
    logging.getLogger("flwr").setLevel(logging.WARNING)
    torch.set_num_threads(1)
    with contextlib.suppress(OSError):
        os.chdir(started_in)
    directory = Path(out)
    try:
        mark = _Mark(directory, cell)
        run(
            build(raw),
            out=directory,
            twin=own_twin,
            resume=True,
            progress=mark,
            twin_from=None if twin is None else Path(twin),
            clients_of=None if clients_of is None else build(clients_of, possible=False),
            threads=threads,
        )
        mark.write()
    except FedsimError as error:
        return str(error), traceback.format_exc()
    except MemoryError:
        return "out of memory; play fewer runs at a time (--jobs)", traceback.format_exc()
    except Exception as error:
        return f"{type(error).__name__}: {error}", traceback.format_exc()
    return "", ""
