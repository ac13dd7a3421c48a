"""Accidents of a whole run on Ray: nothing is left running, and what is on disk goes on to the same end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
import pytest
import ray

from fedsim.config import load_config
from fedsim.errors import RunError
from fedsim.experiment import Silent, run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="processes are looked up in /proc"),
]

CONFIG: dict[str, Any] = {
    "name": "accident",
    "task": {"data": "digits", "model": "logistic", "train_examples": 200, "test_examples": 50},
    "federation": {"clients": 8, "clients_per_round": 4, "rounds": 100_000, "partition": "iid"},
    "training": {"local_epochs": 1},
    "attack": {"name": "data_poisoning", "trigger": {"name": "patch", "size": 2}},
    "engine": {"name": "ray", "workers": 2},
    "output": {"report": False, "checkpoint_every": 2},
}


def marked(mark: str) -> dict[int, str]:
    """The living processes that were started, directly or not, with ``mark`` in their environment ("": by us)."""
    found = {}
    sign = f"FEDSIM_TEST_MARK={mark}" if mark else f"PYTEST_CURRENT_TEST={os.environ['PYTEST_CURRENT_TEST']}"
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if sign.encode() in (entry / "environ").read_bytes():
                    found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()[:120]
            except OSError:
                continue  # gone meanwhile, or not ours
    return found


def workers(mark: str) -> list[int]:
    return [pid for pid, command in marked(mark).items() if "ray::_Worker" in command]


def wait(condition: Any, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


class Started:
    """``fedsim run`` in a process group of its own, as a shell starts it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory / "run"
        config = directory / "accident.yaml"
        config.write_text(json.dumps(CONFIG))
        self.mark = uuid.uuid4().hex
        self.process = subprocess.Popen(
            [
                *("env", "--default-signal=INT"),  # a shell that runs the suite in the background has it ignored
                *(sys.executable, "-m", "fedsim", "run", str(config), "--out", str(self.directory)),
            ],
            env={**os.environ, "FEDSIM_TEST_MARK": self.mark},
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def rounds(self) -> int:
        try:
            return (self.directory / "journal.jsonl").read_bytes().count(b"\n")
        except OSError:
            return 0

    def until_round(self, number: int) -> None:
        assert wait(lambda: self.rounds() >= number or self.process.poll() is not None, 90), "it takes too long"
        assert self.process.poll() is None, self.process.communicate()[0]

    def clean_up(self) -> None:
        for pid in marked(self.mark):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Started]:
    made = Started(tmp_path)
    yield made
    made.clean_up()


def shorter(rounds: int) -> Any:
    """The same experiment, ended in time and without Ray."""
    return load_config(CONFIG, {"federation.rounds": rounds, "engine.name": "serial"})


def test_ctrl_c_stops_everything_and_the_run_goes_on_later(started: Started, tmp_path: Path) -> None:
    started.until_round(3)
    assert len(workers(started.mark)) == 2, marked(started.mark)
    os.killpg(started.process.pid, signal.SIGINT)  # a terminal sends it to the whole group
    output, _ = started.process.communicate(timeout=60)
    assert started.process.returncode == 130, output
    assert "interrupted; continue with" in output
    assert "Traceback" not in output
    assert wait(lambda: not marked(started.mark), 15), marked(started.mark)

    manifest = json.loads((started.directory / "manifest.json").read_text())
    assert manifest["status"] == "interrupted"
    rounds = pd.read_parquet(started.directory / "rounds.parquet")
    played = len(rounds)
    assert rounds["round"].tolist() == list(range(1, played + 1))
    assert not (started.directory / ".lock").exists()
    reference = run(shorter(played), out=tmp_path / "reference")
    assert rounds.equals(reference.rounds), "rounds on disk are whole"
    assert pd.read_parquet(started.directory / "clients.parquet").equals(reference.clients)


def test_killing_the_run_itself_leaves_no_worker(started: Started) -> None:
    """Nor Ray's servers."""
    started.until_round(1)
    assert len(workers(started.mark)) == 2
    started.process.kill()
    started.process.wait(20)
    assert wait(lambda: all("Agent" in name for name in marked(started.mark).values()), 30), marked(started.mark)
    # two agents of Ray's own notice after a minute that their node is gone, and leave


def test_a_run_that_fails_stops_the_ray_it_started(tmp_path: Path) -> None:
    class Failing(Silent):
        seen: ClassVar[list[int]] = []

        def client(self) -> None:
            self.seen += workers("")
            raise RunError("enough")

    with pytest.raises(RunError, match="enough"):
        run(load_config(CONFIG), out=tmp_path / "run", progress=Failing())
    assert len(Failing.seen) == 2
    assert not ray.is_initialized()
    assert wait(lambda: not workers(""), 15), "a program that goes on has no workers of ours"


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
"""An attack whose client never ends in round 2."""
import time

from fedsim.attack import Attack
from fedsim.plugins import register


@register("sleeper")
class Sleeper(Attack):
    """Sleeps through round 2."""

    paper = "a test, not published"

    def train(self, context):
        if context.round == 2:
            time.sleep(3600)
        super().train(context)
'''


def test_a_client_that_hangs_is_recorded_and_the_run_goes_on(tmp_path: Path) -> None:
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    config = load_config(
        CONFIG,
        {
            "federation.rounds": 3,
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
    assert failed[["round", "malicious"]].values.tolist() == [[2, True]]
    assert failed["reason"].iloc[0] == "no reply within 8 s (engine.client_timeout)"
    assert any("round 2: client" in line and "failed" in line for line in lines)
    assert finished.rounds["round"].tolist() == [1, 2, 3]
    assert wait(lambda: not workers(""), 15), "the one that slept is gone, too"
