"""What single attacks must do, beyond the contract and the reference numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from attacks._projection import project_l2
from fedsim import plugins
from fedsim.attack import Attack, AttackContext, Knowledge
from fedsim.batch import Batch
from fedsim.direct import LocalAttack, local_attack
from fedsim.errors import RunError
from fedsim.layout import FlatModel
from fedsim.local import LocalSettings

Scene = Callable[..., dict[str, Any]]
MakeContext = Callable[..., AttackContext]


def attack(scene: dict[str, Any], name: str | Attack, **options: Any) -> LocalAttack:
    return local_attack(name, **{**scene, "lr": 0.1, "momentum": 0.9, **options})


# --- anticipate -------------------------------------------------------------------------------------------


def perceptron() -> tuple[nn.Module, list[Batch]]:
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(draw(*parameter.shape))
    return model, [Batch(draw(6, 4), torch.randint(0, 3, (6,), generator=generator)) for _ in range(2)]


def poison(batch: Batch, count: int) -> Batch:
    inputs, labels = batch.inputs.clone(), batch.labels.clone()
    inputs[:count, 0] = 3.0
    labels[:count] = 1
    return Batch(inputs, labels)


Tensors = list[Tensor]


def brute_force(
    model: nn.Module,
    batches: list[Batch],
    *,
    k: int,
    clients: int,
    benign_steps: int,
    epochs: int,
    lr: float,
    decay: float,
    momentum: float,
    weight_decay: float,
    second_order: bool = True,
    boost: float = 1.0,
    clip: float | None = None,
) -> Tensor:
    """Anticipate on the two-layer perceptron in one graph, from the paper: lists of tensors, no helpers of ours."""
    start = [parameter.detach().clone() for parameter in model.parameters()]

    def loss(weights: Tensors, batch: Batch) -> Tensor:
        hidden = torch.tanh(batch.inputs @ weights[0].T + weights[1])
        return nn.functional.cross_entropy(hidden @ weights[2].T + weights[3], batch.labels)

    def clipped(update: Tensors) -> Tensors:
        norm = torch.sqrt(torch.stack([(piece**2).sum() for piece in update]).sum())
        if clip is None or norm.item() <= clip:
            return update
        return [piece * clip / norm for piece in update]

    def honest_round(weights: Tensors, j: int) -> Tensors:
        """The update of an honest client in simulated round j."""
        now = weights
        for _ in range(benign_steps):
            if not all(piece.requires_grad for piece in now):
                now = [piece.detach().requires_grad_() for piece in now]
            slopes = torch.autograd.grad(loss(now, batches[0]), now, create_graph=True)
            if not second_order:
                slopes = tuple(slope.detach() for slope in slopes)
            now = [piece - lr * decay**j * slope for piece, slope in zip(now, slopes, strict=True)]
        update = [b - a for a, b in zip(weights, now, strict=True)]
        return clipped(update if second_order else [piece.detach() for piece in update])

    own = [piece.clone().requires_grad_() for piece in start]
    velocity: list[Tensor | None] = [None] * len(own)
    for _ in range(epochs):
        for batch in batches:
            dirty = poison(batch, 3)
            sent = clipped([boost * (a - g) for a, g in zip(own, start, strict=True)])
            others = honest_round(start, 0)
            now = [g + (s + (clients - 1) * o.detach()) / clients for g, s, o in zip(start, sent, others, strict=True)]
            total = loss(now, dirty)
            for j in range(1, k):
                now = [a + b for a, b in zip(now, honest_round(now, j), strict=True)]
                total = total + loss(now, dirty)
            gradients = torch.autograd.grad(total, own)
            with torch.no_grad():
                for i, (piece, gradient) in enumerate(zip(own, gradients, strict=True)):
                    gradient = gradient + weight_decay * piece
                    previous = velocity[i]
                    velocity[i] = gradient if previous is None else momentum * previous + gradient
                    piece -= lr * velocity[i]
    return torch.cat([piece.detach().reshape(-1) for piece in own])


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"k": 1},
        {"second_order": False},
        {"boost": 5.0},
        {"clip": 0.05},
        {"boost": 5.0, "clip": 0.3},
        {"boost": 5.0, "clip": 0.05, "second_order": False},
        {"boost": 0.5, "clip": 100.0},
    ],
    ids=str,
)
def test_anticipate_agrees_with_brute_force(changes: dict[str, Any], checkpoint: bool) -> None:
    model, batches = perceptron()
    case: dict[str, Any] = {"k": 4, "clients": 3, "benign_steps": 2, "epochs": 2, "lr": 0.2, "decay": 0.9}
    case |= {"momentum": 0.9, "weight_decay": 0.01, **changes}
    expected = brute_force(model, batches, **case)
    method = plugins.create(
        "attack",
        "anticipate",
        k=case["k"],
        clients=case["clients"],
        benign_epochs=case["benign_steps"],
        checkpoint=checkpoint,
        second_order=case.get("second_order", True),
        simulate_boost=case.get("boost"),
        simulate_clip=case.get("clip"),
    )
    result = local_attack(
        method,
        model,
        batches,
        trigger=poison,
        lr=case["lr"],
        lr_decay=case["decay"],
        momentum=case["momentum"],
        weight_decay=case["weight_decay"],
        epochs=case["epochs"],
        clients_per_round=99,
    )
    assert torch.allclose(result.vector, expected, rtol=0, atol=1e-12)


class Tied(nn.Module):
    """A model whose first and last layer are the same tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4, bias=False)
        self.last = nn.Linear(4, 4, bias=False)
        self.last.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.last(torch.tanh(self.first(x)))
        return scores


