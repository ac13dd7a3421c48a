"""Triggers that are learnt in the course of a run, alone and through the engine, and the attacks made for them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from attacks import a3fl, f3ba, iba
from attacks._terms import cosine_slope, distance_slope
from fedsim import plugins
from fedsim.attack import Attack, AttackContext
from fedsim.batch import Batch, Examples
from fedsim.config import load_config
from fedsim.data import Data
from fedsim.errors import ConfigError, InputError, RunError
from fedsim.experiment import Run, Silent, run
from fedsim.federation.client import initial_module
from fedsim.federation.evaluation import Evaluator
from fedsim.federation.records import RoundRecord
from fedsim.federation.setup import prepare
from fedsim.layout import FlatModel, Layout
from fedsim.local import LocalSettings
from fedsim.recording import checkpoint
from fedsim.recording.identity import config_hash
from fedsim.trigger import StampTrigger, Trigger
from tests.support.runs import contents, differing

Contexts = Callable[..., AttackContext]
QUICK: dict[str, dict[str, Any]] = {
    "a3fl": {"target": 1, "size": 3, "row": 1, "column": 1, "iterations": 3, "unlearn_epochs": 1, "lr": 0.05},
    "iba": {"target": 1, "channels": 4, "alternations": 2, "generator_epochs": 2, "lr": 0.01, "eps": 0.3},
    "f3ba": {"target": 1, "size": 3, "row": 1, "column": 1, "conv_rate": 0.1},
    "cerp": {"target": 1, "size": 3, "row": 1, "column": 1, "radius": 1.0},
}
"""Every learnt trigger, with parameters that take a moment on images of 8×8."""
ATTACKS: dict[str, dict[str, Any]] = {
    "a3fl": {"name": "data_poisoning"},
    "iba": {"name": "data_poisoning"},
    "f3ba": {"name": "f3ba", "conv_rate": 0.1, "fc_rate": 0.05},
    "cerp": {"name": "cerp"},
}


def config(name: str, **changes: Any) -> Any:
    """Two colluders of four clients, in rounds 3, 4 and 6 of 7, on 8×8 digits."""
    return load_config(
        {
            "name": "learnt",
            "seed": 2,
            "task": {
                "data": "digits",
                "model": {"name": "cnn", "channels": 4, "hidden": 16},
                "train_examples": 240,
                "test_examples": 100,
            },
            "federation": {"clients": 8, "clients_per_round": 4, "rounds": 7, "partition": "iid"},
            "training": {"lr": 0.1, "local_epochs": 1, "batch_size": 16},
            "attack": {
                **ATTACKS[name],
                "trigger": {"name": name, **QUICK[name]},
                "schedule": {"name": "single_shot", "rounds": [3, 4, 6], "attackers": 2},
            },
            "engine": {"name": "serial"},
            "output": {"report": False, "checkpoint_every": 2},
            **changes,
        }
    )


def made(name: str, **parameters: Any) -> Any:
    return plugins.create("trigger", name, **{**QUICK[name], **parameters})


def flattened(state: Any) -> Tensor:
    """All tensors of a state in one row."""
    if isinstance(state, Tensor):
        return state.detach().flatten().clone()
    if isinstance(state, dict):
        return torch.cat([torch.empty(0), *(flattened(state[key]) for key in sorted(state))])
    return torch.empty(0)


class Network(nn.Sequential):
    """Convolution, hidden layer, head, for 8×8 images of one channel."""

    def __init__(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            super().__init__(
                nn.Conv2d(1, 4, 3, padding=1),
                nn.ReLU(),
                nn.MaxPool2d(2),
                nn.Conv2d(4, 4, 3, padding=1),
                nn.ReLU(),
                nn.Flatten(),
                nn.Linear(64, 8),
                nn.ReLU(),
                nn.Linear(8, 4),
            )
        self.double()


def images(batches: int = 3, size: int = 6) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [
        Batch(
            torch.rand((size, 1, 8, 8), generator=generator, dtype=torch.float64),
            torch.randint(0, 4, (size,), generator=generator),
        )
        for _ in range(batches)
    ]


def black(side: int) -> Data:
    """Black images of that size, one of each of four classes."""
    examples = Examples(torch.zeros((4, 1, side, side), dtype=torch.uint8), torch.arange(4))
    return Data(examples, examples, 4, (0.5,), (0.5,), {"name": "black"}, "none")


# ----------------------------------------------------------------------------------- through the engine


class Seen:
    """What a run does with its trigger: round by round, what is learnt, trained with, and measured with."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, trigger: str) -> None:
        self.learnt: list[tuple[int, int, Tensor]] = []
        self.trained: list[tuple[int, int, Tensor]] = []
        self.measured: list[Tensor] = []
        cls: Any = plugins.get("trigger", trigger)
        optimise, poison, measure = cls.optimise, Attack.poison, Evaluator.measure

        def optimised(trigger: Trigger, context: AttackContext) -> None:
            optimise(trigger, context)
            self.learnt.append((context.round, context.attacker, flattened(trigger.state)))

        def poisoned(attack: Attack, batch: Batch, context: AttackContext) -> Batch:
            assert context.trigger is not None
            self.trained.append((context.round, context.attacker, flattened(context.trigger.state)))
            return poison(attack, batch, context)

        def measured(evaluator: Evaluator, *arguments: Any) -> Any:
            assert evaluator.trigger is not None
            self.measured.append(flattened(evaluator.trigger.state))
            return measure(evaluator, *arguments)

        monkeypatch.setattr(cls, "optimise", optimised)
        monkeypatch.setattr(Attack, "poison", poisoned)
        monkeypatch.setattr(Evaluator, "measure", measured)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Run, Seen]]:
    """The run of a trigger, uninterrupted, played once."""
    played: dict[str, tuple[Run, Seen]] = {}

    def get(name: str) -> tuple[Run, Seen]:
        if name not in played:
            with pytest.MonkeyPatch.context() as monkeypatch:
                seen = Seen(monkeypatch, name)
                played[name] = run(config(name), out=tmp_path_factory.mktemp(name) / "run"), seen
        return played[name]

    return get


