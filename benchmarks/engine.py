"""What the engine adds to the training: rounds on the Ray Grid, on Flower's own simulation, and training alone.

    python benchmarks/engine.py [--json FILE] [--workers 2] [--repeats 3] [--case mnist_cnn|tiny_clients]

Two cases, each with the same ClientApp, strategy and resources everywhere:

* ``mnist_cnn``: 100 clients of 600 MNIST-size images each, 10 a round, 2 local epochs of the small CNN;
* ``tiny_clients``: 200 clients a round, each a logistic regression on 20 examples, one epoch.

Per case three figures in seconds per round, medians over interleaved repeats (the first round of each repeat is
left out: it loads the data):

* ``ray_grid``: this project's Grid; ``run_simulation``: Flower's;
* ``training_floor``: training alone — as many bare processes as workers train the same clients at the same time;
  their busy time, summed, divided by the workers. No messages, no aggregation, no waiting.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import statistics
import time
import warnings
from dataclasses import dataclass
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import torch

from fedsim.config import Config, load_config
from fedsim.federation.client import client_app, initial_module
from fedsim.federation.cluster import Resources
from fedsim.federation.evaluation import Measurement
from fedsim.federation.grids import InProcessGrid
from fedsim.federation.ray_grid import RayGrid
from fedsim.federation.records import RoundRecord
from fedsim.federation.schedule import plan
from fedsim.federation.server import play, server_app
from fedsim.federation.setup import prepare, resident_runtime
from fedsim.federation.strategy import FederatedStrategy
from fedsim.layout import FlatModel


@dataclass(frozen=True)
class Case:
    """A config, by overrides on ``base``, and how many rounds a repeat plays."""

    overrides: tuple[str, ...]
    rounds: int


CASES = {
    "mnist_cnn": Case(
        (
            "federation.clients=100",
            "federation.clients_per_round=10",
            "federation.partition={name: with_replacement, examples: 600}",
            "training.local_epochs=2",
            "training.batch_size=32",
        ),
        rounds=8,
    ),
    "tiny_clients": Case(
        (
            "federation.clients=200",
            "federation.clients_per_round=200",
            "federation.partition={name: iid}",
            "task.model=logistic",
            "training.local_epochs=1",
            "training.batch_size=20",
        ),
        rounds=20,
    ),
}
COMMON = ("attack=null", f"plugins=[{Path(__file__).with_name('with_replacement.py')}]")


def config_of(case: Case) -> Config:
    return load_config("base", [*COMMON, *case.overrides, f"federation.rounds={case.rounds}"])


class Clock:
    """Seconds from the start of one round to the start of the next."""

    def __init__(self) -> None:
        self.marks: list[float] = [time.perf_counter()]

    def __call__(self, record: RoundRecord) -> None:
        self.marks.append(time.perf_counter())

    def rounds(self) -> list[float]:
        """All rounds but the first."""
        return [b - a for a, b in zip(self.marks[1:], self.marks[2:], strict=False)]


def strategy_of(config: Config, clock: Clock) -> FederatedStrategy:
    setup = prepare(config)
    flat = FlatModel(initial_module(config, setup.data))
    return FederatedStrategy(
        config,
        plan(config),
        flat.layout,
        flat.vector.clone(),
        setup.sizes,
        [],
        attack=None,
        measure=lambda *_: Measurement(0.0, 0.0, None, None),  # evaluation is not what is measured here
        on_round=clock,
    )


def ray_grid(case: Case, workers: int) -> list[float]:
    """Seconds of each round on the Ray Grid."""
    config, clock = config_of(case), Clock()
    strategy = strategy_of(config, clock)
    runtime = resident_runtime("base", (*COMMON, *case.overrides))
    sizes = strategy.sizes
    grid = RayGrid(
        lambda: client_app(runtime),
        config.federation.clients,
        Resources(workers),
        size_of=lambda m: ("client", float(sizes[int(m.content.config_records["config"]["client"])])),  # type: ignore[arg-type]
    )
    try:
        clock.marks = [time.perf_counter()]
        play(strategy, grid)
    finally:
        grid.close()
    return clock.rounds()


def run_simulation(case: Case, workers: int) -> list[float]:
    """Seconds of each round on Flower's own simulation, with the same resources."""
    import ray
    from flwr.simulation import run_simulation as flower

    config, clock = config_of(case), Clock()
    strategy = strategy_of(config, clock)
    runtime = resident_runtime("base", (*COMMON, *case.overrides))
    logging.getLogger("flwr").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        flower(
            server_app(strategy),
            client_app(runtime),
            num_supernodes=config.federation.clients,
            backend_config={
                "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
                "init_args": {"num_cpus": workers, "include_dashboard": False, "log_to_driver": False},
            },
        )
    if ray.is_initialized():
        ray.shutdown()
    return clock.rounds()


