"""How much memory every defense takes over N clients of D weights: the figures of ``docs/results/memory.md``.

    python benchmarks/memory.py [--clients 100] [--weights 1.1e6] [--defenses krum …] [--limit 24] [--markdown FILE]

Each defense aggregates one round of random float32 updates in a process of its own, which says how long it took and how
much its resident memory grew beyond what it held before the matrix was made, at its peak, in multiples of the matrix
(the matrix itself counts as one). The promise is about N = 100, D = 11 M and 24 GiB; the default is a tenth of that D,
which takes some minutes and tells who is near the limit.

Layers are those of a chain of linear layers; methods that run the network get few inputs, whose cost is time.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

OPTIONS: dict[str, dict[str, Any]] = {
    "flower": {"strategy": "FedMedian"},
    "deepsight": {"inputs": 20, "sets": 1},
    "backdoor_indicator": {"epochs": 1},
    "flip": {"steps": 1},
}
INPUT, CLASSES = 64, 10


def network(weights: int) -> Any:
    """A chain of square linear layers with about so many weights."""
    from torch import nn

    width = max(16, int((weights / 4) ** 0.5))
    hidden = [layer for _ in range(4) for layer in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(nn.Linear(INPUT, width), *hidden, nn.Linear(width, CLASSES))


def peak() -> float:
    """Largest resident memory so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def measure(name: str, clients: int, weights: int) -> dict[str, Any]:
    """One defense in this process."""
    import torch

    from fedsim import plugins
    from fedsim.defense import RoundUpdates
    from fedsim.direct import make_server
    from fedsim.layout import FlatModel
    from fedsim.pipeline import apply_pipeline

    torch.set_num_threads(1)
    torch.manual_seed(0)
    module = network(weights)
    held = torch.rand(50, INPUT), torch.randint(0, CLASSES, (50,))
    server = make_server(module, CLASSES, data=held)
    base = FlatModel(module).vector.clone()
    stage = plugins.create("defense", name, **OPTIONS.get(name, {}))
    before = peak()
    updates = torch.empty(clients, len(base))
    for row in updates:
        row.normal_(0, 0.01)
    examples = torch.ones(clients)
    sent = stage.broadcast(base, server)
    started = time.perf_counter()
    result = apply_pipeline(
        [stage],
        RoundUpdates(
            updates=updates,
            num_examples=examples,
            global_vector=sent,
            weights=examples.clone(),
            accepted=torch.ones(clients, dtype=torch.bool),
            trainable=len(base),
            clients=tuple(range(clients)),
            layout=server.model.layout,
            server=server,
        ),
    )
    seconds = time.perf_counter() - started
    matrix = 4.0 * updates.numel()
    return {
        "name": name,
        "weights": len(base),
        "matrix_gib": matrix / 2**30,
        "times": (peak() - before) / matrix,
        "gib": peak() / 2**30,
        "seconds": seconds,
        "accepted": int(result.accepted.sum()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--weights", type=float, default=1.1e6)
    parser.add_argument("--defenses", nargs="+", help="default: all")
    parser.add_argument("--limit", type=float, default=24.0, help="GiB; who takes more is said")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds for one defense")
    parser.add_argument("--markdown", type=Path, help="also write the table here")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measure(given.one, given.clients, int(given.weights))))
        return
    from fedsim import plugins

    lines = ["| defense | peak, in matrices | peak GiB | seconds |", "|---|---|---|---|"]
    over = []
    for name in given.defenses or plugins.names("defense"):
        command = [sys.executable, __file__, "--one", name, "--clients", str(given.clients)]
        try:
            done = subprocess.run(
                [*command, "--weights", str(given.weights)],
                capture_output=True,
                text=True,
                timeout=given.timeout,
                check=False,
            )
        except subprocess.TimeoutExpired:
            lines.append(f"| {name} | – | – | > {given.timeout:g} |")
            print(lines[-1], flush=True)
            continue
        if done.returncode != 0:
            said = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
            lines.append(f"| {name} | {said[:80]} | | |")
            over.append(name)
        else:
            found = json.loads(done.stdout.strip().splitlines()[-1])
            lines.append(f"| {name} | {found['times']:.2f} | {found['gib']:.2f} | {found['seconds']:.1f} |")
            if found["gib"] > given.limit:
                over.append(name)
        print(lines[-1], flush=True)
    if given.markdown:
        given.markdown.write_text("\n".join(lines) + "\n", encoding="utf-8")
    if over:
        raise SystemExit(f"beyond {given.limit:g} GiB, or failed: {', '.join(over)}")


if __name__ == "__main__":
    main()
