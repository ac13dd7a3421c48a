"""The results of many runs as one table: a row a run, from what each run directory holds."""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import yaml

from fedsim.config.reading import refuse_deep
from fedsim.errors import InputError
from fedsim.recording.files import write_atomic
from fedsim.recording.manifest import portable
from fedsim.recording.summary import HORIZONS, KAPPAS

CELL = "cell.json"
"""What a grid leaves in the directory of a cell: ``{"labels": {axis: label}, "seed": k}``."""

LABELS = ("task", "model", "attack", "trigger", "schedule", "defense", "partition")
"""The columns that say in words what was run; a grid's further axes are columns ``axis.<name>``."""

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
_STATUS = {"finished": "complete", "running": "running", "failed": "failed", "interrupted": "interrupted"}
_SAFE: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where PyYAML was built with it
_MOST_BYTES = 16 * 2**20
_MOST_VALUES = 20_000  # in a config; a few lines of aliases can stand for millions
_LONGEST = 48  # characters of a value in a label
_NAN = float("nan")
_ABSENT = object()


@dataclass(frozen=True)
class RunFiles:
    """What a run directory says of itself. summary: None while there is none. axes: axis → label, of a grid."""

    path: Path
    config: dict[str, Any]
    manifest: dict[str, Any]
    summary: dict[str, Any] | None
    axes: dict[str, str]


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


def read_runs(directories: Sequence[Path]) -> list[RunFiles]:
    """What the runs at or below the directories hold, sorted by path; errors as in :func:`collect`."""
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


