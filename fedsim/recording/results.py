"""The results of many runs as one table: a row a run, from the summary that each left."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from fedsim.errors import InputError
from fedsim.recording.directory import TWIN
from fedsim.recording.files import write_atomic
from fedsim.recording.identity import relevant
from fedsim.recording.labels import LABELS, brief, described, name_of
from fedsim.recording.runs import RunFiles, read_runs, section
from fedsim.recording.summary import HORIZONS, KAPPAS

COMPLETE = "complete"
"""The status of a run that was played to its end; the others are running, failed and interrupted."""

SPANS = (*(f"{what}_{round(100 * k)}" for what in ("lifespan", "crossing") for k in KAPPAS), "half_life")
"""Columns that hold a number of rounds; ``<column>_censored`` says that the run ended first."""

MEASURES = (
    "main_accuracy",
    "main_loss",
    "perplexity",
    "asr",
    "asr_floor",
    "twin_accuracy",
    "stealth_final",
    "stealth_attack_rounds",
    *SPANS,
    *(f"{what}_{h}" for what in ("area", "asr_at") for h in HORIZONS),
    *(f"time_to_inject_{round(100 * k)}" for k in KAPPAS),
    "tpr",
    "fpr",
    "fpr_attack_rounds",
    "malicious_weight",
    "auroc",
    "seconds",
)
"""Columns of numbers that may be missing."""

_DTYPES: dict[str, str] = {
    **dict.fromkeys(("run", "name"), "str"),
    "seed": "int64",
    **dict.fromkeys(("row", *LABELS, "settings"), "str"),
    "undefended": "bool",
    **dict.fromkeys(("status", "message"), "str"),
    **dict.fromkeys(("rounds", "t0"), "float64"),
    **{
        column: dtype
        for measure in MEASURES
        for column, dtype in ((measure, "float64"), (f"{measure}_censored", "bool"))
        if dtype == "float64" or measure in SPANS
    },
    "auroc_score": "str",
}
_NAN = float("nan")


def collect(directories: Sequence[Path]) -> pd.DataFrame:
    """The runs at or below the directories, one row a run, sorted by what was run and then by seed.

    A run is a directory with a ``config.yaml`` and either ``rounds.parquet`` or a run's ``manifest.json`` (one
    that failed before its first round). What lies inside a run (its clean twin) is not looked at, nor are
    ``twins/`` beside a grid's cells and hidden directories. A run that is found twice is one row.

    Columns
    -------
    run: the path. name, seed. row: the same for runs whose results can differ by the seed alone.
    task, model, attack, trigger, schedule, defense, partition: in words, see below. axis.<name>: a grid's
        other axes ("" for runs of no grid). settings: other keys of the config in which the runs differ.
    undefended: the pipeline is plain FedAvg.
    status: complete, running, failed or interrupted, as the manifest says; a killed run still says running.
    message: why it failed, or "". rounds: of the config. t0: last round with a malicious submission.
    main_accuracy, main_loss, perplexity, asr: at the last evaluated round. asr_floor, twin_accuracy: the same
        of the clean twin. stealth_final, stealth_attack_rounds: main accuracy minus the twin's.
    lifespan_K, crossing_K (first age at κ or below), half_life: in rounds, K = 100 κ; with ``<column>_censored``
        (False where the number is missing). area_H, asr_at_H: shares. time_to_inject_K: submissions.
    tpr, fpr, fpr_attack_rounds, malicious_weight; auroc of the score named in auroc_score: of the first stage
        of the pipeline that gave scores the one called ``score``, else the first by name.
    seconds: wall time.

    A number that is missing or meaningless is NaN; texts are never missing. A label is the name of the method
    (or a grid's own label) with those parameters in which the runs collected under that name differ, as in
    ``norm_clipping (bound=0.5)``; the stages of a pipeline are joined by `` + ``, an empty one is ``fedavg``. What
    a grid itself varies is told by its labels, and appears neither beside them nor in ``settings``.

    Raises
    ------
    InputError: a directory is missing or holds no run; a file is damaged or not what a run writes.
    """
    return tabulate(read_runs(directories))


def tabulate(runs: Sequence[RunFiles]) -> pd.DataFrame:
    """The table of :func:`collect` for runs that were read already."""
    columns: dict[str, list[Any]] = {name: [] for name in _DTYPES}
    for run in runs:
        facts = {**dict.fromkeys(MEASURES, _NAN), **_identity(run), **_numbers(run)}
        for name in columns.keys() - {*LABELS, "settings"}:
            columns[name].append(facts.get(name, False))  # only <span>_censored has a default
    columns.update(described(runs))
    for axis in sorted({axis for run in runs for axis in run.axes} - {*LABELS, "seed", "seeds"}):
        columns[f"axis.{axis}"] = [run.axes.get(axis, "") for run in runs]
    frame = pd.DataFrame({name: pd.Series(values, dtype=_DTYPES.get(name, "str")) for name, values in columns.items()})
    order = ["task", "model", "partition", "attack", "trigger", "schedule", "defense", "settings", "seed", "run"]
    return frame.sort_values(order, ignore_index=True)


def write_results(frame: pd.DataFrame, directory: Path) -> None:
    """Write ``results.parquet`` and ``results.csv``; the column ``run`` becomes relative to ``directory``.

    Raises
    ------
    RunError: the disk is full, or the directory cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    relative = [Path(os.path.relpath(run, directory)).as_posix() for run in frame["run"]]
    table = frame.assign(run=pd.Series(relative, index=frame.index, dtype="str"))
    write_atomic(directory / "results.parquet", lambda path: table.to_parquet(path, index=False))
    text = table.to_csv(index=False, lineterminator="\n").encode()
    write_atomic(directory / "results.csv", lambda path: path.write_bytes(text))


# --------------------------------------------------------------------------------------------------- numbers


def _identity(run: RunFiles) -> dict[str, Any]:
    config, manifest = run.config, run.manifest
    seed, rounds = config.get("seed", 0), section(config, "federation").get("rounds")
    if not isinstance(seed, int) or not -(2**63) <= seed < 2**63:
        raise InputError(f"{run.path / 'config.yaml'}: seed is {brief(seed)}, not a whole number")
    same = {key: value for key, value in relevant(config).items() if key != "seed"}
    said = manifest.get("status", "finished" if run.summary is not None else "interrupted")
    return {
        "run": str(run.path),
        "name": str(config.get("name", "")),
        "seed": seed,
        "row": hashlib.sha256(json.dumps(same, sort_keys=True, default=str).encode()).hexdigest()[:12],
        "undefended": all(name_of(stage) == "fedavg" for stage in run.stages),
        "status": COMPLETE if said == "finished" else str(said),
        "message": str(manifest.get("reason") or ""),
        "rounds": _float(rounds, run.path / "config.yaml"),
        "seconds": _float(manifest.get("seconds"), run.path / "manifest.json"),
        "t0": _NAN,
        "auroc_score": "",
    }


def _numbers(run: RunFiles) -> dict[str, Any]:
    """The columns that ``summary.json`` (and the twin) fill; none without a summary."""
    summary, path = run.summary, run.path / "summary.json"
    if summary is None:
        return {}

    def number(*keys: str) -> float:
        value: Any = summary
        for key in keys:
            if value is None:
                break
            if not isinstance(value, dict):
                raise InputError(f"{path} is not the summary of a run: {key!r} is looked for in {brief(value)}")
            value = value.get(key)
        return _float(value, path)

    found: dict[str, Any] = {"t0": number("t0"), "half_life": number("half_life", "rounds")}
    found["half_life_censored"] = number("half_life", "censored") == 1
    for kappa in KAPPAS:
        key, short = f"{kappa:g}", round(100 * kappa)
        for column, where in ((f"lifespan_{short}", (key,)), (f"crossing_{short}", (key, "first_crossing"))):
            found[column] = number("lifespan", *where, "rounds")
            found[f"{column}_censored"] = number("lifespan", *where, "censored") == 1
        found[f"time_to_inject_{short}"] = number("time_to_inject", key)
    for horizon in HORIZONS:
        found[f"area_{horizon}"] = number("area", str(horizon))
        found[f"asr_at_{horizon}"] = number("asr_at", str(horizon))
    for name in ("main_accuracy", "main_loss", "perplexity", "asr"):
        found[name] = number("final", name)
    for name in ("final", "attack_rounds"):
        found[f"stealth_{name}"] = number("stealth", name)
    for name in ("tpr", "fpr", "fpr_attack_rounds", "malicious_weight"):
        found[name] = number("detection", name)
    found["auroc_score"] = score = _main_score(run.stages, section(section(summary, "detection"), "auroc"))
    found["auroc"] = number("detection", "auroc", score)
    twin = run.path / TWIN / "rounds.parquet"
    if summary.get("floor") == "clean twin" and twin.is_file():
        found["twin_accuracy"], found["asr_floor"] = _last_of_twin(twin)
    return found


def _main_score(stages: Sequence[Any], scores: Mapping[str, Any]) -> str:
    """Of the first stage that gave scores the one named ``score``, else the first by name; "" if there is none."""
    names = [name_of(stage) for stage in stages]
    # a stage that is in the pipeline more than once is numbered, as fedsim.pipeline.prefixes does
    order = [n if names.count(n) == 1 else f"{n}{names[: i + 1].count(n)}" for i, n in enumerate(names)]

    def rank(name: str) -> tuple[int, bool, str]:
        stage, _, score = name.partition(".")
        return (order.index(stage) if stage in order else len(order)), score != "score", name

    return min(map(str, scores), key=rank, default="")


def _last_of_twin(path: Path) -> tuple[float, float]:
    """Main accuracy and ASR of the last evaluated round of a table of rounds."""
    try:
        names = ["round", "main_accuracy", "asr"]
        table = pq.ParquetFile(path).read(columns=names, use_threads=False)
        rounds, accuracy, asr = (table[name].to_numpy().astype(np.float64) for name in names)
    except (OSError, ValueError, LookupError, TypeError) as error:  # what pyarrow raises derives from these
        raise InputError(f"{path} cannot be read: {error}") from None
    evaluated = np.flatnonzero(~(np.isnan(accuracy) & np.isnan(asr)))
    if not evaluated.size:
        return _NAN, _NAN
    last = evaluated[rounds[evaluated].argmax()]
    return float(accuracy[last]), float(asr[last])


def _float(value: Any, path: Path) -> float:
    if value is None:
        return _NAN
    if not isinstance(value, (int, float)):
        raise InputError(f"{path} is not what a run writes: {brief(value)} stands where a number belongs")
    try:
        return float(value)
    except OverflowError:
        raise InputError(f"{path} is not what a run writes: a number there is out of range") from None


# ---------------------------------------------------------------------------------------------------- labels


# ---------------------------------------------------------------------------------------------------- files
