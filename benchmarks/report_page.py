"""How long the page of many runs takes to write and to open, and how large it is.

    python benchmarks/report_page.py [--runs 200] [--rounds 300] [--keep DIR]

Writes run directories with made-up numbers (for timing, not for science), reports on them, and opens the page in a
headless Chromium: from the start of the navigation to the first paint after everything has loaded.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from fedsim.recording.summary import summarise
from fedsim.recording.tables import CLIENTS, ROUNDS
from fedsim.report import write_grid_report, write_report

ATTACKS = {"data_poisoning": 0.5, "neurotoxin": 1.4, "anticipate": 2.0, "pgd": 1.0, "constrain_and_scale": 1.7}
"""How long their made-up backdoors live, relative to one another."""

DEFENSES = {"fedavg": 1.0, "norm_clipping": 0.6, "krum": 0.1, "multi_metrics": 0.05, "flame": 0.15}
"""What is left of them."""

_SCORING = ("krum", "multi_metrics", "flame")
_NOWHERE = {"status": "failed", "reason": "round 3: every update was rejected, so there is nothing to aggregate"}


def write_run(
    directory: Path,
    attack: str,
    defense: str,
    *,
    seed: int = 0,
    rounds: int = 60,
    twin: bool = True,
    failed: bool = False,
    changes: Mapping[str, Any] | None = None,
) -> Path:
    """Write the directory of a made-up run as ``fedsim run`` leaves it; the second quarter of its rounds is attacked.

    changes: dotted keys of the config, for example ``{"attack.trigger": {"name": "patch"}}``.
    """
    directory.mkdir(parents=True)
    config: dict[str, Any] = {
        "name": "synthetic",
        "seed": seed,
        "task": {"name": "vision", "data": {"name": "mnist5k"}, "model": {"name": "cnn"}},
        "federation": {"rounds": rounds, "partition": {"name": "dirichlet", "alpha": 1.0}},
        "attack": {"name": attack, "trigger": {"name": "pixel_pattern"}, "schedule": {"name": "continuous"}},
        "defense": [{"name": defense}],
    }
    for key, value in (changes or {}).items():
        *path, last = key.split(".")
        part = config
        for name in path:
            part = part[name]
        part[last] = value
    (directory / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    if failed:
        (directory / "manifest.json").write_text(json.dumps({"config_sha256": "0" * 64, **_NOWHERE}))
        return directory
    rng = np.random.default_rng([seed, *f"{attack}{defense}".encode()])
    table = _rounds(rng, rounds, ATTACKS.get(attack, 1.0), DEFENSES.get(defense, 0.5))
    pq.write_table(pa.Table.from_pylist(table.to_dict("records"), schema=ROUNDS), directory / "rounds.parquet")
    clients = _clients(rng, table, f"{defense}.score" if defense in _SCORING else None)
    pq.write_table(pa.Table.from_pylist(clients, schema=CLIENTS), directory / "clients.parquet")
    clean = table.assign(asr=0.02, malicious_submitted=0, main_accuracy=table["main_accuracy"] + 0.004)
    if twin:
        (directory / "twin").mkdir()
        records = clean.to_dict("records")
        pq.write_table(pa.Table.from_pylist(records, schema=ROUNDS), directory / "twin" / "rounds.parquet")
    summary = summarise(table, pd.DataFrame(clients), twin=clean if twin else None)
    (directory / "summary.json").write_text(json.dumps(summary, allow_nan=False))
    manifest = {"config_sha256": "0" * 64, "status": "finished", "seconds": 12.5}
    (directory / "manifest.json").write_text(json.dumps(manifest))
    return directory


def write_grid(
    directory: Path,
    *,
    attacks: Sequence[str] = tuple(ATTACKS),
    defenses: Sequence[str] = tuple(DEFENSES),
    seeds: int = 2,
    **options: Any,
) -> list[Path]:
    """Runs of every attack against every defense; options as those of :func:`write_run`."""
    return [
        write_run(directory / f"{attack}-{defense}-seed{seed}", attack, defense, seed=seed, **options)
        for attack in attacks
        for defense in defenses
        for seed in range(seeds)
    ]


def _rounds(rng: np.random.Generator, rounds: int, life: float, left: float) -> pd.DataFrame:
    t = np.arange(1, rounds + 1)
    first, t0 = max(1, rounds // 4), max(1, rounds // 2)
    height = min(1.0, 0.35 + left)
    rising = 1 - np.exp(-np.clip(t - first + 1, 0, t0 - first + 1) / 3)
    decay = 0.5 ** (np.clip(t - t0, 0, None) / (life * left * rounds))
    asr = np.clip(0.02 + 0.93 * height * rising * decay + rng.normal(0, 0.03, rounds), 0, 1)
    accuracy = 0.93 - 0.03 * (1 - left) - 0.8 * np.exp(-t / (rounds / 10)) + rng.normal(0, 0.004, rounds)
    submitted = ((t >= first) & (t <= t0)).astype(int)
    columns = {
        "round": t,
        "main_accuracy": np.clip(accuracy, 0, 1),
        "main_loss": 2.3 * np.exp(-t / 20) + 0.2,
        "asr": asr,
        "asr_examples": 900,
        "malicious_submitted": submitted,
        "malicious_accepted": submitted,
    }
    return pd.DataFrame(columns)


def _clients(rng: np.random.Generator, table: pd.DataFrame, score: str | None) -> list[dict[str, Any]]:
    rows = []
    for t, attackers in zip(table["round"], table["malicious_submitted"], strict=True):
        for i in range(10):
            bad = i < attackers
            value = float(rng.normal(1.8 if bad else 0.0))
            accepted = score is None or value < 1.5
            rows.append(
                {
                    "round": int(t),
                    "client": i,
                    "malicious": bool(bad),
                    "examples": 100,
                    "update_norm": float(rng.lognormal(0.2, 0.2)),
                    "accepted": accepted,
                    "weight": 0.1 if accepted else 0.0,
                    "status": "ok",
                    "reason": None,
                    "scores": [] if score is None else [(score, value)],
                }
            )
    return rows


def opening(page: Path, repeats: int = 3) -> dict[str, float]:
    """Median seconds that Chromium takes to open the page from a file, and how many elements it holds."""
    from playwright.sync_api import sync_playwright

    executable = shutil.which("chromium")
    if executable is None:
        raise SystemExit("there is no chromium to open the page with; install it (Debian: apt install chromium)")
    took, elements = [], 0
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=executable, args=["--no-sandbox", "--disable-gpu"])
        for _ in range(repeats):
            tab = browser.new_context(viewport={"width": 1280, "height": 900}).new_page()
            started = time.perf_counter()
            tab.goto(page.resolve().as_uri(), wait_until="load")
            tab.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
            took.append(time.perf_counter() - started)
            elements = tab.evaluate("document.querySelectorAll('*').length")
            tab.context.close()
        browser.close()
    return {"open_seconds": statistics.median(took), "elements": elements}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200, help="how many; rounded up to whole rows of the grid")
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--keep", type=Path, help="write there and leave it")
    given = parser.parse_args()
    root = given.keep or Path(tempfile.mkdtemp(prefix="fedsim-report-"))
    seeds = -(-given.runs // (len(ATTACKS) * len(DEFENSES)))
    try:
        runs = write_grid(root / "runs", seeds=seeds, rounds=given.rounds)
        own = write_report(runs[0])  # one is drawn, the others get a copy: links are what the page needs
        for run in runs[1:]:
            shutil.copy(own, run / "report.html")
        started = time.perf_counter()
        page = write_grid_report([root / "runs"], root / "report")
        written = time.perf_counter() - started
        found = opening(page)
        print(
            f"{len(runs)} runs of {given.rounds} rounds: written in {written:.1f} s, "
            f"{page.stat().st_size / 1e6:.2f} MB, {found['elements']:.0f} elements, opened in "
            f"{found['open_seconds']:.2f} s"
        )
    finally:
        if given.keep is None:
            shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    main()
