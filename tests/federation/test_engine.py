"""Where clients are played: how many workers there are, and what share of a GPU each gets."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedsim.config import Config, build
from fedsim.federation import cluster, engine, ray_grid, worker
from fedsim.federation.cluster import Resources, room_on_gpus
from fedsim.federation.setup import Setup


def a_config(**options: Any) -> Config:
    return build(
        {
            "task": {"data": "digits", "model": "logistic"},
            "federation": {"clients": 20, "clients_per_round": 10, "rounds": 1},
            "attack": None,
            "engine": options,
        }
    )


@pytest.mark.parametrize(
    ("gpus", "share", "room"),
    [
        (1, 1.0, 1),
        (1, 0.5, 2),
        (2, 0.4, 4),
        (3, 0.6, 3),
        (1, 1 / 3, 3),
        (2, 0.3333, 6),
        (4, 2.0, 2),
        (3, 2.0, 1),
        (0, 0.5, 0),
    ],
)
def test_a_share_lies_on_one_gpu(gpus: int, share: float, room: int) -> None:
    assert room_on_gpus(gpus, share) == room


def test_even_shares_leave_room_for_every_worker() -> None:
    for gpus in range(1, 9):
        for workers in range(1, 65):
            share = engine._even_share(workers, gpus)
            assert 0 < share <= 1
            assert room_on_gpus(gpus, share) >= workers, (gpus, workers)


@pytest.mark.parametrize(
    ("options", "gpus", "workers"),
    [
        ({}, 0, 10),
        ({"cpus_per_worker": 3}, 0, 5),
        ({"gpus_per_worker": 0.5}, 0, 10),
        ({}, 1, 10),
        ({"gpus_per_worker": 0}, 1, 10),
        ({"gpus_per_worker": 0.5}, 1, 2),
        ({"gpus_per_worker": 2}, 4, 2),
        ({"gpus_per_worker": 2}, 1, 1),
        ({"workers": 7, "gpus_per_worker": 0.5}, 1, 7),
    ],
)
def test_auto_counts_cores_clients_and_gpu_shares(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], gpus: int, workers: int
) -> None:
    monkeypatch.setattr(engine, "cores", lambda: 16)
    assert engine._count_workers(a_config(**options), gpus) == workers


@pytest.mark.parametrize(("share", "given"), [(0.5, {}), (0.25, {"gpus_per_worker": 0.25})])
def test_three_workers_find_room_on_two_gpus(
    monkeypatch: pytest.MonkeyPatch, share: float, given: dict[str, float]
) -> None:
    made: list[Resources] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(cluster, "start_ray", lambda resources: True)
    monkeypatch.setattr(worker, "app_factory", lambda *_: None)
    monkeypatch.setattr(ray_grid, "RayGrid", lambda app, nodes, resources, **_: made.append(resources))
    config = a_config(name="ray", workers=3, **given)
    engine.open_grid(config, Setup(None, [], None), torch.device("cuda"), say=lambda line: None)  # type: ignore[arg-type]
    assert made == [Resources(3, 1.0, share, None, config.engine.retries, config.engine.client_timeout)]
