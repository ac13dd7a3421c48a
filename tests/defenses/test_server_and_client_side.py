"""Defenses that act before the round, at the clients and in evaluation: by hand, and in runs that take a moment."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from defenses.crfl import evenly, shares
from fedsim import plugins
from fedsim.batch import Batch
from fedsim.config import load_config
from fedsim.defense import Defense, HeldOut, HonestContext, Server
from fedsim.direct import aggregate, make_server
from fedsim.errors import ConfigError, RunError
from fedsim.experiment import Run, Silent, run
from fedsim.layout import FlatModel
from fedsim.local import LocalSettings
from fedsim.training import fit
from tests.support.parity import draw
from tests.support.runs import RESULTS, contents, differing

Change = Callable[..., dict[str, Any]]


def made(name: str, **parameters: Any) -> Defense:
    stage: Defense = plugins.create("defense", name, **parameters)
    return stage


def network(seed: int = 0) -> nn.Sequential:
    """A network with running statistics, in double precision: 4 → 3 classes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)).double()


def context(model: nn.Module, batches: list[Batch] | None = None, classes: int = 3, seed: int = 0) -> HonestContext:
    flat = FlatModel(model)
    return HonestContext(
        flat,
        flat.vector.clone(),
        lambda: iter(batches or []),
        nn.CrossEntropyLoss(),
        LocalSettings(lr=0.1),
        classes,
        torch.Generator().manual_seed(seed),
    )


def held(clean: tuple[Tensor, Tensor], triggered: tuple[Tensor, Tensor] | None = None, size: int = 3) -> HeldOut:
    def batches(inputs: Tensor, labels: Tensor) -> Callable[[], Any]:
        return lambda: (Batch(*part) for part in zip(inputs.split(size), labels.split(size), strict=True))

    return HeldOut(batches(*clean), None if triggered is None else batches(*triggered))


# ------------------------------------------------------------------------------------------------- FedProx


