"""How long backdoors live, measured: the studies behind ``docs/results``.

    FEDSIM_DATA=DIRECTORY python benchmarks/study.py attacks --out runs/attacks [--seeds 0 1 2] [--jobs 2]
    python benchmarks/study.py map --out runs/map [--seeds 0 1] [--jobs 2]
    python benchmarks/study.py text --out runs/text [--seeds 2 3 4] [--jobs 2]

``attacks`` compares plain poisoning, Neurotoxin, Anticipate and Anticipate with the server simulated, on MNIST split by
writer, under norm clipping at several bounds S. ``map`` varies what anticipation may depend on, one thing at a time,
on the embedded digits. ``text`` plays plain poisoning, Neurotoxin, Anticipate and nobody's attack on both text
quickstarts, under norm clipping and under Multi-metrics. Every cell is an ordinary run directory; a study that was
stopped goes on where it was.

It writes ``results.json`` (one entry a run), ``table.md`` and the figures into ``--out``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from fedsim import persistence
from fedsim.report.statistics import median_interval

SMALL = {"name": "cnn", "channels": 8, "hidden": 32}
QUIET = {"engine.name": "serial", "output.report": False, "output.checkpoint_every": 50}
ATTACKS: dict[str, dict[str, Any]] = {
    "plain": {"attack": {"name": "data_poisoning"}},
    "Neurotoxin": {"attack": {"name": "neurotoxin"}},
    "Anticipate": {"attack": {"name": "anticipate", "k": 5}},
    "Anticipate, server simulated": {"attack": {"name": "anticipate", "k": 5}},
}


@dataclass(frozen=True)
class Cell:
    """One run: which row of the table it belongs to, and the config's overrides."""

    study: str
    row: str
    label: str
    seed: int
    config: str
    overrides: tuple[tuple[str, Any], ...]

    @property
    def directory(self) -> str:
        text = f"{self.row}-{self.label}-seed{self.seed}"
        return "".join(c if c.isalnum() or c in "-." else "_" for c in text)


def server_simulated(bound: float, clients: int) -> dict[str, Any]:
    """Anticipate's simulation told of the attacker's boost and the server's clip."""
    return {"attack.simulate_boost": float(clients), "attack.simulate_clip": bound}


def attacks(seeds: Iterable[int], bounds: Iterable[float]) -> list[Cell]:
    """Attack × bound × seed on MNIST by writer."""
    cells = []
    for bound, (label, chosen), seed in itertools.product(bounds, ATTACKS.items(), seeds):
        overrides = {**QUIET, **chosen, "seed": seed, "defense.0.bound": bound, "task.model": SMALL}
        if "server" in label:
            overrides |= server_simulated(bound, 10)
        cells.append(
            Cell("attacks", f"S = {bound:g}", label, seed, "mnist_writers_anticipate", tuple(overrides.items()))
        )
    return cells


def anticipation_map(seeds: Iterable[int]) -> list[Cell]:
    """One thing at a time around a centre, three attacks each."""
    centre: dict[str, Any] = {
        "federation.rounds": 90,
        "attack.schedule": {"name": "random_rounds", "count": 24, "start": 20, "stop": 60},
        "task.model": SMALL,
        "training.lr": 0.05,
        "defense.0.bound": 3.0,
    }
    changes: dict[str, dict[str, Any]] = {
        "centre: k 5, S 3, 24 of 41 rounds": {},
        "S = 4": {"defense.0.bound": 4.0},
        "k = 1": {"attack.k": 1},
        "k = 9": {"attack.k": 9},
        "attacker lr × 1/10": {"attack.lr": 0.005},
        "attacker lr × 4": {"attack.lr": 0.2},
        "logistic regression": {"task.model": {"name": "logistic"}},
        "attack in 12 of 41 rounds": {"attack.schedule.count": 12},
    }
    cells = []
    for (row, change), (label, chosen), seed in itertools.product(changes.items(), ATTACKS.items(), seeds):
        if label == "Neurotoxin" or (row.startswith("k = ") and label == "plain"):
            continue
        own = {key: value for key, value in change.items() if key != "attack.k" or "Anticipate" in label}
        overrides = {**QUIET, **centre, **chosen, **own, "seed": seed}
        if "server" in label:
            overrides |= server_simulated(float(overrides["defense.0.bound"]), 10)
        cells.append(Cell("map", row, label, seed, "quickstart", tuple(overrides.items())))
    return cells


def text(seeds: Iterable[int]) -> list[Cell]:
    """Task × defense × attack × seed; the attacker keeps to the clipping bound by itself, whatever the defense."""
    tasks = {"next word": ("next_word_quickstart", 20.0), "sentiment": ("sentiment_quickstart", 8.0)}
    attackers = {**{k: v for k, v in ATTACKS.items() if "server" not in k}, "nobody": {"attack": {"name": "none"}}}
    cells = []
    for (task, (config, bound)), defense, (label, chosen), seed in itertools.product(
        tasks.items(), ("norm_clipping", "multi_metrics"), attackers.items(), seeds
    ):
        if label == "nobody" and defense != "norm_clipping":
            continue
        stage = {"name": defense, "bound": bound} if defense == "norm_clipping" else {"name": defense}
        overrides = {
            **QUIET,
            **chosen,
            "seed": seed,
            "attack.craft": ["scale", {"name": "project", "bound": bound}],
            "defense": [stage],
        }
        if label == "Anticipate":
            overrides["attack.k"] = 3
        cells.append(Cell("text", f"{task}, {defense}", label, seed, config, tuple(overrides.items())))
    return cells