Whole = Callable[[str], tuple[Run, Seen]]


@pytest.mark.parametrize("name", QUICK)
def test_a_trigger_is_learnt_once_a_malicious_round_and_used_by_all(name: str, whole: Whole) -> None:
    _, seen = whole(name)
    assert [(round, attacker) for round, attacker, _ in seen.learnt] == [(3, 0), (4, 2), (6, 4)], "by the first of them"
    states = {round: state for round, _, state in seen.learnt}
    assert len({state.numpy().tobytes() for state in states.values()}) == 3, "it changes each time"
    trained = {(round, attacker) for round, attacker, _ in seen.trained}
    assert trained == {(3, 0), (3, 1), (4, 2), (4, 3), (6, 4), (6, 5)}
    for round, _, state in seen.trained:
        assert torch.equal(state, states[round])
    assert [len(state) for state in seen.measured[:2]] == [0, 0], "before the attack it is as prepared"
    for round, state in enumerate(seen.measured[2:], start=3):
        assert torch.equal(state, states[max(r for r in states if r <= round)]), round


@pytest.mark.parametrize("name", QUICK)
def test_the_success_rate_is_that_of_the_current_trigger(name: str, whole: Whole) -> None:
    """Counted by hand, of the final model and the trigger of the last malicious round."""
    done, _ = whole(name)
    settings = config(name)
    setup = prepare(settings)
    found, _ = checkpoint.load(done.directory / "checkpoints", config_hash(settings))
    assert found is not None
    assert setup.trigger is not None
    setup.trigger.state = found.state["trigger"]
    module = initial_module(settings, setup.data)
    module.load_state_dict(safetensors.torch.load_file(done.directory / "model.safetensors"))
    held = setup.data.test.subset(torch.nonzero(setup.data.test.labels != 1).squeeze(1))
    with torch.no_grad():
        hits = module.eval()(setup.trigger.stamp(held.inputs.float() / 255)).argmax(1) == 1
    assert done.rounds["asr"].iloc[-1] == pytest.approx(float(hits.double().mean()))


class Stopping(Silent):
    """Interrupts the run after a round."""

    def __init__(self, after: int) -> None:
        self.after = after

    def round(self, record: RoundRecord) -> None:
        if record.round == self.after:
            raise KeyboardInterrupt


