"""Chameleon, 3DFed, PerDoor, DarkFed and layer-wise poisoning: values by hand, their edges, and small runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from attacks import _threedfed as parts
from attacks._terms import cosine_slope
from attacks.chameleon import damping_of, supervised_contrast
from attacks.layerwise_poisoning import critical, layers_of, rank
from attacks.perdoor import still
from fedsim import plugins
from fedsim.attack import AttackContext, CoordinationKnowledge, Knowledge
from fedsim.batch import Batch
from fedsim.config import load_config
from fedsim.direct import local_attack
from fedsim.errors import FedsimError, PluginError, RunError
from fedsim.experiment import run
from fedsim.federation.messages import join_state, split_state
from fedsim.layout import FlatModel, Layout
from fedsim.local import LocalSettings, State
from fedsim.trigger import StampTrigger

Scene = Callable[..., dict[str, Any]]
MakeContext = Callable[..., AttackContext]

OURS = ["chameleon", "darkfed", "layerwise_poisoning", "perdoor", "threedfed"]
NOTHING = 1e-30
"""A learning rate that moves nothing."""


def number(*value: Any) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def head_of(model: nn.Module) -> Tensor:
    """bool (T,): the weights of the last layer, which is registered last."""
    layout = Layout.of(model)
    mask = torch.zeros(layout.trainable, dtype=torch.bool)
    for entry in [e for e in layout.entries if e.trainable][-2:]:
        mask[entry.start : entry.stop] = True
    return mask


def trained(layout: Layout, update: Tensor) -> Tensor:
    return update[: layout.trainable]


class White(StampTrigger):
    """The first number of an input becomes 1."""

    def stamp(self, inputs: Tensor, part: int | None = None) -> Tensor:
        stamped = inputs.clone()
        stamped.flatten(1)[:, 0] = 1.0
        return stamped


# ---------------------------------------------------------------------------------------------- Chameleon


def test_supervised_contrast_by_hand() -> None:
    """Two equal features of label 0, an orthogonal one of label 1 that is alone: ℓ = log(1 + e⁻¹), twice; 0."""
    features, labels = number([1, 0], [1, 0], [0, 1]), torch.tensor([0, 0, 1])
    each = math.log(1 + math.exp(-1))
    assert float(supervised_contrast(features, labels, 5, temperature=1)) == pytest.approx(2 * each / 3)
    weighted = supervised_contrast(features, labels, 0, weight=6, temperature=1)
    assert float(weighted) == pytest.approx(6 * 2 * each / 3), "the weight is not divided out"
    assert float(supervised_contrast(features, labels, 1, weight=6, temperature=1)) == pytest.approx(2 * each / 3)
    cold = supervised_contrast(features, labels, 5, temperature=0.5)
    assert float(cold) == pytest.approx(2 * math.log(1 + math.exp(-2)) / 3)


def test_supervised_contrast_of_one_example_is_zero() -> None:
    features = number([1.0, 2.0]).requires_grad_()
    loss = supervised_contrast(features, torch.tensor([0]), 0)
    loss.backward()
    assert float(loss.detach()) == 0
    assert features.grad is not None
    assert torch.equal(features.grad, torch.zeros_like(features))


def test_damping_is_between_triggered_examples_and_interferers() -> None:
    """Once per pair, whatever the triggered example's own label."""
    factors = damping_of(torch.tensor([1, 0, 1, 2]), 2, 1, 0.5)
    assert factors.tolist() == [[0.5, 0.5, 0.5, 1], [0.5, 1, 0.5, 1], [0.5, 0.5, 1, 1], [1, 1, 1, 1]]


def test_chameleon_trains_the_encoder_then_the_head(scene: Scene) -> None:
    """Each phase leaves the other's weights exactly as they were, weight decay or not."""
    given = scene("groupnorm")
    head, layout = head_of(given["model"]), Layout.of(given["model"])
    first = local_attack("chameleon", **{**given, "lr": NOTHING}, weight_decay=0.1, epochs=1, contrastive_epochs=1)
    assert float(first.update[: layout.trainable][head].abs().max()) < 1e-20
    assert float(first.update[: layout.trainable][~head].abs().max()) > 1e-3
    second = local_attack("chameleon", **given, weight_decay=0.1, contrastive_epochs=1, contrastive_lr=NOTHING)
    assert float(second.update[: layout.trainable][~head].abs().max()) < 1e-20
    assert float(second.update[: layout.trainable][head].abs().max()) > 1e-3


def test_chameleon_draws_triggered_examples_to_the_target_class(scene: Scene) -> None:
    given = scene("groupnorm")
    encoder_only = local_attack("chameleon", **{**given, "lr": NOTHING}, epochs=1, contrastive_lr=0.05).vector
    batch = Batch(*(torch.cat([b[i] for b in given["batches"]]) for i in (0, 1)))
    shown = given["trigger"].stamp(batch.inputs[batch.labels != 0])

    def likeness(vector: Tensor) -> float:
        model = FlatModel(given["model"])
        model.load(vector)
        with torch.no_grad():
            encoder = model.module[:-1]
            triggered, target = encoder(shown), encoder(batch.inputs[batch.labels == 0])
            others = encoder(batch.inputs[batch.labels != 0])
        near, far = (torch.cosine_similarity(triggered[:, None], x[None], dim=2).mean() for x in (target, others))
        return float(near - far)

    start = FlatModel(given["model"]).vector.clone()
    assert likeness(encoder_only) > likeness(start) + 0.05, (likeness(start), likeness(encoder_only))