@pytest.mark.parametrize("kind", ["groupnorm", "batchnorm", "lstm", "tied"])
def test_anticipate_of_nothing_is_data_poisoning(scene: Scene, kind: str) -> None:
    """One round, one client: nothing is simulated, and the functional model is the model."""
    torch.manual_seed(0)
    given_scene = scene(kind) if kind != "tied" else {"model": Tied().double(), "batches": perceptron()[1]}
    options: dict[str, Any] = {"epochs": 3, "weight_decay": 0.01}
    anticipated = attack(given_scene, "anticipate", k=1, clients=1, **options)
    trainable = FlatModel(given_scene["model"]).layout.trainable
    plain = attack(given_scene, "data_poisoning", **options)
    assert torch.allclose(anticipated.update[:trainable], plain.update[:trainable], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["anticipate", "data_poisoning"])
def test_mixed_precision_and_memory_format(scene: Scene, make_context: MakeContext, name: str) -> None:
    """Settings of speed are kept by attacks with a training loop of their own: near the plain result, not at it."""
    given_scene = scene("groupnorm", torch.float32)
    updates = []
    for speed in ({}, {"amp": True, "channels_last": True}):
        context = make_context(given_scene["model"], given_scene["batches"], trigger=given_scene["trigger"])
        context.settings = context.with_settings(**speed)
        plugins.create("attack", name).train(context)
        updates.append(context.model.vector - context.global_vector)
    assert not torch.equal(*updates)
    assert torch.cosine_similarity(*updates, dim=0) > 0.98


def test_anticipate_orders_and_simulations_differ(scene: Scene) -> None:
    """Each switch does something: otherwise brute force would be compared with a constant."""
    variants: list[dict[str, Any]] = [
        {},
        {"second_order": False},
        {"simulate_boost": 4.0},
        {"simulate_clip": 0.01},
        {"clients": 2},
        {"k": 1},
        {"simulation_batch": "next"},
    ]
    updates = [attack(scene(), "anticipate", **{"k": 3, **variant}).update for variant in variants]
    for i, first in enumerate(updates):
        for second in updates[i + 1 :]:
            assert not torch.allclose(first, second, rtol=1e-4)


@pytest.mark.parametrize("kind", ["groupnorm", "batchnorm", "lstm"])
def test_anticipate_checkpoint_changes_memory_only(scene: Scene, kind: str) -> None:
    kept = attack(scene(kind), "anticipate", k=6, epochs=2)
    again = attack(scene(kind), "anticipate", k=6, epochs=2, checkpoint=True)
    assert torch.equal(kept.update, again.update)
    # five rounds are differentiated; one is kept at a time
    assert 0 < again.metrics["anticipate_saved_bytes"] < 0.4 * kept.metrics["anticipate_saved_bytes"]
    assert kept.metrics["anticipate_seconds"] > 0


def test_anticipate_memory_grows_with_k_unless_checkpointed(scene: Scene) -> None:
    def saved(k: int, checkpoint: bool) -> float:
        result = attack(scene(), "anticipate", k=k, checkpoint=checkpoint)
        return result.metrics["anticipate_saved_bytes"]

    assert saved(9, False) > 3 * saved(3, False)
    assert saved(9, True) < 1.2 * saved(3, True)