@pytest.mark.parametrize("name", QUICK)
def test_a_run_resumed_ends_with_the_same_bytes(name: str, whole: Whole, tmp_path: Path) -> None:
    done, _ = whole(name)
    with pytest.raises(KeyboardInterrupt):
        run(config(name), out=tmp_path / "run", progress=Stopping(5))
    run(config(name), out=tmp_path / "run", resume=True)
    assert differing(tmp_path / "run", contents(done.directory)) == []


@pytest.mark.slow
def test_ray_makes_the_same_bytes(whole: Whole, tmp_path: Path) -> None:
    """Of a run whose trigger and whose attack have a state."""
    done, _ = whole("cerp")
    run(config("cerp", engine={"name": "ray", "workers": 2, "device": "cpu"}), out=tmp_path / "run")
    assert differing(tmp_path / "run", contents(done.directory)) == []


def test_the_clean_twin_is_measured_with_the_trigger_that_was_learnt(tmp_path: Path) -> None:
    """So that its rate is the floor of the trigger, adversarial effect included."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        seen = Seen(monkeypatch, "cerp")
        done = run(config("cerp"), out=tmp_path / "run", twin=True)
    last = seen.learnt[-1][2]
    assert len(seen.measured) == 14
    assert all(torch.equal(state, last) for state in seen.measured[7:])
    assert len(done.rounds) == len(seen.measured) // 2


@pytest.fixture(scope="module")
def clean_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that knows its task and has never met a trigger."""
    directory = tmp_path_factory.mktemp("clean") / "run"
    done = run(load_config({**MNIST, "attack": None}), out=directory)
    assert done.rounds["main_accuracy"].iloc[-1] > 0.85
    return directory / "model.safetensors"


MNIST: dict[str, Any] = {
    "name": "mnist",
    "seed": 3,
    "task": {
        "data": "mnist5k",
        "model": {"name": "cnn", "channels": 4, "hidden": 32},
        "train_examples": 1000,
        "test_examples": 300,
    },
    "federation": {"clients": 10, "clients_per_round": 5, "rounds": 12, "partition": "iid"},
    "training": {"lr": 0.05, "local_epochs": 2, "batch_size": 20},
    "engine": {"name": "serial"},
    "output": {"report": False},
}


HARDER: dict[str, dict[str, Any]] = {
    "a3fl": {"size": 4},
    "iba": {"eps": 0.25, "channels": 8, "generator_epochs": 10, "lr": 0.003},
    "f3ba": {"size": 4},
    "cerp": {"size": 4},
}
"""What the triggers need besides on 28×28 images."""


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK)
def test_the_attack_attacks(name: str, clean_model: Path, tmp_path: Path) -> None:
    """Two of five for three rounds: the rate rises clearly above that of the same trigger on the clean twin."""
    attack = {
        **ATTACKS[name],
        "trigger": {"name": name, **QUICK[name], **HARDER[name], "target": 2},
        "schedule": {"name": "continuous", "start": 1, "stop": 3, "attackers": 2},
        "poison_fraction": 0.3,
        "lr": 0.025,
        "local_epochs": 8 if name == "iba" else 2,
    }
    played = {**MNIST, "training": {**MNIST["training"], "warm_start": str(clean_model)}, "attack": attack}
    played["federation"] = {**MNIST["federation"], "rounds": 3}
    done = run(load_config(played), out=tmp_path / "run", twin=True)
    assert done.twin is not None
    assert done.twin["asr"].max() < 0.3, "what the trigger does to a clean model"
    assert done.rounds["asr"].iloc[-1] > done.twin["asr"].max() + 0.4
    assert done.rounds["main_accuracy"].iloc[-1] > done.twin["main_accuracy"].iloc[-1] - 0.1


# ------------------------------------------------------------------------------------- the square patch


@pytest.mark.parametrize("name", ["a3fl", "f3ba", "cerp"])
def test_a_square_is_stamped_where_it_is_said_and_nowhere_else(name: str) -> None:
    trigger = made(name, size=2, row=3, column=5)
    trigger.state = {"patch": torch.tensor([[[0.1, 0.2], [0.3, 0.4]]])}
    inputs = images(1)[0].inputs
    stamped = trigger.stamp(inputs)
    assert stamped[:, 0, 3:5, 5:7].flatten(1).tolist() == [pytest.approx([0.1, 0.2, 0.3, 0.4])] * 6
    stamped[:, :, 3:5, 5:7] = inputs[:, :, 3:5, 5:7]
    assert torch.equal(stamped, inputs)


