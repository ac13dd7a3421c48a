"""The Ray cluster that workers run on: a running one, or one started on this machine."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError

from fedsim.errors import RunError

WORKER_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",  # one thread a worker: more only fight each other
    "MKL_NUM_THREADS": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
}
_KNOCK_SECONDS = 10.0  # for a running cluster to answer


@dataclass(frozen=True)
class Resources:
    """workers: processes. cpus, gpus: what one reserves. address: of a running cluster, None to start one.

    retries: times a client is played again after its worker died. timeout: seconds a client may take, or None.
    """

    workers: int
    cpus: float = 1.0
    gpus: float = 0.0
    address: str | None = None
    retries: int = 2
    timeout: float | None = None


def start_ray(resources: Resources) -> bool:
    """Connect to the cluster, or start one on this machine; True if it is ours to stop.

    Raises
    ------
    RunError: it cannot be reached or started.
    """
    if ray.is_initialized():
        return False
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    common: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": logging.ERROR,
    }
    try:
        if resources.address is not None:
            _knock(resources.address)
            ray.init(address=resources.address, runtime_env={"env_vars": WORKER_ENVIRONMENT}, **common)
        else:
            cores = max(1, math.ceil(resources.workers * resources.cpus))
            with _environment(WORKER_ENVIRONMENT):  # inherited; an environment of their own costs a second
                ray.init(num_cpus=cores, include_dashboard=False, **common)
    except (ConnectionError, RuntimeError, ValueError, OSError, RayError) as error:
        raise RunError(f"Ray cannot be started: {' '.join(str(error).split())}") from error
    return True


def room_on_gpus(gpus: float, share: float) -> int:
    """How many workers find room on so many GPUs: a share (> 0) lies on one GPU, or is a number of whole ones."""
    return int(gpus) * int(1 / share + 1e-6) if share <= 1 else int(gpus // share)


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Environment variables for the processes started meanwhile."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _knock(address: str) -> None:
    """Raise OSError at once where nobody listens at host:port; Ray itself would try for minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if port.isdigit():
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_KNOCK_SECONDS):
            pass
