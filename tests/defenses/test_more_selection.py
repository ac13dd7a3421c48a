"""MESAS, the second stage of Snowball, the variants of the geometric median, and what defenses share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from defenses._autoencoder import Autoencoder
from defenses._clustering import agglomerative
from defenses._layers import tensors
from defenses._statistics import cosines, similarities
from defenses.mesas import Mesas, MesasParameters, chance_of_outlier, measures
from fedsim import plugins
from fedsim.config import load_config
from fedsim.defense import RoundUpdates
from fedsim.direct import aggregate
from fedsim.experiment import run
from fedsim.pipeline import Aggregation, apply_pipeline
from tests.support.parity import assert_near, draw, kept, tensor

Cases = Callable[[str], list[dict[str, Any]]]
Rounds = Callable[..., RoundUpdates]


# ---------------------------------------------------------------------------------------------------- MESAS


def test_mesas_measures_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, base = tensor([[0.0, 3, 0, -1], [4, 0, 0, 0]]), tensor([3.0, 0, 0, 0])
    expected = {
        "cosine": [1 - 3 / 19**0.5, 0],
        "length": [10**0.5, 4],
        "increased": [1, 1],
        "variance": [10 / 4 - 0.25, 3],
        "least": [-1, 0],
        "greatest": [3, 4],
    }
    for block in (8192, 3):
        monkeypatch.setattr("fedsim.distances.BLOCK", block)
        found = measures(rows, base)
        assert list(found) == list(expected)
        for name, values in expected.items():
            assert_near(found[name], values, 1e-15)
    far = measures(draw(1, 3, 500) + 1e9, draw(2, 500))["variance"]  # the mean costs no digits
    assert_near(far, (draw(1, 3, 500) + 1e9).var(dim=1, correction=0), 1e-6)


@pytest.mark.parametrize(
    ("values", "lone", "significant"),
    [
        ([-3, -2, -1, 0, 1, 2, 3], True, False),
        ([-3, -2, -1, 0, 1, 2, 30], False, False),  # the three tests cannot see one among seven
        ([-3, -2, -1, 0, 1, 2, 30], True, True),
        ([*range(-8, 9), 60, 61, 62, 63, 64, 65], False, True),
        ([1e30 * x for x in (*range(-8, 9), 60, 61, 62, 63, 64, 65)], False, True),
        ([7.0] * 9, True, False),
        ([7.0] * 8 + [7.0 + 1e-14], True, False),  # rounding noise
        ([7.0] * 8 + [8.0], True, True),
    ],
)
def test_mesas_significance(values: list[float], lone: bool, significant: bool) -> None:
    assert Mesas(MesasParameters(lone=lone)).significant(np.array(values, dtype=float)) == significant


@pytest.mark.parametrize("which", ["ttest_ind", "levene", "ks_2samp"])
def test_mesas_hears_each_of_its_tests(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the halves 0 … n and the distances above the median; one p-value alone decides."""
    from types import SimpleNamespace

    from scipy import stats

    seen = []

    def chance(p: float) -> Callable[..., Any]:
        return lambda one, other: (seen.append((one.tolist(), other.tolist())), SimpleNamespace(pvalue=p))[1]

    for name in ("ttest_ind", "levene", "ks_2samp"):
        monkeypatch.setattr(stats, name, chance(0.04 if name == which else 1.0))
    values = np.array([4.0, 1, 2, 8, 3])
    assert Mesas(MesasParameters(alpha=0.05, lone=False)).significant(values)
    assert not Mesas(MesasParameters(alpha=0.03, lone=False)).significant(values)
    assert [sorted(half) for half in seen[0]] == [[0.0, 0.2, 0.4], [0.0, 0.2, 1.0]]