def tabulate(runs: Sequence[RunFiles]) -> pd.DataFrame:
    """The table of :func:`collect` for runs that were read already."""
    columns: dict[str, list[Any]] = {name: [] for name in _DTYPES}
    for run in runs:
        facts = {**dict.fromkeys(MEASURES, float("nan")), **_identity(run), **_numbers(run)}
        for name in columns.keys() - {*LABELS, "settings"}:
            columns[name].append(facts.get(name, False))  # only <span>_censored has a default
    columns.update(_described(runs))
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
    seed, rounds = config.get("seed", 0), _part(config, "federation").get("rounds")
    if not isinstance(seed, int) or not -(2**63) <= seed < 2**63:
        raise InputError(f"{run.path / 'config.yaml'}: seed is {brief(seed)}, not a whole number")
    stages = _stages(config)
    said = manifest.get("status", "finished" if run.summary is not None else "interrupted")
    return {
        "run": str(run.path),
        "name": str(config.get("name", "")),
        "seed": seed,
        "row": hashlib.sha256(json.dumps(_relevant(config), sort_keys=True, default=str).encode()).hexdigest()[:12],
        "undefended": all(_named(stage) == "fedavg" for stage in stages),
        "status": _STATUS.get(str(said), str(said)),
        "message": str(manifest.get("reason") or ""),
        "rounds": _float(rounds, run.path / "config.yaml"),
        "seconds": _float(manifest.get("seconds"), run.path / "manifest.json"),
        "t0": float("nan"),
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
    found["auroc_score"] = score = _main_score(run.config, _part(_part(summary, "detection"), "auroc"))
    found["auroc"] = number("detection", "auroc", score)
    twin = run.path / "twin" / "rounds.parquet"
    if summary.get("floor") == "clean twin" and twin.is_file():
        found["twin_accuracy"], found["asr_floor"] = _last_of_twin(twin)
    return found


def _main_score(config: Mapping[str, Any], scores: Mapping[str, Any]) -> str:
    """Of the first stage that gave scores the one named ``score``, else the first by name; "" if there is none."""
    names = [_named(stage) for stage in _stages(config)]
    # a stage that is in the pipeline more than once is numbered, as fedsim.defense.prefixes does
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


def _described(runs: Sequence[RunFiles]) -> dict[str, list[str]]:
    """The columns in words."""
    sections: dict[str, list[Any]] = defaultdict(list)
    rests = []
    for run in runs:
        config = run.config
        task, attack = _part(config, "task"), _part(config, "attack")
        federation = _part(config, "federation")
        sections["task"].append({key: value for key, value in task.items() if key != "model"})
        sections["model"].append(task.get("model"))
        sections["attack"].append({key: v for key, v in attack.items() if key not in ("trigger", "schedule")})
        sections["trigger"].append(attack.get("trigger"))
        sections["schedule"].append(attack.get("schedule"))
        sections["defense"].append(_stages(config))
        sections["partition"].append(federation.get("partition"))
        rest = {key: value for key, value in _relevant(config).items() if key not in ("task", "attack", "defense")}
        rest["federation"] = {key: value for key, value in federation.items() if key != "partition"}
        rests.append(rest)
    words = {column: _labels(column, sections[column], runs) for column in LABELS}
    return {**words, "settings": _joined(_differences(rests), runs)}


def _labels(column: str, sections: Sequence[Any], runs: Sequence[RunFiles]) -> list[str]:
    """A label a run: the grid's own, or the method's name; with the parameters in which namesakes differ."""
    given = [run.axes.get(column) for run in runs]
    ours = [i for i, label in enumerate(given) if label is not None]
    others = [i for i, label in enumerate(given) if label is None]
    named = _told_apart([str(given[i]) for i in ours], [sections[i] for i in ours], [runs[i] for i in ours])
    labels = dict(zip(ours, named, strict=True))
    if column == "defense":
        stages = [(i, stage) for i in others for stage in sections[i]]
        texts = _told_apart([_named(stage) for _, stage in stages], [stage for _, stage in stages])
        pipelines: dict[int, list[str]] = {i: [] for i in others}
        for (i, _), text in zip(stages, texts, strict=True):
            pipelines[i].append(text)
        labels |= {i: " + ".join(pipeline) or "fedavg" for i, pipeline in pipelines.items()}
    else:
        bases = [_named(sections[i]) for i in others]
        if column == "task":
            bases = [f"{base} / {_named(sections[i].get('data'))}" for base, i in zip(bases, others, strict=True)]
        labels |= dict(zip(others, _told_apart(bases, [sections[i] for i in others]), strict=True))
    return [labels[i] for i in range(len(runs))]


def _told_apart(bases: Sequence[str], sections: Sequence[Any], runs: Sequence[RunFiles] = ()) -> list[str]:
    """Each base; where sections of one base differ, with the keys and values in which they do.

    runs: whose the sections are, if their grids' labels are to count as telling.
    """
    members = defaultdict(list)
    for i, base in enumerate(bases):
        members[base].append(i)
    labels = list(bases)
    for base, indices in members.items():
        found = _differences([sections[i] for i in indices])
        whose = [runs[i] if runs else None for i in indices]
        for i, text in zip(indices, _joined(found, whose), strict=True):
            labels[i] = f"{base} ({text})" if text else base
    return labels


def _joined(differences: Sequence[tuple[str, Sequence[str]]], runs: Sequence[RunFiles | None]) -> list[str]:
    """The differences of each of the runs in one line, without those that a grid's labels tell already."""
    parts: list[list[str]] = [[] for _ in runs]
    for key, texts in differences:
        for part, text, told in zip(parts, texts, _told_by_grid(runs, texts), strict=True):
            if not told:
                part.append(f"{key}={text}" if key else text)
    return [", ".join(part) for part in parts]


def _told_by_grid(runs: Sequence[RunFiles | None], texts: Sequence[str]) -> list[bool]:
    """Which runs lie in a grid (a directory of cells) that itself varies what the texts say, by its labels."""
    grids: dict[Path, dict[tuple[tuple[str, str], ...], set[str]]] = defaultdict(lambda: defaultdict(set))
    for run, text in zip(runs, texts, strict=True):
        if run is not None and run.axes:
            grids[run.path.parent][tuple(sorted(run.axes.items()))].add(text)
    telling = {
        grid
        for grid, cells in grids.items()
        if len(set().union(*cells.values())) > 1 and all(len(found) == 1 for found in cells.values())
    }
    return [run is not None and bool(run.axes) and run.path.parent in telling for run in runs]


def _differences(values: Sequence[Any], path: str = "") -> list[tuple[str, list[str]]]:
    """Where ``values`` differ: key path and the text of each value there.

    Two plugins of different names differ as wholes, not key by key.
    """
    if not values or all(value is values[0] or value == values[0] for value in values[1:]):
        return []
    head = f"{path}." if path else ""
    if all(isinstance(value, dict) for value in values) and len({str(value.get("name")) for value in values}) == 1:
        keys = dict.fromkeys(key for value in values for key in value)
        parts = [_differences([value.get(key, _ABSENT) for value in values], f"{head}{key}") for key in keys]
        return [difference for part in parts for difference in part]
    if all(isinstance(value, list) and all(isinstance(item, dict) for item in value) for value in values):
        lengths = {len(value) for value in values}
        if len(lengths) == 1:
            count = lengths.pop()
            heads = [path] if count == 1 else [f"{head}{i}" for i in range(count)]  # a single entry needs no number
            parts = [_differences([value[i] for value in values], where) for i, where in enumerate(heads)]
            return [difference for part in parts for difference in part]
    return [(path, [_cut(*_without_paths(value)) for value in values])]


def brief(value: Any) -> str:
    """A value of a config in one line: ``krum(f=2)`` for a plugin, its name alone where it has no parameters."""
    if value is _ABSENT:
        return "unset"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, dict):
        inner = ", ".join(f"{key}={brief(item)}" for key, item in value.items() if key != "name")
        return f"{value.get('name', '')}({inner})" if inner else str(value.get("name", ""))
    if isinstance(value, list):
        return " + ".join(map(brief, value)) or "none"
    return str(value)


def _without_paths(value: Any) -> tuple[str, str]:
    """The text of a value, with and without the directories in it."""
    return brief(value), brief(portable(value))


def _cut(whole: str, text: str) -> str:
    """A text that is too long for a label loses its end, and a path its beginning, but not its identity."""
    if len(text) <= _LONGEST and text == whole:
        return text
    short = text if len(text) <= _LONGEST - 6 else f"{text[: _LONGEST - 8]}…"
    return f"{short} #{hashlib.sha256(whole.encode()).hexdigest()[:4]}"


def _named(section: Any) -> str:
    if isinstance(section, Mapping):
        return str(section.get("name") or "none")
    return str(section or "none")


def _stages(config: Mapping[str, Any]) -> list[Any]:
    stages = config.get("defense") or []
    return stages if isinstance(stages, list) else [stages]


def _part(mapping: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = mapping.get(key)
    return value if isinstance(value, dict) else {}


def _relevant(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a result depends on beside the seed: neither the engine nor where it is written."""
    rest = {key: value for key, value in config.items() if key not in ("name", "seed", "engine", "output")}
    rest["evaluation"] = {key: value for key, value in _part(config, "evaluation").items() if key != "twin"}
    return rest


# ---------------------------------------------------------------------------------------------------- files


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
