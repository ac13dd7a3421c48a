"""Local training: torch's SGD step by step, and the hooks at their places."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedsim import plugins
from fedsim.attack import Attack, AttackContext
from fedsim.batch import Batch
from fedsim.errors import RunError
from fedsim.layout import FlatModel
from fedsim.local import LocalSettings, StepInfo
from fedsim.streams import generator
from fedsim.training import fit, learning_rate, malicious_update

LOSS = nn.CrossEntropyLoss()


def network(norm: bool = False) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        layers = [nn.Linear(6, 8), nn.BatchNorm1d(8) if norm else nn.Identity(), nn.ReLU(), nn.Linear(8, 3)]
        return nn.Sequential(*layers)


def batches(count: int = 3, last: int = 4) -> list[Batch]:
    source = torch.Generator().manual_seed(2)
    sizes = [5] * (count - 1) + [last]
    return [
        Batch(torch.randn(size, 6, generator=source), torch.randint(0, 3, (size,), generator=source)) for size in sizes
    ]


def by_torch(module: nn.Module, data: list[Batch], settings: LocalSettings, lrs: list[float] | None = None) -> float:
    """What fit says it does, in the plainest way; the mean loss of the last epoch."""
    optimiser = torch.optim.SGD(
        module.parameters(), lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay
    )
    module.train()
    total, seen, step = 0.0, 0, 0
    for epoch in range(settings.epochs if settings.steps is None else 10**6):
        if settings.steps is not None and step == settings.steps:
            break
        if lrs is not None:
            optimiser.param_groups[0]["lr"] = lrs[epoch]
        total, seen = 0.0, 0
        for batch in data:
            if settings.steps is not None and step == settings.steps:
                break
            optimiser.zero_grad()
            value = LOSS(module(batch.inputs), batch.labels)
            value.backward()
            optimiser.step()
            total, seen, step = total + float(value.detach()) * len(batch.labels), seen + len(batch.labels), step + 1
    return total / seen


SETTINGS = [
    LocalSettings(lr=0.1),
    LocalSettings(lr=0.1, epochs=4),
    LocalSettings(lr=0.1, epochs=3, momentum=0.9),
    LocalSettings(lr=0.1, epochs=3, weight_decay=0.05),
    LocalSettings(lr=0.1, epochs=3, momentum=0.9, weight_decay=0.05),
    LocalSettings(lr=0.1, steps=1),
    LocalSettings(lr=0.1, steps=2, momentum=0.9),
    LocalSettings(lr=0.1, steps=3),
    LocalSettings(lr=0.1, steps=7, epochs=1, momentum=0.5),
]


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("settings", SETTINGS)
def test_fit_is_torchs_sgd_step_by_step(settings, norm):
    reference, flat = network(norm), FlatModel(network(norm))
    data = batches()
    expected = by_torch(reference, data, settings)
    found = fit(flat, lambda: iter(data), LOSS, settings)
    assert found == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(flat.vector, FlatModel(reference).vector, rtol=1e-6, atol=1e-7)


def test_the_learning_rate_of_each_epoch():
    reference, flat, data = network(), FlatModel(network()), batches()
    settings, lrs = LocalSettings(lr=9.0, epochs=3, momentum=0.9), [0.1, 0.01, 0.2]
    by_torch(reference, data, settings, lrs)
    fit(flat, lambda: iter(data), LOSS, settings, lr_at=lrs.__getitem__)
    torch.testing.assert_close(flat.vector, FlatModel(reference).vector, rtol=1e-6, atol=1e-7)


def test_momentum_starts_anew_every_time():
    settings, data = LocalSettings(lr=0.1, momentum=0.9), batches()
    one = FlatModel(network())
    fit(one, lambda: iter(data), LOSS, settings)
    start = one.vector.clone()
    fit(one, lambda: iter(data), LOSS, settings)
    other = FlatModel(network())
    other.load(start)
    fit(other, lambda: iter(data), LOSS, settings)
    assert torch.equal(one.vector, other.vector)


def test_every_epoch_asks_for_its_own_batches():
    asked = []

    def epoch() -> Iterator[Batch]:
        asked.append(len(asked))
        return iter(batches())

    fit(FlatModel(network()), epoch, LOSS, LocalSettings(lr=0.1, epochs=4))
    assert asked == [0, 1, 2, 3]


def test_hooks_are_called_in_their_places():
    """transform → forward; backward → on_gradient → step → on_step, for every batch."""
    flat, data = FlatModel(network()), batches(3)
    calls: list[Any] = []
    weights_before: list[Tensor] = []

    def transform(batch: Batch) -> Batch:
        calls.append("transform")
        weights_before.append(flat.weights.clone())
        return Batch(batch.inputs, torch.zeros_like(batch.labels))

    def on_gradient(gradient: Tensor, weights: Tensor) -> None:
        calls.append("gradient")
        assert torch.equal(weights, weights_before[-1])
        module = copy.deepcopy(network())
        FlatModel(module).load(flat.vector)
        batch = data[(len(weights_before) - 1) % 3]
        LOSS(module(batch.inputs), torch.zeros_like(batch.labels)).backward()
        gradient_here = torch.cat([p.grad.reshape(-1) for p in module.parameters() if p.grad is not None])
        torch.testing.assert_close(gradient, gradient_here)
        gradient.fill_(1.0)

    def on_step(weights: Tensor, info: StepInfo) -> None:
        calls.append((info.epoch, info.batch, info.last_batch))
        torch.testing.assert_close(weights, weights_before[-1] - 0.1)
        weights.zero_()
        weights += 0.5

    fit(
        flat,
        lambda: iter(data),
        LOSS,
        LocalSettings(lr=0.1, epochs=2),
        transform=transform,
        on_gradient=on_gradient,
        on_step=on_step,
    )
    expected: list[Any] = []
    for epoch in range(2):
        for index in range(3):
            expected += ["transform", "gradient", (epoch, index, index == 2)]
    assert calls == expected
    assert (flat.vector == 0.5).all()


def test_the_gradient_hook_comes_before_weight_decay_and_momentum():
    flat = FlatModel(network())
    start = flat.vector.clone()
    settings = LocalSettings(lr=0.1, weight_decay=0.5, momentum=0.9, epochs=1)

    def nothing(gradient: Tensor, weights: Tensor) -> None:
        gradient.zero_()

    fit(flat, lambda: iter(batches(1)), LOSS, settings, on_gradient=nothing)
    torch.testing.assert_close(flat.vector, start - 0.1 * 0.5 * start)


def test_a_step_limit_ends_within_an_epoch_and_runs_over_several():
    steps: list[StepInfo] = []
    fit(
        FlatModel(network()),
        lambda: iter(batches(3)),
        LOSS,
        LocalSettings(lr=0.1, steps=4, epochs=99),
        on_step=lambda weights, info: steps.append(info),
    )
    assert [(s.epoch, s.batch) for s in steps] == [(0, 0), (0, 1), (0, 2), (1, 0)]


@pytest.mark.parametrize("settings", [LocalSettings(lr=0.1), LocalSettings(lr=0.1, steps=2)])
def test_no_data_is_said(settings):
    with pytest.raises(RunError, match="no batch to train on"):
        fit(FlatModel(network()), lambda: iter([]), LOSS, settings)


def test_the_model_is_left_in_training_mode_and_without_a_graph():
    flat = FlatModel(network(norm=True))
    flat.module.eval()
    fit(flat, lambda: iter(batches()), LOSS, LocalSettings(lr=0.1))
    assert flat.module.training
    assert not flat.vector.requires_grad


def test_bf16_and_channels_last_train_the_same_model_roughly():
    module, images = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 3)), torch.rand(8, 3, 8, 8)
    data = [Batch(images, torch.arange(8) % 3)]
    seen: list[bool] = []
    module.register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].is_contiguous(memory_format=torch.channels_last))
    )
    plain, other = FlatModel(copy.deepcopy(module)), FlatModel(module)
    fit(plain, lambda: iter(data), LOSS, LocalSettings(lr=0.1, epochs=3))
    fit(other, lambda: iter(data), LOSS, LocalSettings(lr=0.1, epochs=3, amp=True, channels_last=True))
    assert seen == [False] * 3 + [True] * 3
    assert other.vector.dtype == torch.float32
    torch.testing.assert_close(plain.vector, other.vector, rtol=0.1, atol=0.02)
    assert not torch.equal(plain.vector, other.vector)


@pytest.mark.parametrize(("round", "factor"), [(1, 1.0), (2, 0.9), (11, 0.9**10)])
def test_the_first_round_uses_the_base_rate(round, factor):
    assert learning_rate(0.3, 0.9, round) == pytest.approx(0.3 * factor)


# -------------------------------------------------------------------------------- the frame of an attack


def context(**changes: Any) -> AttackContext:
    flat = FlatModel(network())
    values: dict[str, Any] = {
        "model": flat,
        "global_vector": flat.vector.clone(),
        "batches": lambda: iter(batches()),
        "loss": LOSS,
        "settings": LocalSettings(lr=0.1),
        "benign": LocalSettings(lr=0.1),
        "fit": fit,
        "trigger": None,
        "poison_fraction": 0.5,
        "generator": generator(0, "test"),
    }
    return AttackContext(**{**values, **changes})


class Shift(Attack):
    """Trains by adding one, crafts by doubling."""

    name = "shift"

    def train(self, context: AttackContext) -> None:
        context.model.vector.add_(1.0)

    def craft(self, update: Tensor, context: AttackContext) -> Tensor:
        return update * 2


def test_an_update_is_trained_then_crafted_then_taken_through_the_steps_in_order():
    ours = context()
    ours.model.vector.fill_(7.0)  # what an earlier client left is no part of it
    scale = plugins.create("craft", "scale", factor=3.0)
    project = plugins.create("craft", "project", bound=1.0)
    size = ours.global_vector.shape[0]
    torch.testing.assert_close(malicious_update(Shift(), ours), torch.full((size,), 2.0), rtol=0, atol=1e-5)
    scaled = malicious_update(Shift(), ours, [scale])
    torch.testing.assert_close(scaled, torch.full((size,), 6.0), rtol=0, atol=1e-5)
    last = malicious_update(Shift(), ours, [scale, project])
    assert float(last.norm()) == pytest.approx(1.0)
    other = malicious_update(Shift(), ours, [project, scale])
    assert float(other.norm()) == pytest.approx(3.0)


def test_an_update_of_the_wrong_shape_is_the_attacks_fault():
    class Wrong(Attack):
        name = "wrong"

        def craft(self, update: Tensor, context: AttackContext) -> Tensor:
            return update[:3]

    with pytest.raises(RunError, match=r"attack 'wrong' made an update of shape \(3,\)"):
        malicious_update(Wrong(), context())
