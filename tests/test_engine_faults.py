"""Accidents of a whole run on Ray: nothing is left running, and what is on disk goes on to the same end."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
import pytest
import ray

from fedsim.config import load_config
from fedsim.errors import RunError
from fedsim.experiment import Silent, run
from tests.support.processes import Started, living, rounds_in, wait, workers

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="processes are looked up in /proc"),
]

CONFIG: dict[str, Any] = {
    "name": "accident",
    "task": {"data": "digits", "model": "logistic", "train_examples": 200, "test_examples": 50},
    "federation": {"clients": 8, "clients_per_round": 4, "rounds": 5_000, "partition": "iid"},
    "training": {"local_epochs": 1},
    "attack": {"name": "data_poisoning", "trigger": {"name": "patch", "size": 2}},
    "engine": {"name": "ray", "workers": 2},
    "output": {"report": False, "checkpoint_every": 2},
}


def ours() -> str:
    """What processes that this test started itself have in their environment."""
    return f"PYTEST_CURRENT_TEST={os.environ['PYTEST_CURRENT_TEST']}"


@pytest.fixture
def started(start: Callable[..., Started], tmp_path: Path) -> Started:
    """The run above, at work in ``tmp_path / "run"``."""
    config = tmp_path / "accident.yaml"
    config.write_text(json.dumps(CONFIG))
    return start("run", config, "--out", tmp_path / "run")


def shorter(rounds: int) -> Any:
    """The same experiment, ended in time and without Ray."""
    return load_config(CONFIG, {"federation.rounds": rounds, "engine.name": "serial"})


def test_ctrl_c_stops_everything_and_the_run_goes_on_later(started: Started, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    started.until(lambda: rounds_in(directory) >= 3)
    assert len(workers(started.sign)) == 2, living(started.sign)
    assert "interrupted; continue with" in started.interrupt()
    assert wait(lambda: not living(started.sign), 15), living(started.sign)

    manifest = json.loads((directory / "manifest.json").read_text())
    assert manifest["status"] == "interrupted"
    rounds = pd.read_parquet(directory / "rounds.parquet")
    played = len(rounds)
    assert rounds["round"].tolist() == list(range(1, played + 1))
    assert not (directory / ".lock").exists()
    reference = run(shorter(played), out=tmp_path / "reference")
    assert rounds.equals(reference.rounds), "rounds on disk are whole"
    assert pd.read_parquet(directory / "clients.parquet").equals(reference.clients)


def test_killing_the_run_itself_leaves_no_worker(started: Started, tmp_path: Path) -> None:
    """Nor Ray's servers."""
    started.until(lambda: rounds_in(tmp_path / "run") >= 1)
    assert len(workers(started.sign)) == 2
    started.kill(group=False)
    assert wait(lambda: all("Agent" in name for name in living(started.sign).values()), 30), living(started.sign)
    # two agents of Ray's own notice after a minute that their node is gone, and leave


def test_a_run_that_fails_stops_the_ray_it_started(tmp_path: Path) -> None:
    class Failing(Silent):
        seen: ClassVar[list[int]] = []

        def client(self) -> None:
            self.seen += workers(ours())
            raise RunError("enough")

    with pytest.raises(RunError, match="enough"):
        run(load_config(CONFIG), out=tmp_path / "run", progress=Failing())
    assert len(Failing.seen) == 2
    assert not ray.is_initialized()
    assert wait(lambda: not workers(ours()), 15), "a program that goes on has no workers of ours"


def test_a_cluster_that_is_not_there_fails_in_seconds(tmp_path: Path) -> None:
    config = load_config(CONFIG, {"engine.address": "127.0.0.1:1", "federation.rounds": 2})
    begun = time.monotonic()
    with pytest.raises(RunError, match="Ray cannot be started"):
        run(config, out=tmp_path / "run")
    assert time.monotonic() - begun < 30
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["status"] == "failed"
    assert manifest["reason"].startswith("Ray cannot be started")


SLEEPER = '''
"""An attack whose client never ends in round 1."""
import time

from fedsim.attack import Attack
from fedsim.plugins import register


@register("sleeper")
class Sleeper(Attack):
    """Sleeps through round 1."""

    paper = "a test, not published"

    def train(self, context):
        if context.round == 1:
            time.sleep(3600)
        super().train(context)
'''


def test_a_client_that_hangs_is_recorded_and_the_run_goes_on(tmp_path: Path) -> None:
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    config = load_config(
        CONFIG,
        {
            "federation.rounds": 2,
            "plugins": [str(tmp_path / "sleeper.py")],
            "attack.name": "sleeper",
            "engine.client_timeout": 8.0,  # a fresh worker needs some of it to warm up
        },
    )
    lines: list[str] = []

    class Listening(Silent):
        def say(self, line: str) -> None:
            lines.append(line)

    finished = run(config, out=tmp_path / "run", progress=Listening())
    failed = finished.clients[finished.clients["status"] == "failed"]
    assert failed[["round", "malicious"]].values.tolist() == [[1, True]]
    assert failed["reason"].iloc[0] == "no reply within 8 s (engine.client_timeout)"
    assert any("round 1: client" in line and "failed" in line for line in lines)
    assert finished.rounds["round"].tolist() == [1, 2]
    assert wait(lambda: not workers(ours()), 15), "the one that slept is gone, too"
