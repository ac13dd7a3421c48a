"""Every attack and every defense in a whole run on real data: it attacks, it defends, it does not reject everybody.

The cases are those of ``benchmarks/catalogue.py``, whose longer version makes the table of docs/results/catalogue.md.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fedsim import plugins
from fedsim.config import load_config
from fedsim.experiment import Run, run


def _catalogue() -> ModuleType:
    path = Path(__file__).parents[1] / "benchmarks" / "catalogue.py"
    spec = importlib.util.spec_from_file_location("benchmarks_catalogue", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


catalogue = _catalogue()
ATTACKS: dict[str, Any] = catalogue.ATTACKS
DEFENSES = plugins.names("defense")
SMALL: dict[str, Any] = {
    **catalogue.BASE,
    "task.model": {"name": "cnn", "channels": 4, "hidden": 16},
    "task.train_examples": 800,
    "task.test_examples": 300,
    "federation.clients": 10,
    "federation.rounds": 6,
    "federation.partition": "iid",
    "training.lr": 0.1,
    "attack.schedule": {**catalogue.ATTACKED, "start": 4, "stop": 5},
    "engine.name": "serial",
    "output.report": False,
}
CHEAP = {
    "a3fl trigger": {"attack.trigger.iterations": 5, "attack.trigger.unlearn_epochs": 1},
    "iba trigger": {"attack.trigger.channels": 4},
    "chameleon": {"attack.contrastive_epochs": 2},
    "darkfed": {"attack.examples": 100},
}
"""Less work, in runs that only show that a method is at work."""
HARMLESS = {
    "alie": "what it sends is inside the spread of honest updates, which are alike here",
    "mimic": "it sends an honest update",
    "perdoor": "few weights move, and each by no more than δ: it needs more than two rounds",
    "darkfed": "its shadow images are labelled by a model that knows little yet",
}
"""Attacks that show nothing in so short a run, and why; the catalogue's long run is to show them."""


def play(out: Path, *changes: dict[str, Any]) -> Run:
    merged: dict[str, Any] = {**SMALL}
    for change in changes:
        merged |= change
    schedule = merged["attack.schedule"]
    merged["attack.schedule"] = {**schedule, "start": 4, "stop": 5}
    return run(load_config("quickstart", merged), out=out, twin=False)


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Nobody attacks: how accurate the model is, and how often the pattern alone fools it."""
    return play(tmp_path_factory.mktemp("honest") / "run", {"attack.name": "none"})


@pytest.mark.slow
@pytest.mark.parametrize("label", [label for label in ATTACKS if label != "rare_embedding"])
def test_an_attack_against_nothing_and_against_its_best_known_defense(label: str, honest: Run, tmp_path: Path) -> None:
    changes, against = ATTACKS[label]
    cls: Any = plugins.get("attack", changes["attack"]["name"])
    alone = play(tmp_path / "alone", changes, CHEAP.get(label, {}))
    attackers = int(alone.rounds["malicious_submitted"].sum())
    assert attackers >= 2, "two rounds of at least one"
    if label not in HARMLESS:
        if cls.backdoor:
            assert alone.rounds["asr"].iloc[3:5].max() > honest.rounds["asr"].iloc[3:5].max() + 0.2
        else:
            assert alone.rounds["main_accuracy"].iloc[3:5].min() < honest.rounds["main_accuracy"].iloc[3:5].min() - 0.05
    stage = catalogue.defended(against)
    stage["defense"] = [{"name": "flip", "steps": 5, "triggers": 1}] if against == "flip" else stage["defense"]
    defended = play(tmp_path / "defended", changes, CHEAP.get(label, {}), stage)
    assert len(defended.rounds) == 6
    assert not defended.rounds["main_accuracy"].equals(alone.rounds["main_accuracy"])


@pytest.mark.slow
@pytest.mark.parametrize("attack", ["data_poisoning", "anticipate"])
@pytest.mark.parametrize("name", DEFENSES)
def test_a_defense_against_plain_poisoning_and_anticipate(name: str, attack: str, tmp_path: Path) -> None:
    tiny = {
        "task.data": "digits",
        "task.model": "logistic",
        "task.train_examples": None,
        "training.local_epochs": 1,
        "attack.trigger": {"name": "patch", "size": 3},
    }
    changes = {"attack": {"name": attack, "k": 2}} if attack == "anticipate" else {}
    stage = catalogue.defended(name)
    stage["defense"] = [{"name": "flip", "steps": 5, "triggers": 1}] if name == "flip" else stage["defense"]
    if "server_data" in stage:
        stage["server_data"] = {**stage["server_data"], "examples": 50}
    played = play(tmp_path / "run", tiny, changes, stage)
    clients = played.clients
    accepted = clients.groupby("round")["accepted"].sum()
    assert len(played.rounds) == 6
    assert (accepted > 0).all(), "a defense that rejects everybody does not defend"
    assert clients.groupby("round")["weight"].sum().between(0.999, 1.001).all()
    assert played.rounds["main_accuracy"].iloc[-1] > 0.3, "the main task is learnt"


def test_every_attack_is_in_the_catalogue() -> None:
    played = {changes["attack"]["name"] for changes, _ in ATTACKS.values()}
    assert played == set(plugins.names("attack"))
    assert {against for _, against in ATTACKS.values()} <= set(DEFENSES)
    learnt = {name for name in plugins.names("trigger") if plugins.get("trigger", name).learnt()}  # type: ignore[attr-defined]
    triggers = {changes.get("attack.trigger", {}).get("name") for changes, _ in ATTACKS.values()}
    assert learnt <= triggers
    assert set(HARMLESS) <= set(ATTACKS)
    assert set(catalogue.DEFENSES) <= set(DEFENSES)
