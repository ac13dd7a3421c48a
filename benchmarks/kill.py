"""Kill runs at random instants and see whether they end with the same bytes: the figures of ``docs/reliability.md``.

    python benchmarks/kill.py [--kills 54] [--seed 0] [--cases vision next_word …] [--markdown FILE]

Every case is first played without interruption. Then, as often as asked, the same experiment is started as
``fedsim run … --out DIR --resume`` in a process group of its own, the whole group is killed with SIGKILL after a random
time — one time in four again while it is being resumed — and the same command plays it to its end. ``rounds.parquet``,
``clients.parquet`` and ``model.safetensors`` must equal those of the run that was never killed, byte for byte.

Only what died of the signal counts: a run that had already ended when it was to be killed is no kill, and another is
started and killed sooner in its place; a second kill that came too late is not among "of these again". "After the
last file" are runs that had written their summary and were still alive.

Exit status 1 if one of them differs.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

COMPARED = ("rounds.parquet", "clients.parquet", "model.safetensors")
OUTPUT = {"report": False, "checkpoint_every": 3}
WORDS = {"federation.rounds": 10, "attack.schedule": {"name": "continuous", "start": 3, "stop": 6}}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "vision, learnt trigger, FoolsGold": (
        "vision",
        {
            "task": {"data": "digits", "model": {"name": "cnn", "channels": 4, "hidden": 16}, "test_examples": 300},
            "federation": {"clients": 12, "clients_per_round": 6, "rounds": 24},
            "training": {"lr": 0.1, "local_epochs": 1},
            "attack": {
                "name": "neurotoxin",
                "trigger": {"name": "a3fl", "size": 3, "iterations": 10},
                "schedule": {"name": "fixed_frequency", "every": 2, "start": 3, "stop": 19, "attackers": 2},
                "craft": ["scale"],
            },
            "defense": [{"name": "foolsgold", "combine": "mean"}],
            "engine": {"name": "serial"},
        },
    ),
    "vision, Anticipate, FLDetector, two Ray workers": (
        "vision",
        {
            "task": {"data": "digits", "model": {"name": "cnn", "channels": 4, "hidden": 16}, "test_examples": 300},
            "federation": {"clients": 12, "clients_per_round": 6, "rounds": 24, "dropout": 0.1},
            "training": {"lr": 0.1, "local_epochs": 1},
            "attack": {
                "name": "anticipate",
                "k": 2,
                "trigger": {"name": "patch", "size": 3},
                "schedule": {"name": "continuous", "start": 3, "stop": 19},
            },
            "defense": [{"name": "norm_clipping", "bound": 2.0}, {"name": "fldetector", "window": 3, "warm_up": 0}],
            "engine": {"name": "ray", "workers": 2},
        },
    ),
    "next word, Neurotoxin, SparseFed": (
        "next_word_quickstart",
        {
            **WORDS,
            "attack.name": "neurotoxin",
            "defense": [{"name": "sparsefed"}],
            "task.test_examples": 200,
            "federation.clients": 100,
            "federation.clients_per_round": 5,
            "engine.name": "serial",
        },
    ),
    "sentiment, rare embedding, centered clipping": (
        "sentiment_quickstart",
        {
            **WORDS,
            "attack.name": "rare_embedding",
            "attack.trigger": {"name": "rare_words", "words": ["cf", "mn"]},
            "task.specials": ["cf", "mn"],
            "defense": [{"name": "centered_clipping"}],
            "task.train_examples": 600,
            "task.test_examples": 300,
            "federation.clients": 10,
            "federation.clients_per_round": 5,
            "engine.name": "serial",
        },
    ),
}


def write_config(base: str, changes: dict[str, Any], path: Path) -> None:
    """The case as one resolved file."""
    from fedsim.config import load_config

    raw = {**changes, "output": OUTPUT} if base == "vision" else base
    overrides = {} if base == "vision" else {**changes, **{f"output.{k}": v for k, v in OUTPUT.items()}}
    path.write_text(yaml.safe_dump(load_config(raw, overrides).to_dict(), sort_keys=False), encoding="utf-8")


def start(config: Path, out: Path) -> subprocess.Popen[bytes]:
    """The command, in a process group of its own."""
    command = [sys.executable, "-m", "fedsim", "run", str(config), "--out", str(out), "--resume"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)


def kill(process: subprocess.Popen[bytes]) -> bool:
    """SIGKILL to the whole group: there is no time to clean up. False if it had ended by itself."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    return process.returncode == -signal.SIGKILL  # it may have ended between the two