def play(cell: Cell, out: str) -> dict[str, Any]:
    """Run one cell (or read what is there) and say what came out."""
    import fedsim

    directory = Path(out) / cell.directory
    started = time.perf_counter()
    config = fedsim.load_config(cell.config, dict(cell.overrides))
    run = fedsim.run(config, out=directory, resume=directory.exists())
    t0 = run.summary["t0"]
    if t0 is None and config.attack is not None:  # nobody attacked: from where the others stop
        t0 = config.attack.schedule.parameters.stop  # type: ignore[attr-defined]
    curve = persistence.Curve.of(run.rounds["round"], run.rounds["asr"])
    span = run.summary["lifespan"]["0.5"] or {"rounds": None, "censored": False}
    return {
        "row": cell.row,
        "label": cell.label,
        "seed": cell.seed,
        "directory": cell.directory,
        "t0": t0,
        "asr_at_t0": float(curve.since(t0)[1][0]),
        "area": persistence.area(curve, t0, 30 if cell.study == "map" else 50),
        "lifespan": span["rounds"],
        "censored": span["censored"],
        "final_asr": run.summary["final"]["asr"],
        "final_accuracy": run.summary["final"]["main_accuracy"],
        "perplexity": run.summary["final"]["perplexity"],
        "tpr": run.summary["detection"]["tpr"],
        "fpr": run.summary["detection"]["fpr"],
        "malicious_weight": run.summary["detection"]["malicious_weight"],
        "auroc": run.summary["detection"]["auroc"],
        "seconds": float(run.timings["seconds_total"].sum()),
        "wall": time.perf_counter() - started,
    }


def table(results: list[dict[str, Any]]) -> str:
    """A Markdown table, one row a setting and attack; what was turned away only where a defense turns clients away."""
    screened = any(r["fpr"] for r in results)
    turned_away = [" turned away: malicious", " honest |"] if screened else []
    lines = [
        "| setting | attack | ASR after the attack | mean ASR | lifespan (κ = 50 %) | final ASR | main accuracy |"
        + " |".join(turned_away),
        "|---|---|---|---|---|---|---|" + "---|" * len(turned_away),
    ]
    keys = list(dict.fromkeys((r["row"], r["label"]) for r in results))
    for row, label in keys:
        group = sorted((r for r in results if (r["row"], r["label"]) == (row, label)), key=lambda r: r["seed"])
        start, accuracy = (statistics.median(r[key] for r in group) for key in ("asr_at_t0", "final_accuracy"))
        area, final = (_interval([r[key] for r in group]) for key in ("area", "final_asr"))
        spans = ", ".join(map(_span, group))
        lines.append(
            f"| {row} | {label} | {start:.2f} | {area} | {spans} | {final} | {accuracy:.3f} |"
            + "".join(f" {_share([r[key] for r in group])} |" for key in ("tpr", "fpr") if screened)
        )
    return "\n".join(lines) + "\n"


def _interval(values: list[float]) -> str:
    """The median over seeds with its 95 % bootstrap interval, which a single seed does not have."""
    found = median_interval(values)
    return f"{found.median:.2f}" + ("" if found.low is None else f" [{found.low:.2f}, {found.high:.2f}]")


def _span(result: dict[str, Any]) -> str:
    """A lifespan; a lower bound where the backdoor was alive at the end, a dash where nobody attacked."""
    rounds = result["lifespan"]
    return "–" if rounds is None else f"> {rounds}" if result["censored"] else str(rounds)


def _share(values: list[float | None]) -> str:
    """The median of shares as a percentage; a dash where there is none."""
    known = [value for value in values if value is not None]
    return f"{statistics.median(known):.1%}" if known else "–"


def figures(results: list[dict[str, Any]], out: Path) -> None:
    """ASR by age, one figure a setting: the median over seeds and the range."""
    import pandas as pd

    from fedsim.report import drawing
    from fedsim.report.figures import compare

    for row in dict.fromkeys(r["row"] for r in results):
        curves: dict[str, list[Any]] = {}
        for r in (r for r in results if r["row"] == row and r["lifespan"] is not None):  # an attacker there was
            curves.setdefault(r["label"], []).append(pd.read_parquet(out / r["directory"] / "rounds.parquet"))
        stem = "".join(c if c.isalnum() else "_" for c in f"asr {row}".lower())
        drawing.save(compare(curves, title=row), out, stem)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=("attacks", "map", "text"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--bounds", type=float, nargs="+", default=[2.0, 3.0, 4.0], help="attacks: clipping bounds S")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one core each")
    given = parser.parse_args()
    made_of = {"attacks": lambda: attacks(given.seeds, given.bounds), "map": lambda: anticipation_map(given.seeds)}
    cells = {**made_of, "text": lambda: text(given.seeds)}[given.study]()
    given.out.mkdir(parents=True, exist_ok=True)
    results = []
    started = time.perf_counter()
    with ProcessPoolExecutor(given.jobs, mp_context=get_context("spawn")) as pool:
        waiting = {pool.submit(play, cell, str(given.out)): cell for cell in cells}
        for done in as_completed(waiting):
            made = done.result()
            results.append(made)
            left = (time.perf_counter() - started) / len(results) * (len(cells) - len(results))
            print(
                f"{len(results)}/{len(cells)} {made['row']} | {made['label']} | seed {made['seed']}: "
                f"lifespan {_span(made)}, "
                f"area {made['area']:.2f}, {made['wall']:.0f} s; {left / 60:.0f} min left",
                flush=True,
            )
    order = {(cell.row, cell.label, cell.seed): i for i, cell in enumerate(cells)}
    results.sort(key=lambda r: order[(r["row"], r["label"], r["seed"])])
    (given.out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (given.out / "table.md").write_text(table(results), encoding="utf-8")
    if given.study != "map":
        figures(results, given.out)
    print((given.out / "table.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