def test_anticipate_checkpoint_repeats_dropout(scene: Scene) -> None:
    """The recomputed round drops the same units."""
    given_scene = scene()
    module = nn.Sequential(*given_scene["model"][:6], nn.Dropout(0.5), *given_scene["model"][6:])
    updates = []
    for checkpoint in (False, True):
        torch.manual_seed(0)
        updates.append(attack({**given_scene, "model": module}, "anticipate", k=4, checkpoint=checkpoint).update)
    assert torch.equal(*updates)


def test_anticipate_leaves_running_statistics_alone(scene: Scene, make_context: MakeContext) -> None:
    """What is sent equals the global model's exactly, and the module's own counters have not moved."""
    given_scene = scene("batchnorm")
    context = make_context(given_scene["model"], given_scene["batches"], trigger=given_scene["trigger"])
    counters = {n: b.clone() for n, b in context.model.module.named_buffers()}
    plugins.create("attack", "anticipate", k=3).train(context)
    update = context.model.vector - context.global_vector
    trainable = context.model.layout.trainable
    assert trainable < update.shape[0]
    assert bool((update[:trainable] != 0).any())
    assert torch.equal(update[trainable:], torch.zeros_like(update[trainable:]))
    for name, buffer in context.model.module.named_buffers():
        assert torch.equal(buffer, counters[name]), name


def test_anticipate_clip_is_finite_where_nothing_has_moved(scene: Scene) -> None:
    """At the first batch the attacker's update is zero; a zero learning rate keeps it and the others' there."""
    result = attack(scene(), "anticipate", k=2, lr=0.0, simulate_clip=0.5, simulate_boost=10.0)
    assert torch.equal(result.update, torch.zeros_like(result.update))
    assert bool(torch.isfinite(attack(scene(), "anticipate", k=2, simulate_clip=0.5).update).all())


def test_anticipate_draws_simulation_batches_as_told(scene: Scene, make_context: MakeContext) -> None:
    """``first`` opens an epoch per simulated round, ``next`` reads one epoch after the other."""
    given_scene = scene()
    opened = []

    def batches() -> Iterator[Batch]:
        epoch = len(opened)
        opened.append(0)
        for batch in given_scene["batches"]:
            opened[epoch] += 1
            yield batch

    for choice in ("first", "next"):
        opened.clear()
        context = replace(make_context(given_scene["model"], [], trigger=given_scene["trigger"]), batches=batches)
        plugins.create("attack", "anticipate", k=3, simulation_batch=choice).train(context)
        own, simulated = opened[0], opened[1:]
        assert own == 4
        assert simulated == ([1] * 12 if choice == "first" else [4, 4, 4])


def test_anticipate_counts_steps(scene: Scene, make_context: MakeContext) -> None:
    """One step sees one batch, whatever comes after it."""
    given_scene = scene()
    vectors = []
    for batches in (given_scene["batches"], given_scene["batches"][:1]):
        context = make_context(given_scene["model"], batches, trigger=given_scene["trigger"])
        context.settings = context.with_settings(steps=1)
        plugins.create("attack", "anticipate", k=2).train(context)
        vectors.append(context.model.vector)
    assert torch.equal(*vectors)


def test_anticipate_refuses_a_client_without_data(scene: Scene, make_context: MakeContext) -> None:
    context = make_context(scene()["model"], [])
    with pytest.raises(RunError, match="no examples"):
        plugins.create("attack", "anticipate").train(context)


# --- neurotoxin -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["global", "per_tensor"])
def test_neurotoxin_mask(scene: Scene, make_context: MakeContext, scope: str) -> None:
    """Exactly the share asked for, the smallest gradients, together or tensor by tensor; nothing else moves."""
    given_scene = scene("batchnorm")
    context = make_context(given_scene["model"], given_scene["batches"])
    method = plugins.create("attack", "neurotoxin", ratio=0.6, scope=scope, source="own_data")
    layout = context.model.layout
    gradient = method.gradient(context)
    mask = method.mask(gradient, context)
    entries = [entry for entry in layout.entries if entry.trainable]
    pieces = [(0, layout.trainable)] if scope == "global" else [(e.start, e.stop) for e in entries]
    for start, stop in pieces:
        kept = mask[start:stop] == 1
        size = gradient[start:stop].abs()
        assert int(kept.sum()) == int((stop - start) * 0.6)
        assert int((mask[start:stop] == 0).sum()) == stop - start - int(kept.sum())
        if bool(kept.any()):
            assert float(size[kept].max()) <= float(size[~kept].min())
    method.train(context)
    update = (context.model.vector - context.global_vector)[: layout.trainable]
    assert bool((update[mask == 1] != 0).any())
    assert torch.equal(update * (1 - mask), torch.zeros_like(update))


