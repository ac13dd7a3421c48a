"""What must hold of the methods on any data."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from defenses.multi_metrics import squared_length
from defenses.trimmed_mean import mean_of_ranks
from fedsim import plugins
from fedsim.defense import RoundUpdates
from fedsim.direct import aggregate
from fedsim.pipeline import Aggregation, apply_pipeline

Rounds = Callable[..., RoundUpdates]
few = settings(max_examples=15, deadline=None, derandomize=True, database=None)
seeds, clients = st.integers(0, 2**32 - 1), st.integers(5, 13)
sizes = st.integers(3, 30)  # on a line all cosines are ±1, so scores of multi_metrics tie

SELECTING: list[tuple[str, dict[str, Any]]] = [
    ("krum", {}),
    ("krum", {"f": 1, "distance": "plain"}),
    ("multi_krum", {}),
    ("multi_krum", {"f": 1, "m": 3, "weighted": False}),
    ("multi_krum", {"select": "around_winner"}),
    ("multi_metrics", {}),
    ("multi_metrics", {"variant": "paper", "keep": 0.5}),
]
COMBINING: list[tuple[str, dict[str, Any]]] = [
    ("coordinate_median", {}),
    ("coordinate_median", {"lower": True}),
    ("trimmed_mean", {"beta": 0.3}),
    ("trimmed_mean", {"f": 1}),
    ("rfa", {}),
    ("rfa", {"max_iterations": 60, "ftol": 1e-12}),
    ("flower", {"strategy": "FedMedian"}),
]
OTHERS: list[tuple[str, dict[str, Any]]] = [
    ("fedavg", {}),
    ("norm_clipping", {"bound": 1.5}),
    ("weak_dp", {"bound": 1.5, "sigma": 0.1}),
]


def over(*groups: list[tuple[str, dict[str, Any]]]) -> pytest.MarkDecorator:
    cases = [case for group in groups for case in group]
    names = [name + "".join(f" {value}" for value in parameters.values()) for name, parameters in cases]
    return pytest.mark.parametrize(("name", "parameters"), cases, ids=names)


def draw(seed: int, n: int, d: int) -> dict[str, Tensor]:
    """Continuous values: no two equal, so nothing depends on the order of clients."""
    source = torch.Generator().manual_seed(seed)
    return {
        "updates": torch.randn(n, d, generator=source, dtype=torch.float64),
        "num_examples": torch.rand(n, generator=source, dtype=torch.float64) + 0.5,
        "global_vector": torch.randn(d, generator=source, dtype=torch.float64),
    }


def near(found: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def defend(name: str, parameters: dict[str, Any], data: dict[str, Tensor], **changes: Tensor) -> Aggregation:
    return aggregate(name, **{**data, **changes}, **parameters)


@over(SELECTING, COMBINING, OTHERS)
@few
@given(seed=seeds, n=clients, d=sizes)
def test_the_order_of_clients_does_not_matter(name: str, parameters: dict[str, Any], seed: int, n: int, d: int) -> None:
    data = draw(seed, n, d)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    straight = defend(name, parameters, data)
    moved = {key: value[order] for key, value in data.items() if key != "global_vector"}
    permuted = defend(name, parameters, data, **moved)
    near(permuted.vector, straight.vector)
    near(permuted.weights, straight.weights[order])
    assert torch.equal(permuted.accepted, straight.accepted[order])
    for key, score in straight.scores.items():
        near(
            permuted.scores[key] / score.abs().amax().clamp(min=1), score[order] / score.abs().amax().clamp(min=1), 1e-6
        )


@over(SELECTING[:-1], COMBINING[:-1], OTHERS[:1])
@few
@given(seed=seeds, n=clients, d=sizes, factor=st.floats(0.1, 100))
def test_scaling_the_updates_scales_the_aggregate(
    name: str, parameters: dict[str, Any], seed: int, n: int, d: int, factor: float
) -> None:
    data = draw(seed, n, d)
    data["global_vector"] = torch.zeros(d, dtype=torch.float64)
    along = {**parameters, "nu": 1e-5 * factor} if name == "rfa" else parameters
    scaled = defend(name, along, data, updates=factor * data["updates"])
    near(scaled.vector / factor, defend(name, parameters, data).vector)


@over(SELECTING[:5], COMBINING, OTHERS[:1])
@few
@given(seed=seeds, n=clients, d=sizes)
def test_whole_weights_give_the_same_model_as_updates(
    name: str, parameters: dict[str, Any], seed: int, n: int, d: int
) -> None:
    data = draw(seed, n, d)
    start, zero = data["global_vector"], torch.zeros(d, dtype=torch.float64)
    whole = defend(name, parameters, data, updates=data["updates"] + start, global_vector=zero)
    updates = defend(name, parameters, data)
    near(whole.model, updates.model)
    near(whole.weights, updates.weights)


def test_multi_metrics_code_sees_whole_weights_only() -> None:
    data = draw(3, 10, 30)
    zero = torch.zeros(30, dtype=torch.float64)
    split = aggregate("multi_metrics", **data)
    whole = defend("multi_metrics", {}, data, updates=data["updates"] + data["global_vector"], global_vector=zero)
    near(split.scores["multi_metrics.score"], whole.scores["multi_metrics.score"], 1e-9)
    near(split.model, whole.model)


@over(SELECTING, COMBINING, OTHERS[:1])
def test_unanimous_clients_get_their_update(name: str, parameters: dict[str, Any]) -> None:
    data = draw(1, 8, 20)
    same = data["updates"][:1].expand(8, -1).clone()
    near(defend(name, parameters, data, updates=same).vector, same[0])


@over(COMBINING[:4])
@few
@given(seed=seeds, n=clients, d=sizes)
def test_coordinates_stay_between_the_extremes(
    name: str, parameters: dict[str, Any], seed: int, n: int, d: int
) -> None:
    data = draw(seed, n, d)
    rows = data["updates"]
    result = defend(name, parameters, data)
    assert bool((result.vector >= rows.amin(dim=0)).all())
    assert bool((result.vector <= rows.amax(dim=0)).all())
    # one client, whatever it sends, moves no coordinate beyond the others' extremes
    rows = rows.clone()
    rows[0] = 1e9
    attacked = defend(name, parameters, data, updates=rows)
    assert bool((attacked.vector <= rows[1:].amax(dim=0) + 1e-9).all())


@few
@given(seed=seeds, n=st.integers(1, 12), d=st.integers(1, 30))
def test_shares_of_ranks(seed: int, n: int, d: int) -> None:
    rows = draw(seed, n, d)["updates"]
    for first, last in {(0, n - 1), (n // 2, n // 2), ((n - 1) // 2, n // 2)}:
        found = mean_of_ranks(rows, first, last)
        ranks = rows.argsort(dim=0).argsort(dim=0)
        inside = (ranks >= first) & (ranks <= last)
        near(found.vector, (rows * inside).sum(dim=0) / (last - first + 1))
        near(found.weights, inside.double().sum(dim=1) / inside.sum())


def test_blocks_of_columns_do_not_show(monkeypatch: pytest.MonkeyPatch, make_round: Rounds) -> None:
    cases = [*SELECTING, *COMBINING, *OTHERS]
    straight = [apply_pipeline([plugins.create("defense", n, **p)], make_round()) for n, p in cases]
    monkeypatch.setattr("fedsim.distances.BLOCK", 7)
    for (name, parameters), expected in zip(cases, straight, strict=True):
        found = apply_pipeline([plugins.create("defense", name, **parameters)], make_round())
        near(found.vector, expected.vector, 1e-12)
        near(found.weights, expected.weights, 1e-12)


# ------------------------------------------------------------------------------------------- method by method


@pytest.mark.parametrize("scope", ["all", "trainable"])
@few
@given(seed=seeds, bound=st.floats(1e-3, 10), boost=st.floats(1, 1e6))
def test_clipping_bounds_norms_and_keeps_directions(
    make_round: Rounds, scope: str, seed: int, bound: float, boost: float
) -> None:
    updates = draw(seed, 8, make_round().updates.shape[1])["updates"]
    updates[0] *= boost
    updates[1] = 0
    round = make_round(updates)
    stage = plugins.create("defense", "norm_clipping", bound=bound, scope=scope)
    clipped = replace(round, updates=stage.transform(round))
    lengths, before = clipped.seen(scope).norm(dim=1), round.seen(scope).norm(dim=1)
    assert bool((lengths <= bound * (1 + 1e-12)).all())
    near(lengths, before.clamp(max=bound))
    near(clipped.seen(scope) * before[:, None], round.seen(scope) * lengths[:, None], 1e-9 * boost)
    if scope == "trainable":
        assert torch.equal(clipped.updates[:, round.trainable :], round.updates[:, round.trainable :])
    assert apply_pipeline([stage], round).vector[: round.trainable].norm() <= bound * (1 + 1e-12)


def test_clipping_measures_float32_updates_exactly() -> None:
    updates = torch.randn(2, 1_000_000, generator=torch.Generator().manual_seed(0))
    stage = plugins.create("defense", "norm_clipping", bound=1.0)
    result = aggregate(stage, updates=updates)
    near(result.scores["norm_clipping.norm"], updates.double().norm(dim=1), 1e-12)


def test_weak_dp_adds_its_noise_once_to_trainable_parameters(make_round: Rounds) -> None:
    def noise(sigma: float = 0.5, **changes: Any) -> Tensor:
        round = make_round(**changes)
        clip = plugins.create("defense", "norm_clipping")
        weak = plugins.create("defense", "weak_dp", sigma=sigma)
        return apply_pipeline([weak], round).vector - apply_pipeline([clip], round).vector

    trainable = make_round().trainable
    first = noise()
    assert torch.equal(first[trainable:], torch.zeros_like(first[trainable:]))
    assert bool((first[:trainable] != 0).all())
    near(noise(n=5), first)  # not averaged over the clients
    near(noise(sigma=1.0), 2 * first)
    assert not torch.allclose(noise(number=2), first)
    assert not torch.allclose(noise(seed=1), first)
    big = aggregate("weak_dp", updates=torch.zeros(4, 100_000), sigma=0.5).vector
    assert big.std().item() == pytest.approx(0.5, rel=0.02)
    assert big.mean().item() == pytest.approx(0, abs=0.01)


@few
@given(seed=seeds, n=st.integers(4, 12))
def test_rfa_descends_to_the_geometric_median(seed: int, n: int) -> None:
    data = draw(seed, n, 10)
    rows, shares = data["updates"], data["num_examples"] / data["num_examples"].sum()

    def objective(point: Tensor) -> float:
        return float(shares @ (rows - point).norm(dim=1))

    steps = [objective(shares @ rows)]
    for iterations in (1, 2, 4, 1000):
        found = defend("rfa", {"max_iterations": iterations, "ftol": 0.0}, data)
        near(found.weights @ rows, found.vector)
        near(found.scores["rfa.distance"], (rows - found.vector).norm(dim=1))
        steps.append(objective(found.vector))
    assert all(after <= before + 1e-12 for before, after in itertools.pairwise(steps))
    assert steps[-1] <= min(objective(row) for row in rows) + 1e-5
    for direction in torch.randn(20, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64):
        assert steps[-1] <= objective(found.vector + 0.01 * direction) + 1e-5


def test_rfa_stops_when_nothing_changes(make_round: Rounds) -> None:
    stage = plugins.create("defense", "rfa", max_iterations=500)
    apply_pipeline([stage], make_round())
    assert 1 < stage.state["iterations"] < 500
    never = plugins.create("defense", "rfa", max_iterations=30, ftol=0.0)
    apply_pipeline([never], make_round(torch.zeros(4, 59)))
    assert never.state["iterations"] == 30


@over(SELECTING[:5], [("rfa", {}), ("norm_clipping", {})])
def test_scores_rank_boosted_colluders_first(name: str, parameters: dict[str, Any], colluders: Rounds) -> None:
    result = apply_pipeline([plugins.create("defense", name, **parameters)], colluders())
    score = next(iter(result.scores.values()))
    assert score[:3].min() > score[3:].max()
    if "krum" in name:
        assert not bool(result.accepted[:3].any())


@pytest.mark.parametrize("variant", ["code", "paper"])
@pytest.mark.parametrize("boost", [2, 10, 100])
def test_multi_metrics_does_not_keep_a_lone_boosted_attacker(variant: str, boost: float) -> None:
    for seed in range(10):
        data = draw(seed, 10, 500)
        updates = 0.1 * data["updates"]
        updates[0] += boost * updates[0]
        assert not bool(defend("multi_metrics", {"variant": variant}, data, updates=updates).accepted[0])


@pytest.mark.parametrize("name", ["krum", "multi_krum", "multi_metrics", "rfa", "norm_clipping", "weak_dp"])
def test_scope_decides_whether_running_statistics_are_seen(name: str, make_round: Rounds) -> None:
    round = make_round()
    updates = round.updates.clone()
    updates[4, round.trainable :] += 100
    odd = make_round(updates)
    for scope, alike in (("trainable", True), ("all", False)):
        before, after = (
            apply_pipeline([plugins.create("defense", name, scope=scope)], each).scores for each in (round, odd)
        )
        assert all(torch.allclose(before[key], after[key]) for key in before) == alike


def test_krum_counts_neighbours_by_the_clients_present() -> None:
    rows = draw(5, 9, 4)["updates"]
    squared = (rows[:, None] - rows).square().sum(dim=2).sort(dim=1).values
    for f, neighbours in ((None, 4), (0, 7), (3, 4), (6, 1)):  # null: ⌊(9 − 3) / 2⌋ = 3
        score = aggregate("krum", updates=rows, f=f).scores["krum.score"]
        near(score, squared[:, 1 : 1 + neighbours].sum(dim=1))
        plain = aggregate("krum", updates=rows, f=f, distance="plain").scores["krum.score"]
        near(plain, squared[:, 1 : 1 + neighbours].sqrt().sum(dim=1))


def test_multi_krum_keeps_m_clients() -> None:
    rows = draw(6, 10, 4)["updates"]
    for parameters, count in [
        ({}, 7),  # f = 3
        ({"f": 2}, 8),
        ({"f": 2, "m": 5}, 5),
        ({"m": 1}, 1),
        ({"f": 2, "select": "around_winner"}, 7),
        ({"f": 2, "select": "around_winner", "m": 3}, 3),
    ]:
        assert int(aggregate("multi_krum", updates=rows, **parameters).accepted.sum()) == count


def test_multi_krum_around_the_winner() -> None:
    differs = 0
    for seed in range(10):
        rows = draw(seed, 10, 4)["updates"]
        winner = aggregate("krum", updates=rows, f=2).accepted
        around, lowest = (
            aggregate("multi_krum", updates=rows, f=2, m=4, select=select).accepted
            for select in ("around_winner", "lowest")
        )
        nearest = (rows - rows[winner]).norm(dim=1).argsort()[:4]
        assert set(around.nonzero().flatten().tolist()) == set(nearest.tolist())
        differs += not torch.equal(around, lowest)
    assert differs  # else this shows nothing


@pytest.mark.parametrize(("n", "keep", "count"), [(10, 0.3, 3), (4, 0.3, 1), (4, 0.01, 1), (9, 0.5, 4), (7, 1.0, 7)])
@pytest.mark.parametrize("variant", ["code", "paper"])
def test_multi_metrics_keeps_its_share(n: int, keep: float, count: int, variant: str) -> None:
    result = aggregate("multi_metrics", **draw(7, n, 20), keep=keep, variant=variant)
    assert int(result.accepted.sum()) == count
    score = result.scores["multi_metrics.score"]
    assert score[result.accepted].max() <= score.sort().values[count - 1]


def test_multi_metrics_paper_formula() -> None:
    data = draw(8, 9, 20)
    start, updates = data["global_vector"], data["updates"]
    whole = start + updates
    metrics = [
        (whole @ start) / (whole.norm(dim=1) * start.norm()),
        updates.abs().sum(dim=1),
        updates.norm(dim=1),
    ]
    features = torch.stack([(m[:, None] - m).abs().sum(dim=1) for m in metrics], dim=1)
    inverse = torch.cov(features.T).inverse()
    expected = torch.stack([(x @ inverse @ x).sqrt() for x in features])
    result = aggregate("multi_metrics", **data, variant="paper")
    near(result.scores["multi_metrics.score"], expected, 1e-8)
    for column, name in enumerate(("cosine", "manhattan", "length")):
        near(result.scores[f"multi_metrics.{name}"], features[:, column], 1e-8)


@few
@given(seed=seeds, n=st.integers(6, 40))
def test_whitening_is_the_plain_inverse_where_there_is_one(seed: int, n: int) -> None:
    features = draw(seed, n, 3)["updates"].abs() * torch.tensor([1e-4, 1.0, 1e3], dtype=torch.float64)
    covariance = torch.cov(features.T)
    scale = covariance.diagonal().sqrt()
    if torch.linalg.cond(covariance / scale / scale[:, None]) < 1e4:
        expected = torch.einsum("nf,fg,ng->n", features, covariance.inverse(), features)
        near(squared_length(features) / expected, torch.ones(n, dtype=torch.float64), 1e-8)


@pytest.mark.parametrize(
    "features",
    [
        torch.zeros(6, 3),
        torch.ones(6, 3),
        torch.arange(6.0)[:, None].expand(-1, 3),
        torch.stack([torch.arange(6.0), torch.ones(6), 2 * torch.arange(6.0)], dim=1),
        torch.eye(6)[:, :3] * 1e12,
        torch.full((6, 3), 1 / 3) + 1e-17 * torch.arange(6.0)[:, None],
    ],
    ids=["zero", "constant", "equal columns", "one constant, two proportional", "huge", "rounding noise"],
)
def test_whitening_never_fails(features: Tensor) -> None:
    found = squared_length(features.double())
    assert bool(torch.isfinite(found).all())
    assert bool((found >= 0).all())


def test_whitening_ignores_a_feature_that_repeats_another() -> None:
    features = draw(9, 10, 2)["updates"].abs()
    twice = torch.cat([features, 3 * features[:, :1]], dim=1)
    near(squared_length(twice), squared_length(features), 1e-8)


def test_whitening_does_not_blow_up_rounding_noise() -> None:
    features = draw(10, 10, 2)["updates"].abs()
    noise = 1 / 3 + 6e-17 * (torch.arange(10, dtype=torch.float64) % 2)
    assert noise.std() > 0
    near(squared_length(torch.cat([features, noise[:, None]], dim=1)), squared_length(features))


def test_identical_updates_keep_the_first_clients() -> None:
    same = draw(1, 1, 20)["updates"].expand(10, -1).clone()
    for variant in ("code", "paper"):
        assert aggregate("multi_metrics", updates=same, variant=variant).accepted.nonzero().flatten().tolist() == [
            0,
            1,
            2,
        ]
    assert aggregate("krum", updates=same).accepted.nonzero().flatten().tolist() == [0]
