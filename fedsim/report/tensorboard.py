"""The rounds of a run as TensorBoard events."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd

from fedsim.errors import InputError

SCALARS = {
    "main_accuracy": "main/accuracy",
    "main_loss": "main/loss",
    "perplexity": "main/perplexity",
    "asr": "backdoor/asr",
    "malicious_submitted": "attack/malicious_submitted",
    "malicious_accepted": "defense/malicious_accepted",
}
"""Column of the ``rounds`` table → tag of the scalar."""


def write_events(directory: Path) -> Path:
    """Write a run's ``rounds`` (and ``timings``) tables to ``<directory>/tensorboard``; returns that folder.

    The step is the round; rounds that were not evaluated have no point. Events written before are replaced.

    Raises
    ------
    InputError: TensorBoard is not installed, or the directory holds no run.
    """
    writer_class = _writer_class()
    directory = Path(directory)
    if not (directory / "rounds.parquet").is_file():
        raise InputError(f"{directory} is not the directory of a run: it has no rounds.parquet")
    target = directory / "tensorboard"
    for old in target.glob("events.out.tfevents.*"):
        old.unlink()
    writer = writer_class(log_dir=str(target))
    try:
        _write(writer, pd.read_parquet(directory / "rounds.parquet"), SCALARS)
        if (directory / "timings.parquet").is_file():
            timings = pd.read_parquet(directory / "timings.parquet")
            phases = [str(c) for c in timings if str(c).startswith("seconds_")]
            _write(writer, timings, {c: f"seconds/{c.removeprefix('seconds_')}" for c in phases})
    finally:
        writer.close()
    for made in target.glob("events.out.tfevents.*"):
        made.rename(target / "events.out.tfevents.rounds")  # the name that it was given tells the machine's
    return target


def _write(writer: Any, table: pd.DataFrame, tags: dict[str, str]) -> None:
    for column, tag in tags.items():
        if column not in table:  # runs of older versions have no perplexity
            continue
        values = table[column].astype("float64").tolist()
        for t, value in zip(table["round"].tolist(), values, strict=True):
            if not math.isnan(value):
                writer.add_scalar(tag, value, t)


def _writer_class() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise InputError(
            "TensorBoard is not installed; run: pip install 'fedsim-backdoor[tensorboard]' "
            "(or set output.tensorboard=false)"
        ) from None
    return SummaryWriter