def _train(case: Case, share: int, workers: int, barrier: Barrier, busy: Any) -> None:
    """One bare process: train every ``workers``-th client of each round, together with the others."""
    torch.set_num_threads(1)
    config = config_of(case)
    runtime = resident_runtime("base", (*COMMON, *case.overrides))
    strategy = strategy_of(config, Clock())
    grid = InProcessGrid(client_app(runtime), config.federation.clients)
    make = runtime(None)  # type: ignore[arg-type]
    from flwr.app import ConfigRecord

    from fedsim.federation.messages import to_record

    arrays = to_record(strategy.global_vector)
    for number in range(1, case.rounds + 1):
        messages = list(strategy.configure_train(number, arrays, ConfigRecord(), grid))[share::workers]
        barrier.wait()
        started = time.perf_counter()
        for message in messages:
            make.train(message.content, message.content.config_records["config"])
        busy.put((number, time.perf_counter() - started))


def training_floor(case: Case, workers: int) -> list[float]:
    """Busy seconds of each round, summed over the bare processes, divided by their number."""
    context = multiprocessing.get_context("spawn")
    barrier, busy = context.Barrier(workers), context.Queue()
    processes = [context.Process(target=_train, args=(case, i, workers, barrier, busy)) for i in range(workers)]
    for process in processes:
        process.start()
    totals: dict[int, float] = {}
    for _ in range(case.rounds * workers):
        number, seconds = busy.get(timeout=300)  # a process that failed says why on stderr
        totals[number] = totals.get(number, 0.0) + seconds
    for process in processes:
        process.join()
    return [totals[number] / workers for number in range(2, case.rounds + 1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the medians there")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3, help="interleaved repeats of each measurement")
    parser.add_argument("--case", choices=list(CASES), action="append", help="only this case")
    given = parser.parse_args()
    torch.set_num_threads(1)
    measures = {"ray_grid": ray_grid, "run_simulation": run_simulation, "training_floor": training_floor}
    result: dict[str, dict[str, float]] = {}
    for name in given.case or CASES:
        seconds: dict[str, list[float]] = {measure: [] for measure in measures}
        for repeat in range(given.repeats):
            for measure, function in measures.items():
                rounds = function(CASES[name], given.workers)
                seconds[measure] += rounds
                print(f"{name} {measure} repeat {repeat + 1}: {statistics.median(rounds):.4f} s/round", flush=True)
        result[name] = {measure: round(statistics.median(values), 5) for measure, values in seconds.items()}
        r = result[name]
        print(
            f"{name}: ray_grid {r['ray_grid']:.4f}, run_simulation {r['run_simulation']:.4f}, "
            f"floor {r['training_floor']:.4f} s/round"
        )
        print(
            f"{name}: Ray Grid is {r['ray_grid'] / r['training_floor']:.3f} x the floor, "
            f"run_simulation {r['run_simulation'] / r['training_floor']:.3f} x; "
            f"the grid plays {r['run_simulation'] / r['ray_grid']:.1f} x the rounds per second of run_simulation",
            flush=True,
        )
    if given.json:
        given.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
