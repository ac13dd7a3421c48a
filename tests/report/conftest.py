"""A synthetic run directory: an attack in rounds 20 to 40, a backdoor that decays, a defense that scores."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from fedsim.recording.summary import summarise
from fedsim.recording.tables import CLIENTS, ROUNDS

HOSTILE = "<script>alert('gotcha')</script>"


def make_rounds(
    *, last: int, attacks: range, half: float, seed: int, every: int = 1, final: float = 0.03
) -> pd.DataFrame:
    """A ``rounds`` table whose ASR rises under attack and then halves every ``half`` rounds."""
    rng = np.random.default_rng(seed)
    t = np.arange(1, last + 1)
    accuracy = 0.93 - 0.8 * np.exp(-t / 12) + rng.normal(0, 0.008, last)
    asr = np.full(last, final)
    if len(attacks):
        first, t0 = attacks[0], attacks[-1]
        rising = 1 - np.exp(-np.clip(t - first + 1, 0, t0 - first + 1) / 3)
        decay = 0.5 ** (np.clip(t - t0, 0, None) / half)
        asr = final + (0.95 - final) * rising * decay
    asr = np.clip(asr + rng.normal(0, 0.02, last), 0, 1)
    evaluated = (t % every == 0) | (t == last)
    submitted = np.isin(t, list(attacks)).astype(int)
    return pd.DataFrame(
        {
            "round": t,
            "main_accuracy": np.where(evaluated, np.clip(accuracy, 0, 1), np.nan),
            "main_loss": np.where(evaluated, 2.3 * np.exp(-t / 20) + 0.2, np.nan),
            "asr": np.where(evaluated, asr, np.nan),
            "asr_examples": pd.array(np.where(evaluated, 900, 0), dtype="Int64"),
            "malicious_submitted": submitted,
            "malicious_accepted": submitted,
        }
    )


def make_clients(rounds: pd.DataFrame, *, per_round: int, names: list[str], seed: int) -> pd.DataFrame:
    """A ``clients`` table with one attacker in an attack round; only the first score tells it from others."""
    rng = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    for t, attackers in zip(rounds["round"], rounds["malicious_submitted"], strict=True):
        batch = []
        for i in range(per_round):
            bad = i < attackers
            score = rng.normal(2.2 if bad else 0, 1)
            status = "dropped" if not bad and rng.random() < 0.03 else "ok"
            ok = status == "ok"
            batch.append(
                {
                    "round": int(t),
                    "client": i if bad else 10 + int(rng.integers(90)),
                    "malicious": bad,
                    "examples": int(rng.integers(50, 200)),
                    "update_norm": float(rng.lognormal(2.5 if bad else 0.2, 0.25)) if ok else None,
                    "accepted": ok and score < 2,
                    "weight": None,
                    "status": status,
                    "scores": [(n, score if j == 0 else float(rng.exponential(1))) for j, n in enumerate(names)]
                    if ok
                    else None,
                }
            )
        total = sum(row["examples"] for row in batch if row["accepted"])
        for row in batch:
            row["weight"] = row["examples"] / total if row["accepted"] else 0.0
        rows += batch
    return pd.DataFrame(rows)


def write_run(
    directory: Path,
    *,
    twin: bool = True,
    last: int = 200,
    attacks: range = range(20, 41),
    half: float = 60.0,
    every: int = 1,
    names: tuple[str, ...] = ("multi_metrics.distance", "multi_metrics.cosine"),
    config: dict[str, Any] | None = None,
    manifest: dict[str, Any] | None = None,
    summary: bool = True,
    task: str | None = "vision",
    classes: int = 10,
) -> Path:
    """Write the tables of a run as a recorder would and return its directory.

    task: vision, sentiment, next_word; None: vision, of a version that counted nothing per class.
    classes: number of classes, the second of which has no test examples.
    """
    directory.mkdir(parents=True, exist_ok=True)
    rounds = make_rounds(last=last, attacks=attacks, half=half, seed=1, every=every)
    clients = make_clients(rounds, per_round=10, names=list(names), seed=2)
    if task is not None:
        words, measured = task == "next_word", rounds["main_accuracy"].notna()
        rounds["perplexity"] = np.exp(rounds["main_loss"]) if words else float("nan")
        rates = [[0.5 + 0.01 * i if i != 1 else float("nan") for i in range(classes)] if m else None for m in measured]
        rounds["class_accuracy"] = pd.Series([None] * last if words else rates, dtype=object)
        table = pa.Table.from_pylist(rounds.to_dict("records"), schema=ROUNDS)
        pq.write_table(table, directory / "rounds.parquet")
        rounds = pd.read_parquet(directory / "rounds.parquet")
    else:
        rounds.to_parquet(directory / "rounds.parquet")
    pq.write_table(pa.Table.from_pylist(clients.to_dict("records"), schema=CLIENTS), directory / "clients.parquet")
    rng = np.random.default_rng(3)
    phases = {
        "seconds_train": rng.normal(0.8, 0.04, last),
        "seconds_aggregate": rng.normal(0.05, 0.005, last),
        "seconds_evaluate": rng.normal(0.12, 0.01, last),
        "seconds_record": rng.normal(0.01, 0.001, last),
    }
    timings = pd.DataFrame({"round": rounds["round"], **phases})
    timings["seconds_total"] = timings.drop(columns="round").sum(axis=1)
    timings.to_parquet(directory / "timings.parquet")
    clean = make_rounds(last=last, attacks=range(0), half=1, seed=1, every=every) if twin else None
    if clean is not None:
        (directory / "twin").mkdir(exist_ok=True)
        clean.to_parquet(directory / "twin" / "rounds.parquet")
    if summary:
        numbers = summarise(rounds, pd.read_parquet(directory / "clients.parquet"), twin=clean)
        (directory / "summary.json").write_text(json.dumps(numbers, allow_nan=False))
    settings = {
        "name": "mnist5k-multi-metrics",
        "seed": 7,
        "task": {"name": task or "vision", "data": {"name": "mnist5k"}, "model": {"name": "cnn"}},
        "federation": {"clients": 100, "clients_per_round": 10, "rounds": last},
        "attack": {
            "name": "data_poisoning",
            "trigger": {"name": "pixel_pattern"},
            "schedule": {"name": "fixed_frequency", "every": 1, "start": 20, "stop": 40},
        },
        "defense": [{"name": "norm_clipping", "bound": 3.0}, {"name": "multi_metrics", "keep": 0.3}],
    }
    (directory / "config.yaml").write_text(yaml.safe_dump(settings | (config or {}), sort_keys=False))
    facts = {
        "seed": 7,
        "seconds": 196.4,
        "versions": {"fedsim": "0.1.0", "torch": "2.6.0"},
        "hardware": {"cpu": "x86_64", "cores": 2},
        "attack": {"knows": ["own data"], "malicious_rounds": list(attacks)},
    }
    (directory / "manifest.json").write_text(json.dumps(facts | (manifest or {})))
    return directory


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a run directory; keywords as in :func:`write_run`."""

    def make(name: str = "run", **options: Any) -> Path:
        return write_run(tmp_path / name, **options)

    return make
