"""Every attack and every defense in a whole run on real data: it attacks, it defends, it does not reject everybody.

The cases are those of ``benchmarks/catalogue.py``, whose longer version makes the table of docs/results/catalogue.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from fedsim import plugins
from fedsim.config import load_config
from fedsim.experiment import Run, run
from tests.support.places import script

catalogue = script("benchmarks/catalogue.py")
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
LIGHT = {
    "flip": {"steps": 5},
    "deepsight": {"inputs": 100},
    "fldetector": {"window": 1, "warm_up": 0},
    "rflbat": {"references": 3},
}
"""The same for defenses."""
YOUNG = ("chameleon", "threedfed", "perdoor, all poisoned", "min_max", "min_sum", "sign_flip")
"""Attacks that two rounds show at work on a model that knows little, and not on one that has been taught."""
HARMLESS = {
    "alie": "what it sends is inside the spread of honest updates, which are alike here",
    "mimic": "it sends an honest update",
    "perdoor": "few weights move, and each by no more than δ: it needs more than two rounds",
}
"""Attacks that show nothing in so short a run, and why; the catalogue's long run is to show them."""


def play(out: Path, *changes: dict[str, Any]) -> Run:
    """A run of which the last rounds but one are attacked, two of them."""
    merged: dict[str, Any] = {**SMALL}
    for change in changes:
        merged |= change
    last = merged["federation.rounds"]
    merged["attack.schedule"] = {**merged["attack.schedule"], "start": last - 2, "stop": last - 1}
    return run(load_config("quickstart", merged), out=out, twin=False)


def defended(label: str) -> dict[str, Any]:
    """The catalogue's changes that put a defense up, with less work."""
    changes: dict[str, Any] = catalogue.defended(label)
    stages = [{"name": stage} if isinstance(stage, str) else stage for stage in changes["defense"]]
    return {**changes, "defense": [{**stage, **LIGHT.get(label, {})} for stage in stages]}


def attacked(played: Run, column: str) -> pd.Series:
    """What was measured in the two rounds with an attack."""
    return played.rounds[column].iloc[-3:-1]


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What makes a run go on, for four rounds, with a model that knows its task."""
    played = play(tmp_path_factory.mktemp("taught") / "run", {"attack.name": "none", "federation.rounds": 12})
    assert played.rounds["main_accuracy"].iloc[-1] > 0.8
    return {
        "training.warm_start": str(played.directory / "model.safetensors"),
        "task.train_examples": 500,
        "federation.rounds": 4,
    }


@pytest.fixture(scope="module")
def honest(taught: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Nobody attacks: how accurate the model is, and how often the pattern alone fools it."""
    root = tmp_path_factory.mktemp("honest")
    kinds: dict[str, dict[str, Any]] = {"young": {}, "taught": taught}
    return {kind: play(root / kind, changes, {"attack.name": "none"}) for kind, changes in kinds.items()}


@pytest.mark.slow
@pytest.mark.parametrize("label", [label for label in ATTACKS if label != "rare_embedding"])
def test_an_attack_against_nothing_and_against_its_best_known_defense(
    label: str, taught: dict[str, Any], honest: dict[str, Run], tmp_path: Path
) -> None:
    changes, against = ATTACKS[label]
    cls: Any = plugins.get("attack", changes["attack"]["name"])
    changes = {**changes, **CHEAP.get(label, {})}
    young = label in YOUNG
    alone = play(tmp_path / "alone", {} if young else taught, changes)
    attackers = int(alone.rounds["malicious_submitted"].sum())
    assert attackers >= 2, "two rounds of at least one"
    if label not in HARMLESS:
        without = honest["young" if young else "taught"]
        if cls.backdoor:
            assert attacked(alone, "asr").max() > attacked(without, "asr").max() + 0.2
        else:
            assert attacked(alone, "main_accuracy").min() < attacked(without, "main_accuracy").min() - 0.05
    against_it = play(tmp_path / "defended", {} if young else taught, changes, defended(against))
    assert len(against_it.rounds) == len(alone.rounds)
    assert not against_it.rounds["main_accuracy"].equals(alone.rounds["main_accuracy"])


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
    stage = defended(name)
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
    assert set(HARMLESS) | set(YOUNG) <= set(ATTACKS)
    assert set(catalogue.DEFENSES) | set(LIGHT) <= set(DEFENSES)