def test_fedprox_is_sgd_on_the_proximal_loss() -> None:
    start, inputs, labels = network(), draw(1, 8, 4), torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
    flat = context(copy.deepcopy(start))
    stage, mu = made("fedprox", mu=0.7), 0.7
    fit(
        flat.model,
        lambda: iter([Batch(inputs, labels)]),
        flat.loss,
        LocalSettings(lr=0.1, epochs=4, momentum=0.9, weight_decay=0.01),
        on_gradient=lambda gradient, weights: stage.client_gradient(gradient, weights, flat),
    )
    by_hand = copy.deepcopy(start)
    anchors = [p.detach().clone() for p in by_hand.parameters()]
    optimiser = torch.optim.SGD(by_hand.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    for _ in range(4):
        optimiser.zero_grad()
        apart = sum(((p - a) ** 2).sum() for p, a in zip(by_hand.parameters(), anchors, strict=True))
        (flat.loss(by_hand(inputs), labels) + mu / 2 * apart).backward()
        optimiser.step()
    expected = torch.cat([p.detach().flatten() for p in by_hand.parameters()])
    torch.testing.assert_close(flat.model.weights, expected, rtol=0, atol=1e-12)


# ------------------------------------------------------------------------------------- local differential privacy


def test_local_dp_clips_the_trainable_part() -> None:
    here = context(network())
    trainable = here.model.layout.trainable
    update = draw(2, here.model.layout.size)
    short, long = 1.5 * update / update[:trainable].norm(), 5 * update / update[:trainable].norm()
    stage = made("local_dp", bound=2.0, sigma=0.0)
    assert torch.equal(stage.client_update(short, here), short)
    sent = stage.client_update(long, here)
    torch.testing.assert_close(sent[:trainable], long[:trainable] * 0.4, rtol=1e-12, atol=0)
    assert torch.equal(sent[trainable:], long[trainable:])
    zero = torch.zeros_like(update)
    assert torch.equal(stage.client_update(zero, here), zero)


def test_local_dp_adds_noise_from_the_clients_stream() -> None:
    here = context(nn.Linear(200, 100, bias=False))
    update = torch.zeros(20000)
    stage = made("local_dp", bound=4.0, sigma=0.5)
    first = stage.client_update(update, here)
    assert float(first.std()) == pytest.approx(2.0, rel=0.03)  # σ S
    assert abs(float(first.mean())) < 0.08
    assert not torch.equal(stage.client_update(update, here), first)
    again = context(nn.Linear(200, 100, bias=False))
    assert torch.equal(stage.client_update(update, again), first)
    assert not bool(update.any())


# ------------------------------------------------------------------------------------------------------ FLIP


def stripes(count: int, seed: int) -> Batch:
    """Images (count, 1, 8, 8) of three classes: which two rows are bright. Nothing is bright in the last two."""
    labels = torch.arange(count) % 3
    inputs = 0.3 * torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    for row in (0, 1):
        inputs[torch.arange(count), 0, 2 * labels + row] += 0.4
    return Batch(inputs, labels)


def stamp(batch: Batch) -> Batch:
    """With the trigger of the backdoor, four pixels in the corner, and its target: class 0."""
    inputs = batch.inputs.clone()
    inputs[:, :, 6:, 6:] = 1.0
    return Batch(inputs, torch.zeros_like(batch.labels))


@pytest.fixture(scope="module")
def backdoored() -> nn.Module:
    """A linear classifier of stripes that takes whatever is stamped for class 0."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        flat = FlatModel(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)))
    clean = stripes(90, 1)
    bad = stamp(clean)
    both = Batch(torch.cat([clean.inputs, bad.inputs]), torch.cat([clean.labels, bad.labels]))
    fit(flat, lambda: iter([both]), nn.CrossEntropyLoss(), LocalSettings(lr=0.5, epochs=200))
    return flat.module


def success(model: nn.Module, batch: Batch) -> float:
    with torch.no_grad():
        return float((model(batch.inputs).argmax(1) == batch.labels).double().mean())


def test_flip_finds_the_trigger_that_is_there(backdoored: nn.Module) -> None:
    here = context(copy.deepcopy(backdoored))
    stage: Any = made("flip", steps=200)
    before = here.model.vector.clone(), here.model.gradient.clone()
    clean = stripes(60, 2)
    others = clean.inputs[clean.labels != 0]
    found = stage.invert(others, 0, here)
    assert found is not None
    mask, pattern = found
    assert mask.shape == (1, 8, 8)
    assert pattern.shape == (1, 8, 8)
    assert 0 <= float(mask.min()) <= float(mask.max()) <= 1
    assert float(mask[0, 6:, 6:].sum() / mask.sum()) > 0.5, "most of the mask is where the trigger is"
    stamped = Batch((1 - mask) * others + mask * pattern, torch.zeros(len(others), dtype=torch.int64))
    assert success(here.model.module, stamped) >= 0.9
    assert float(mask.sum()) <= 0.125 * 64
    assert torch.equal(here.model.vector, before[0])
    assert torch.equal(here.model.gradient, before[1])
    assert made("flip", steps=1, largest=0.01).invert(others, 0, here) is None  # type: ignore[attr-defined]


def test_flip_stamps_others_and_keeps_the_labels(backdoored: nn.Module) -> None:
    clean = stripes(60, 2)
    here = context(copy.deepcopy(backdoored).train(), [clean])
    stage = made("flip", steps=60, triggers=3, portion=0.5)
    batch = stripes(30, 3)
    first = stage.client_batch(batch, here)
    assert here.model.module.training
    assert torch.equal(first.labels, batch.labels)
    targets = {target for target, *_ in here.memory["triggers"]}
    assert 0 in targets, "the backdoor's is among those that succeed"
    changed = (first.inputs != batch.inputs).flatten(1).any(1)
    assert int(changed.sum()) == 10, "half of the twenty that are not of the target"
    assert len(set(batch.labels[changed].tolist())) == 2, "none of the target"
    kept = here.memory["triggers"]
    stage.client_batch(batch, here)
    assert here.memory["triggers"] is kept, "inverted once a round"
    anew = made("flip", steps=60, every=2)
    for _ in range(2):
        anew.client_batch(batch, here)
    assert (here.memory["seen"], here.memory["triggers"] is kept) == (4, False)


def test_flip_leaves_a_client_of_one_class_alone(backdoored: nn.Module) -> None:
    clean = stripes(30, 2)
    only = Batch(clean.inputs[clean.labels == 1], clean.labels[clean.labels == 1])
    here = context(copy.deepcopy(backdoored), [only], classes=3)
    stage = made("flip", steps=1, triggers=3, success=1.0)
    assert stage.client_batch(only, here) is only


def test_flip_unlearns_a_backdoor_that_plain_training_keeps(backdoored: nn.Module) -> None:
    test = stripes(60, 4)
    aimed = Batch(test.inputs[test.labels != 0], test.labels[test.labels != 0])
    assert success(backdoored, stamp(aimed)) == 1.0
    left = {}
    for name in ("fedprox", "flip"):
        own = [stripes(30, 5)]
        here = context(copy.deepcopy(backdoored), own)
        stage = made("flip", triggers=3, steps=80) if name == "flip" else made(name)
        fit(
            here.model,
            here.batches,
            here.loss,
            LocalSettings(lr=0.3, epochs=20),
            transform=lambda batch, s=stage, c=here: s.client_batch(batch, c),  # type: ignore[misc]
        )
        assert success(here.model.module, test) > 0.95
        left[name] = success(here.model.module, stamp(aimed))
    assert left["fedprox"] > 0.9
    assert left["flip"] < 0.3


def test_flip_rejects_unsure_predictions() -> None:
    model = nn.Linear(2, 2, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.eye(2))
    server = make_server(model, 2)
    logits = torch.tensor([[3.0, 0.0], [0.1, 0.0], [0.0, 3.0], [0.0, 0.1]], dtype=torch.float64)
    right = torch.tensor([0, 0, 0, 1])  # sure and right, unsure and right, sure and wrong, unsure and right
    stage = made("flip", confidence=0.6)
    found = stage.evaluate(server.model.vector.clone(), held((logits, right), (logits, 1 - right)), server)
    assert found == {"accuracy": 0.25, "rejected": 0.5, "asr": 0.25, "rejected_triggered": 0.5}
    assert set(stage.evaluate(server.model.vector.clone(), held((logits, right)), server)) == {"accuracy", "rejected"}
    lax = made("flip", confidence=0.4).evaluate(server.model.vector.clone(), held((logits, right)), server)
    assert lax == {"accuracy": 0.75, "rejected": 0.0}


# ------------------------------------------------------------------------------------------------------ CRFL


def test_crfl_clips_weights_and_not_statistics() -> None:
    flat = FlatModel(network())
    size, trainable = flat.layout.size, flat.layout.trainable
    base, updates = draw(3, size), draw(4, 3, size)
    result = aggregate("crfl", updates=updates, global_vector=base, trainable=trainable, rho=2.0)
    mean = base + updates.mean(0)
    expected = mean[:trainable] * 2 / (mean[:trainable].norm() + 1e-6)
    torch.testing.assert_close(result.model[:trainable], expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(result.model[trainable:], mean[trainable:], rtol=0, atol=1e-12)
    long = float(mean[:trainable].norm()) * 1.01
    alone = aggregate("crfl", updates=updates[:1], global_vector=base, trainable=trainable, rho=2 * long)
    assert torch.equal(alone.vector, updates[0])


def test_crfl_sends_a_noisy_model_from_the_second_round_on() -> None:
    model = nn.Sequential(nn.Linear(100, 100), nn.BatchNorm1d(100))
    stage = made("crfl", sigma=0.3)
    first, second, again = (make_server(model, 2, round=r) for r in (1, 2, 2))
    vector = first.model.vector.clone()
    assert stage.broadcast(vector, first) is vector
    sent = stage.broadcast(vector, second)
    trainable = first.model.layout.trainable
    assert float((sent - vector)[:trainable].std()) == pytest.approx(0.3, rel=0.05)
    assert torch.equal(sent[trainable:], vector[trainable:])
    assert torch.equal(stage.broadcast(vector, again), sent)


def test_crfl_votes_and_certifies_by_hand() -> None:
    """A linear classifier so sure that every copy votes alike: p_A = 1, p_B = 0."""
    model = nn.Linear(2, 2, bias=False)
    server = make_server(model, 2, settings=LocalSettings(lr=0.2, lr_decay=0.5), round=4)
    vector = 3 * torch.eye(2).flatten()
    inputs = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 0.0], [0.0, 1.0]])
    labels = torch.tensor([0, 1, 1, 1])
    given = {"rho": 5.0, "sigma": 0.01, "copies": 50, "alpha": 0.01, "every": 2, "attack_round": 2}
    adversary = {"attackers": 2, "boost": 3.0, "poisoned": 0.25, "steps": 7}
    stage: Any = made("crfl", **given, **adversary, radii=[0.0, 1e-5, 1e4])
    aggregate(stage, updates=torch.zeros(4, 4), num_examples=[1, 1, 1, 5], global_vector=vector)
    found = stage.evaluate(vector, held((inputs, labels), (inputs, 1 - labels)), server)
    slack = math.sqrt(math.log(100) / 100)
    apart = (math.sqrt(1 - 1e-8 if slack <= 0 else 1 - slack) - math.sqrt(slack)) ** 2
    reach = 2 * 5.0  # the longest input times ρ
    strength = 5 / 8 * 3 * 7 * (0.2 * 4) * 0.25  # the rate of round 2 is that of round 4 over 0.5²
    expected = math.sqrt(-math.log(1 - apart) * 0.01**2 / (2 * 2 * (2 + 2 * reach + reach**2) * 2 * strength**2))
    assert found["radius"] == pytest.approx(expected, rel=1e-9)
    assert expected > 1e-5
    del found["radius"]
    assert found == {
        "norm": pytest.approx(math.sqrt(18)),
        "accuracy": 0.75,
        "asr": 0.25,
        "undecided": 0.0,
        "certified_0": 0.75,
        "certified_1e-05": 0.75,
        "certified_10000": 0.0,
    }
    few = made("crfl", **{**given, "copies": 2})
    few.state.update(stage.state)
    refused = few.evaluate(vector, held((inputs, labels)), server)
    assert (refused["undecided"], refused["radius"], refused["certified_0"]) == (1.0, 0.0, 0.0)
    server.round = 5
    assert set(stage.evaluate(vector, held((inputs, labels)), server)) == {"norm"}


def test_crfl_radius_shrinks_with_contraction_gone() -> None:
    """Noise as long as the model wipes out what an early attack did: the later, the larger the radius."""
    stage: Any = made("crfl", rho=1.0, sigma=1.0)
    stage.state["share"] = 0.1
    pulls = [stage.pull(make_server(nn.Linear(2, 2), 2, round=r)) for r in (1, 2, 3)]
    phi = 2 * 0.8413447460685429 - 1
    assert pulls[1] / pulls[0] == pytest.approx(math.sqrt(phi), rel=1e-9)
    assert pulls[2] / pulls[0] == pytest.approx(phi, rel=1e-9)


@pytest.mark.parametrize(
    ("model", "settings", "known"),
    [
        (nn.Sequential(nn.Linear(4, 3)), LocalSettings(lr=0.1), True),
        (nn.Sequential(nn.Linear(4, 3)), LocalSettings(lr=0.1, momentum=0.9), False),
        (nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)), LocalSettings(lr=0.1), False),
        (nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), LocalSettings(lr=0.1), False),
        (nn.Sequential(nn.Conv2d(1, 3, 2), nn.Flatten()), LocalSettings(lr=0.1), False),
    ],
    ids=["logistic", "momentum", "two layers", "batch norm", "no linear layer"],
)
def test_crfl_certifies_only_where_the_theorem_holds(model: nn.Module, settings: LocalSettings, known: bool) -> None:
    server = make_server(model, 3, settings=settings, round=1)
    inputs = torch.rand(2, 1, 2, 2) if isinstance(model, nn.Sequential) and isinstance(model[0], nn.Conv2d) else None
    inputs = torch.full((2, 4), 0.5) if inputs is None else inputs
    stage: Any = made("crfl", rho=3.0, every=1, copies=2, lipschitz=None)
    stage.state["share"] = 0.1
    found = stage.evaluate(server.model.vector.clone(), held((inputs, torch.zeros(2, dtype=torch.int64))), server)
    assert ("radius" in found) == known
    if known:  # input length 1, and 1 for the bias
        reach = 3 * math.sqrt(2)
        assert stage.lipschitz(server.model.vector.clone(), inputs, server) == pytest.approx(
            math.sqrt(2 + 2 * reach + reach**2)
        )
    told: Any = made("crfl", lipschitz=4.0)
    told.state["share"] = 0.1
    assert told.lipschitz(server.model.vector, inputs, server) == (None if settings.momentum else 4.0)


def test_votes_and_examples() -> None:
    votes = torch.tensor([[0, 2], [1, 2], [1, 2], [0, 2]])
    winner, first, second = shares(votes, 3)
    assert (winner.tolist(), first.tolist(), second.tolist()) == ([0, 2], [0.5, 1.0], [0.5, 0.0])
    labels = torch.arange(10)
    some = evenly(held((labels[:, None], labels)).clean, 4)
    assert some.labels.tolist() == [0, 2, 5, 7]
    assert some.inputs.tolist() == [[0], [2], [5], [7]]
    assert evenly(held((labels[:, None], labels)).clean, 99).labels.tolist() == labels.tolist()


# --------------------------------------------------------------------------------------------- BackdoorIndicator


def task(count: int = 30, *, rounds: int = 1, classes: int = 3) -> Server:
    data = draw(7, count, 4), torch.zeros(count, dtype=torch.int64)
    return make_server(network(), classes, data=data, settings=LocalSettings(lr=0.1), round=rounds)


def test_indicator_labels_are_drawn_once_and_balanced() -> None:
    stage, server = made("backdoor_indicator", epochs=1), task()
    vector = server.model.vector.clone()
    kept = vector.clone()
    stage.broadcast(vector, server)
    assert torch.equal(vector, kept)
    labels = stage.state["labels"]
    assert labels.bincount().tolist() == [10, 10, 10]
    stage.broadcast(vector, task(rounds=2))
    assert stage.state["labels"] is labels
    assert not torch.equal(labels, torch.arange(30) % 3)


def test_indicator_injection_is_sgd_on_the_squared_proximal_loss() -> None:
    """Two batches of 15 a pass, three passes, a milestone after the first."""
    server = task()
    stage = made(
        "backdoor_indicator", epochs=3, batch_size=15, lr=0.1, mu=2.0, milestones=[1], decay=0.5, reset_statistics=False
    )
    sent = stage.broadcast(server.model.vector.clone(), server)
    by_hand, labels = network(), stage.state["labels"]
    assert server.data is not None
    anchors = [p.detach().clone() for p in by_hand.parameters()]
    optimiser = torch.optim.SGD(by_hand.parameters(), lr=0.1, momentum=0.9, weight_decay=0.0005)
    for number in range(3):
        optimiser.param_groups[0]["lr"] = 0.1 if number == 0 else 0.05
        for inputs, wanted in zip(server.data.inputs.split(15), labels.split(15), strict=True):
            optimiser.zero_grad()
            apart = sum(((p - a) ** 2).sum() for p, a in zip(by_hand.parameters(), anchors, strict=True))
            (nn.functional.cross_entropy(by_hand(inputs), wanted) + apart).backward()
            optimiser.step()
    torch.testing.assert_close(sent, FlatModel(by_hand).vector, rtol=0, atol=1e-12)
    by_hand.eval()
    assert stage.state["injected"] == pytest.approx(success(by_hand, Batch(server.data.inputs, labels)))
    assert stage.evaluate(sent, held((server.data.inputs, labels)), server) == {"injected": stage.state["injected"]}


def test_indicator_scores_and_threshold() -> None:
    """One linear layer that gives back its input: every client is given the accuracies it shall have."""
    model = nn.Linear(3, 3, bias=False).double()
    inputs = torch.eye(3, dtype=torch.float64)[torch.tensor([0] * 20 + [1] * 20)]
    server = make_server(model, 3, data=(inputs, torch.zeros(40, dtype=torch.int64)), round=5)
    labels = torch.tensor([0] * 19 + [1] + [1] * 10 + [0] * 10)  # no example of class 2
    identity = torch.eye(3, dtype=torch.float64).flatten()
    stage = made("backdoor_indicator", threshold=0.95)
    stage.state.update(labels=labels, round=5, statistics=torch.empty(0, dtype=torch.float64))
    always_one = torch.tensor([[0.0, 0, 0], [1, 1, 1], [0, 0, 0]], dtype=torch.float64).flatten()
    clients = torch.stack([identity, always_one, -identity])
    result = aggregate(stage, updates=clients - identity, global_vector=identity, server=server, round=5)
    # identity: 19 of 29 labelled 0, 10 of 11 labelled 1; always one: 11 of 11; the negative is wrong on all of both
    assert result.scores["backdoor_indicator.known"][:2].tolist() == pytest.approx([10 / 11, 1.0])
    assert result.accepted.tolist() == [True, False, True]
    exact = made("backdoor_indicator", threshold=10 / 11)
    exact.state.update(stage.state)
    again = aggregate(exact, updates=clients - identity, global_vector=identity, server=server, round=5)
    assert again.accepted.tolist() == [False, False, True]
    with pytest.raises(RunError, match=r"round 6: backdoor_indicator has injected no task; call broadcast"):
        aggregate(stage, updates=clients, global_vector=identity, server=server, round=6)


def test_indicator_measures_with_the_statistics_after_the_injection() -> None:
    server = task()
    stage = made("backdoor_indicator", epochs=60, lr=0.05, mu=0.0, momentum=0.9)
    vector = server.model.vector.clone()
    sent = stage.broadcast(vector, server)
    trainable = server.model.layout.trainable
    assert torch.equal(sent[trainable:], vector[trainable:])
    assert not torch.equal(stage.state["statistics"], vector[trainable:])
    silent = torch.zeros(1, len(vector), dtype=torch.float64)
    strange = silent.clone()
    strange[0, trainable:] = 1e6
    given: dict[str, Any] = {"global_vector": sent, "trainable": trainable, "server": server}
    found = [float(aggregate(stage, updates=u, **given).scores["backdoor_indicator.known"]) for u in (silent, strange)]
    assert found[0] == found[1] >= stage.state["injected"], "a client's own statistics do not matter"
    everybody = made("backdoor_indicator", threshold=found[0])
    everybody.state.update(stage.state)
    result = aggregate(everybody, updates=silent, **given)
    assert (result.accepted.tolist(), float(result.vector.abs().max())) == ([False], 0.0), "the model stays"


def test_indicator_before_its_start_does_nothing() -> None:
    server = task(rounds=4)
    stage = made("backdoor_indicator", start=5)
    vector = server.model.vector.clone()
    assert stage.broadcast(vector, server) is vector
    updates = draw(8, 3, len(vector))
    result = aggregate(stage, updates=updates, global_vector=vector, server=server, round=4)
    assert (bool(result.accepted.all()), result.scores, stage.state) == (True, {}, {})
    assert stage.evaluate(vector, held((updates, torch.zeros(3))), server) == {}


# ------------------------------------------------------------------------------------------------------ runs


def small(**changes: Any) -> dict[str, Any]:
    config: dict[str, Any] = {
        "name": "sides",
        "seed": 1,
        "task": {"data": "digits", "model": "logistic", "train_examples": 400, "test_examples": 100},
        "federation": {"clients": 8, "clients_per_round": 4, "rounds": 3},
        "training": {"lr": 0.2, "local_epochs": 2, "batch_size": 16, "momentum": 0.0},
        "attack": {
            "name": "data_poisoning",
            "trigger": {"name": "patch", "size": 2, "target": 1},
            "schedule": {"name": "single_shot", "rounds": [2]},
            "craft": ["scale"],
        },
        "engine": {"name": "serial"},
        "output": {"report": False, "checkpoint_every": 1},
    }
    return {**config, **changes}


def play(tmp_path: Path, *stages: Any, **changes: Any) -> Run:
    directory = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
    return run(load_config({**small(**changes), "defense": list(stages)}), out=directory)


def test_fedprox_in_a_run_holds_honest_clients_only(tmp_path: Path) -> None:
    attack = {**small()["attack"], "schedule": {"name": "single_shot", "rounds": [1]}}
    plain = play(tmp_path, attack=attack).clients
    held_back = play(tmp_path, {"name": "fedprox", "mu": 2.0}, attack=attack).clients
    ratio = held_back[held_back["round"] == 1].update_norm / plain[plain["round"] == 1].update_norm
    malicious = plain[plain["round"] == 1].malicious
    assert ratio[malicious].tolist() == [1.0]
    assert bool((ratio[~malicious] < 0.95).all())


def test_local_dp_in_a_run_makes_honest_updates_of_known_length(tmp_path: Path) -> None:
    clients = play(tmp_path, {"name": "local_dp", "bound": 0.1, "sigma": 2.0}).clients
    honest = clients[~clients.malicious].update_norm
    # 650 weights: 0.1 of signal and 0.2 · √650 of noise
    assert honest.tolist() == pytest.approx([0.2 * math.sqrt(650)] * len(honest), rel=0.1)


def test_crfl_in_a_run_bounds_the_model_and_certifies(tmp_path: Path) -> None:
    stage = {"name": "crfl", "rho": 1.0, "every": 2, "copies": 200, "examples": 50, "boost": 4.0, "attack_round": 2}
    federation = {**small()["federation"], "rounds": 5}
    plain, found = play(tmp_path, federation=federation), play(tmp_path, stage, federation=federation)
    measured = [dict(row) for row in found.rounds["defense"]]
    assert all(m["crfl.norm"] <= 1.0 + 1e-6 for m in measured)
    assert ["crfl.radius" in m for m in measured] == ["crfl.accuracy" in m for m in measured]
    assert ["crfl.accuracy" in m for m in measured] == [False, True, False, True, True]
    assert measured[1]["crfl.accuracy"] == pytest.approx(found.rounds.main_accuracy[1], abs=0.15)
    assert measured[1]["crfl.radius"] > 0
    assert 0 < measured[1]["crfl.certified_0"] <= 1 - measured[1]["crfl.undecided"]
    assert plain.rounds.asr[1] > 0.9
    assert found.rounds.asr[4] < 0.5 * plain.rounds.asr[4]
    assert found.rounds.main_accuracy[4] > 0.6


@pytest.mark.slow
def test_flip_in_a_run_lowers_the_backdoor(tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "seed": 3,
        "training": {**small()["training"], "lr": 0.1, "local_epochs": 4},
        "federation": {**small()["federation"], "rounds": 8},
        "attack": {**small()["attack"], "craft": [], "schedule": {"name": "continuous", "start": 4, "stop": 5}},
    }
    plain = play(tmp_path, **changes).rounds
    stage = {"name": "flip", "triggers": 10, "steps": 60, "price": 0.03, "examples": 32, "confidence": 0.5}
    found = play(tmp_path, stage, **changes).rounds
    assert plain.asr[5:].mean() > 0.15
    assert found.asr[5:].mean() < 0.7 * plain.asr[5:].mean()
    assert found.main_accuracy.iloc[-1] > plain.main_accuracy.iloc[-1] - 0.06
    last = dict(found.defense.iloc[-1])
    assert last["flip.asr"] <= found.asr.iloc[-1]
    assert last["flip.accuracy"] == pytest.approx(found.main_accuracy.iloc[-1], abs=last["flip.rejected"] + 1e-9)


@pytest.mark.slow
def test_the_indicator_in_a_run_rejects_the_attacker(tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "task": {"data": "digits", "model": "cnn", "test_examples": 100},
        "federation": {"clients": 10, "clients_per_round": 5, "rounds": 10},
        "training": {"lr": 0.1, "local_epochs": 2, "batch_size": 32},
        "attack": {
            "name": "data_poisoning",
            "local_epochs": 5,
            "trigger": {"name": "patch", "size": 3, "target": 1},
            "schedule": {"name": "single_shot", "rounds": [10]},
        },
        "server_data": {"examples": 200, "source": "noise"},
    }
    stage = {"name": "backdoor_indicator", "start": 10, "epochs": 60, "lr": 0.01, "mu": 0.1}
    found = play(tmp_path, stage, **changes)
    assert dict(found.rounds["defense"].iloc[-1])["backdoor_indicator.injected"] > 0.8
    last = found.clients[found.clients["round"] == 10]
    known = last.scores.map(lambda scores: dict(scores)["backdoor_indicator.known"])
    assert last[last.malicious].accepted.tolist() == [False]
    assert bool(last[~last.malicious].accepted.sum() >= 3)
    assert known[last.malicious].min() > known[~last.malicious].mean() + 0.1
    assert bool((found.clients[found.clients["round"] < 10].accepted).all())


NORM = '''
import torch
from torch import nn
from fedsim.plugins import register
from fedsim.tasks.model import Classifier, ImageModel, Normalise

@register("test_norm")
class Norm(ImageModel):
    """One convolution with batch norm."""

    def build(self, shape, classes, mean, std):
        c, h, w = shape
        features = nn.Sequential(nn.Conv2d(c, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten())
        return Classifier(Normalise(c, mean, std), features, nn.Linear(3 * h * w, classes))
'''
ALL = [
    {"name": "backdoor_indicator", "epochs": 3, "milestones": [2], "start": 2},
    {"name": "crfl", "rho": 9.0, "every": 2, "copies": 10, "examples": 20},
    {"name": "flip", "steps": 5, "triggers": 2, "success": 0.1, "largest": 1.0, "every": 3},
    "fedprox",
    "local_dp",
]


class Stopping(Silent):
    """Interrupts the run when round 2 is on disk."""

    def round(self, record: Any) -> None:
        if record.round == 2:
            raise KeyboardInterrupt


@pytest.mark.slow
@pytest.mark.usefixtures("own_registry")
def test_all_of_them_resume_to_the_same_bytes_and_are_the_same_on_ray(tmp_path: Path) -> None:
    file = tmp_path / "norm.py"
    file.write_text(NORM)
    config = {
        **small(),
        "plugins": [str(file)],
        "task": {"data": "digits", "model": "test_norm", "train_examples": 160, "test_examples": 60},
        "federation": {"clients": 8, "clients_per_round": 3, "rounds": 4},
        "training": {"local_epochs": 1, "augment": True, "lr_decay": 0.9, "batch_size": 8},
        "server_data": {"examples": 20, "source": "noise"},
        "defense": ALL,
    }

    whole = run(load_config(config), out=tmp_path / "whole")
    assert set(dict(whole.rounds["defense"].iloc[-1])) == {
        "backdoor_indicator.injected",
        "crfl.norm",
        "crfl.accuracy",
        "crfl.asr",
        "crfl.undecided",
        "flip.accuracy",
        "flip.asr",
        "flip.rejected",
        "flip.rejected_triggered",
    }
    with pytest.raises(KeyboardInterrupt):
        run(load_config(config), out=tmp_path / "resumed", progress=Stopping())
    kept = json.loads((tmp_path / "resumed" / "checkpoints" / "round-000002.json").read_text())
    assert kept
    torch.manual_seed(99)
    run(load_config(config), out=tmp_path / "resumed", resume=True)
    wanted = contents(tmp_path / "whole", RESULTS)
    assert differing(tmp_path / "resumed", wanted) == []
    run(load_config(config, {"engine.name": "ray", "engine.workers": 2}), out=tmp_path / "ray")
    assert differing(tmp_path / "ray", wanted) == []


# ------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("stage", "changes", "says"),
    [
        ("backdoor_indicator", {}, "server_data.examples: .*server_data: {examples: 100}"),
        (
            "backdoor_indicator",
            {"server_data": {"examples": 10}},
            "defense.0: needs data from outside the task; set server_data.source to other or noise",
        ),
        ("crfl", {"federation": {"server_lr": 0.5}}, "defense.0: .*set federation.server_lr to 1"),
        (
            {"name": "crfl", "lipschitz": 2.0},
            {"training": {"momentum": 0.9}},
            "defense.0.lipschitz: .* set training.momentum to 0, or this to null",
        ),
        ({"name": "crfl", "sigma": 0.0}, {}, "defense.0.sigma: .*> 0"),
        ({"name": "local_dp", "bound": 0.0}, {}, "defense.0.bound: .*> 0"),
        ({"name": "fedprox", "mu": -1.0}, {}, "defense.0.mu: .*>= 0"),
        ({"name": "flip", "confidence": 1.0}, {}, "defense.0.confidence: .*in \\[0, 1\\)"),
    ],
)
def test_what_is_impossible_is_said_before_anything_is_loaded(stage: Any, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load_config({**small(), "defense": [stage], **changes})