def test_grubbs_chance() -> None:
    values = draw(3, 10).numpy()
    low, far = chance_of_outlier(values), chance_of_outlier(np.append(values, 9.0))
    assert 0 < far < 1e-3 < low <= 1
    # the critical values of Grubbs's tables: n = 10 at 5 % two-sided 2.290, at 1 % (0.5 % each side) 2.482
    for g, chance in ((2.290, 0.05), (2.482, 0.01)):
        rest = np.array([1.0, -1, 1, -1, 1, -1, 1, -1, 0])
        low_x, high_x = 1.0, 100.0
        for _ in range(60):  # the tenth value whose distance is g standard deviations
            middle = (low_x + high_x) / 2
            sample = np.append(rest, middle)
            reached = (middle - sample.mean()) / sample.std(ddof=1) > g
            low_x, high_x = (low_x, middle) if reached else (middle, high_x)
        assert chance_of_outlier(sample) == pytest.approx(chance, rel=0.02)
    assert chance_of_outlier(np.array([0.0] * 9 + [1.0])) == 0


def test_mesas_prunes_until_nothing_is_significant() -> None:
    stage = Mesas()
    honest = draw(4, 20).numpy()
    values = np.concatenate([honest, 1e4 + draw(5, 4).numpy(), 500 + draw(6, 8).numpy()])
    assert stage.prune(values, np.arange(32)).tolist() == list(range(20))
    assert stage.prune(values, np.arange(21)).tolist() == list(range(20))  # looks only at those that are left
    assert stage.prune(values, np.arange(24, 32)).tolist() == list(range(24, 32))
    assert len(stage.prune(np.array([0.0, 0, 0, 9]), np.arange(4))) == 4  # four cannot be tested
    # a majority of the round's clients stays: the second pruning would leave 9 of 20
    values = np.concatenate([honest[:9], 1e4 + honest[9:14], 1e8 + honest[14:]])
    assert Mesas(MesasParameters(alpha=0.2)).prune(values, np.arange(20)).tolist() == list(range(14))
    assert Mesas(MesasParameters(alpha=0.2)).prune(values[:14], np.arange(14)).tolist() == list(range(9))


@pytest.mark.parametrize(
    ("name", "poison"),
    [
        ("length", lambda rows, base: rows * 3),
        ("cosine", lambda rows, base: 2.5 * rows.norm(dim=1, keepdim=True) * -base / base.norm()),
        ("increased", lambda rows, base: rows.abs()),
        ("greatest", lambda rows, base: torch.cat([rows[:, 1:], rows.norm(dim=1, keepdim=True) / 2], dim=1)),
    ],
)
def test_mesas_finds_colluders(name: str, poison: Callable[[Tensor, Tensor], Tensor]) -> None:
    rows, base = 0.1 * draw(7, 20, 400), draw(8, 400)
    rows[:5] = poison(rows[:5], base)
    result = aggregate("mesas", updates=rows, global_vector=base, num_examples=list(range(1, 21)))
    assert not kept(result) & set(range(5))
    assert len(kept(result)) >= 14
    weights = torch.where(result.accepted, torch.arange(1.0, 21), 0).double()
    assert_near(result.vector, weights / weights.sum() @ rows, 1e-12)
    assert result.scores["mesas.score"][:5].min() > 1


def test_mesas_leaves_the_honest_alone() -> None:
    shares = [
        len(kept(aggregate("mesas", updates=draw(seed, 12, 200), global_vector=draw(99, 200)))) for seed in range(20)
    ]
    assert sum(shares) >= 0.95 * 20 * 12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 2, 3, 5, 9])
def test_mesas_of_few_equal_zero_and_huge_rows(n: int, dtype: torch.dtype) -> None:
    rows = draw(9, n, 30).to(dtype)
    huge = rows.clone()
    huge[-1] *= 1e12
    for updates in (rows, rows[:1].expand(n, -1).clone(), torch.zeros_like(rows), huge):
        result = aggregate("mesas", updates=updates)
        assert bool(torch.isfinite(result.vector).all())
        assert bool(torch.isfinite(result.scores["mesas.score"]).all())
        assert 2 * len(kept(result)) > n
        if n < 5:
            assert len(kept(result)) == n
    assert n < 9 or n - 1 not in kept(aggregate("mesas", updates=huge))


# --------------------------------------------------------------------------------------- Snowball, top down

QUICK: dict[str, Any] = {"furthest": 3, "keep": 0.2, "hidden": 16, "latent": 4, "epochs": 60, "tuning": 5}


