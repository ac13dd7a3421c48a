"""Does a long run grow? Memory, open files and object store over 2,000 rounds: the figures of ``docs/reliability.md``.

    python benchmarks/long_run.py [--rounds 2000] [--workers 2] [--markdown FILE]

Plays a tiny backdoored federation on Ray with a defense that keeps history, reads the resident memory and the open
files of the driver and of its workers as the rounds go by, and the bytes in Ray's object store, and prints them at the
beginning, in the middle and at the end, with the growth per 1,000 rounds over the second half (a straight line through
all samples of it; the first half is warm-up: caches, the allocator's arenas, code that is imported on first use).
"""

from __future__ import annotations

import argparse
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedsim.config import load_config
from fedsim.experiment import Silent, run

EXPERIMENT: dict[str, Any] = {
    "name": "long",
    "task": {"data": "digits", "model": "logistic", "test_examples": 200},
    "federation": {"clients": 30, "clients_per_round": 10},
    "training": {"lr": 0.1, "local_epochs": 1},
    "attack": {
        "name": "neurotoxin",
        "trigger": {"name": "patch", "size": 3},
        "schedule": {"name": "fixed_frequency", "every": 3},
        "craft": ["scale"],
    },
    "defense": [{"name": "foolsgold", "combine": "mean"}],
    "evaluation": {"every": 5},
    "output": {"report": False},
}


@dataclass(frozen=True)
class Sample:
    """After ``round``: resident memory in MiB, open files, MiB in the object store."""

    round: int
    driver: float
    workers: float
    driver_files: int
    worker_files: int
    store: float


def own_memory(pid: int) -> float:
    """Resident MiB that are the process's own; pages of the object store are shared."""
    _, resident, shared = Path(f"/proc/{pid}/statm").read_text().split()[:3]
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE") / 2**20


def open_files(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def worker_pids() -> list[int]:
    """Ray's processes that play clients (of any run on this machine)."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and b"ray::_Worker" in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:  # it ended meanwhile
            continue
    return found


class Watch(Silent):
    """Reads the processes every few rounds."""

    def __init__(self, every: int) -> None:
        self.every, self.samples = every, list[Sample]()

    def round(self, record: Any) -> None:
        if record.round % self.every:
            return
        import ray

        workers = worker_pids()
        total, free = ray.cluster_resources(), ray.available_resources()
        used = total.get("object_store_memory", 0.0) - free.get("object_store_memory", 0.0)
        self.samples.append(
            Sample(
                record.round,
                own_memory(os.getpid()),
                sum(map(own_memory, workers)),
                open_files(os.getpid()),
                sum(map(open_files, workers)),
                used / 2**20,
            )
        )
        if record.round % (self.every * 20) == 0:
            print(self.samples[-1], flush=True)


def growth(samples: list[Sample], name: str) -> float:
    """Per 1,000 rounds, by a straight line through the second half."""
    half = samples[len(samples) // 2 :]
    slope, _ = np.polyfit([s.round for s in half], [float(getattr(s, name)) for s in half], 1)
    return 1000 * float(slope)


def table(samples: list[Sample]) -> str:
    first, middle, last = samples[0], samples[len(samples) // 2], samples[-1]
    lines = [
        f"| | round {first.round} | round {middle.round} | round {last.round} | growth per 1,000 rounds, second half |",
        "|---|---|---|---|---|",
    ]
    units = {
        "driver": "driver, MiB",
        "workers": "workers together, MiB",
        "driver_files": "driver, open files",
        "worker_files": "workers together, open files",
        "store": "object store in use, MiB",
    }
    for name, unit in units.items():
        values = [float(getattr(s, name)) for s in (first, middle, last)]
        numbers = " | ".join(f"{v:.1f}" for v in values)
        lines.append(f"| {unit} | {numbers} | {growth(samples, name):+.2f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--markdown", type=Path, help="also write the table here")
    given = parser.parse_args()
    config = load_config(
        EXPERIMENT, {"federation.rounds": given.rounds, "engine.name": "ray", "engine.workers": given.workers}
    )
    watch = Watch(max(1, given.rounds // 200))
    with tempfile.TemporaryDirectory(prefix="fedsim-long-") as scratch:
        run(config, out=Path(scratch) / "run", progress=watch)
    made = table(watch.samples)
    print(made)
    if given.markdown:
        given.markdown.write_text(made, encoding="utf-8")


if __name__ == "__main__":
    main()