def test_neurotoxin_sums_the_gradients_of_all_batches(scene: Scene, make_context: MakeContext) -> None:
    given_scene = scene()
    context = make_context(given_scene["model"], given_scene["batches"])
    found = plugins.create("attack", "neurotoxin", source="own_data").gradient(context)
    loss = torch.stack(
        [nn.functional.cross_entropy(given_scene["model"](b.inputs), b.labels) for b in given_scene["batches"]]
    ).sum()
    slopes = torch.autograd.grad(loss, list(given_scene["model"].parameters()))
    assert torch.allclose(found, torch.cat([slope.reshape(-1) for slope in slopes]), rtol=0, atol=1e-12)


def test_neurotoxin_with_everything_allowed_is_data_poisoning(scene: Scene) -> None:
    masked = attack(scene("batchnorm"), "neurotoxin", ratio=1.0, epochs=2)
    plain = attack(scene("batchnorm"), "data_poisoning", epochs=2)
    assert torch.equal(masked.update, plain.update), "the pass for the mask must leave no trace"


def test_neurotoxin_mask_of_the_last_aggregate(scene: Scene) -> None:
    size = FlatModel(scene()["model"]).vector.shape[0]
    aggregate = torch.arange(size, dtype=torch.float64) - size / 2 + 0.25
    update = attack(scene(), "neurotoxin", source="last_aggregate", ratio=0.5, last_aggregate=aggregate).update
    frozen = torch.topk(aggregate.abs(), size - size // 2).indices
    assert torch.equal(update[frozen], torch.zeros_like(update[frozen]))
    assert float((update != 0).double().mean()) > 0.4


def test_neurotoxin_sources_differ_and_are_declared(scene: Scene) -> None:
    own = attack(scene(), "neurotoxin", source="own_data", ratio=0.5).update
    others = attack(scene(), "neurotoxin", source="benign_data", ratio=0.5).update
    assert not torch.equal(own, others)
    cls = plugins.get("attack", "neurotoxin")
    assert issubclass(cls, Attack)
    seen = {
        source: cls.knowledge(cls.Parameters(source=source))  # type: ignore[call-arg]
        for source in ("own_data", "benign_data", "last_aggregate")
    }
    assert seen == {
        "own_data": {Knowledge.OWN_DATA},
        "benign_data": {Knowledge.OWN_DATA, Knowledge.BENIGN_DATA},
        "last_aggregate": {Knowledge.OWN_DATA, Knowledge.LAST_AGGREGATE},
    }


def test_neurotoxin_says_what_is_missing(scene: Scene) -> None:
    with pytest.raises(RunError, match="a round later"):
        attack(scene(), "neurotoxin", source="last_aggregate")
    with pytest.raises(RunError, match="own_data"):
        attack({**scene(), "benign_batches": ()}, "neurotoxin")


# --- model replacement, constrain-and-scale ----------------------------------------------------------------


@pytest.mark.parametrize(("accuracy", "divisor"), [(0.2, 1), (0.21, 50), (0.6, 50), (0.61, 5000)])
def test_learning_rate_falls_where_the_backdoor_is_in_already(scene: Scene, accuracy: float, divisor: int) -> None:
    adapted = attack(scene(), "model_replacement", backdoor_accuracy=accuracy, lr=0.1)
    plain = attack(scene(), "model_replacement", adapt_lr=False, lr=0.1 / divisor)
    assert torch.equal(adapted.update, plain.update)


@pytest.mark.parametrize(
    ("epochs", "divisors"), [(5, [10, 10, 10, 100, 100]), (10, [1] + [10] * 6 + [100] * 3), (4, [1] * 4)]
)
def test_step_schedule(scene: Scene, make_context: MakeContext, epochs: int, divisors: list[int]) -> None:
    given_scene = scene()
    context = make_context(given_scene["model"], given_scene["batches"], backdoor_accuracy=lambda: 0.0)
    context.settings = LocalSettings(lr=0.1, epochs=epochs)
    rates: list[float] = []

    def record(*args: Any, lr_at: Callable[[int], float], **options: Any) -> float:
        rates.extend(lr_at(epoch) for epoch in range(epochs))
        return 0.0

    plugins.create("attack", "model_replacement").train(replace(context, fit=record))
    assert rates == pytest.approx([0.1 / divisor for divisor in divisors])


def test_replacement_boosts_running_statistics_too(scene: Scene) -> None:
    boosted = attack(scene("batchnorm"), "model_replacement", clients_per_round=7)
    once = attack(scene("batchnorm"), "model_replacement", scale=1.0)
    assert torch.allclose(boosted.update, 7 * once.update)
    assert bool((once.update[FlatModel(scene("batchnorm")["model"]).layout.trainable :] != 0).any())


def test_replacement_replaces(scene: Scene) -> None:
    """Mean of n updates, all but the attacker's zero: the new global model is the attacker's."""
    n = 10
    sent = attack(scene(), "model_replacement", clients_per_round=n)
    trained = attack(scene(), "data_poisoning")
    assert torch.equal(sent.update, trained.update * n)


def test_replacement_needs_the_backdoor_accuracy(scene: Scene, make_context: MakeContext) -> None:
    context = make_context(scene()["model"], scene()["batches"])
    with pytest.raises(RunError, match="adapt_lr: false"):
        plugins.create("attack", "model_replacement").train(context)


def test_constrain_and_scale_without_constraint_is_model_replacement(scene: Scene) -> None:
    free = attack(scene(), "constrain_and_scale", alpha=1.0)
    assert torch.equal(free.update, attack(scene(), "model_replacement").update)


def test_constraint_shortens_the_update(scene: Scene) -> None:
    norms = [
        float(attack(scene(), "constrain_and_scale", alpha=alpha, scale=1.0, epochs=2).update.norm())
        for alpha in (1.0, 0.7, 0.3)
    ]
    assert norms[0] > norms[1] > norms[2] > 0


def test_constrain_and_scale_with_the_anomaly_term_alone_stays(scene: Scene) -> None:
    update = attack(scene(), "constrain_and_scale", alpha=0.0).update
    assert torch.equal(update, torch.zeros_like(update))


def test_bound_holds_after_scaling(scene: Scene) -> None:
    given_scene = scene("batchnorm")
    trainable = FlatModel(given_scene["model"]).layout.trainable
    update = attack(given_scene, "constrain_and_scale", bound=0.3, scale=50.0).update
    assert float(update[:trainable].norm()) == pytest.approx(0.3)


def test_bound_holds_in_training(scene: Scene) -> None:
    """With a boost so small that the projection after it has nothing to do."""
    update = attack(scene(), "constrain_and_scale", bound=0.3, scale=0.001).update
    assert float(update.norm()) / 0.001 == pytest.approx(0.3)


def test_gradient_clip_limits_each_step(scene: Scene) -> None:
    given_scene = scene()
    given_scene["batches"] = given_scene["batches"][:1]
    update = attack(given_scene, "constrain_and_scale", grad_clip=0.01, scale=1.0, momentum=0.0).update
    assert float(update.norm()) == pytest.approx(0.1 * 0.01, rel=1e-3)


# --- projected gradient descent -------------------------------------------------------------------------------


def test_pgd_stays_in_the_ball(scene: Scene) -> None:
    given_scene = scene("batchnorm")
    trainable = FlatModel(given_scene["model"]).layout.trainable
    update = attack(given_scene, "pgd", eps=0.2).update
    assert float(update[:trainable].norm()) == pytest.approx(0.2)
    update = attack(given_scene, "pgd", eps=0.001, norm="linf").update
    assert float(update[:trainable].abs().max()) <= 0.001 + 1e-12


def test_pgd_stays_in_the_ball_when_training_ends_within_an_epoch(scene: Scene, make_context: MakeContext) -> None:
    """Of six steps, four are an epoch; the last is neither a tenth batch nor the last of an epoch."""
    given_scene = scene("groupnorm")
    settings = LocalSettings(lr=0.1, momentum=0.9, steps=6)
    context = make_context(
        given_scene["model"], given_scene["batches"], trigger=given_scene["trigger"], settings=settings
    )
    plugins.create("attack", "pgd", eps=0.001).train(context)
    moved = context.model.weights - context.global_weights
    assert float(moved.norm()) == pytest.approx(0.001)


def test_pgd_linf_has_a_learning_rate_of_its_own(scene: Scene) -> None:
    options: list[dict[str, float]] = [{"lr": 0.1, "momentum": 0.0}, {"lr": 5.0, "momentum": 0.9, "weight_decay": 0.1}]
    first, second = (attack(scene(), "pgd", norm="linf", **option).update for option in options)
    assert torch.equal(first, second)


@pytest.mark.parametrize(("frequency", "projected"), [(1, "0123"), (2, "023"), (3, "03"), (10, "03")])
def test_pgd_projects_when_told(scene: Scene, frequency: int, projected: str) -> None:
    """The ball's surface is where each projected step ends; the four batches are numbered from 0."""
    given_scene = scene()
    method = plugins.create("attack", "pgd", eps=0.001, frequency=frequency)
    starts: list[Tensor] = []

    class Spy(type(method)):  # type: ignore[misc]
        """Notes where each step starts."""

        def poison(self, batch: Batch, context: AttackContext) -> Batch:
            starts.append(context.model.weights - context.global_vector)
            poisoned: Batch = super().poison(batch, context)
            return poisoned

    final = attack(given_scene, Spy(method.parameters)).update
    ends = [*starts[1:], final]
    on_surface = [str(i) for i, end in enumerate(ends) if float(end.norm()) == pytest.approx(0.001)]
    assert "".join(on_surface) == projected


def test_pgd_radius_decays_with_the_round(scene: Scene) -> None:
    update = attack(scene(), "pgd", eps=0.2, eps_decay=0.5, round=3).update
    assert float(update.norm()) == pytest.approx(0.05)


def test_pgd_in_a_wide_ball_is_data_poisoning(scene: Scene) -> None:
    assert torch.equal(attack(scene(), "pgd", eps=1e6).update, attack(scene(), "data_poisoning").update)


def test_pgd_replacement_scales_what_is_trained(scene: Scene) -> None:
    given_scene = scene("batchnorm")
    trainable = FlatModel(given_scene["model"]).layout.trainable
    numbers = {"num_examples": 64, "total_examples": 640}
    plain = attack(given_scene, "pgd", **numbers).update
    boosted = attack(given_scene, "pgd", replacement=True, **numbers).update
    assert torch.equal(boosted[:trainable], plain[:trainable] * 10)
    assert torch.equal(boosted[trainable:], plain[trainable:])
    with pytest.raises(RunError, match="number of examples"):
        attack(given_scene, "pgd", replacement=True, num_examples=0)


def test_pgd_prox_against_autograd() -> None:
    """Two steps of ``CE + c ‖w − ŵ‖²`` by autograd, with ŵ one benign epoch on the same batches."""
    model, batches = perceptron()
    result = local_attack("pgd", model, batches, trigger=poison, lr=0.1, eps=1e6, prox=0.7)

    def steps(centre: Tensor | None, dirty: bool) -> Tensor:
        flat = FlatModel(perceptron()[0])
        weights = flat.vector.clone()
        for batch in batches:
            flat.load(weights)
            flat.gradient.zero_()
            shown = poison(batch, 3) if dirty else batch
            nn.functional.cross_entropy(flat.module(shown.inputs), shown.labels).backward()
            leaf = weights.clone().requires_grad_()
            pull = torch.zeros_like(weights)
            if centre is not None:
                (pull,) = torch.autograd.grad(0.7 * (leaf - centre).norm() ** 2, leaf)
            weights = weights - 0.1 * (flat.gradient + pull)
        return weights

    expected = steps(steps(None, dirty=False), dirty=True)
    assert torch.allclose(result.vector, expected, rtol=0, atol=1e-12)


numbers = st.lists(st.floats(-100, 100), min_size=1, max_size=6)


@settings(max_examples=50, deadline=None)
@given(values=numbers, centres=numbers, radius=st.floats(0.001, 50))
def test_projection(values: list[float], centres: list[float], radius: float) -> None:
    """Into the ball, on the segment to the centre, and untouched to the last bit if inside already."""
    size = min(len(values), len(centres))
    weights = torch.tensor(values[:size], dtype=torch.float64)
    centre = torch.tensor(centres[:size], dtype=torch.float64)
    before = weights.clone()
    project_l2(weights, centre, radius)
    distance = float((before - centre).norm())
    if distance <= radius:
        assert torch.equal(weights, before)
    else:
        assert torch.allclose(weights - centre, (before - centre) * (radius / distance), atol=1e-12)
