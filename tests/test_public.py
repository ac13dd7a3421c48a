"""What fedsim offers in Python, and the configs it ships."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

import fedsim
from fedsim.batch import Batch
from fedsim.config import Config, config_directory, find, load_config, shipped
from fedsim.errors import ConfigError, PluginError, RunError
from fedsim.federation.schedule import plan, plan_problems

PUBLIC = ["Run", "aggregate", "load_config", "local_attack", "run"]
EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.yaml"))
CONFIGS = sorted(p for p in config_directory().rglob("*.yaml") if p.parent.name != "bench")


def test_these_are_the_public_names():
    assert fedsim.__all__ == PUBLIC
    assert set(fedsim._HOMES) == set(PUBLIC)
    for name in PUBLIC:
        assert inspect.getdoc(getattr(fedsim, name)), f"{name} says nothing about itself"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        fedsim.nothing  # noqa: B018


def test_a_star_import_gives_the_public_names():
    names: dict[str, Any] = {}
    exec("from fedsim import *", names)
    assert {name for name in names if not name.startswith("__")} == set(PUBLIC)


def test_importing_it_is_quick_and_imports_nothing_heavy():
    code = "import sys, fedsim; print(sorted({'torch', 'flwr', 'ray', 'pandas'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_nobody_is_told_what_runs():
    code = "import os, fedsim; print(os.environ['FLWR_TELEMETRY_ENABLED'], os.environ['RAY_USAGE_STATS_ENABLED'])"
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("FLWR", "RAY"))}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True, env=environment
    )
    assert done.stdout.split() == ["0", "0"]


# ------------------------------------------------------------------------------------------------- configs


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch) -> None:
    """The data sets that shipped configs name, where they are."""
    shared = Path(os.environ.get("FEDSIM_SHARED", Path(__file__).parents[1].parent / "shared"))
    if "FEDSIM_DATA" not in os.environ and (shared / "data").is_dir():
        monkeypatch.setenv("FEDSIM_DATA", str(shared / "data"))


def loaded(path: Path) -> Config:
    """The config, or a skip where only its data is missing."""
    try:
        return load_config(path)
    except ConfigError as error:
        absent = [problem for problem in error.problems if problem.absent]
        if absent != error.problems:
            raise
        pytest.skip(f"needs data that is not here: {absent[0]}; set FEDSIM_DATA to the directory that has it")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.relative_to(config_directory()).as_posix())
@pytest.mark.usefixtures("data")
def test_every_shipped_config_is_right(path):
    config = loaded(path)
    assert plan_problems(config, plan(config)) == []
    name = path.relative_to(config_directory()).with_suffix("").as_posix()
    assert name in shipped()
    assert find(name) == path
    assert load_config(config.to_dict()) == config


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
@pytest.mark.usefixtures("own_registry")
def test_every_example_config_is_right(path):
    config = loaded(path)
    assert plan_problems(config, plan(config)) == []


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.relative_to(config_directory()).as_posix())
def test_a_shipped_config_names_no_machine(path):
    raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert isinstance(raw, dict)
    text = path.read_text(encoding="utf-8")
    assert "/home/" not in text
    assert str(Path.home()) not in text


# -------------------------------------------------------------------------------------------------- running


def test_a_run_in_python(tmp_path, tiny, tiny_file, finished):
    config = fedsim.load_config(tiny)
    result = fedsim.run(config, out=tmp_path / "run", twin=True)
    assert isinstance(result, fedsim.Run)
    assert result.rounds.equals(finished.rounds)
    assert result.twin is not None
    assert result.twin.equals(finished.twin)
    assert result.summary == finished.summary
    assert result.directory == tmp_path / "run"
    assert result.timings["round"].tolist() == [1, 2, 3, 4, 5, 6]
    assert (result.timings["seconds_total"] > 0).all()
    opened = fedsim.Run.open(tmp_path / "run")
    assert opened.clients.equals(result.clients)
    again = fedsim.run(tiny_file, out=tmp_path / "file")
    assert again.rounds.equals(finished.rounds)
    assert again.twin is None


def test_a_run_tells_its_progress(tmp_path, tiny):
    told: list[Any] = []

    class Progress:
        def begin(self, what: str, rounds: int, done: int) -> None:
            told.append((what, rounds, done))

        def say(self, line: str) -> None:
            told.append(line)

        def client(self) -> None:
            told.append("client")

        def round(self, record: Any) -> None:
            told.append(record.round)

    fedsim.run(fedsim.load_config(tiny), out=tmp_path / "run", twin=True, progress=Progress())
    one = [told for number in range(1, 7) for told in (*["client"] * 4, number)]
    expected = [f"run directory: {tmp_path / 'run'}", ("attack", 6, 0), *one, ("clean twin", 6, 0), *one]
    assert told == expected


def test_overrides_as_text_and_as_a_mapping():
    one = fedsim.load_config("quickstart", ["training.lr=0.1", "attack.k=2"])
    assert one == fedsim.load_config("quickstart", {"training.lr": 0.1, "attack.k": 2})
    assert one == fedsim.load_config("quickstart", {"training": {"lr": 0.1}, "attack": {"k": 2}})


def test_impossible_plans_are_refused_before_anything_is_begun(tmp_path, tiny):
    tiny["federation"]["dropout"] = 0.9
    tiny["defense"] = "krum"
    with pytest.raises(ConfigError, match="'krum' needs at least 3 clients"):
        fedsim.run(fedsim.load_config(tiny), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------- one method by itself


def test_one_defense():
    updates = torch.tensor([[1.0, 0.0], [1.1, 0.1], [0.9, 0.0], [50.0, 50.0]])
    result = fedsim.aggregate("krum", updates=updates, f=1)
    assert result.vector.tolist() == updates[0].tolist()
    assert result.accepted.tolist() == [True, False, False, False]
    assert result.scores["krum.score"].argmax() == 3
    base = torch.tensor([10.0, 10.0])
    mean = fedsim.aggregate("fedavg", updates=updates[:2], num_examples=[1, 3], global_vector=base)
    torch.testing.assert_close(mean.vector, updates[0] / 4 + updates[1] * 3 / 4)
    torch.testing.assert_close(mean.model, base + mean.vector)
    torch.testing.assert_close(mean.weights, torch.tensor([0.25, 0.75]))


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"updates": torch.ones(3)}, ValueError, "matrix"),
        ({"updates": torch.ones(3, 2, dtype=torch.int64)}, ValueError, "floating-point"),
        ({"updates": torch.tensor([[float("nan")]])}, ValueError, "finite"),
        ({"updates": torch.ones(3, 2), "num_examples": [1, 2]}, ValueError, r"shape \(3,\)"),
        ({"updates": torch.ones(3, 2), "global_vector": torch.ones(3)}, ValueError, r"shape \(2,\)"),
        ({"updates": torch.ones(3, 2), "g": 1}, PluginError, "no parameter 'g'"),
        ({"updates": torch.ones(3, 2), "f": -1}, PluginError, "out of range"),
        ({"updates": torch.ones(3, 2), "f": 1}, RunError, "needs at least 4 clients"),
    ],
)
def test_what_a_defense_cannot_be_given(options, error, said):
    with pytest.raises(error, match=said):
        fedsim.aggregate("krum", **options)


def scene() -> tuple[nn.Module, list[Batch]]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
        batches = [Batch(torch.rand(8, 1, 4, 4), torch.arange(8) % 3) for _ in range(3)]
    return model, batches


def stamp(batch: Batch, count: int) -> Batch:
    inputs, labels = batch.inputs.clone(), batch.labels.clone()
    inputs[:count, :, :2, :2] = 1.0
    labels[:count] = 0
    return Batch(inputs, labels)


def test_one_attack():
    model, batches = scene()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = fedsim.local_attack("data_poisoning", model, batches, trigger=stamp, lr=0.1, epochs=2)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items()), "the model is copied"
    assert result.update.shape == (51,)
    assert bool(result.update.any())
    moved = {name: result.state_dict[name] - before[name] for name in before}
    torch.testing.assert_close(torch.cat([m.reshape(-1) for m in moved.values()]), result.update)
    scaled = fedsim.local_attack(
        "data_poisoning", model, batches, trigger=stamp, lr=0.1, epochs=2, craft=["scale"], clients_per_round=4
    )
    torch.testing.assert_close(scaled.update, 4 * result.update)
    pairs = [(batch.inputs, batch.labels) for batch in batches]
    assert torch.equal(
        fedsim.local_attack("data_poisoning", model, pairs, trigger=stamp, lr=0.1, epochs=2).update, result.update
    )


def test_the_learning_rate_of_a_later_round():
    model, batches = scene()
    first = fedsim.local_attack("data_poisoning", model, batches, trigger=stamp, lr=0.05, epochs=1)
    third = fedsim.local_attack("data_poisoning", model, batches, trigger=stamp, lr=0.2, lr_decay=0.5, round=3)
    torch.testing.assert_close(first.update, third.update)


def test_what_an_attack_cannot_be_given():
    model, batches = scene()
    with pytest.raises(PluginError, match="did you mean 'anticipate'"):
        fedsim.local_attack("anticipatte", model, batches)
    with pytest.raises(PluginError, match="no parameter 'kk'"):
        fedsim.local_attack("anticipate", model, batches, kk=3)
    with pytest.raises(RunError, match="no batch"):
        fedsim.local_attack("data_poisoning", model, [])