def finish(process: subprocess.Popen[bytes]) -> None:
    _, said = process.communicate()
    if process.returncode != 0:
        raise SystemExit(f"the run did not finish: exit status {process.returncode}\n{said.decode()[-2000:]}")


def digests(out: Path) -> dict[str, str]:
    return {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in COMPARED}


def wait_for(path: Path, process: subprocess.Popen[bytes]) -> None:
    while not path.exists() and process.poll() is None:
        time.sleep(0.005)


def reached(out: Path) -> str:
    """How far a killed run had come."""
    if not (out / "config.yaml").exists():
        return "before the first file"
    if (out / "summary.json").exists():
        return "after the last file"
    journal = out / "journal.jsonl"
    if not journal.exists():
        return "after the last round" if (out / "rounds.parquet").exists() else "before the first round"
    return "between checkpoints" if list((out / "checkpoints").glob("*.json")) else "before the first checkpoint"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=54, help="runs to kill, over all cases")
    parser.add_argument("--seed", type=int, default=0, help="of the instants")
    parser.add_argument("--cases", nargs="+", help="parts of the names of cases to play; default: all")
    parser.add_argument("--markdown", type=Path, help="also write the table here")
    given = parser.parse_args()
    chosen = [name for name in CASES if not given.cases or any(part in name for part in given.cases)]
    draw = random.Random(given.seed)
    lines = ["| experiment | killed | of these again | same bytes | where |", "|---|---|---|---|---|"]
    wrong = 0
    with tempfile.TemporaryDirectory(prefix="fedsim-kill-") as scratch:
        for number, name in enumerate(chosen):
            config = Path(scratch) / f"case{number}.yaml"
            write_config(*CASES[name], config)
            whole = Path(scratch) / f"whole{number}"
            began = time.perf_counter()
            process = start(config, whole)
            wait_for(whole / "config.yaml", process)
            loading = time.perf_counter() - began
            finish(process)
            playing = time.perf_counter() - began - loading
            expected, places, same, twice = digests(whole), Counter[str](), 0, 0
            kills = given.kills // len(chosen) + (number < given.kills % len(chosen))
            attempt = 0
            while attempt < kills:
                out = Path(scratch) / f"killed{number}-{draw.getrandbits(64):x}"
                process = start(config, out)
                if draw.random() < 0.9:
                    wait_for(out / "config.yaml", process)
                    time.sleep(draw.uniform(0, playing))
                else:
                    time.sleep(draw.uniform(0, loading))
                if not kill(process):  # it was faster than the first one: that was no kill
                    playing *= 0.9
                    continue
                attempt += 1
                if draw.random() < 0.25:
                    process = start(config, out)
                    time.sleep(draw.uniform(0, loading + playing / 2))
                    twice += kill(process)
                places[reached(out)] += 1
                finish(start(config, out))
                equal = digests(out) == expected
                same += equal
                wrong += not equal
                print(f"{name}: {attempt}/{kills}, {'same' if equal else 'DIFFERENT'} bytes", flush=True)
            where = ", ".join(f"{count} {place}" for place, count in sorted(places.items()))
            lines.append(f"| {name} | {kills} | {twice} | {same} of {kills} | {where} |")
    table = "\n".join(lines) + "\n"
    print(table)
    if given.markdown:
        given.markdown.write_text(table, encoding="utf-8")
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
