"""What a CUDA device gives: agreement with the CPU, rounds per second of ``cifar10_anticipate``, memory.

    PYTHONPATH=. python benchmarks/gpu.py [--json FILE] [--rounds 3] [--device cuda]

Needs torch, flwr and omegaconf only: clients run in this process (no Ray), on made-up images of CIFAR-10's size.
Under ten minutes on a current GPU. ``--device cpu --smoke`` runs the same code on a small model anywhere.

Agreement: the same client trained from the same weights and the same draws on CPU and GPU; the figure is
‖Δ_gpu − Δ_cpu‖ / ‖Δ_cpu‖ in float64 and float32 (TF32 off), for honest training and for Anticipate.
Rounds: seconds of a round of ten honest clients, of one with the attacker, and the peak of allocated memory; in
float32, with bf16 autocast and channels-last, and for Anticipate with gradient checkpointing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedsim import local_attack
from fedsim.batch import Batch
from fedsim.config import Config, load_config
from fedsim.data import Data
from fedsim.federation.client import ClientRuntime, client_app, initial_module
from fedsim.federation.evaluation import Evaluator
from fedsim.federation.grids import InProcessGrid
from fedsim.federation.records import RoundRecord
from fedsim.federation.schedule import RoundPlan
from fedsim.federation.server import play
from fedsim.federation.strategy import FederatedStrategy
from fedsim.layout import FlatModel
from fedsim.plugins import create

SYNTHETIC = Path(__file__).with_name("synthetic.py")
SMOKE = ("task.model=cnn", "attack.k=2", "federation.clients=20", "attack.local_epochs=1")


def configuration(smoke: bool, *overrides: str) -> Config:
    size = "{name: synthetic, train: 600, test: 200}" if smoke else "{name: synthetic}"
    data = [f"plugins=[{SYNTHETIC}]", f"task.data={size}", "federation.rounds=1000"]
    return load_config("cifar10_anticipate", [*data, *(SMOKE if smoke else ()), *overrides])


def agreement(device: torch.device) -> dict[str, float]:
    """Relative difference of one client's update between the device and the CPU."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    result: dict[str, float] = {}
    model = create("model", "cnn").build((3, 32, 32), 10, (0.5,) * 3, (0.25,) * 3)
    generator = torch.Generator().manual_seed(1)
    batches = [
        Batch(torch.rand(64, 3, 32, 32, generator=generator), torch.randint(0, 10, (64,), generator=generator))
        for _ in range(3)
    ]
    for attack, parameters in (("data_poisoning", {}), ("anticipate", {"k": 3})):
        for dtype in (torch.float64, torch.float32):
            updates: list[Tensor] = []
            for where in (torch.device("cpu"), device):
                moved = [Batch(b.inputs.to(where, dtype), b.labels.to(where)) for b in batches]
                made = local_attack(
                    attack,
                    _copy(model).to(where, dtype),
                    moved,
                    trigger=create("trigger", "pixel_pattern", target=8),
                    lr=0.05,
                    momentum=0.9,
                    epochs=2,
                    benign_epochs=2,
                    **parameters,
                )
                updates.append(made.update.double().cpu())
            difference = torch.linalg.vector_norm(updates[1] - updates[0]) / torch.linalg.vector_norm(updates[0])
            result[f"{attack}_{str(dtype).removeprefix('torch.')}"] = float(difference)
    torch.backends.cudnn.deterministic = False
    return result


def _copy(model: nn.Module) -> nn.Module:
    import copy

    return copy.deepcopy(model)


def rounds(
    config: Config, data: Data, parts: list[Tensor], device: torch.device, count: int, *, attacked: bool
) -> dict[str, float]:
    """Median seconds of a round (after one to warm up), of its evaluation, and the peak of allocated memory in GiB."""
    runtime = ClientRuntime(config, data, parts, device)
    flat = FlatModel(initial_module(config, data), device=device)
    n = config.federation.clients_per_round
    plans = [RoundPlan(r, tuple(range(n)), (), (), {0: 0} if attacked else {}) for r in range(1, count + 2)]
    marks: list[dict[str, float]] = []

    def done(record: RoundRecord) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()
        marks.append({**record.seconds, "at": time.perf_counter()})

    evaluator = Evaluator(
        runtime.task, FlatModel(initial_module(config, data), device=device), data, runtime.trigger, 1024, threads=1
    )
    strategy = FederatedStrategy(
        config,
        plans,
        flat.layout,
        flat.vector.clone(),
        [len(part) for part in parts],
        [stage.create() for stage in config.defense],
        attack=runtime.attack,
        measure=evaluator.measure,
        on_round=done,
    )
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    play(strategy, InProcessGrid(client_app(lambda context: runtime), config.federation.clients))
    spans = [b["at"] - a["at"] for a, b in itertools.pairwise(marks)]
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    seconds = statistics.median(spans)
    evaluated = statistics.median(mark["evaluate"] for mark in marks[1:])
    return {"seconds": seconds, "rounds_per_second": 1 / seconds, "evaluate_seconds": evaluated, "peak_gib": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds of each variant")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--smoke", action="store_true", help="a small model and little data")
    given = parser.parse_args()
    device = torch.device(given.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; --device cpu --smoke runs the same code without one")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    result: dict[str, Any] = {"device": name, "torch": torch.__version__}
    print(f"{name}, torch {torch.__version__}", flush=True)
    if device.type == "cuda":
        result["agreement"] = agreement(device)
        for what, value in result["agreement"].items():
            print(f"agreement with the CPU, {what}: {value:.2e}", flush=True)
    config = configuration(given.smoke)
    data = config.task.data.create().load()
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))
    parts = list(torch.tensor_split(order, config.federation.clients))
    fast = ("training.amp=true", "training.channels_last=true")
    variants: dict[str, tuple[tuple[str, ...], bool]] = {
        "honest_float32": ((), False),
        "honest_bf16_channels_last": (fast, False),
        "anticipate_float32": ((), True),
        "anticipate_float32_checkpoint": (("attack.checkpoint=true",), True),
        "anticipate_bf16_channels_last": (fast, True),
    }
    for variant, (overrides, attacked) in variants.items():
        made = rounds(configuration(given.smoke, *overrides), data, parts, device, given.rounds, attacked=attacked)
        result[variant] = made
        print(
            f"{variant}: {made['seconds']:.3f} s a round ({made['rounds_per_second']:.2f} rounds/s), "
            f"evaluation {made['evaluate_seconds']:.3f} s, peak {made['peak_gib']:.2f} GiB",
            flush=True,
        )
    if given.json:
        given.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
