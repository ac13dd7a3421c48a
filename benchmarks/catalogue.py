"""Every attack and every defense at work: the table of ``docs/results/catalogue.md``.

    python benchmarks/catalogue.py --out runs/catalogue [--seeds 1] [--jobs 2] [--only attacks|defenses]

``attacks`` plays every attack (and every learnt or distributed trigger) against plain FedAvg and against the defense
best known to stop it; ``defenses`` plays every defense against plain poisoning and against Anticipate. Both are
benchmarks of ``fedsim bench``'s kind on 5,000 handwritten digits, and a stopped one goes on where it was. Prints, and
writes into ``--out``, one table each: main accuracy and ASR when the attack ends and at the end, lifespan, and what the
defense turned away. The row *nobody* says how the same federation does without an attacker, and what the pattern alone
gets there; clean twins are not played.

All of a kind are given the same federation, schedule and boost, and their own defaults: the tables show that a method
does what it is for, not which is best.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

Case = tuple[dict[str, Any], str]
"""What is changed of the base experiment, and the label of the defense best known to stop it."""

ATTACKED = {"name": "fixed_frequency", "every": 1, "start": 8, "stop": 20, "attackers": 2, "fixed": True}
BASE: dict[str, Any] = {
    "task.model": {"name": "cnn", "channels": 8, "hidden": 32},
    "task.test_examples": 500,
    "federation.clients": 20,
    "federation.clients_per_round": 10,
    "federation.rounds": 36,
    "training.lr": 0.05,
    "attack.trigger": {"name": "pixel_pattern", "target": 8},
    "attack.schedule": ATTACKED,
    "attack.craft": [{"name": "scale", "factor": 3.0}],
    "defense": [],
}

TEXT = "sentiment_quickstart"
"""The base of attacks that are for text only."""


def attack(against: str, name: str = "data_poisoning", trigger: Any = None, **parameters: Any) -> Case:
    """An attack with its trigger; ``craft`` and ``schedule`` are those of the base unless given."""
    changes: dict[str, Any] = {}
    for key in ("craft", "schedule", "poison_fraction", "lr", "local_epochs"):
        if key in parameters:
            changes[f"attack.{key}"] = parameters.pop(key)
    if trigger is not None:
        changes["attack.trigger"] = trigger
    return {"attack": {"name": name, **parameters}, **changes}, against


MANY = {**ATTACKED, "attackers": 4}
ATTACKS: dict[str, Case] = {
    "data_poisoning": attack("norm_clipping"),
    "model_replacement": attack("norm_clipping", "model_replacement", craft=[]),
    "constrain_and_scale": attack("flame", "constrain_and_scale"),
    "pgd": attack("multi_metrics", "pgd"),
    "neurotoxin": attack("norm_clipping", "neurotoxin"),
    "anticipate": attack("multi_metrics", "anticipate", k=3),
    "chameleon": attack("flame", "chameleon", craft=[], schedule=MANY),
    "threedfed": attack("deepsight", "threedfed", schedule=MANY, craft=[], threshold=0.02, indicator=0.1),
    "perdoor": attack("multi_krum", "perdoor", craft=[], schedule={**ATTACKED, "start": 20, "attackers": 1}),
    "perdoor, all poisoned": attack(
        "multi_krum",
        "perdoor",
        craft=[],
        schedule={**ATTACKED, "start": 20, "attackers": 1},
        poison_fraction=1.0,
    ),
    "darkfed": attack("foolsgold", "darkfed"),
    "layerwise_poisoning": attack("lasa", "layerwise_poisoning"),
    "cerp": attack("multi_metrics", "cerp", {"name": "cerp", "target": 8}),
    "f3ba": attack("flame", "f3ba", {"name": "f3ba", "target": 8}),
    "a3fl trigger": attack("flip", trigger={"name": "a3fl", "target": 8, "iterations": 20}, poison_fraction=0.25),
    "iba trigger": attack("rlr", trigger={"name": "iba", "target": 8}),
    "dba trigger": attack("foolsgold", trigger={"name": "dba", "target": 8}, schedule=MANY),
    "fcba trigger": attack("foolsgold", trigger={"name": "fcba", "target": 8}, schedule=MANY),
    "alie": attack("bulyan", "alie", schedule=MANY, craft=[]),
    "ipm": attack("coordinate_median", "ipm", factor=6.0, craft=[]),
    "min_max": attack("dnc", "min_max", schedule=MANY, craft=[]),
    "min_sum": attack("dnc", "min_sum", schedule=MANY, craft=[]),
    "sign_flip": attack("signguard", "sign_flip"),
    "gaussian_noise": attack("krum", "gaussian_noise"),
    "label_flip": attack("auror", "label_flip"),
    "mimic": attack("bucketing", "mimic", schedule=MANY, craft=[]),
    "rare_embedding": attack("norm_clipping", "rare_embedding"),
}
"""Every attack, and every trigger that is more than a pattern, by its label."""

SERVER_DATA = {"examples": 100, "source": "train"}
DEFENSES: dict[str, Any] = {
    "norm_clipping": {"name": "norm_clipping", "bound": 2.0},
    "weak_dp": {"name": "weak_dp", "bound": 2.0},
    "flower": {"name": "flower", "strategy": "FedMedian"},
    "trimmed_mean": {"name": "trimmed_mean", "beta": 0.2},
    "krum": {"name": "krum", "f": 2},
    "multi_krum": {"name": "multi_krum", "f": 2},
    "bulyan": {"name": "bulyan", "f": 1},
    "foolsgold": {"name": "foolsgold", "combine": "mean"},
    "rlr": {"name": "rlr", "theta": 4},
    "local_dp": {"name": "local_dp", "bound": 3.0, "sigma": 0.01},
    "deepsight": {"name": "deepsight", "inputs": 1000},
    "fldetector": {"name": "fldetector", "window": 5, "warm_up": 0},
    "flip": {"name": "flip", "steps": 10, "triggers": 1, "examples": 32},
    "backdoor_indicator": {"name": "backdoor_indicator", "epochs": 20},
}
"""Parameters of the defenses whose defaults are not for ten clients a round, or cost much."""
ALSO: dict[str, dict[str, Any]] = {
    "backdoor_indicator": {"server_data": {"examples": 200, "source": "other", "other": "digits"}},
}
"""What else a defense is given."""


def defended(label: str) -> dict[str, Any]:
    """The changes that put the defense of this label up; ``fedavg`` is none."""
    from fedsim import plugins

    if label == "fedavg":
        return {"defense": []}
    cls: Any = plugins.get("defense", label)
    changes: dict[str, Any] = {"defense": [DEFENSES.get(label, label)], **ALSO.get(label, {})}
    if cls.needs_data and "server_data" not in changes:
        changes["server_data"] = SERVER_DATA
    return changes


def attacks_grid(seeds: list[int]) -> dict[str, Any]:
    """Attack × {FedAvg, its best-known defense}, as the definition of a benchmark."""
    entries: dict[str, Any] = {"nobody / fedavg": {"set": {"attack.name": "none", "defense": []}}}
    for label, (changes, against) in ATTACKS.items():
        if label == "rare_embedding":
            continue  # of another task: benchmarks/study.py text plays it
        for defense in ("fedavg", against):
            entries[f"{label} / {defense}"] = {"set": {**changes, **defended(defense)}}
    return {"base": "quickstart", "set": BASE, "seeds": seeds, "twin": False, "grid": {"method": entries}}


def defenses_grid(seeds: list[int]) -> dict[str, Any]:
    """Defense × {plain poisoning, Anticipate}, as the definition of a benchmark."""
    from fedsim import plugins

    entries = {
        f"{name} / {attack}": {"set": {**ATTACKS[attack][0], **defended(name)}}
        for attack in ("data_poisoning", "anticipate")
        for name in plugins.names("defense")
    }
    return {"base": "quickstart", "set": BASE, "seeds": seeds, "twin": False, "grid": {"method": entries}}


def table(out: Path) -> str:
    """Markdown, one row a method and opponent: medians over seeds.

    Success and accuracy swing from round to round under a boosted attacker; so they are averaged over the attack.
    """
    import pandas as pd

    from fedsim.recording.results import collect

    results = collect([out / "cells"])
    results = results[results["status"] == "complete"].copy()
    attacked = [_attacked(pd.read_parquet(Path(run) / "rounds.parquet")) for run in results["run"]]
    for name, column in (("asr_attacked", "asr"), ("accuracy_attacked", "main_accuracy")):
        results[name] = [float(rounds[column].mean()) for rounds in attacked]
    lines = [
        "| method | against | main accuracy in attack rounds | at the end | ASR in attack rounds | at the end "
        "| lifespan (50 %) | malicious turned away | honest turned away |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for label, group in results.groupby("axis.method", sort=False):
        first, _, second = str(label).partition(" / ")
        middle = group.median(numeric_only=True)
        spans = [
            "–" if pd.isna(life) else f"> {life:.0f}" if censored else f"{life:.0f}"
            for life, censored in zip(group["lifespan_50"], group["lifespan_50_censored"], strict=True)
        ]
        shares = ["accuracy_attacked", "main_accuracy", "asr_attacked", "asr"]
        found = " | ".join(f"{middle[name]:.1%}" for name in shares)
        away = " | ".join("–" if pd.isna(middle[name]) else f"{middle[name]:.0%}" for name in ("tpr", "fpr"))
        lines.append(f"| {first} | {second} | {found} | {', '.join(spans)} | {away} |")
    return "\n".join(lines) + "\n"


def _attacked(rounds: pd.DataFrame) -> pd.DataFrame:
    """The rounds with a malicious update; those of the usual schedule where nobody attacks."""
    under = rounds["malicious_submitted"] > 0
    return rounds[under if under.any() else rounds["round"].between(ATTACKED["start"], ATTACKED["stop"])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--jobs", type=int, help="runs at a time; default: as many as the cores allow")
    parser.add_argument("--only", choices=("attacks", "defenses"))
    given = parser.parse_args()
    from rich.console import Console

    from fedsim.benchmark.display import display
    from fedsim.benchmark.grid import load_grid
    from fedsim.benchmark.running import play

    grids = {"attacks": attacks_grid, "defenses": defenses_grid}
    for name, made in grids.items():
        if given.only not in (None, name):
            continue
        grid = load_grid({"name": f"catalogue of {name}", **made(given.seeds)})
        grid.check()
        out = given.out / name
        with display(Console()) as watcher:
            outcome = play(grid, out, jobs=given.jobs, watcher=watcher)
        for job in outcome.failed:
            print(f"failed: {job.title}: {job.reason}")
        text = table(out)
        (out / "catalogue.md").write_text(text, encoding="utf-8")
        print(text)


if __name__ == "__main__":
    main()