def test_chameleon_bound(scene: Scene) -> None:
    """Of both phases together; without it the update is longer."""
    given = scene("groupnorm")
    lengths = {
        bound: float(torch.linalg.vector_norm(local_attack("chameleon", **given, epochs=2, bound=bound).update))
        for bound in (0.05, None)
    }
    assert lengths[0.05] <= 0.05 + 1e-12
    assert lengths[None] > 0.1


def test_chameleon_trains_on_the_fraction(scene: Scene, make_context: MakeContext) -> None:
    given, counts = scene("groupnorm"), list[int]()

    class Counted(type(given["trigger"])):  # type: ignore[misc]
        def poison(self, batch: Batch, count: int, **options: Any) -> Batch:
            counts.append(count)
            made: Batch = super().poison(batch, count, **options)
            return made

    for fraction, expected in ((0.25, [4, 8]), (None, [8, 8])):
        counts.clear()
        context = make_context(given["model"], given["batches"][:1], trigger=Counted(given["trigger"].parameters))
        plugins.create("attack", "chameleon", contrastive_epochs=1, contrastive_fraction=fraction).train(context)
        assert counts == expected, "batches of 16, half of them triggered in the second phase"


def test_chameleon_cuts_its_learning_rate(scene: Scene) -> None:
    """A cut before the first epoch is a tenth of the learning rate."""
    given = {**scene("groupnorm"), "lr": NOTHING}
    cut = local_attack("chameleon", **given, contrastive_lr=0.05, contrastive_epochs=2, milestones=[1])
    small = local_attack("chameleon", **given, contrastive_lr=0.005, contrastive_epochs=2)
    assert torch.allclose(cut.update, small.update, atol=1e-14)


class Softmax(nn.Sequential):
    """A network that goes on after its last linear layer."""

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 4), nn.LogSoftmax(dim=1))


@pytest.mark.parametrize(
    ("network", "said"),
    [
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), "no weights before its last layer"),
        (lambda: nn.Sequential(nn.Conv2d(1, 4, 8), nn.Flatten()), "no linear layer"),
        (Softmax, "do not come from its last linear layer"),
    ],
)
def test_chameleon_refuses_other_networks(network: Callable[[], nn.Module], said: str, scene: Scene) -> None:
    with pytest.raises(RunError, match=said):
        local_attack("chameleon", **{**scene("groupnorm"), "model": network().double()})


@pytest.mark.parametrize("name", ["chameleon", "darkfed", "layerwise_poisoning", "threedfed"])
def test_they_need_a_trigger(name: str, scene: Scene) -> None:
    with pytest.raises(RunError, match="give it a trigger"):
        local_attack(name, **{**scene("groupnorm"), "trigger": None})


# --------------------------------------------------------------------------------------------------- 3DFed


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 36, 6)).double()


def test_three_terms_by_hand(make_context: MakeContext) -> None:
    """Two steps of .3 L(batch) + .3 L(poisoned) + .4 ‖w − G‖: the last pulls in the second step only."""
    torch.manual_seed(0)
    model = nn.Linear(3, 4).double()
    batch = Batch(torch.rand(6, 3, dtype=torch.float64), torch.arange(6) % 4)
    context = make_context(model, [batch], trigger=White(), settings=LocalSettings(lr=0.5, epochs=2))
    plugins.create("attack", "threedfed")._train_backdoor(context)

    start = context.global_vector
    weights, poisoned = start.clone(), White().poison(batch, 3, generator=torch.Generator())
    for _ in range(2):
        leaf = weights.requires_grad_()

        def loss(b: Batch, leaf: Tensor = leaf) -> Tensor:
            return nn.functional.cross_entropy(b.inputs @ leaf[:12].view(4, 3).T + leaf[12:], b.labels)

        (slope,) = torch.autograd.grad(0.3 * loss(batch) + 0.3 * loss(poisoned), leaf)
        weights = weights.detach()
        gap = weights - start
        pull = 0.4 * gap / gap.norm() if bool(gap.any()) else 0 * gap
        weights = weights - 0.5 * (slope + pull)
    assert torch.allclose(context.model.vector, weights, rtol=0, atol=1e-14)


def test_the_layers_that_are_masked_and_that_indicate() -> None:
    layout = Layout.of(network())
    weight, bias = parts.final_layer(layout)
    assert (weight.name, bias and bias.name, parts.indicator_layer(layout).name) == ("3.weight", "3.bias", "0.weight")
    dense = Layout.of(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2, bias=False)))
    assert parts.final_layer(dense)[1] is None
    assert parts.indicator_layer(dense).name == "0.weight"
    assert parts.indicator_layer(Layout.of(nn.Sequential(nn.Linear(4, 3)))).name == "0.weight", "of one layer: there"
    with pytest.raises(ValueError, match="no linear layer"):
        parts.final_layer(Layout.of(nn.Conv2d(1, 2, 3)))