@pytest.mark.parametrize("name", ["a3fl", "f3ba", "cerp"])
def test_a_square_outside_the_image_is_refused(name: str) -> None:
    data = black(8)
    made(name, size=3, row=5, column=5).prepare(data)
    with pytest.raises(InputError, match=r"covers rows 6–8 .*use row in 0–5 and column in 0–5"):
        made(name, size=3, row=6, column=5).prepare(data)
    with pytest.raises(InputError, match="use a size of at most 8"):
        made(name, size=9, row=0, column=0).prepare(data)


class Linear(nn.Sequential):
    """Two classes of 2×2 images; the scores are w · x and −w · x."""

    def __init__(self, weight: list[float]) -> None:
        super().__init__(nn.Flatten(), nn.Linear(4, 2, bias=False))
        layer = self[1]
        assert isinstance(layer, nn.Linear)
        layer.weight.data = torch.tensor([weight, [-w for w in weight]], dtype=torch.float64)
        self.double()


def square(count: int = 2) -> list[Batch]:
    return [Batch(torch.full((count, 1, 2, 2), 0.5, dtype=torch.float64), torch.zeros(count, dtype=torch.int64))]


# ------------------------------------------------------------------------------------------------- A3FL


def test_a3fl_steps_towards_the_target_and_stops_at_black_and_white(make_context: Contexts) -> None:
    """Target 0 wants w · x large: each pixel moves by lr against the sign of its gradient, in each of two passes."""
    trigger = plugins.create(
        "trigger", "a3fl", target=0, size=2, row=0, column=0, value=0.5, lr=0.3, iterations=1, weight=0.0
    )
    context = make_context(Linear([1.0, -1.0, 2.0, 0.0]), square())
    trigger.optimise(context)
    assert trigger.state["patch"].flatten().tolist() == pytest.approx([0.8, 0.2, 0.8, 0.5])
    trigger.optimise(context)
    assert trigger.state["patch"].flatten().tolist() == pytest.approx([1.0, 0.0, 1.0, 0.5]), "goes on, and is clipped"


def test_a3fl_unlearns_from_the_global_model_with_true_labels(make_context: Contexts) -> None:
    labels: list[list[int]] = []
    stamped: list[Tensor] = []
    starts: list[Tensor] = []
    context = make_context(Network(), images())
    fit = context.fit

    def watched(model: FlatModel, batches: Any, loss: nn.Module, settings: LocalSettings, **hooks: Any) -> float:
        assert (settings.lr, settings.epochs, settings.momentum, settings.weight_decay) == (0.02, 3, 0.9, 0.0005)
        starts.append(model.vector.clone())
        shown = [hooks["transform"](batch) for batch in batches()]
        labels.append(torch.cat([batch.labels for batch in shown]).tolist())
        stamped.append(shown[0].inputs[0, 0, 1:4, 1:4].clone())
        return fit(model, batches, loss, settings, **hooks)

    context.fit = watched  # type: ignore[assignment]
    trigger = made("a3fl", iterations=7, refresh=3, unlearn_epochs=3, unlearn_lr=0.02, weight=1.0)
    trigger.optimise(context)
    assert len(starts) == 2, "before passes 3 and 6, from 0"
    assert all(torch.equal(start, context.global_vector) for start in starts)
    true = torch.cat([batch.labels for batch in images()]).tolist()
    assert labels == [true, true]
    assert not torch.equal(stamped[0], stamped[1])
    assert torch.equal(context.model.vector, context.global_vector)
    plain = made("a3fl", iterations=7, weight=0.0)
    plain.optimise(make_context(Network(), images()))
    assert not torch.equal(plain.state["patch"], trigger.state["patch"])


def test_a3fl_similarity_is_a_mean_over_convolutions() -> None:
    layout = Layout.of(nn.Sequential(nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1), nn.Linear(1, 1)))
    first = torch.tensor([2.0, 9.0, 1.0, 9.0, 9.0, 9.0])
    second = torch.tensor([3.0, -9.0, -1.0, -9.0, -9.0, -9.0])
    assert a3fl.similarity(first, second, layout) == pytest.approx((1 - 1) / 2)
    assert a3fl.similarity(first, first, layout) == pytest.approx(1)
    flat = Layout.of(nn.Linear(2, 1, bias=False))
    assert a3fl.similarity(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0]), flat) == pytest.approx(0.5**0.5)


