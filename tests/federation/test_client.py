"""What a client does in a round: a function of (seed, round, client), whoever ran before it in the same process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, MetricRecord, RecordDict
from torch import Tensor, nn

from fedsim.attack import Attack, AttackContext, CraftStep, Knowledge
from fedsim.batch import Batch
from fedsim.config import Config, build
from fedsim.federation.client import ClientRuntime, initial_module
from fedsim.federation.messages import pack_state, to_record, to_vector, unpack_state
from fedsim.federation.setup import Setup, prepare
from fedsim.layout import FlatModel
from fedsim.local import LocalSettings
from fedsim.training import fit

CLIENTS = 4
TARGET = 1
CPU = torch.device("cpu")


def a_config(training: dict[str, Any] | None = None, attack: dict[str, Any] | None = None, **top: Any) -> Config:
    return build(
        {
            "seed": 5,
            "task": {"data": "digits", "model": "logistic", "train_examples": 130, "test_examples": 20},
            "federation": {"clients": CLIENTS, "clients_per_round": CLIENTS, "rounds": 9, "partition": "iid"},
            "training": {"lr": 0.1, "local_epochs": 1, "batch_size": 10, **(training or {})},
            "attack": {
                "name": "data_poisoning",
                "trigger": {"name": "patch", "target": TARGET, "size": 2},
                **(attack or {}),
            },
            **top,
        }
    )


@pytest.fixture(scope="module")
def setup() -> Setup:
    return prepare(a_config())


class Fragile(nn.Module):
    """A network with everything that could carry something from one client to the next: dropout, running
    statistics, a cumulative average that counts batches, and a buffer in no state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(1, momentum=None)
        self.net = nn.Sequential(
            nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.Linear(16, 10)
        )
        self.register_buffer("calls", torch.ones(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        out: Tensor = self.net(self.norm(x)) * (1 + 1 / self.calls)
        return out


def fragile() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Fragile()


@pytest.fixture
def runtime_of(setup: Setup) -> Callable[..., ClientRuntime]:
    def make(module: nn.Module | None = None, method: Attack | None = None, **sections: Any) -> ClientRuntime:
        runtime = ClientRuntime(a_config(**sections), setup.data, setup.parts, CPU)
        if module is not None:
            runtime.model = FlatModel(module)
        if method is not None:
            runtime.attack = method
        return runtime

    return make


def play(runtime: ClientRuntime, client: int, round: int = 1, **order: Any) -> RecordDict:
    extra = order.pop("content", {})
    start = order.pop("start", runtime_start(runtime))
    content = RecordDict({"arrays": to_record(start), **extra})
    said = {"malicious": False, "attacker": 0, "participants": 4, "total-examples": 130, **order}
    return runtime.train(content, {"round": round, "client": client, **said})


def runtime_start(runtime: ClientRuntime) -> Tensor:
    return torch.linspace(-0.1, 0.1, runtime.model.layout.size)


def vector(reply: RecordDict) -> Tensor:
    return to_vector(reply.array_records["arrays"]).clone()


# --------------------------------------------------------------------------------------------------- randomness


def test_initial_weights_are_a_function_of_the_seed(setup: Setup) -> None:
    def weights(seed: int) -> Tensor:
        return FlatModel(initial_module(a_config(seed=seed), setup.data)).vector

    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = weights(5)
    assert torch.equal(torch.get_rng_state(), before), "the caller's generator is left alone"
    torch.manual_seed(2)
    assert torch.equal(weights(5), one)
    assert not torch.equal(weights(6), one)


@pytest.mark.parametrize("malicious", [False, True])
def test_the_order_in_which_clients_run_changes_nothing(
    runtime_of: Callable[..., ClientRuntime], malicious: bool
) -> None:
    def results(order: list[tuple[int, int]], seed: int) -> dict[tuple[int, int], Tensor]:
        runtime = runtime_of(fragile(), training={"augment": True, "momentum": 0.9, "local_epochs": 2})
        torch.manual_seed(seed)
        return {(c, r): vector(play(runtime, c, r, malicious=malicious and c == 2)) for c, r in order}

    order = [(c, r) for r in (1, 2) for c in range(CLIENTS)]
    first = results(order, seed=1)
    second = results(order[::-1], seed=2)
    alone = {key: results([key], seed=3)[key] for key in [(2, 2), (3, 1)]}
    assert all(torch.equal(first[key], second[key]) for key in order)
    assert all(torch.equal(first[key], alone[key]) for key in alone)
    assert len({tuple(v.tolist()) for v in first.values()}) == len(order), "no two clients or rounds are alike"


def test_the_seed_matters(runtime_of: Callable[..., ClientRuntime]) -> None:
    assert not torch.equal(vector(play(runtime_of(fragile()), 0)), vector(play(runtime_of(fragile(), seed=6), 0)))


# ------------------------------------------------------------------------------------------------------- honest


def test_an_honest_client_trains_on_its_own_examples(runtime_of: Callable[..., ClientRuntime], setup: Setup) -> None:
    """As plain SGD written out, without the engine."""
    runtime = runtime_of(training={"batch_size": 1000, "local_epochs": 3, "momentum": 0.5, "weight_decay": 0.01})
    reply = play(runtime, 2)
    own = setup.parts[2]
    module = initial_module(a_config(), setup.data)
    model = FlatModel(module)
    model.load(runtime_start(runtime))
    optimiser = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.5, weight_decay=0.01)
    inputs, labels = setup.data.train.inputs[own].float() / 255, setup.data.train.labels[own]
    for _ in range(3):
        optimiser.zero_grad()
        loss = nn.functional.cross_entropy(module(inputs), labels)
        loss.backward()
        optimiser.step()
    assert torch.allclose(vector(reply), model.vector, atol=1e-6)
    metrics = reply.metric_records["metrics"]
    assert metrics["num-examples"] == len(own)
    assert metrics["train-loss"] == pytest.approx(float(loss.detach()), rel=1e-4)
    assert float(metrics["seconds"]) > 0
    assert set(reply) == {"arrays", "metrics"}


def test_an_honest_client_never_meets_the_attack(runtime_of: Callable[..., ClientRuntime]) -> None:
    class Never(Attack):
        def train(self, context: AttackContext) -> None:
            raise AssertionError("the attack ran")

        poison = craft = coordinate = train

    attacked = play(runtime_of(method=Never()), 1)
    assert torch.equal(vector(attacked), vector(play(runtime_of(attack={"name": "none"}), 1)))
    with pytest.raises(AssertionError):
        play(runtime_of(method=Never()), 1, malicious=True)


def test_without_an_attack_a_malicious_order_is_honest_training(runtime_of: Callable[..., ClientRuntime]) -> None:
    runtime = runtime_of(attack={"name": "none"})
    assert torch.equal(vector(play(runtime, 1, malicious=True)), vector(play(runtime, 1)))


def test_what_arrives_is_not_written_into(runtime_of: Callable[..., ClientRuntime]) -> None:
    runtime = runtime_of()
    start = runtime_start(runtime)
    kept = start.clone()
    for malicious in (False, True):
        play(runtime, 0, start=start, malicious=malicious)
    assert torch.equal(start, kept)


# ----------------------------------------------------------------------------------------------------- settings


def test_the_learning_rate_decays_per_round(runtime_of: Callable[..., ClientRuntime]) -> None:
    runtime = runtime_of(training={"lr": 0.4, "lr_decay": 0.5}, attack={"lr": 0.8})
    assert [runtime.settings(r).lr for r in (1, 2, 4)] == pytest.approx([0.4, 0.2, 0.05])
    assert [runtime.attacker_settings(r).lr for r in (1, 2, 4)] == pytest.approx([0.8, 0.4, 0.1])
    assert runtime.settings(4).lr_decay == 0.5


ALL = {
    "lr": 0.3,
    "lr_decay": 0.9,
    "momentum": 0.7,
    "weight_decay": 0.02,
    "local_epochs": 3,
    "local_steps": 5,
    "batch_size": 12,
    "amp": True,
    "channels_last": True,
}


def test_settings_hold_what_the_config_says(runtime_of: Callable[..., ClientRuntime]) -> None:
    runtime = runtime_of(training=ALL)
    assert runtime.settings(2) == LocalSettings(
        lr=pytest.approx(0.27),
        epochs=3,
        batch_size=12,
        momentum=0.7,
        weight_decay=0.02,
        steps=5,
        lr_decay=0.9,
        amp=True,
        channels_last=True,
    )
    assert runtime.attacker_settings(2) == runtime.settings(2), "null: as everybody"


@pytest.mark.parametrize(
    ("attack", "changed"),
    [
        ({"lr": 0.05}, {"lr": 0.045}),
        ({"local_epochs": 7}, {"epochs": 7, "steps": None}),
        ({"local_steps": 2}, {"steps": 2}),
        ({"local_epochs": 7, "local_steps": 2}, {"epochs": 7, "steps": 2}),
    ],
)
def test_the_attack_section_overrides_the_attackers_training_only(
    runtime_of: Callable[..., ClientRuntime], attack: dict[str, Any], changed: dict[str, Any]
) -> None:
    plain, runtime = runtime_of(training=ALL), runtime_of(training=ALL, attack=attack)
    assert runtime.settings(2) == plain.settings(2)
    expected = {**vars(plain.settings(2)), **changed}
    assert vars(runtime.attacker_settings(2)) == pytest.approx(expected)


# ------------------------------------------------------------------------------------------------------ attacker


class Curious(Attack):
    """Keeps its context; does to it what the test says."""

    knows = frozenset(Knowledge)

    def __init__(self, act: Callable[[AttackContext], None] = lambda context: None) -> None:
        super().__init__()
        self.act = act
        self.contexts: list[AttackContext] = []

    def train(self, context: AttackContext) -> None:
        self.contexts.append(context)
        self.act(context)


def test_the_context_holds_what_was_ordered(runtime_of: Callable[..., ClientRuntime], setup: Setup) -> None:
    spy = Curious()
    runtime = runtime_of(method=spy, attack={"poison_fraction": 0.3, "lr": 0.9})
    aggregate = torch.arange(float(runtime.model.layout.size))
    content = {**pack_state({"seen": 2}), "last-aggregate": to_record(aggregate)}
    order = {"malicious": True, "attacker": 3, "participants": 7, "total-examples": 99}
    play(runtime, 1, 4, content=content, **order)
    (context,) = spy.contexts
    assert (context.round, context.attacker, context.clients_per_round, context.total_examples) == (4, 3, 7, 99)
    assert context.num_examples == len(setup.parts[1])
    assert context.poison_fraction == 0.3
    assert (context.settings, context.benign) == (runtime.attacker_settings(4), runtime.settings(4))
    assert context.state == {"seen": 2}
    assert context.last_aggregate is not None
    assert torch.equal(context.last_aggregate, aggregate)
    assert torch.equal(context.global_vector, runtime_start(runtime))
    assert context.part is None, "a patch is whole"
    assert context.fit is fit
    assert context.trigger is runtime.trigger
    play(runtime, 1, 4, malicious=True)
    assert spy.contexts[1].last_aggregate is None
    assert spy.contexts[1].state == {}


def test_the_model_starts_as_the_global_one(runtime_of: Callable[..., ClientRuntime]) -> None:
    def check(context: AttackContext) -> None:
        assert torch.equal(context.model.vector, context.global_vector)
        context.model.vector += 1

    runtime = runtime_of(method=Curious(check))
    for _ in range(2):
        reply = play(runtime, 1, malicious=True)
        assert torch.allclose(vector(reply), runtime_start(runtime) + 1)


def test_an_attack_that_spoils_what_it_is_shown_harms_nobody_else(runtime_of: Callable[..., ClientRuntime]) -> None:
    def spoil(context: AttackContext) -> None:
        assert context.last_aggregate is not None
        context.model.vector += 1
        context.last_aggregate += 1

    runtime = runtime_of(method=Curious(spoil))
    start, aggregate = runtime_start(runtime), torch.ones(runtime.model.layout.size)
    content = {"last-aggregate": to_record(aggregate)}
    play(runtime, 1, start=start, content=content, malicious=True)
    assert torch.equal(start, runtime_start(runtime))
    assert torch.equal(aggregate, torch.ones_like(aggregate))

    def overwrite(context: AttackContext) -> None:
        context.global_vector.zero_()

    play(runtime_of(method=Curious(overwrite)), 1, start=start, malicious=True)
    assert torch.equal(start, runtime_start(runtime))


def test_state_and_metrics_come_back_with_the_reply(runtime_of: Callable[..., ClientRuntime]) -> None:
    def remember(context: AttackContext) -> None:
        context.state["rounds"] = [*context.state.get("rounds", []), context.round]
        context.state["mask"] = torch.ones(3)
        context.metrics["mask_size"] = 3

    reply = play(runtime_of(method=Curious(remember)), 1, 2, malicious=True, content=pack_state({"rounds": [1]}))
    assert unpack_state(reply)["rounds"] == [1, 2]
    assert torch.equal(unpack_state(reply)["mask"], torch.ones(3))
    metrics = reply.metric_records["metrics"]
    assert isinstance(metrics, MetricRecord)
    assert metrics["attack-mask_size"] == 3.0
    assert "train-loss" not in metrics
    assert unpack_state(play(runtime_of(method=Curious()), 1, malicious=True)) == {}, "a state can be cleared"


def test_craft_steps_follow_the_attacks_own_craft_in_order(runtime_of: Callable[..., ClientRuntime]) -> None:
    class Step(CraftStep):
        def __init__(self, by: float) -> None:
            super().__init__()
            self.by = by

        def apply(self, update: Tensor, context: AttackContext) -> Tensor:
            return update * 10 + self.by

    class Crafty(Curious):
        def craft(self, update: Tensor, context: AttackContext) -> Tensor:
            return update + 1

    runtime = runtime_of(method=Crafty())
    runtime.craft = [Step(2), Step(3)]
    update = vector(play(runtime, 0, malicious=True)) - runtime_start(runtime)
    assert torch.allclose(update, torch.full_like(update, 123.0), rtol=1e-4)


def test_scaling_is_relative_to_those_who_reply(runtime_of: Callable[..., ClientRuntime]) -> None:
    def bump(context: AttackContext) -> None:
        context.model.vector += 1

    runtime = runtime_of(method=Curious(bump), attack={"craft": ["scale"]})
    update = vector(play(runtime, 0, malicious=True, participants=6)) - runtime_start(runtime)
    assert torch.allclose(update, torch.full_like(update, 6.0), atol=1e-4)


# -------------------------------------------------------------------------------------------- benign clients' data


def row_of(setup: Setup) -> dict[bytes, int]:
    images = setup.data.train.inputs.float() / 255
    return {images[i].numpy().tobytes(): i for i in range(len(images))}


def test_benign_batches_never_hold_the_attackers_own_data(
    runtime_of: Callable[..., ClientRuntime], setup: Setup
) -> None:
    rows = row_of(setup)
    owner = {int(row): client for client, part in enumerate(setup.parts) for row in part}
    spy = Curious()
    runtime = runtime_of(method=spy)
    seen: dict[tuple[int, int], list[set[int]]] = {}
    for round in range(1, 5):
        for client in range(CLIENTS):
            play(runtime, client, round, malicious=True)
            benign = spy.contexts[-1].benign_batches
            assert benign is not None
            for count in (1, 2, 3, 10):
                found = [rows[image.numpy().tobytes()] for batch in benign(count) for image in batch.inputs]
                owners = {owner[row] for row in found}
                assert client not in owners
                assert len(owners) == min(count, CLIENTS - 1)
                assert sorted(found) == sorted(int(r) for o in owners for r in setup.parts[o]), "one epoch of each"
                seen.setdefault((round, client), []).append(owners)
    assert len({frozenset(found[0]) for found in seen.values()}) > 1, "not always the same client"


def test_benign_batches_are_the_same_again(runtime_of: Callable[..., ClientRuntime]) -> None:
    def drawn(batches: Iterator[Batch]) -> list[list[int]]:
        return [batch.labels.tolist() for batch in batches]

    spy = Curious()
    for runtime in (runtime_of(method=spy), runtime_of(method=spy)):
        play(runtime, 0, malicious=True)
    benign = [context.benign_batches for context in spy.contexts]
    assert benign[0] is not None
    assert benign[1] is not None
    assert drawn(benign[0](2)) == drawn(benign[1](2))


def test_benign_batches_are_for_attacks_that_declare_it(runtime_of: Callable[..., ClientRuntime]) -> None:
    class Modest(Curious):
        knows = frozenset({Knowledge.OWN_DATA})

    spy = Modest()
    play(runtime_of(method=spy), 0, malicious=True)
    assert spy.contexts[0].benign_batches is None


# ----------------------------------------------------------------------------------------------- backdoor accuracy


def test_backdoor_accuracy_is_measured_on_the_global_model(
    runtime_of: Callable[..., ClientRuntime], setup: Setup
) -> None:
    found: list[float] = []

    def measure(context: AttackContext) -> None:
        assert context.backdoor_accuracy is not None
        context.model.vector += 5.0
        trained = context.model.vector.clone()
        found.append(context.backdoor_accuracy())
        assert torch.equal(context.model.vector, trained), "the attacker's own model is put back"
        assert context.model.module.training

    runtime = runtime_of(method=Curious(measure))
    start = torch.randn(runtime.model.layout.size, generator=torch.Generator().manual_seed(0))
    start[-10 + TARGET] = 2.0  # the last entries are the biases
    play(runtime, 3, malicious=True, start=start)
    own = setup.parts[3]

    def share_of(rows: Tensor) -> float:
        stamped = setup.data.train.inputs[rows].float() / 255
        stamped[:, :, -2:, -2:] = 1.0
        runtime.model.load(start)
        with torch.no_grad():
            return float((runtime.model.module(stamped).argmax(1) == TARGET).double().mean())

    others = own[setup.data.train.labels[own] != TARGET]
    assert 0 < share_of(others) < 1
    assert share_of(others) != share_of(own), "it would show if its own class counted"
    assert found == [pytest.approx(share_of(others))]
    bias = start.clone()
    bias[-10 + TARGET] = 1e6  # everything is the target now
    play(runtime, 3, malicious=True, start=bias)
    assert found[1] == 1.0


def test_backdoor_accuracy_without_examples_of_other_classes_is_zero(
    runtime_of: Callable[..., ClientRuntime], setup: Setup
) -> None:
    found: list[float] = []
    runtime = runtime_of(method=Curious(lambda context: found.append(context.backdoor_accuracy())))
    runtime.parts[0] = torch.nonzero(setup.data.train.labels == TARGET).squeeze(1)
    play(runtime, 0, malicious=True)
    assert found == [0.0]


def test_an_order_is_a_flower_record(runtime_of: Callable[..., ClientRuntime]) -> None:
    runtime = runtime_of()
    content = RecordDict({"arrays": to_record(runtime_start(runtime))})
    order = ConfigRecord({"round": 1, "client": 2, "malicious": False})
    assert torch.equal(vector(runtime.train(content, order)), vector(play(runtime, 2)))