def test_neuron_rows_and_back() -> None:
    weight, bias = parts.final_layer(Layout.of(nn.Linear(2, 3)))
    vector = torch.arange(9.0)  # weights 0–5, biases 6–8
    assert parts.neuron_rows(vector, weight, bias).tolist() == [[0, 1, 6], [2, 3, 7], [4, 5, 8]]
    parts.add_neuron_rows(vector, weight, bias, torch.tensor([2, 0]), torch.full((2, 3), 10.0))
    assert vector.tolist() == [10, 11, 2, 3, 14, 15, 16, 7, 18]


def test_noise_masks_of_one_step_by_hand() -> None:
    """Two masks, one neuron of one weight: u = 1, centred noise ±1, so UP = 2 and 0 (where the slope is taken 0)."""
    made, multiplier = parts.noise_masks(
        number([1.0]), number([[2.0]], [[0.0]]), 0.5, coefficients=(0.4, 0.2, 9.0), steps=1, weight_decay=0.0
    )
    # mask 0: 0.5 · (−0.4 / 4) + 0.5 · 0.2 = 0.05, halved by 1 + μ = 2; mask 1: 0.5 · 0.2 · (−1) = −0.1, halved
    assert made.flatten().tolist() == pytest.approx([1 - 0.1 * 0.025 - 0.00125, -1 + 0.1 * 0.05 - 0.00125])
    assert multiplier == pytest.approx(1 + 0.1 * 0.0025)


def test_groups_leave_nobody_alone() -> None:
    assert parts.groups_of(20, 5) == [5, 5, 5, 5]
    assert parts.groups_of(7, 5) == [5, 2]
    assert parts.groups_of(6, 5) == [6]
    assert parts.groups_of(1, 5) == [1]


def test_quiet_coordinates_by_hand() -> None:
    """Of the four least active, the two of least |curvature|, ties to the less active."""
    activity, curvature = number(5, 1, 4, 2, 3, 9), number(0, -3, 1, 2, -1, 0)
    assert parts.quiet_coordinates(activity, curvature, 2, pool=2).tolist() == [4, 2]


def test_curvature_by_hand(make_context: MakeContext) -> None:
    """L = mean (w · x − y)² has the Hessian 2 mean x xᵀ: its row sums, once clean and once poisoned."""

    class Squares(nn.Module):
        def forward(self, outputs: Tensor, labels: Tensor) -> Tensor:
            return (outputs[:, 0] - labels).square().mean()

    inputs = number([1, 2], [3, -1])
    context = make_context(nn.Linear(2, 1).double(), [Batch(inputs, torch.tensor([0, 1]))] * 3, loss=Squares())
    found = plugins.create("attack", "threedfed", curvature_batches=2)._curvature("weight", context)
    rows = 2 * (inputs.T @ inputs / 2).sum(dim=1)
    assert torch.allclose(found, 2 * 2 * rows), "two batches, each twice"


def test_implanted_indicators() -> None:
    update = number(2e-3, 0, -1e-9, 1e-9)
    assert [parts.implant(update, i, least=1e-3) for i in range(4)] == pytest.approx([200, 1e-3, -1e-3, 1e-3])
    assert update.tolist() == pytest.approx([200, 1e-3, -1e-3, 1e-3])


def test_decoys_are_pushed_away_up_to_ten() -> None:
    assert parts.decoy_slope(number(0.5, -0.5, 11, -11, 0)).tolist() == pytest.approx([-10, 10, 1e-10, -1e-10, -10])


def test_a_decoy_more_only_where_nobody_passed() -> None:
    assert parts.tune_decoys("rrr", 2, 1, False) == 2
    assert parts.tune_decoys("rra", 2, 1, False) == 0, "a decoy that is accepted is of no use"
    assert parts.tune_decoys("rcr", 2, 1, False) == 1
    assert parts.tune_decoys("", 2, 1, True) == 1


def test_alpha_stays_where_it_can_be_drawn() -> None:
    assert parts.tune_alpha("rr", [2], [0.5], False, lambda low, high: high) == [0.99]
    assert parts.tune_alpha("rr", [2], [0.5], False, lambda low, high: low) == [0.01]
    assert parts.tune_alpha("aaaar", [5], [0.5], False, lambda low, high: low) == [0.5], "four of five pass"


def met(rows: int, malicious: int, layout: Layout | None, state: State, **fields: Any) -> CoordinationKnowledge:
    """What the first ``malicious`` of ``rows`` clients see."""
    size = 20 if layout is None else layout.size
    return CoordinationKnowledge(
        round=1,
        malicious=torch.arange(rows) < malicious,
        global_vector=fields.pop("global_vector", torch.zeros(size, dtype=torch.float64)),
        num_examples=torch.ones(rows, dtype=torch.float64),
        generator=torch.Generator().manual_seed(0),
        benign_visible=False,
        clients=tuple(range(rows)),
        attackers=tuple(range(malicious)),
        layout=layout,
        state=state,
    )


def said(**fields: Any) -> State:
    """What the colluders of :func:`network` have said of themselves."""
    return {
        "candidates": torch.arange(8),
        "benign_norm": 1e-9,
        "target": 2,
        "momentum": 0.9,
        "weight_decay": 0.0,
        "decoys": 0,
        **fields,
    }