def two_kinds(n: int = 20, bad: int = 3) -> Tensor:
    """Honest rows around zero; colluders far off, and far from one another, so that they do not win the vote."""
    rows = draw(10, n, 40)
    rows[:bad] = 8 * draw(11, bad, 40)
    return rows


def test_snowball_elects_more_like_the_elected() -> None:
    rows = two_kinds()
    votes = aggregate("snowball", updates=rows, **QUICK)
    first = kept(votes)
    assert len(first) == 4
    result = aggregate("snowball", updates=rows, **QUICK, select=0.75, step=0.15)
    turn = result.scores["snowball.turn"]
    assert {int(row) for row in (turn == 0).nonzero()} == first
    assert torch.bincount(turn.long()).tolist() == [4, 3, 3, 3, 2, 5]  # ⌈0.15 · 20⌉ a pass until there are 15
    assert kept(result) == {int(row) for row in (turn < 5).nonzero()}
    assert not kept(result) & {0, 1, 2}
    assert torch.equal(result.scores["snowball.score"], votes.scores["snowball.score"])
    assert_near(result.vector, rows[sorted(kept(result))].mean(dim=0), 1e-12)


def test_snowball_draws_from_the_rounds_stream_alone(make_round: Rounds) -> None:
    round = make_round(draw(12, 12, 49))

    def elected(seed: int = 0) -> Aggregation:
        stage = plugins.create("defense", "snowball", **QUICK, select=0.9)
        return apply_pipeline([stage], replace(round, seed=seed))

    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = elected()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(elected().scores["snowball.turn"], first.scores["snowball.turn"])
    turns = {tuple(elected(seed=seed).scores["snowball.turn"].tolist()) for seed in range(4)}
    assert len(turns) > 1  # candidates that are all alike are told apart by the draws


def test_snowball_begins_its_second_stage_when_told(make_round: Rounds) -> None:
    stage = plugins.create("defense", "snowball", **QUICK, select=0.5, start=3)
    for number, count in ((1, 3), (2, 3), (3, 6)):
        result = apply_pipeline([stage], make_round(draw(13, 12, 49), number=number))
        assert len(kept(result)) == count
        assert ("snowball.turn" in result.scores) == (number == 3)


def test_snowball_where_the_votes_elect_one() -> None:
    options = {**QUICK, "keep": 0.05}
    rows = two_kinds(10, 2)
    votes = aggregate("snowball", updates=rows, **options)
    assert len(kept(votes)) == 1
    result = aggregate("snowball", updates=rows, **options, select=0.5)
    best = votes.scores["snowball.score"].argsort(stable=True)[:2].tolist()
    assert (result.scores["snowball.turn"] == 0).nonzero().flatten().tolist() == sorted(best)
    assert len(kept(result)) == 5
    assert len(kept(aggregate("snowball", updates=rows, **options, select=0.1))) == 1  # nobody to add
    assert len(kept(aggregate("snowball", updates=rows, **options, select=1.0))) == 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_snowball_elects_among_equal_zero_and_huge_rows(dtype: torch.dtype) -> None:
    rows = draw(14, 8, 30).to(dtype)
    huge = rows.clone()
    huge[-1] *= 1e12 if dtype == torch.float32 else 1e100
    for updates in (rows[:1].expand(8, -1).clone(), torch.zeros_like(rows), huge):
        result = aggregate("snowball", updates=updates, **QUICK, select=0.6)
        assert len(kept(result)) == 4
        assert bool(torch.isfinite(result.vector).all())
        assert all(bool(torch.isfinite(score).all()) for score in result.scores.values())
    assert 7 not in kept(result)


def test_snowball_learns_beside_two_huge_rows_that_were_elected(make_round: Rounds) -> None:
    """In single precision both are infinite, and their difference no number."""
    rows = draw(19, 6, 49)
    rows[2] = 9 * draw(20, 49)
    rows[4:] = 1e100
    stage = plugins.create("defense", "snowball", **{**QUICK, "step": 0.01})
    assert stage.elect(make_round(rows), [0, 1, 4, 5], 5) == [[0, 1, 4, 5], [3]]


