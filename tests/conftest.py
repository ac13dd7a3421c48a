"""What tests share: deterministic hypothesis, small runs, the command line in this process, the reference data."""

from __future__ import annotations

import copy
import os
import signal
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: the tests share few cores
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test asks the network for anything

import pytest
import yaml
from hypothesis import HealthCheck, settings

with warnings.catch_warnings():  # Flower imports typer, which touches a deprecated name of click
    warnings.simplefilter("ignore", DeprecationWarning)
    import flwr.serverapp.strategy  # noqa: F401

from fedsim import plugins
from fedsim.config import load_config
from fedsim.experiment import Run, run
from tests.support.places import SHARED
from tests.support.processes import Started

settings.register_profile(
    "fedsim",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("fedsim")

TINY: dict[str, Any] = {
    "name": "tiny",
    "task": {"data": "digits", "model": "logistic", "test_examples": 200},
    "federation": {"clients": 8, "clients_per_round": 4, "rounds": 6},
    "training": {"lr": 0.2, "local_epochs": 1},
    "attack": {
        "name": "data_poisoning",
        "trigger": {"name": "patch", "size": 3},
        "schedule": {"name": "continuous", "start": 3, "stop": 4},
        "craft": ["scale"],
    },
    "engine": {"name": "serial"},
    "output": {"report": False},
}
"""A backdoored federation on 8×8 digits that is played in a moment."""


@pytest.fixture(autouse=True, scope="session")
def decoded_once() -> Iterator[None]:
    """The same bytes of a data set that comes with a package are decoded once, and not for each of a thousand runs."""
    with pytest.MonkeyPatch.context() as patch:
        for cls in (plugins.get("dataset", name) for name in plugins.names("dataset")):
            card = getattr(cls, "card", None)
            if card is not None:
                patch.setattr(cls, "card", replace(card, reader=cache(card.reader)))
        yield


@pytest.fixture(scope="session")
def shared() -> Path:
    """The directory of data and reference numbers beside the checkout; tests that need it skip where it is not."""
    if not SHARED.is_dir():
        pytest.skip(f"there is no reference data at {SHARED}; set FEDSIM_SHARED to the directory that has it")
    return SHARED


@pytest.fixture
def tiny() -> dict[str, Any]:
    """A config of a run that takes a moment, as a mapping to change at will."""
    return copy.deepcopy(TINY)


@pytest.fixture
def tiny_file(tmp_path: Path) -> Path:
    """The same as a file."""
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY, sort_keys=False))
    return path


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished tiny run with its clean twin, to look at and not to touch."""
    return run(load_config(TINY), out=tmp_path_factory.mktemp("finished") / "run", twin=True)


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plugins that a test registers are gone afterwards."""
    plugins.load()
    monkeypatch.setattr(plugins, "_registry", {kind: dict(known) for kind, known in plugins._registry.items()})
    monkeypatch.setattr(plugins, "_loaded", set(plugins._loaded))


@dataclass(frozen=True)
class Outcome:
    """What a command left: exit status, standard output, standard error."""

    status: int
    out: str
    err: str

    @property
    def text(self) -> str:
        """Both outputs, on one line of single spaces."""
        return " ".join((self.out + self.err).split())


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """The command line in this process: ``cli("run", "quickstart")``; an exception it lets through is a failure."""
    from fedsim.cli import app, guarded

    def call(*arguments: object) -> Outcome:
        capsys.readouterr()
        status = guarded(lambda **options: app([str(argument) for argument in arguments], **options))
        out, err = capsys.readouterr()
        return Outcome(status, out, err)

    return call


@pytest.fixture
def bounded() -> Iterator[None]:
    """Ends a test that a malformed file keeps busy for ever: after two minutes of computing, however slow the clock."""

    def stop(*_: object) -> None:
        raise AssertionError("a malformed file keeps the command busy")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, 120)
    yield
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    signal.signal(signal.SIGVTALRM, before)


@pytest.fixture
def start() -> Iterator[Callable[..., Started]]:
    """``start("run", file)``: fedsim in a process of its own; whatever that started ends with the test."""
    if not Path("/proc/self/environ").exists():
        pytest.skip("processes are looked up in /proc")
    made: list[Started] = []

    def begin(*arguments: object) -> Started:
        made.append(Started(*arguments))
        return made[-1]

    yield begin
    for one in made:
        one.clean_up()


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """One Ray cluster of two workers for the runs of a module: they use it and leave it."""
    import ray

    from fedsim.federation.cluster import Resources, start_ray

    assert start_ray(Resources(workers=2))
    yield
    ray.shutdown()