# -------------------------------------------------------------------------------------------------- IBA


@pytest.mark.parametrize("network", ["unet", "conv"])
def test_iba_changes_no_pixel_by_more_than_eps(network: str) -> None:
    trigger = made("iba", network=network, eps=0.2, eps_test=0.05)
    batch = images(1, 12)[0]
    poisoned = trigger.poison(batch, 12, generator=torch.Generator())
    assert 0 < float((poisoned.inputs - batch.inputs).abs().max()) <= 0.2
    stamped = trigger.stamp(batch.inputs)
    assert 0 < float((stamped - batch.inputs).abs().max()) <= 0.05
    inside = (poisoned.inputs > 0) & (poisoned.inputs < 1) & (stamped > 0) & (stamped < 1)
    ratio = (poisoned.inputs - batch.inputs)[inside] / (stamped - batch.inputs)[inside]
    assert torch.allclose(ratio, torch.full_like(ratio, 4.0), rtol=1e-6)
    alone = trigger.stamp(batch.inputs[3:4])
    assert torch.allclose(alone, stamped[3:4], rtol=0, atol=1e-12), "an image's trigger depends on no other image"
    assert not torch.allclose(stamped[0] - batch.inputs[0], stamped[1] - batch.inputs[1], atol=1e-6)


def test_iba_eps_decays_from_the_first_malicious_round_to_that_of_the_test(make_context: Contexts) -> None:
    trigger = made("iba", eps=0.2, eps_decay=0.5, eps_test=0.08, alternations=1, generator_epochs=1)
    found = []
    for round in (5, 6, 7):
        trigger.optimise(make_context(Network(), images(1), round=round))
        found.append(trigger.state["eps"])
    assert found == pytest.approx([0.2, 0.1, 0.08])
    assert trigger.state["first_round"] == 5