def test_the_autoencoder_learns_differences() -> None:
    rows = draw(15, 5, 12).float()
    strange = 6 * draw(16, 5, 12).float()
    model = Autoencoder(12, 32, 4, torch.Generator().manual_seed(0))
    before = model.error(rows[0] - rows[1:])
    model.learn(rows, 150)
    known = model.error(rows[0] - rows[1:])
    assert float(known) < 0.7 * float(before)
    assert float(model.error(rows[0] - strange)) > 2 * float(known)
    # with no weights but the last bias, 1, x̂ is σ(1) everywhere: the error is the mean of both ways round
    for weight in model.weights:
        weight.detach().zero_()
    model.weights[-1].detach().fill_(1.0)
    difference = torch.tensor([[0.0, 1.0, -2.0] + [1.0] * 9])
    made = torch.ones(12).sigmoid()
    errors = [((way * difference).sigmoid() - made).square().sum() for way in (1, -1)]
    assert float(model.error(difference)) == pytest.approx(float(sum(errors)) / 2, rel=1e-5)


def test_the_autoencoders_loss_by_hand() -> None:
    """One step against the slope of the loss written out."""
    rows = torch.tensor([[1.0, -1.0, 0.5], [0.0, 2.0, -0.5]])
    models = [Autoencoder(3, 4, 2, torch.Generator().manual_seed(7)) for _ in range(2)]
    start = [weight.detach().clone() for weight in models[0].weights]
    assert models[0].optimiser.defaults["lr"] == 1e-3
    models[0].optimiser = torch.optim.SGD(models[0].weights, lr=1.0)  # type: ignore[assignment]
    models[0].learn(rows, 1)
    source = models[1].source
    order = torch.randperm(2, generator=source)
    x = torch.stack([rows[0] - rows[1], rows[1] - rows[0]])[order].sigmoid()
    w = models[1].weights
    hidden = torch.relu(torch.relu(x @ w[0].T + w[1]) @ w[2].T + w[3]) @ w[4].T + w[5]
    mean, log_variance = hidden[:, :2], torch.nn.functional.softplus(hidden[:, 2:])
    code = mean + log_variance.div(2).exp() * torch.randn((2, 2), generator=source)
    made = torch.sigmoid(torch.relu(torch.relu(code @ w[6].T + w[7]) @ w[8].T + w[9]) @ w[10].T + w[11])
    loss = (made - x).pow(2).sum() - 0.5 * (1 + log_variance - mean.pow(2) - log_variance.exp()).sum()
    for before, after, slope in zip(start, models[0].weights, torch.autograd.grad(loss, w), strict=True):
        assert_near((after - before).detach(), -slope.double(), 1e-6)


# ------------------------------------------------------------------------ variants of the geometric median


def test_rfa_as_byzfl_has_it(reference: Cases) -> None:
    for case in reference("defenses/rfa_geometric_median"):
        byzfl: dict[str, Any] = {"weighted": False, "start": "zero", "nu": 0.1, "max_iterations": 3, "ftol": 0.0}
        result = aggregate("rfa", updates=tensor(case["client_weights"]), num_examples=case["num_examples"], **byzfl)
        assert_near(result.vector, case["expected_aggregate_byzfl_nu_0.1_T_3"], 1e-9)


def test_rfa_from_zero_by_hand() -> None:
    rows = tensor([[3.0, 4], [0, 1], [0, 0]])
    one = aggregate("rfa", updates=rows, num_examples=[1, 2, 1], start="zero", nu=0.5, max_iterations=1)
    beta = tensor([1 / 5, 2 / 1, 1 / 0.5])  # by distance to zero, at least ν
    assert_near(one.weights, beta / beta.sum(), 1e-12)
    assert_near(one.vector, beta @ rows / beta.sum(), 1e-12)
    same = aggregate("rfa", updates=rows, num_examples=[1, 1, 1], start="zero", nu=0.5, max_iterations=1)
    equal = {"weighted": False, "start": "zero", "nu": 0.5, "max_iterations": 1}
    assert torch.equal(aggregate("rfa", updates=rows, num_examples=[1, 2, 1], **equal).vector, same.vector)


