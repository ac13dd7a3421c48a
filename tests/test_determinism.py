"""The promise: a result is a function of the config and its seed, whatever it runs on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from fedsim.config import load_config
from fedsim.experiment import Silent, run
from fedsim.federation.ray_grid import RayGrid
from fedsim.federation.records import RoundRecord
from tests.support.runs import RESULTS, STATEFUL, contents, differing, forgotten

pytestmark = pytest.mark.slow

CONFIG: dict[str, Any] = {
    "name": "repeated",
    "seed": 11,
    "plugins": [str(STATEFUL)],
    "task": {"data": "digits", "model": "test_dropout", "train_examples": 300, "test_examples": 100},
    "federation": {
        "clients": 12,
        "clients_per_round": 6,
        "rounds": 4,
        "partition": {"name": "dirichlet", "alpha": 1.0},
        "dropout": 0.15,
        "stragglers": 0.15,
    },
    "training": {"local_epochs": 2, "augment": True, "lr_decay": 0.9, "weight_decay": 0.001},
    "attack": {
        "name": "test_memory",
        "trigger": {"name": "dba", "target": 1, "width": 2, "gap": 1},
        "schedule": {"name": "pool", "fraction": 0.3},
        "craft": [{"name": "scale", "factor": 2.0}],
    },
    "defense": [
        "fedprox",
        {"name": "backdoor_indicator", "epochs": 2},  # trains at the server, with dropout
        {"name": "norm_clipping", "bound": 5.0},
        "test_momentum",
        {"name": "weak_dp", "sigma": 0.002},
    ],
    "server_data": {"examples": 20, "source": "noise"},
    "evaluation": {"batch_size": 17},
    "engine": {"name": "serial"},
    "output": {"report": False},
}


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "repeated.yaml"
    path.write_text(json.dumps(CONFIG))  # JSON is YAML
    return path


@pytest.fixture(scope="module")
def serial(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, bytes]]:
    """The run in this process."""
    directory = tmp_path_factory.mktemp("serial") / "run"
    torch.manual_seed(1)
    with forgotten(STATEFUL):
        finished = run(load_config(CONFIG), out=directory)
        statuses = set(finished.clients["status"])
        assert {"ok", "dropped", "straggler"} <= statuses, "the run shows what it should"
        assert int(finished.clients["malicious"].sum()) > 2
        yield contents(directory, RESULTS)


def test_the_global_seed_and_the_threads_of_the_caller_do_not_matter(serial: dict[str, bytes], tmp_path: Path) -> None:
    during: list[int] = []

    class Looking(Silent):
        def client(self) -> None:
            during.append(torch.get_num_threads())

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.manual_seed(2)
    try:
        run(load_config(CONFIG), out=tmp_path / "run", progress=Looking())
        assert torch.get_num_threads() == 2, "given back"
    finally:
        torch.set_num_threads(before)
    assert set(during) == {1}
    assert differing(tmp_path / "run", serial) == []


def test_another_process_with_another_environment_makes_the_same(
    serial: dict[str, bytes], config_file: Path, tmp_path: Path
) -> None:
    environment = {**os.environ, "PYTHONHASHSEED": "77", "OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"}
    subprocess.run(
        [sys.executable, "-m", "fedsim", "run", str(config_file), "--out", str(tmp_path / "run")],
        env=environment,
        check=True,
        capture_output=True,
        timeout=120,
    )
    assert differing(tmp_path / "run", serial) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_ray_makes_the_same_with_any_number_of_workers(
    cluster: None, serial: dict[str, bytes], tmp_path: Path, workers: int
) -> None:
    config = load_config(CONFIG, {"engine.name": "ray", "engine.workers": workers})
    run(config, out=tmp_path / "run")
    assert differing(tmp_path / "run", serial) == []
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["engine"] == {"name": "ray", "workers": workers}
    assert ray.is_initialized(), "the run did not start it, so it does not stop it"


def test_a_worker_killed_on_the_way_changes_nothing(
    cluster: None, serial: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grids: list[RayGrid] = []
    real = RayGrid.answer

    def answer(self: RayGrid, messages: list[Any]) -> list[Any]:
        grids.append(self)
        return real(self, messages)

    class Killing(Silent):
        def round(self, record: RoundRecord) -> None:
            if record.round == 2:
                os.kill(grids[0].pids()[0], signal.SIGKILL)

    monkeypatch.setattr(RayGrid, "answer", answer)
    config = load_config(CONFIG, {"engine.name": "ray", "engine.workers": 2})
    run(config, out=tmp_path / "run", progress=Killing())
    assert grids[0].replaced == 1
    assert differing(tmp_path / "run", serial) == []


def test_the_seed_matters(serial: dict[str, bytes], tmp_path: Path) -> None:
    run(load_config(CONFIG, {"seed": 12}), out=tmp_path / "run")
    assert differing(tmp_path / "run", serial) == list(RESULTS)
