"""Where clients are played: the device, and the grid of ``engine.name``, in this process or on Ray workers."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from typing import Any

import torch

from fedsim.config import Config
from fedsim.errors import InputError
from fedsim.federation.client import ClientRuntime, client_app
from fedsim.federation.grids import InProcessGrid, LocalGrid
from fedsim.federation.setup import Setup


def choose_device(name: str) -> torch.device:
    """The device meant by ``engine.device``.

    Raises
    ------
    InputError: cuda is asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("engine.device: cuda is asked for, but torch sees no GPU; use cpu or auto")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def open_grid(
    config: Config,
    setup: Setup,
    device: torch.device,
    *,
    say: Callable[[str], None],
    on_reply: Callable[[], None] | None = None,
) -> tuple[LocalGrid, int]:
    """The grid over all clients, and how many workers it has.

    Raises
    ------
    RunError: Ray cannot be reached, or has no room for the workers.
    """
    nodes, engine = config.federation.clients, config.engine
    if engine.name == "serial":
        runtime = ClientRuntime(config, setup.data, setup.parts, device)
        return InProcessGrid(client_app(lambda context: runtime), nodes, on_reply), 1
    from fedsim.federation.cluster import Resources, start_ray
    from fedsim.federation.ray_grid import RayGrid
    from fedsim.federation.worker import app_factory

    # A running cluster is asked how many cores and GPUs it has before workers are counted.
    connected = engine.address is not None and start_ray(Resources(1, address=engine.address))
    gpus = _count_gpus(config) if device.type == "cuda" else 0
    workers, share = _count_workers(config, gpus), 0.0
    if device.type == "cuda":
        share = _even_share(workers, gpus) if engine.gpus_per_worker is None else engine.gpus_per_worker
    resources = Resources(workers, engine.cpus_per_worker, share, engine.address, engine.retries, engine.client_timeout)
    say(f"starting {workers} Ray worker{'s' if workers != 1 else ''}")
    ours = start_ray(resources) or connected
    grid = RayGrid(
        app_factory(config, setup.data, setup.parts, device.type),
        nodes,
        resources,
        size_of=functools.partial(_size_of, setup.sizes),
        on_reply=on_reply,
        stop_ray=ours,
    )
    return grid, workers


def _count_workers(config: Config, gpus: int) -> int:
    """``engine.workers``; auto: as many as the cores and the shares of ``gpus`` GPUs allow, and clients can use."""
    from fedsim.federation.cluster import room_on_gpus

    engine = config.engine
    if isinstance(engine.workers, int):
        return engine.workers
    there = float(cores())
    if engine.address is not None:
        import ray

        there = float(ray.cluster_resources().get("CPU", 1.0))
    room = [int(there // engine.cpus_per_worker), config.federation.clients_per_round]
    if gpus and engine.gpus_per_worker:
        room.append(room_on_gpus(gpus, engine.gpus_per_worker))
    return max(1, min(room))


def _count_gpus(config: Config) -> int:
    """GPUs of the running cluster, or of this machine where one is still to be started."""
    if config.engine.address is None:
        return torch.cuda.device_count()
    import ray

    return int(ray.cluster_resources().get("GPU", 0))


def _even_share(workers: int, gpus: int) -> float:
    """Of a GPU, for each worker, so that all of them find room: a worker's share lies on one GPU."""
    return 1 / math.ceil(workers / max(gpus, 1))


def _size_of(sizes: list[int], message: Any) -> tuple[str, float]:
    """Kind and size of a message's work, for the grid's hand-out."""
    order = message.content["config"]
    return ("malicious" if order["malicious"] else "honest"), float(sizes[int(order["client"])])