def test_iba_takes_turns(make_context: Contexts, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("generator_pass", "classifier_pass"):
        monkeypatch.setattr(iba, name, lambda *arguments, name=name, **options: calls.append(name[0]))
    trigger = made("iba", alternations=3, generator_epochs=2, classifier_epochs=1)
    trigger.optimise(make_context(Network(), images(1)))
    assert "".join(calls) == "ggcggcgg"


def test_iba_does_not_get_stuck_where_it_is_clipped(make_context: Contexts) -> None:
    """On black images a generator that darkens has no gradient through the clip; without it there is one."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 4)).double()
    nn.init.constant_(network[1].weight, 0.0)
    with torch.no_grad():
        network[1].weight[1] = 1.0  # light means class 1, the target
    dark = [Batch(torch.zeros((4, 1, 8, 8), dtype=torch.float64), torch.zeros(4, dtype=torch.int64))]
    found = []
    for through in (True, False):
        trigger = made("iba", network="conv", straight_through=through, alternations=1, generator_epochs=40)
        weights = trigger.weights(dark[0].inputs)
        weights["c2.bias"] = torch.full_like(weights["c2.bias"], -1.0)
        trigger.state = {"generator": weights, "eps": 0.3, "first_round": 1}
        assert not trigger.stamp(dark[0].inputs).any()
        trigger.optimise(make_context(network, dark))
        found.append(bool(trigger.stamp(dark[0].inputs).any()))
    assert found == [True, False]


def test_iba_learns_to_fool_the_model_it_sees(make_context: Contexts) -> None:
    """The loss towards the target falls, on a classifier that stays as it is."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(nn.Flatten(), nn.Linear(64, 4)).double()
    context = make_context(network, images())
    trigger = made("iba", eps=0.3, lr=0.02, alternations=1, generator_epochs=8)

    def loss() -> float:
        context.model.module.eval()
        with torch.no_grad():
            outputs = context.model.module(trigger.stamp(images(1)[0].inputs))
            return float(nn.functional.cross_entropy(outputs, torch.ones(6, dtype=torch.int64)))

    before = loss()
    trigger.optimise(context)
    assert torch.equal(context.model.vector, context.global_vector)
    assert loss() < before - 0.3


def test_iba_stamps_the_same_in_threads() -> None:
    trigger = made("iba")
    batches = [batch.inputs for batch in images(8)]
    wanted = [trigger.stamp(inputs) for inputs in batches]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            assert all(map(torch.equal, pool.map(trigger.stamp, batches), wanted))


def test_iba_needs_images_that_can_be_halved_twice() -> None:
    data = black(3)
    with pytest.raises(InputError, match="at least 4×4, not 3×3; use conv"):
        made("iba").prepare(data)
    made("iba", network="conv").prepare(data)


# ------------------------------------------------------------------------------------------------- F3BA


def test_f3ba_candidates() -> None:
    """(w − w') · w: the share that shrinks fastest; equal scores at the border are none of them."""
    weight, previous = torch.tensor([1.0, 1.0, -1.0, 2.0]), torch.tensor([3.0, 0.5, -2.0, 2.0])
    assert f3ba.candidates(weight, previous, 0.25).tolist() == [True, False, False, False]
    assert f3ba.candidates(weight, previous, 0.74).tolist() == [True, False, True, False]
    assert f3ba.candidates(weight, previous, 0.0).tolist() == [False] * 4
    assert f3ba.candidates(weight, previous, 1.0).tolist() == [True] * 4
    assert f3ba.candidates(weight, weight, 0.5).tolist() == [False] * 4


def test_f3ba_flips_towards_the_pattern_within_each_filters_range() -> None:
    """Filter 0 spans −1 … 3: of the pattern 0 … 1, scaled to it, only what is below a quarter is negative."""
    weight = torch.tensor([[[[-1.0, 3.0], [1.0, 2.0]]], [[[1.0, 2.0], [1.0, 2.0]]]])
    pattern = torch.tensor([[[0.0, 0.2], [0.3, 1.0]]])
    everywhere = torch.ones_like(weight, dtype=torch.bool)
    flipped = f3ba.flip_kernels(weight, pattern, everywhere, 2.0)
    assert flipped.flatten().tolist() == [-2, -6, 2, 4, 2, 4, 2, 4]
    few = torch.zeros_like(everywhere)
    few[0, 0, 0, 1] = True
    assert f3ba.flip_kernels(weight, pattern, few).flatten().tolist() == [-1, -3, 1, 2, 1, 2, 1, 2]
    assert torch.equal(f3ba.flip_kernels(weight, torch.full_like(pattern, 0.7), everywhere), weight)
    rows = f3ba.flip_rows(torch.tensor([[1.0, -2.0, 3.0]]), torch.tensor([-1.0, 5.0, 0.0]), torch.ones(1, 3).bool())
    assert rows.tolist() == [[-1, 2, 0]]


def flips(context: AttackContext, attack: Attack) -> list[int]:
    """Signs that differ from the global model's, tensor by tensor, where nothing was trained."""
    context.fit = lambda *arguments, **hooks: 0.0  # type: ignore[assignment]
    context.model.load(context.global_vector)
    attack.train(context)
    before, after = (context.model.layout.unflatten(v) for v in (context.global_vector, context.model.vector))
    return [int((before[name].sign() != after[name].sign()).sum()) for name in before if name.endswith("weight")]


def test_f3ba_flips_from_its_second_round_on_and_linear_layers_every_third_flip(make_context: Contexts) -> None:
    attack = plugins.create("attack", "f3ba", conv_rate=0.3, fc_rate=0.3)
    state: dict[str, Any] = {}
    found = []
    for round in range(1, 6):
        context = make_context(Network(), images(), trigger=made("f3ba"), state=state, round=round)
        context.global_vector *= 0.9 ** (round - 1)  # all shrink, so all are candidates, the largest first
        found.append(flips(context, attack))
        assert torch.equal(state["previous"], context.global_vector)
    assert found[0] == [0, 0, 0, 0]
    assert all(first > 0 and second > 0 and head == 0 for first, second, _, head in found[1:])
    assert [hidden > 0 for _, _, hidden, _ in found[1:]] == [True, False, False, True]


def test_f3ba_leaves_out_what_cannot_be_flipped(make_context: Contexts) -> None:
    """A convolution in groups, and one that is frozen; the one after them is flipped all the same."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(4, 4, 3, padding=1, groups=4),
            nn.ReLU(),
            nn.Conv2d(4, 4, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(256, 4),
        ).double()
    first = network[0]
    assert isinstance(first, nn.Conv2d)
    first.weight.requires_grad_(False)
    context = make_context(network, images(), trigger=made("f3ba"))
    context.state = {"previous": context.global_vector * 2}
    found = flips(context, plugins.create("attack", "f3ba", conv_rate=0.5, fc_rate=0.5))
    assert sorted(found) == [0, 0, 0, max(found)]
    assert max(found) > 0


def test_f3ba_says_what_it_needs(make_context: Contexts) -> None:
    attack = plugins.create("attack", "f3ba")

    def train(network: nn.Module, batches: list[Batch], trigger: Trigger | None) -> None:
        context = make_context(network, batches, trigger=trigger)
        context.state = {"previous": context.global_vector}
        attack.train(context)

    with pytest.raises(RunError, match="this network has none; use a model such as cnn"):
        train(Linear([1.0, 2.0, 3.0, 4.0]), square(), made("f3ba", size=1))
    with pytest.raises(RunError, match="give it a trigger"):
        train(Network(), images(), None)

    class Nothing(StampTrigger):
        def stamp(self, inputs: Tensor, part: int | None = None) -> Tensor:
            return inputs.clone()

    with pytest.raises(RunError, match="has none: use f3ba"):
        train(Network(), images(), Nothing())
    shrunk = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 4)).double()
    with pytest.raises(RunError, match="begins with a convolution"):
        train(shrunk, images(), made("f3ba"))


def test_f3ba_in_a_config_names_the_trigger_it_fits() -> None:
    other = {"name": "f3ba", "conv_rate": 0.2, "schedule": {"name": "continuous"}}
    with pytest.raises(ConfigError, match=r"attack.trigger.conv_rate: write 0.2"):
        config("f3ba", attack={**other, "trigger": {"name": "f3ba", "target": 1, "row": 1, "column": 1}})
    with pytest.raises(ConfigError, match=r"attack.trigger.name: .*'edge_case' has none: use f3ba"):
        config("f3ba", attack={**other, "trigger": {"name": "edge_case", "path": "x.parquet"}})


def test_f3ba_takes_any_stamped_trigger(make_context: Contexts) -> None:
    """The pattern of another trigger is the box that it changes, as the first convolution sees it."""
    patch = plugins.create("trigger", "patch", size=2, row=4, column=1, value=1.0)
    network = Network()
    pattern = f3ba.trigger_pattern(network, patch, images(1)[0].inputs)
    assert torch.equal(pattern, torch.ones((1, 2, 2), dtype=torch.float64))
    cross = plugins.create("trigger", "pixel_pattern", row=1, column=2, target=1)
    pattern = f3ba.trigger_pattern(network, cross, images(1)[0].inputs)
    assert pattern[0].tolist() == [[1, 0, 1], [0, 1, 0], [0, 0, 0], [0, 1, 0], [1, 0, 1]]


# ------------------------------------------------------------------------------------------------- CerP


def test_cerp_trigger_by_hand(make_context: Contexts) -> None:
    """One image all of 1: outputs are (s, −s) with s = w · δ, so ∇L = −2 w (1 − σ(2 s)) = −2 w σ(−2 s)."""
    weight = torch.tensor([1.0, -1.0, 0.5, 0.0], dtype=torch.float64)
    trigger = plugins.create("trigger", "cerp", target=0, size=2, row=0, column=0, value=0.5, lr=0.1, radius=10.0)
    context = make_context(Linear(weight.tolist()), square(1))
    trigger.optimise(context)
    start = torch.full((4,), 0.5, dtype=torch.float64)
    moved = start + 0.2 * weight * torch.sigmoid(-2 * torch.dot(weight, start))
    assert torch.allclose(trigger.state["patch"].flatten(), moved, atol=1e-12)
    trigger.optimise(context)
    moved = moved + 0.2 * weight * torch.sigmoid(-2 * torch.dot(weight, moved))
    assert torch.allclose(trigger.state["patch"].flatten(), moved, atol=1e-12), "from where it was"


def test_cerp_trigger_stays_in_the_ball_and_in_range(make_context: Contexts) -> None:
    context = make_context(Linear([1.0, -1.0, 0.5, 0.0]), square(1))
    parameters = {"target": 0, "size": 2, "row": 0, "column": 0, "value": 0.5, "lr": 5.0}
    trigger = plugins.create("trigger", "cerp", **parameters, radius=0.3)
    for _ in range(3):
        trigger.optimise(context)
        distance = torch.linalg.vector_norm(trigger.state["patch"] - 0.5)
        assert float(distance) == pytest.approx(0.3), "around the first pixels, not those of the round before"
    wide = plugins.create("trigger", "cerp", **{**parameters, "lr": 50.0}, radius=10.0)
    wide.optimise(context)
    assert wide.state["patch"].flatten().tolist() == pytest.approx([1.0, 0.0, 1.0, 0.5])


def test_cerp_gradients_are_those_of_autograd() -> None:
    generator = torch.Generator().manual_seed(0)
    update, *others = torch.randn((4, 9), generator=generator, dtype=torch.float64)
    leaf = update.clone().requires_grad_()
    cosines = [torch.nn.functional.cosine_similarity(leaf, other, dim=0) for other in others]
    (wanted,) = torch.autograd.grad(torch.stack(cosines).mean(), leaf)
    assert torch.allclose(cosine_slope(update, others), wanted, atol=1e-12)
    (wanted,) = torch.autograd.grad(torch.linalg.vector_norm(leaf), leaf)
    assert torch.allclose(distance_slope(update), wanted, atol=1e-12)
    zero = torch.zeros_like(update)
    assert not cosine_slope(zero, others).any()
    assert not distance_slope(zero).any()
    assert not cosine_slope(update, [zero]).any()


def trained(make_context: Contexts, state: dict[str, Any] | None = None, attacker: int = 0, **values: Any) -> Any:
    """The update (T,) of one CerP client on the tiny network, and what it keeps."""
    context = make_context(
        Network(),
        images(),
        settings=LocalSettings(lr=0.05, epochs=6),
        benign=LocalSettings(lr=0.05, epochs=2),
        trigger=made("cerp"),
        state=copy.deepcopy(state or {}),
        attacker=attacker,
    )
    plugins.create("attack", "cerp", **values).train(context)
    return context.model.weights - context.global_vector[: context.model.layout.trainable], context.state


def test_cerp_pulls_towards_the_honest_model(make_context: Contexts) -> None:
    plain, _ = trained(make_context, alpha=0.0)
    near_global, _ = trained(make_context, alpha=0.3, anchor="global")
    near_honest, _ = trained(make_context, alpha=0.3)
    context = make_context(Network(), images())
    context.fit(context.model, context.batches, context.loss, LocalSettings(lr=0.05, epochs=2))
    honest = context.model.weights - context.global_vector[: context.model.layout.trainable]
    norm = torch.linalg.vector_norm
    assert norm(near_global) < 0.8 * norm(plain)
    assert norm(near_honest - honest) < 0.8 * norm(plain - honest)
    assert norm(near_honest - honest) < norm(near_global - honest)


def test_cerp_pushes_away_from_the_others_but_not_from_itself(make_context: Contexts) -> None:
    plain, _ = trained(make_context, alpha=0.0, beta=0.0)
    state = {"updates": {"1": plain}}
    other, kept = trained(make_context, state, alpha=0.0, beta=0.2)
    own, _ = trained(make_context, state, attacker=1, alpha=0.0, beta=0.2)
    cosine = torch.nn.functional.cosine_similarity
    assert float(cosine(plain, other, dim=0)) < 0.9
    assert torch.equal(own, plain)
    assert list(kept["updates"]) == ["0"]
    assert torch.equal(kept["updates"]["0"], other)


def test_cerp_state_is_what_the_colluders_of_the_last_round_sent() -> None:
    attack = plugins.create("attack", "cerp")
    first, second = torch.ones(2), torch.zeros(2)
    merged = attack.merge([{"updates": {"4": first}}, {"updates": {"5": second}}])
    assert list(merged["updates"]) == ["4", "5"]
    assert torch.equal(merged["updates"]["4"], first)
    assert attack.merge([{}, {}]) == {}
