"""What every registered attack must keep, whoever wrote it."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedsim import plugins
from fedsim.attack import Attack, AttackContext, CoordinationKnowledge, CraftStep, Knowledge
from fedsim.batch import IGNORE, Batch, Examples
from fedsim.direct import LocalAttack, local_attack
from fedsim.errors import PluginError, RunError
from fedsim.layout import FlatModel
from fedsim.plugins import Plugin, range_problem

Scene = Callable[..., dict[str, Any]]
ATTACKS = plugins.names("attack")
CRAFT = plugins.names("craft")
SCENES = {
    "groupnorm": "vision",
    "batchnorm": "vision",
    "next_word": "next_word",
    "next_word_transformer": "next_word",
    "sentiment": "sentiment",
    "sentiment_transformer": "sentiment",
}
"""The scenes, each with the task that it is of."""
CLIENTS = 4


def attack_class(name: str) -> type[Attack]:
    cls = plugins.get("attack", name)
    assert issubclass(cls, Attack)
    return cls


def kinds(name: str) -> list[str]:
    """The scenes of the tasks that the attack is for."""
    return [kind for kind, task in SCENES.items() if task in (attack_class(name).tasks or SCENES.values())]


def home(name: str, wanted: str = "groupnorm") -> str:
    """The scene ``wanted``, or the first that the attack is for."""
    return wanted if wanted in kinds(name) else kinds(name)[0]


PAIRS = [(name, kind) for name in ATTACKS for kind in kinds(name)]


def run(attack: str | Attack, scene: dict[str, Any], **options: Any) -> LocalAttack:
    """One malicious client with all an attack may know at hand."""
    size = FlatModel(copy.deepcopy(scene["model"])).vector
    return local_attack(
        attack,
        **{
            **scene,
            "momentum": 0.9,
            "epochs": 8,
            "clients_per_round": CLIENTS,
            "last_aggregate": torch.sin(torch.arange(size.shape[0])).to(size.dtype),
            **options,
        },
    )


def backdoor_rate(scene: dict[str, Any], vector: Tensor) -> float:
    """The success rate of the backdoor on the attacker's own examples, measured as the trigger says.

    With the batch's own statistics, so that boosted running statistics do not hide what the weights learnt.
    """
    model = FlatModel(copy.deepcopy(scene["model"]))
    model.load(vector)
    model.module.train()
    trigger = scene["trigger"]
    inputs, labels = (torch.cat([batch[i] for batch in scene["batches"]]) for i in (0, 1))
    own = trigger.held_out(Examples(inputs, labels))
    shown = trigger.test(Batch(own.inputs, own.labels))
    with torch.no_grad():
        hits, total = trigger.succeeded(model.module(shown.inputs), shown.labels)
    return float(hits) / int(total)


def backdoor_gain(attack: str | Attack, scene: dict[str, Any], **options: Any) -> float:
    """How much the backdoor rate rises by the update sent: taken whole, or as the mean of n clients takes it."""
    start = FlatModel(copy.deepcopy(scene["model"])).vector
    update = run(attack, scene, **options).update
    after = max(backdoor_rate(scene, start + update * share) for share in (1.0, 1 / CLIENTS))
    return after - backdoor_rate(scene, start)


ENOUGH = 0.3


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_plants_a_backdoor(name: str, kind: str, scene: Scene) -> None:
    if not attack_class(name).backdoor:
        pytest.skip("only harms the model")
    assert backdoor_gain(name, scene(kind)) > ENOUGH


class Nothing(Attack):
    """Does not train."""

    def train(self, context: AttackContext) -> None:
        pass


class Zero(Attack):
    """Trains, and sends nothing of it."""

    def craft(self, update: Tensor, context: AttackContext) -> Tensor:
        return torch.zeros_like(update)


class Benign(Attack):
    """Trains as everybody else."""

    def poison(self, batch: Batch, context: AttackContext) -> Batch:
        return batch


@pytest.mark.parametrize("kind", SCENES)
@pytest.mark.parametrize("idle", [Nothing, Zero, Benign])
def test_an_attack_that_does_nothing_would_fail(idle: type[Attack], kind: str, scene: Scene) -> None:
    assert backdoor_gain(idle(), scene(kind)) < ENOUGH / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_update(name: str, kind: str, dtype: torch.dtype, scene: Scene) -> None:
    """Shape, dtype, finite, the same every time, and nothing it was given is changed."""
    given = scene(kind, dtype)
    kept = copy.deepcopy(given)
    aggregate = torch.ones(FlatModel(copy.deepcopy(given["model"])).vector.shape[0], dtype=dtype)
    state: dict[str, Any] = {}
    torch.manual_seed(1)
    first = run(name, given, epochs=2, last_aggregate=aggregate, state=state)

    assert first.update.shape == aggregate.shape
    assert first.update.dtype == dtype
    assert bool(torch.isfinite(first.update).all())
    assert bool((first.update != 0).any())

    for parameter, before in kept["model"].state_dict().items():
        assert torch.equal(given["model"].state_dict()[parameter], before), parameter
    for key in ("batches", "benign_batches"):
        for batch, before in zip(given[key], kept[key], strict=True):
            assert torch.equal(batch.inputs, before.inputs), key
            assert torch.equal(batch.labels, before.labels), key
            assert batch.carried is None or torch.equal(batch.carried, before.carried), key
    assert torch.equal(aggregate, torch.ones_like(aggregate))
    assert state == {}

    torch.manual_seed(2)  # no random draw may come from the global stream
    again = run(name, kept, epochs=2, last_aggregate=aggregate)
    assert torch.equal(first.update, again.update)


@pytest.mark.parametrize("name", ATTACKS)
def test_state_survives_a_second_round(name: str, scene: Scene) -> None:
    given = scene(home(name, "batchnorm"))
    first = run(name, given, epochs=1)
    second = run(name, given, epochs=1, round=2, state=first.state)
    assert bool(torch.isfinite(second.update).all())
    assert second.state.keys() >= first.state.keys()


@pytest.mark.parametrize("name", ATTACKS)
def test_works_without_a_trigger_on_prepared_batches(name: str, scene: Scene) -> None:
    """Or says that it needs one, which only an attack for some tasks may."""
    with contextlib.suppress(RunError) if attack_class(name).tasks else contextlib.nullcontext():
        result = run(name, {**scene(home(name)), "trigger": None}, epochs=1)
        assert bool(torch.isfinite(result.update).all())


@pytest.mark.parametrize("name", ATTACKS)
def test_works_when_training_is_counted_in_steps(
    name: str, scene: Scene, make_context: Callable[..., AttackContext]
) -> None:
    """Four steps are an epoch here; six go into a second one."""
    given = scene(home(name))

    def moved(steps: int) -> Tensor:
        context = make_context(
            given["model"],
            given["batches"],
            benign_batches=given["benign_batches"],
            trigger=given["trigger"],
            loss=given["loss"],
            last_aggregate=torch.ones(FlatModel(given["model"]).vector.shape[0], dtype=torch.float64),
            backdoor_accuracy=lambda: 0.0,
        )
        context.settings = context.with_settings(steps=steps, epochs=1)
        start = context.global_vector.clone()
        plugins.create("attack", name).train(context)
        assert torch.equal(context.global_vector, start), "the global vector is not to be modified"
        return context.model.vector - start

    if name == "perdoor":  # takes steps of its own
        assert torch.equal(moved(4), moved(6))
        return
    assert not torch.equal(moved(4), moved(1))
    assert not torch.equal(moved(4), moved(6))


@pytest.mark.parametrize("name", ATTACKS)
def test_coordinate(name: str, scene: Scene) -> None:
    """Same shape, finite, deterministic, and the given matrix is left alone."""
    attack = plugins.create("attack", name)
    torch.manual_seed(0)
    updates = torch.randn(8, 20, dtype=torch.float64)
    malicious = torch.arange(8) < 3
    visible = Knowledge.BENIGN_UPDATES in attack.knowledge(attack.parameters)
    if not visible:
        updates[~malicious] = torch.nan
    kept = updates.clone()

    def once() -> Tensor:
        knowledge = CoordinationKnowledge(
            round=1,
            malicious=malicious,
            global_vector=torch.zeros(20, dtype=torch.float64),
            num_examples=torch.ones(8, dtype=torch.float64),
            generator=torch.Generator().manual_seed(0),
            benign_visible=visible,
        )
        result: Tensor = attack.coordinate(updates, knowledge)
        return result

    result = once()
    assert result.shape == updates.shape
    assert bool(torch.isfinite(result[malicious]).all())
    assert torch.equal(torch.nan_to_num(updates), torch.nan_to_num(kept))
    assert torch.equal(result[malicious], once()[malicious])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("what", ["drawn", "equal", "zero", "huge"])
@pytest.mark.parametrize(("clients", "colluders"), [(1, 1), (2, 1), (2, 2), (3, 1), (3, 3)])
@pytest.mark.parametrize("name", ATTACKS)
def test_coordinate_few_odd_updates(name: str, clients: int, colluders: int, what: str, dtype: torch.dtype) -> None:
    """With one, two, three clients, updates that are equal, zero, or huge: finite, or one clear message."""
    attack = plugins.create("attack", name)
    generator = torch.Generator().manual_seed(1)
    updates = torch.randn(clients, 20, generator=generator, dtype=dtype)
    if what == "equal":
        updates = updates[:1].expand(clients, -1).clone()
    elif what == "zero":
        updates = torch.zeros_like(updates)
    elif what == "huge":
        updates[-1] *= 1e12
    malicious = torch.arange(clients) < colluders
    visible = Knowledge.BENIGN_UPDATES in attack.knowledge(attack.parameters)
    if not visible:
        updates[~malicious] = torch.nan
    knowledge = CoordinationKnowledge(
        round=1,
        malicious=malicious,
        global_vector=torch.zeros(20, dtype=dtype),
        num_examples=torch.ones(clients, dtype=dtype),
        generator=generator,
        benign_visible=visible,
        clients=tuple(range(clients)),
        attackers=tuple(range(colluders)),
    )
    try:
        made = attack.coordinate(updates, knowledge)
    except RunError as error:
        assert name in str(error)  # noqa: PT017
        return
    assert made.shape == updates.shape
    assert made.dtype == dtype
    assert bool(torch.isfinite(made[malicious]).all())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("name", [n for n in ATTACKS if n not in ("gaussian_noise", "threedfed")])  # these draw
def test_a_gpu_coordinates_the_same(name: str) -> None:
    attack = plugins.create("attack", name)
    updates = torch.randn(8, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def on(device: str) -> Tensor:
        knowledge = CoordinationKnowledge(
            round=1,
            malicious=(torch.arange(8) < 3).to(device),
            global_vector=torch.zeros(20, dtype=torch.float64, device=device),
            num_examples=torch.ones(8, dtype=torch.float64, device=device),
            generator=torch.Generator(device).manual_seed(0),
            benign_visible=True,
        )
        made: Tensor = attack.coordinate(updates.to(device), knowledge)
        return made[:3].cpu()

    torch.testing.assert_close(on("cuda"), on("cpu"))


@pytest.mark.parametrize("name", ATTACKS)
def test_says_what_it_is(name: str) -> None:
    cls = attack_class(name)
    assert cls.name == name
    assert len(cls.paper) > 10
    assert cls.knows, "an attack knows at least its own data"
    assert cls.__doc__ is not None
    summary = cls.summary()
    assert summary.endswith("."), "the first docstring line is a summary of its own"
    assert 20 <= len(summary) <= 120
    assert inspect.getmodule(cls).__doc__  # type: ignore[union-attr]
    assert cls.knowledge(cls.Parameters()) <= cls.knows


PLUGINS = [*(("attack", name) for name in ATTACKS), *(("craft", name) for name in CRAFT)]


def outside(metadata: Any) -> list[Any]:
    """Values just outside what a field allows."""
    values: list[Any] = []
    if "ge" in metadata:
        values.append(metadata["ge"] - 1)
    if "gt" in metadata:
        values.append(metadata["gt"])
    if "le" in metadata:
        values.append(metadata["le"] + 1)
    if "lt" in metadata:
        values.append(metadata["lt"])
    if values:
        values.append(float("nan"))
    if "choices" in metadata:
        values.append("no such choice")
    return values


@pytest.mark.parametrize(("kind", "name"), PLUGINS)
def test_parameters_are_documented_and_their_ranges_enforced(kind: str, name: str) -> None:
    cls: type[Plugin] = plugins.get(kind, name)
    assert cls.Parameters.__dataclass_params__.frozen  # type: ignore[attr-defined]
    with pytest.raises(PluginError, match="no parameter"):
        plugins.create(kind, name, no_such_parameter=1)
    for field in fields(cls.Parameters):
        assert field.metadata.get("doc"), f"{field.name} is not documented"
        default = getattr(cls.Parameters(), field.name)
        assert range_problem(field, default) is None, f"the default of {field.name} is out of its range"
        if "bool" not in str(field.type):
            assert outside(field.metadata) or isinstance(default, (list, dict)), f"{field.name} has no range"
        for value in outside(field.metadata):
            with pytest.raises(PluginError, match=field.name):
                plugins.create(kind, name, **{field.name: value})


def variations() -> list[tuple[str, str, Any]]:
    """Every flag turned and every choice taken, one at a time."""
    result = []
    for name in ATTACKS:
        for field in fields(plugins.get("attack", name).Parameters):
            default = getattr(plugins.get("attack", name).Parameters(), field.name)
            values = [not default] if isinstance(default, bool) else list(field.metadata.get("choices", ()))
            result += [(name, field.name, value) for value in values if value != default]
    return result


@pytest.mark.parametrize(("name", "parameter", "value"), variations())
def test_every_choice_works(name: str, parameter: str, value: Any, scene: Scene) -> None:
    result = run(name, scene(home(name)), epochs=1, **{parameter: value})
    assert bool(torch.isfinite(result.update).all())
    assert bool((result.update != 0).any())


@pytest.mark.parametrize("name", CRAFT)
def test_craft_step(name: str, scene: Scene, make_context: Callable[..., AttackContext]) -> None:
    given = scene("batchnorm")
    context = make_context(given["model"], given["batches"])
    step: CraftStep = plugins.create("craft", name)
    update = torch.linspace(-1, 1, context.global_vector.shape[0], dtype=torch.float64)
    kept = update.clone()
    crafted = step.apply(update, context)
    assert crafted.shape == update.shape
    assert bool(torch.isfinite(crafted).all())
    assert torch.equal(update, kept)
    assert bool(torch.isfinite(step.apply(torch.zeros_like(update), context)).all())
    assert step.paper
    assert step.summary()


def test_the_scene_is_fair(scene: Scene) -> None:
    """The global model knows its main task and has no backdoor, so that a rise means something."""
    for kind, task in SCENES.items():
        given = scene(kind)
        module: nn.Module = given["model"].train()
        with torch.no_grad():
            counts = [plugins.create("task", task).count(module(b.inputs), b.labels) for b in given["batches"]]
        accuracy = sum(int(c.right) for c in counts) / sum(int(c.total) for c in counts)
        assert accuracy > (0.45 if task == "next_word" else 0.9), kind  # what people talk about cannot be foreseen
        assert backdoor_rate(given, FlatModel(given["model"]).vector) < ENOUGH, kind


def test_the_scenes_are_of_every_kind(scene: Scene) -> None:
    """Every task has a scene; a state is carried in one, and labels that do not count are in one."""
    assert set(SCENES.values()) == set(plugins.names("task"))
    batches = scene("next_word")["batches"]
    assert any(bool(batch.carried.any()) for batch in batches)
    poisoned = scene("next_word")["trigger"].poison(batches[0], 8, generator=torch.Generator().manual_seed(0))
    assert bool((poisoned.labels == IGNORE).any())