@pytest.mark.parametrize("scope", ["all", "trainable"])
def test_rfa_of_every_tensor_by_itself(make_round: Rounds, scope: str) -> None:
    round = make_round()
    stage = plugins.create("defense", "rfa", blocks="tensors", scope=scope, max_iterations=20)
    result = apply_pipeline([stage], round)
    share, squared, seen = torch.zeros(12).double(), torch.zeros(12).double(), round.seen(scope).shape[1]
    for entry in tensors(round):
        rows = round.updates[:, entry.start : entry.stop]
        if entry.start < seen:
            alone = aggregate("rfa", updates=rows, num_examples=round.num_examples, max_iterations=20)
            assert_near(result.vector[entry.start : entry.stop], alone.vector, 1e-12)
            share += alone.weights * entry.size / seen
            squared += (rows - alone.vector).square().sum(dim=1)
    assert_near(result.weights, share, 1e-12)
    assert_near(result.scores["rfa.distance"], squared.sqrt(), 1e-12)
    if scope == "trainable":
        assert_near(result.vector[seen:], share @ round.updates[:, seen:], 1e-12)
    bare = apply_pipeline([stage], replace(round, layout=None, trainable=round.updates.shape[1]))
    whole = apply_pipeline([plugins.create("defense", "rfa", max_iterations=20)], round)
    assert_near(bare.vector, whole.vector, 1e-12)


def test_rfa_of_tensors_hears_a_client_in_the_layers_where_it_is_ordinary(make_round: Rounds) -> None:
    round = make_round()
    updates = round.updates.clone()
    last = tensors(round)[-1]
    updates[0, last.start : last.stop] += 1e6
    loud = make_round(updates)
    for blocks, heard in (("vector", False), ("tensors", True)):
        result = apply_pipeline([plugins.create("defense", "rfa", blocks=blocks, max_iterations=100)], loud)
        first = tensors(round)[0]
        moved = updates.clone()
        moved[0, : first.stop] += 0.05  # an ordinary change
        after = apply_pipeline([plugins.create("defense", "rfa", blocks=blocks, max_iterations=100)], make_round(moved))
        assert ((after.vector - result.vector)[: first.stop].norm() > 1e-4) == heard


# ----------------------------------------------------------------------------------------- shared rooms


def test_cosines_and_similarities(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, base = draw(17, 4, 9), draw(18, 9)
    rows[2] = 0
    expected = torch.nn.functional.cosine_similarity(rows, base[None])
    pairs = torch.nn.functional.cosine_similarity(rows[:, None], rows[None], dim=2).fill_diagonal_(0)
    for block in (8192, 4):
        monkeypatch.setattr("fedsim.distances.BLOCK", block)
        assert_near(cosines(rows, base), expected, 1e-12)
        assert cosines(rows, torch.zeros(9)).tolist() == [0.0] * 4
        assert_near(similarities(rows), pairs, 1e-12)


def test_agglomerative_clusters() -> None:
    points = np.array([[0.0], [1], [10], [11], [12]])
    labels = agglomerative(points, 2)
    assert labels[0] == labels[1] != labels[2]
    assert labels[2] == labels[3] == labels[4]


# -------------------------------------------------------------------------------------------- in a run


@pytest.mark.parametrize(
    "defense",
    [{"name": "mesas"}, {"name": "snowball", **QUICK, "select": 0.5}, {"name": "rfa", "blocks": "tensors"}],
    ids=["mesas", "snowball", "rfa"],
)
def test_a_boosted_attacker_is_found_in_a_run(defense: dict[str, Any], tiny: dict[str, Any], tmp_path: Path) -> None:
    tiny["federation"].update(clients=12, clients_per_round=10, rounds=4)
    played = {}
    for name, stages in (("bare", []), ("defended", [defense])):
        done = run(load_config({**tiny, "defense": stages}), out=tmp_path / name)
        played[name] = done.rounds.set_index("round")
    attacked = [3, 4]
    assert played["bare"].loc[attacked, "asr"].max() > 0.8
    assert played["defended"].loc[attacked, "malicious_submitted"].tolist() == [1, 1]
    assert played["defended"].loc[attacked, "asr"].max() < 0.2
    assert played["defended"]["main_accuracy"].iloc[-1] > 0.6
    if defense["name"] != "rfa":
        assert played["defended"].loc[attacked, "malicious_accepted"].tolist() == [0, 0]