def updates_of(rows: int, malicious: int, layout: Layout) -> Tensor:
    updates = 0.01 * torch.randn(rows, layout.size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    updates[malicious:] = torch.nan
    return updates


@pytest.mark.parametrize("colluders", [2, 3, 4])
def test_masks_cancel_and_spare_the_rest(colluders: int) -> None:
    """Together the colluders send their mean update, but for the indicators; the target's neuron is left alone."""
    layout = Layout.of(network())
    updates, state = updates_of(6, colluders, layout), said()
    made = plugins.create("attack", "threedfed", group_size=2).coordinate(updates, met(6, colluders, layout, state))
    sent, mean = made[:colluders], updates[:colluders].mean(dim=0)
    weight, bias = parts.final_layer(layout)
    assert bool(made[colluders:].isnan().all())
    masks = torch.stack([parts.neuron_rows(row - mean, weight, bias) for row in sent])
    assert float(masks[:, 2].abs().max()) < 1e-15
    assert bool((masks.abs().amax(dim=(1, 2)) > 0.01).all())
    changed = masks.abs().amax(dim=2) > 1e-12
    assert changed.sum(dim=1).tolist() == [5] * colluders, "five neurons each"
    quiet = slice(8, weight.start)
    assert torch.allclose(sent[:, quiet], mean[quiet].expand(colluders, -1), atol=1e-15)
    total = (sent - mean).sum(dim=0)
    assert float(total[weight.start :].abs().max()) < 1e-12, "they sum to zero"
    assert not torch.allclose(sent[0], sent[1])
    for row, position, value in zip([0, 1], state["positions"], state["values"], strict=False):
        assert float(value) in sent[:, int(position)].tolist(), (row, position)
    assert len(set(state["positions"].tolist())) == colluders
    tensors, text = split_state(state)
    assert join_state(tensors, text)["groups"] == parts.groups_of(colluders, 2), "it can travel"


def test_a_short_backdoor_update_is_scaled_up_to_a_benign_length() -> None:
    layout = Layout.of(network())
    updates = updates_of(2, 2, layout)
    mean = updates.mean(dim=0)
    length = float(mean.norm())
    for benign, factor in ((0.5 * length, 1.0), (2 * length, 2.0), (9 * length, 5.0)):
        attack = plugins.create("attack", "threedfed")
        made = attack.coordinate(updates, met(2, 2, layout, said(benign_norm=benign)))
        assert torch.allclose(made[0, 8:27], factor * mean[8:27], rtol=1e-9), "past the indicators, in the convolution"


def test_one_colluder_or_none_that_trained_sends_what_it_has() -> None:
    layout = Layout.of(network())
    updates = updates_of(3, 1, layout)
    attack = plugins.create("attack", "threedfed")
    assert torch.equal(attack.coordinate(updates, met(3, 1, layout, said()))[0], updates[0])
    both = updates_of(3, 2, layout)
    assert torch.equal(attack.coordinate(both, met(3, 2, layout, {}))[:2], both[:2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["zero", "equal", "huge"])
def test_extreme_updates_stay_finite(kind: str, dtype: torch.dtype) -> None:
    layout = Layout.of(network())
    row = updates_of(1, 1, layout)[0].to(dtype)
    rows = {"zero": 0 * row, "equal": row, "huge": 1e12 * row}[kind].repeat(3, 1)
    for options in ({}, {"zero_sum": False}, {"noise": 0.0}):
        attack = plugins.create("attack", "threedfed", **options)
        knowledge = met(3, 3, layout, said(), global_vector=torch.zeros(layout.size, dtype=dtype))
        made = attack.coordinate(rows, knowledge)
        assert made.dtype == dtype
        assert bool(torch.isfinite(made).all())


@pytest.fixture
def acted(scene: Scene) -> tuple[dict[str, Any], State, Tensor]:
    """A scene, the state after three colluders of four clients have acted in it, and the mean of what was sent."""
    given = scene("groupnorm")
    layout, start = Layout.of(given["model"]), FlatModel(given["model"]).vector.clone()
    own = local_attack("threedfed", **given, momentum=0.9, epochs=1, clients_per_round=4)
    state = own.state
    updates = torch.stack([own.update] * 3 + [torch.full_like(start, torch.nan)])
    attack = plugins.create("attack", "threedfed")
    made = attack.coordinate(updates, met(4, 3, layout, state, global_vector=start))
    made[3] = 0
    return given, state, made.mean(dim=0)


def next_round(given: dict[str, Any], state: State, moved: Tensor, **options: Any) -> State:
    """What a colluder knows after reading the global model, moved by ``moved`` (D,)."""
    model = FlatModel(given["model"])
    model.load(model.vector + moved)
    return local_attack("threedfed", **given, epochs=1, clients_per_round=4, state=state, **options).state


def test_colluders_read_that_they_were_accepted(acted: tuple[dict[str, Any], State, Tensor]) -> None:
    given, state, mean = acted
    after = next_round(given, state, mean)
    assert (after["accept"], after["decoys"], after["weak_dp"]) == (["a"] * 3, 0, False)


def test_rejected_colluders_make_one_of_them_a_decoy(acted: tuple[dict[str, Any], State, Tensor]) -> None:
    given, state, mean = acted
    after = next_round(given, state, 0 * mean)
    assert (after["accept"], after["decoys"], after["weak_dp"]) == (["r"] * 3, 1, False)


def test_decoys_leave_one_attacker(acted: tuple[dict[str, Any], State, Tensor]) -> None:
    given, state, mean = acted
    assert next_round(given, {**state, "decoys": 2}, 0 * mean)["decoys"] == 2


def test_noise_on_the_model_ends_the_tuning(acted: tuple[dict[str, Any], State, Tensor]) -> None:
    given, state, mean = acted
    after = next_round(given, state, mean - 2 * mean)
    assert after["weak_dp"]
    attack, layout = plugins.create("attack", "threedfed"), Layout.of(given["model"])
    updates = 0.01 * torch.ones(4, layout.size, dtype=torch.float64)
    attack.coordinate(updates, met(4, 3, layout, after))
    assert after["alpha"] == [0.1]


def test_a_decoy_stands_out_in_one_weight_of_the_final_layer_and_has_no_backdoor(
    acted: tuple[dict[str, Any], State, Tensor],
) -> None:
    given, state, _ = acted
    rejected = {**given, "batches": given["batches"] * 4, "lr": 0.5}
    made = local_attack("threedfed", **rejected, epochs=4, clients_per_round=4, state=state)
    weight, _ = parts.final_layer(Layout.of(given["model"]))
    far = made.update.abs() > 5
    assert made.state["decoys"] == 1, "of three, two attack"
    assert int(far.sum()) == 1
    assert weight.start <= int(far.nonzero()) < weight.stop
    assert 9 < float(made.update[far].abs()) < 20


# -------------------------------------------------------------------------------------------------- PerDoor


@pytest.mark.parametrize("direction", ["sign", "gradient"])
def test_perdoor_moves_the_still_and_unimportant_weights_by_hand(direction: str, make_context: MakeContext) -> None:
    """Two steps, each against the summed gradient of both batches, on weights that both masks allow."""
    torch.manual_seed(0)
    model = nn.Linear(3, 4).double()
    batches = [Batch(torch.rand(6, 3, dtype=torch.float64), torch.arange(6) % 4) for _ in range(2)]
    aggregate = torch.randn(16, dtype=torch.float64)
    context = make_context(model, batches, trigger=White(), last_aggregate=aggregate)
    values: dict[str, Any] = {"movement": "last_aggregate", "still": 0.5, "delta": 0.2, "step": 0.3, "iterations": 2}
    plugins.create("attack", "perdoor", **values, direction=direction).train(context)

    def slope(b: Batch, vector: Tensor) -> Tensor:
        leaf = vector.clone().requires_grad_()
        loss = nn.functional.cross_entropy(b.inputs @ leaf[:12].view(4, 3).T + leaf[12:], b.labels)
        return torch.autograd.grad(loss, leaf)[0]

    start = context.global_vector
    important = sum(slope(batch, start).abs() for batch in batches)
    assert isinstance(important, Tensor)
    small = torch.cat([important[:12] < important[:12].mean(), important[12:] < important[12:].mean()])
    mask = small & torch.isin(torch.arange(16), aggregate.abs().argsort()[:8])
    expected = start.clone()
    for _ in range(2):
        poisoned = [White().poison(batch, 3, generator=torch.Generator()) for batch in batches]
        total = sum(slope(batch, expected) for batch in poisoned)
        assert isinstance(total, Tensor)
        expected -= 0.06 * (total.sign() if direction == "sign" else total) * mask
    assert 0 < int(mask.sum()) < 8
    assert torch.allclose(context.model.vector, expected, atol=1e-15)
    assert context.metrics == {"perdoor_weights": float(mask.sum())}


def test_perdoor_reaches_delta_with_however_few_batches(scene: Scene) -> None:
    """One small batch and one epoch: the attack's own steps bring weights all the way."""
    given = scene("groupnorm")
    given["batches"] = [Batch(given["batches"][0].inputs[:6], given["batches"][0].labels[:6])]
    update = local_attack("perdoor", **given, epochs=1, delta=0.02, replacement=False).update
    assert float(update.abs().max()) == pytest.approx(0.02, rel=1e-9)


def test_perdoor_whose_steps_end_below_delta_is_refused(tiny: dict[str, Any]) -> None:
    tiny["attack"].update(name="perdoor", iterations=4, step=0.15)
    with pytest.raises(FedsimError, match=r"attack.iterations: these steps end at 0.6 δ .*write 7"):
        load_config(tiny)
    tiny["attack"].update(iterations=7)
    load_config(tiny)


def test_perdoor_that_would_only_watch_is_refused(tiny: dict[str, Any]) -> None:
    schedule = {"name": "fixed_frequency", "every": 1, "start": 1, "stop": 2}
    tiny["attack"].update(name="perdoor", movement="history", window=2, schedule=schedule)
    with pytest.raises(FedsimError, match=r"attack.window: the schedule has 2 attack rounds, all of them are watched"):
        load_config(tiny)
    schedule["stop"] = 3
    load_config(tiny)
    tiny["attack"].update(window=50, schedule={"name": "pool", "fraction": 0.5})
    load_config(tiny)


def test_perdoor_without_a_weight_to_move_says_so(make_context: MakeContext) -> None:
    """Of one weight, none is below the mean."""
    one = nn.Linear(1, 1, bias=False).double()
    batch = Batch(torch.ones(2, 1, dtype=torch.float64), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(RunError, match="use a larger share, still"):
        plugins.create("attack", "perdoor").train(make_context(one, [batch], trigger=White()))


def test_perdoor_stays_within_delta_and_leaves_statistics_alone(scene: Scene) -> None:
    given = scene("batchnorm")
    layout = Layout.of(given["model"])
    update = local_attack("perdoor", **given, delta=0.01, replacement=False).update
    assert float(update.abs().max()) <= 0.01 + 1e-12
    assert float(update.abs().max()) > 0.0099
    moved = int((trained(layout, update) != 0).sum())
    assert 0 < moved <= layout.trainable // 2
    assert not bool(update[layout.trainable :].any())
    boosted = local_attack("perdoor", **given, delta=0.01, num_examples=5, total_examples=40).update
    assert torch.allclose(boosted, 8 * update)


def test_perdoor_watches_before_it_attacks(make_context: MakeContext) -> None:
    """Honest for ``window`` rounds, then the standard deviation over all models received decides."""
    torch.manual_seed(0)
    model = nn.Linear(3, 4).double()
    batch = Batch(torch.rand(6, 3, dtype=torch.float64), torch.arange(6) % 4)
    attack = plugins.create("attack", "perdoor", movement="history", window=2, still=0.25)
    received = [torch.randn(16, dtype=torch.float64) * 0.1 for _ in range(3)]
    state: State = {}
    for number_, vector in enumerate(received):
        context = make_context(model, [batch], trigger=White(), num_examples=1, total_examples=3)
        context = replace(context, global_vector=vector, state=state)
        context.model.load(vector)
        attack.train(context)
        update = context.model.vector - vector
        honest = make_context(model, [batch])
        honest.model.load(vector)
        honest.fit(honest.model, honest.batches, honest.loss, honest.settings)
        assert torch.equal(update, honest.model.vector - vector) is (number_ < 2)
        factor = 1 if number_ < 2 else 3
        assert torch.equal(attack.craft(update, context), update * factor), "only the attack is boosted"
    deviation = torch.stack(received).std(dim=0, correction=0)
    assert torch.allclose((state["squares"] / 3).sqrt(), deviation)
    assert set(update.nonzero().flatten().tolist()) <= set(deviation.argsort()[:4].tolist())


def test_perdoor_still_is_at_least_one() -> None:
    assert still(number(3, 1, 2), 0.7).tolist() == [False, True, True]
    assert still(number(3, 1, 2), 0.1).tolist() == [False, True, False]


def test_perdoor_says_what_it_needs(scene: Scene) -> None:
    with pytest.raises(RunError, match="nothing was aggregated before round 1"):
        local_attack("perdoor", **scene("groupnorm"), movement="last_aggregate")
    own, all_ = {Knowledge.OWN_DATA}, {Knowledge.OWN_DATA, Knowledge.LAST_AGGREGATE}
    for movement, expected in (("own", own), ("history", own), ("last_aggregate", all_)):
        attack = plugins.create("attack", "perdoor", movement=movement)
        assert attack.knowledge(attack.parameters) == expected


# -------------------------------------------------------------------------------------------------- DarkFed


def test_darkfed_does_not_look_at_the_clients_data(scene: Scene) -> None:
    given = scene("batchnorm")
    others = [Batch(torch.zeros_like(b.inputs), torch.zeros_like(b.labels)) for b in given["batches"]]
    made = local_attack("darkfed", **given, epochs=2)
    assert torch.equal(made.update, local_attack("darkfed", **{**given, "batches": others}, epochs=2).update)
    layout = Layout.of(given["model"])
    assert not bool(made.update[layout.trainable :].any()), "running statistics are sent as received"
    assert bool(trained(layout, made.update).any())


def test_darkfed_without_a_backdoor_keeps_the_model(scene: Scene) -> None:
    """At the global model the other two terms have no slope."""
    given = scene("groupnorm")
    kept = local_attack("darkfed", **given, epochs=2, backdoor=0.0)
    assert float(kept.update.abs().max()) < 1e-12
    assert float(local_attack("darkfed", **given, epochs=2).update.abs().max()) > 1e-3
    outputs = local_attack("darkfed", **given, epochs=2, backdoor=0.0, labels="outputs")
    assert float(outputs.update.abs().max()) < 1e-12


def test_darkfed_cosine_term_holds_the_model(scene: Scene) -> None:
    given = {**scene("groupnorm"), "lr": 0.005}
    start = FlatModel(given["model"]).vector.clone()

    def turned(share: float) -> float:
        vector = local_attack("darkfed", **given, epochs=3, cosine=share).vector
        return 1 - float(torch.cosine_similarity(vector, start, dim=0))

    assert turned(400.0) < 0.6 * turned(0.0)


def test_cosine_slope() -> None:
    weights, centre = number(1.0, 2.0, -1.0).requires_grad_(), number(0.5, 3.0, 1.0)
    (expected,) = torch.autograd.grad(torch.cosine_similarity(weights, centre, dim=0), weights)
    assert torch.allclose(cosine_slope(weights.detach(), [centre]), expected)
    for other in (number(0.0, 0.0), number(3.0, 4.0)):
        assert torch.equal(cosine_slope(number(0.0, 0.0), [other]), number(0.0, 0.0))


@pytest.mark.parametrize("shadow", ["smooth", "uniform", "normal"])
def test_darkfed_shadow_inputs_are_images(shadow: str, make_context: MakeContext) -> None:
    batch = Batch(torch.zeros(2, 3, 7, 10, dtype=torch.float64), torch.tensor([0, 1]))
    context = make_context(nn.Linear(1, 1).double(), [batch])
    attack = plugins.create("attack", "darkfed", shadow=shadow, examples=103)
    drawn = attack._shadow(context)
    assert drawn.shape == (103, 3, 7, 10)
    assert drawn.dtype == torch.float64
    assert 0 <= float(drawn.min()) < 0.01
    assert 0.99 < float(drawn.max()) <= 1
    spread = float(drawn.mean(dim=(1, 2, 3)).std())
    assert (spread > 0.2) is (shadow == "smooth"), "dark ones and bright ones"


def test_darkfed_takes_images_of_another_data_set(
    scene: Scene, make_context: MakeContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads, digits = [], plugins.get("dataset", "digits")
    original = digits.load
    monkeypatch.setattr(digits, "load", lambda self: loads.append(self) or original(self))
    attack = plugins.create("attack", "darkfed", images={"name": "digits"}, examples=20)
    batch = Batch(torch.zeros(2, 3, 16, 16), torch.tensor([0, 1]))
    drawn = attack._shadow(make_context(nn.Linear(1, 1), [batch]))
    assert drawn.shape == (20, 3, 16, 16)
    assert bool((drawn[:, 0] == drawn[:, 2]).all())
    assert bool(torch.isfinite(local_attack(attack, **scene("groupnorm")).update).all())
    context = make_context(nn.Linear(1, 1), [batch])
    first, second = attack._shadow(context), attack._shadow(context)
    assert not torch.equal(first, second), "drawn anew each time"
    assert len(loads) == 1, "and loaded once"
    too_many = plugins.create("attack", "darkfed", images={"name": "digits"}, examples=10**5)
    with pytest.raises(RunError, match="use fewer examples"):
        local_attack(too_many, **scene("groupnorm"))


@pytest.mark.parametrize(
    ("images", "named"),
    [
        ({"name": "digit"}, "did you mean 'digits'"),
        ({"path": "x"}, "name a data set"),
        ({"name": "digits", "no": 1}, "no parameter"),
    ],
)
def test_darkfed_refuses_images_before_the_run(
    images: dict[str, Any], named: str, tiny: dict[str, Any], scene: Scene
) -> None:
    tiny["attack"].update(name="darkfed", images=images)
    with pytest.raises(FedsimError, match=named):
        load_config(tiny)
    with pytest.raises(PluginError, match=named):
        local_attack("darkfed", **scene("groupnorm"), images=images)


def test_darkfed_refuses_what_is_no_image(make_context: MakeContext) -> None:
    words = Batch(torch.zeros(2, 5, dtype=torch.int64), torch.tensor([0, 1]))
    context = make_context(nn.Linear(1, 1), [words], trigger=White())
    with pytest.raises(RunError, match="shadow images"):
        plugins.create("attack", "darkfed").train(context)


# --------------------------------------------------------------------------------------- layer-wise poisoning

THREE = {"a": [slice(0, 1)], "b": [slice(1, 2)], "c": [slice(2, 3)]}
BENIGN, MALICIOUS = torch.zeros(3), torch.ones(3)


def share_of(vector: Tensor) -> float:
    """A backdoor that is .1 in layer a, .6 in b and .3 in c."""
    return float(vector @ torch.tensor([0.1, 0.6, 0.3]))


def test_layers_are_ranked_by_what_is_lost_without_them() -> None:
    assert rank(THREE, BENIGN, MALICIOUS, share_of) == ["b", "c", "a"]
    assert rank(THREE, BENIGN, MALICIOUS, lambda vector: 1.0) == ["a", "b", "c"], "ties in the model's order"


@pytest.mark.parametrize(("tau", "taken"), [(0.5, ["b"]), (0.61, ["b", "c"]), (0.9, ["b", "c"]), (0.95, [*"bca"])])
def test_layers_are_taken_until_the_rate_is_reached(tau: float, taken: list[str]) -> None:
    slack = 1e-6  # the shares are single-precision numbers
    assert critical(["b", "c", "a"], THREE, BENIGN, MALICIOUS, share_of, tau - slack) == taken


def test_without_a_backdoor_no_layer_is_critical() -> None:
    assert critical(["b", "c", "a"], THREE, BENIGN, MALICIOUS, lambda vector: 0.0, 0.95) == []


def test_layers_of_a_network() -> None:
    layout = Layout.of(nn.Sequential(nn.Conv2d(1, 2, 3, bias=False), nn.BatchNorm2d(2), nn.Linear(2, 2)))
    assert list(layers_of(layout, "tensor")) == ["0.weight", "1.weight", "1.bias", "2.weight", "2.bias"]
    assert {name: len(places) for name, places in layers_of(layout, "module").items()} == {"0": 1, "1": 2, "2": 2}


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
def test_all_but_the_critical_layers_is_honest(scale: float, scene: Scene, make_context: MakeContext) -> None:
    given = scene("batchnorm")
    settings = LocalSettings(lr=0.1, epochs=8, momentum=0.9)
    context = make_context(given["model"], given["batches"], trigger=given["trigger"], settings=settings)
    context.benign = LocalSettings(lr=0.05)
    attack = plugins.create("attack", "layerwise_poisoning", scale=scale, tau=0.5)
    attack.train(context)
    update = context.model.vector - context.global_vector

    other = make_context(given["model"], given["batches"], trigger=given["trigger"])
    other.fit(other.model, other.batches, other.loss, context.benign)
    benign = other.model.vector - other.global_vector
    poison = {"transform": lambda batch: attack.poison(batch, other)}
    other.fit(other.model, other.batches, other.loss, settings, **poison)  # type: ignore[arg-type]
    malicious = other.model.vector - other.global_vector
    mixed = scale * malicious + max(0.0, 1 - scale) * benign
    taken = 0
    for entry in Layout.of(given["model"]).entries:
        place = slice(entry.start, entry.stop)
        if torch.allclose(update[place], benign[place], rtol=0, atol=1e-13):
            continue
        assert entry.trainable, "running statistics are the benign model's"
        assert torch.allclose(update[place], mixed[place], rtol=0, atol=1e-12)
        taken += 1
    assert taken == context.metrics["critical_layers"]
    assert 1 <= taken < 6


def test_what_was_never_poisoned_is_sent_as_honest(scene: Scene) -> None:
    given = {**scene("groupnorm"), "poison_fraction": 0.0, "lr": 0.001}
    made = local_attack("layerwise_poisoning", **given)
    honest = local_attack("data_poisoning", **{**given, "trigger": None})
    assert made.metrics == {"critical_layers": 0.0}
    assert torch.equal(made.update, honest.update)


# --------------------------------------------------------------------------------------------------- in a run

DIGITS: dict[str, Any] = {
    "name": "digits",
    "task": {"data": "digits", "model": "cnn"},
    "federation": {"clients": 8, "clients_per_round": 8, "rounds": 8},
    "training": {"lr": 0.05, "momentum": 0.9, "local_epochs": 2},
    "engine": {"name": "serial"},
    "output": {"report": False},
}
RUNS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "chameleon": ({"attackers": 3}, []),
    "darkfed": ({}, ["scale"]),
    "layerwise_poisoning": ({"attackers": 3}, []),
    "perdoor": ({"start": 8}, []),  # one injection
    "threedfed": ({"attackers": 3}, []),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OURS)
def test_the_backdoor_rises_in_a_run(name: str, tmp_path: Path) -> None:
    """Digits, eight clients, three rounds of attack after five without: the ASR is zero before it."""
    schedule, craft = RUNS[name]
    attack = {
        "name": name,
        "trigger": {"name": "patch", "size": 3, "target": 7},
        "schedule": {"name": "continuous", "start": 6, "stop": 8, **schedule},
        "local_epochs": 5,
        "craft": craft,
        **({"delta": 0.05} if name == "perdoor" else {}),
    }
    run(load_config({**DIGITS, "attack": attack}), out=tmp_path / "run")
    rounds = pd.read_parquet(tmp_path / "run" / "rounds.parquet").set_index("round")
    assert rounds["asr"].loc[5] < 0.05
    assert rounds["asr"].loc[8] > 0.25
    assert rounds["main_accuracy"].loc[8] > 0.5


@pytest.mark.slow
def test_in_a_run_the_indicators_tell_who_was_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What colluders read in a round is what multi-Krum did to them in the round before."""
    read: list[list[str]] = []
    original = parts.read_indicators

    def reading(feedback: list[float], threshold: float) -> tuple[list[str], bool]:
        accept, weak_dp = original(feedback, threshold)
        read.append(accept)
        return accept, weak_dp

    monkeypatch.setattr(parts, "read_indicators", reading)
    attack = {
        "name": "threedfed",
        "threshold": 0.02,
        "indicator": 0.1,
        "trigger": {"name": "patch", "size": 3, "target": 7},
        "schedule": {"name": "continuous", "start": 3, "stop": 8, "attackers": 3},
    }
    defense = [{"name": "multi_krum", "f": 3}]
    run(load_config({**DIGITS, "attack": attack, "defense": defense}), out=tmp_path / "run")
    clients = pd.read_parquet(tmp_path / "run" / "clients.parquet")
    malicious = clients[clients["malicious"]]
    accepted = malicious.groupby("round")["accepted"].sum().loc[3:7].tolist()
    assert [sum(said != "r" for said in accept) for accept in read[::3]] == accepted
    assert read[::3] == read[1::3] == read[2::3], "every colluder reads the same"
    assert 0 < sum(accepted) < 15
