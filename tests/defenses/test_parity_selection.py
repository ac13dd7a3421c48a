"""Bulyan, FoolsGold, DnC, SignGuard, centered clipping, RLR, SparseFed and FLAME against other people's numbers.

A figure may be off by the tolerance times max(1, |expected|); selections are compared as sets.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from defenses._clustering import hdbscan, largest_cluster, mean_shift
from defenses.bulyan import Bulyan, BulyanParameters
from defenses.dnc import Dnc, DncParameters
from defenses.flame import Flame, FlameParameters
from defenses.signguard import SignGuard, SignGuardParameters
from fedsim import plugins
from fedsim.defense import RoundUpdates
from fedsim.direct import aggregate
from fedsim.distances import cosine_distances, squared_distances
from fedsim.pipeline import apply_pipeline
from tests.support.parity import assert_near, kept, tensor

Cases = Callable[[str], list[dict[str, Any]]]
Rounds = Callable[..., RoundUpdates]


# --------------------------------------------------------------------------------------------------- Bulyan


def test_bulyan(reference: Cases) -> None:
    for case in reference("defenses/bulyan"):
        rows, f = tensor(case["client_weights"]), case["f"]
        distances = squared_distances(rows)
        iterative = Bulyan(BulyanParameters(f=f, variant="ndss21")).select(distances).tolist()
        expected = case["expected_selected_iterative_in_order"]
        # exact copies are interchangeable: compare by a row's first copy
        first = (distances == 0).int().argmax(dim=1)
        assert first[iterative].tolist() == first[expected].tolist()
        result = aggregate("bulyan", updates=rows, f=f, variant="ndss21")
        assert_near(result.vector, case["expected_aggregate_iterative"], 1e-12)

        single = Bulyan(BulyanParameters(f=f, variant="flwr")).select(distances)
        assert len(single) == case["theta"]
        assert first[single].sort().values.tolist() == sorted(first[case["expected_selected_flwr"]].tolist())
        result = aggregate("bulyan", updates=rows, f=f, variant="flwr")
        assert_near(result.vector, case["expected_aggregate_flwr"], 1e-12)


def test_bulyan_of_the_paper_by_hand() -> None:
    """θ picks by Krum with the neighbours of those left, β values around the ordinary median."""
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(12, 6, generator=generator, dtype=torch.float64)
    n, f = 12, 2
    left, order = list(range(n)), []
    while len(order) < n - 2 * f:
        scores = [
            sum(sorted(float((rows[i] - rows[j]).square().sum()) for j in left if j != i)[: len(left) - f - 2])
            for i in left
        ]
        order.append(left.pop(scores.index(min(scores))))
    assert Bulyan(BulyanParameters(f=f)).select(squared_distances(rows)).tolist() == order
    chosen = rows[order]
    wanted = []
    for column in chosen.T.tolist():
        ranked = sorted(column)
        median = (ranked[3] + ranked[4]) / 2
        wanted.append(sum(sorted(column, key=lambda x: abs(x - median))[:4]) / 4)
    result = aggregate("bulyan", updates=rows)  # f: null is ⌊(12 − 3) / 4⌋ = 2
    assert_near(result.vector, wanted, 1e-12)
    assert kept(result) <= set(order)


# ------------------------------------------------------------------------------------------------ FoolsGold


@pytest.mark.parametrize(
    ("epsilon", "key"), [(1e-5, "expected_weights"), (0.0, "expected_weights_deep_fg_without_epsilon")]
)
def test_foolsgold(reference: Cases, epsilon: float, key: str) -> None:
    for case in reference("defenses/foolsgold"):
        updates, sums = tensor(case["updates"]), tensor(case["update_history_sums"])
        stage = plugins.create("defense", "foolsgold", epsilon=epsilon)
        stage.state["history"] = {str(i): row for i, row in enumerate(sums - updates)}
        result = aggregate(stage, updates=updates)
        weights, total = tensor(case[key]), sum(case[key])
        assert_near(result.weights * total, case[key], 1e-8)
        assert_near(result.vector, (weights @ updates).tolist(), 1e-8)
        if epsilon:
            assert_near(result.vector, case["expected_aggregate_sum"], 1e-8)
            mean = plugins.create("defense", "foolsgold", combine="mean")
            mean.state["history"] = {str(i): row for i, row in enumerate(sums - updates)}
            assert_near(aggregate(mean, updates=updates).vector * total, case["expected_aggregate_sum"], 1e-8)


def test_foolsgold_remembers_clients_by_id(make_round: Rounds) -> None:
    stage = plugins.create("defense", "foolsgold")
    first, second = make_round(number=1), make_round(number=2, clients=tuple(range(5, 29, 2)))
    apply_pipeline([stage], first)
    apply_pipeline([stage], second)
    history, t = stage.state["history"], first.trainable
    assert list(history) == [str(i) for i in range(3, 29, 2)]
    assert torch.equal(history["3"], first.updates[0, :t])
    assert torch.equal(history["5"], first.updates[1, :t] + second.updates[0, :t])
    assert torch.equal(history["27"], second.updates[-1, :t])


def test_foolsgold_sums_parameters_and_averages_running_statistics(make_round: Rounds) -> None:
    round = make_round()
    t = round.trainable
    stage = plugins.create("defense", "foolsgold")
    result = apply_pipeline([stage], round)
    alpha, _ = plugins.create("defense", "foolsgold").judge(round.updates[:, :t])
    assert_near(result.vector[:t], (alpha @ round.updates[:, :t]).tolist(), 1e-12)
    assert_near(result.vector[t:], (alpha @ round.updates[:, t:] / alpha.sum()).tolist(), 1e-12)


def test_foolsgold_counts_copies_as_one_and_a_zero_update_as_nobody(make_round: Rounds) -> None:
    row = make_round().updates[:1]
    result = aggregate("foolsgold", updates=row.expand(4, -1).clone())
    assert_near(result.vector, row[0].tolist(), 1e-12)
    scaled = aggregate("foolsgold", updates=torch.tensor([1, 3, 7, 9]).double()[:, None] * row)
    assert_near(scaled.vector, (5 * row[0]).tolist(), 1e-12)
    stage = plugins.create("defense", "foolsgold")
    alpha, similarity = stage.judge(torch.stack([torch.zeros(3), torch.zeros(3), torch.ones(3)]).double())
    assert alpha.tolist() == [1, 1, 1]
    assert similarity.tolist() == [0, 0, 0]


# ------------------------------------------------------------------------------------------------------ DnC


class DncWithDraws(Dnc):
    """DnC on given coordinates."""

    def __init__(self, parameters: DncParameters, draws: list[list[int]]) -> None:
        super().__init__(parameters)
        self.draws = iter(draws)

    def draw(self, total: int, count: int, source: torch.Generator) -> Tensor:
        drawn = next(self.draws)
        assert len(drawn) == count
        return torch.tensor(drawn)


def test_dnc(reference: Cases) -> None:
    for case in reference("defenses/dnc"):
        parameters = DncParameters(
            f=case["f"],
            filter_fraction=case["filter_fraction"],
            iterations=case["iterations"],
            fraction=case["subsample_fraction"],
        )
        stage = DncWithDraws(parameters, case["coordinates_drawn_each_iteration"])
        result = aggregate(stage, updates=tensor(case["updates"]), num_examples=range(1, len(case["updates"]) + 1))
        assert kept(result) == set(case["expected_selected"])
        assert_near(result.vector, case["expected_aggregate"], 1e-10)


def test_dnc_scores_and_draws(make_round: Rounds) -> None:
    round = make_round()
    result = apply_pipeline([plugins.create("defense", "dnc")], round)  # all coordinates: fewer than 10000
    centred = round.updates[:, : round.trainable] - round.updates[:, : round.trainable].mean(dim=0)
    top = torch.linalg.svd(centred)[2][0]
    assert_near(result.scores["dnc.score"], (centred @ top).square().tolist(), 1e-12)
    assert kept(result) == set((centred @ top).square().argsort()[:10].tolist())
    drawn = Dnc().draw(50, 20, round.generator("dnc"))
    assert len(set(drawn.tolist())) == 20
    assert not torch.equal(drawn, Dnc().draw(50, 20, make_round(seed=1).generator("dnc")))


def test_dnc_where_nobody_passes_every_time_keeps_those_that_did_most_often() -> None:
    """Each pass sees one coordinate, in which another client is the furthest."""
    rows = torch.eye(3, dtype=torch.float64)
    stage = DncWithDraws(DncParameters(f=1, iterations=3, coordinates=1), [[0], [1], [2]])
    assert kept(aggregate(stage, updates=rows)) == {0, 1, 2}
    uneven = DncWithDraws(DncParameters(f=1, filter_fraction=2, iterations=2, coordinates=1), [[0], [1]])
    assert kept(aggregate(uneven, updates=tensor([[9, 1], [1, 9], [4, 4]]))) == {2}


# ------------------------------------------------------------------------------------------------ SignGuard


class SignGuardWithWindow(SignGuard):
    """SignGuard on a window with a given start."""

    start = 0

    def draw(self, total: int, source: torch.Generator) -> Tensor:
        count = len(super().draw(total, source))
        return torch.arange(self.start, self.start + count)


SIGNGUARD = {
    "plain": "none",
    "sim": "cosine",
    "dist": "distance",
    "sim_with_previous_aggregate": "cosine",
    "dist_with_previous_aggregate": "distance",
}


@pytest.mark.parametrize("key", SIGNGUARD)
def test_signguard(reference: Cases, key: str) -> None:
    for case in reference("defenses/signguard"):
        updates, wanted = tensor(case["updates"]), case["expected"][key]
        stage = SignGuardWithWindow(SignGuardParameters(similarity=SIGNGUARD[key], coordinates="window"))
        stage.start = wanted["coordinate_window_start"]
        if "previous_aggregate" in wanted:
            stage.state["previous"] = tensor(wanted["previous_aggregate"])
        ones = torch.ones(len(updates), dtype=torch.float64)
        n, d = updates.shape
        round = RoundUpdates(updates, ones, torch.zeros(d).double(), ones, ones.bool(), d, tuple(range(n)))
        features = stage.features(round)
        assert_near(features, wanted["features"], 1e-7)
        assert mean_shift(features).tolist() == wanted["mean_shift_labels"]
        result = aggregate(stage, updates=updates)
        assert kept(result) == set(wanted["selected"])
        assert_near(result.vector, wanted["aggregate"], 1e-7)
        length = updates.norm(dim=1)
        low, high = case["norm_bounds_times_median"]
        assert (low, high) == (stage.parameters.lower, stage.parameters.upper)
        median = length.quantile(0.5)
        ordinary = ((length > low * median) & (length < high * median)).nonzero().flatten().tolist()
        assert ordinary == case["norm_filter_selected"]
        assert kept(result) <= set(ordinary)
        if SIGNGUARD[key] != "none":
            assert torch.equal(stage.state["previous"], result.vector)


def test_signguard_rejects_by_length_alone(make_round: Rounds) -> None:
    updates = make_round().updates[:1] * torch.linspace(0.9, 1.1, 12).double()[:, None]
    updates[3] *= 20
    updates[5] *= 0.01
    assert kept(aggregate("signguard", updates=updates)) == set(range(12)) - {3, 5}


def test_signguard_keeps_zero_updates_where_most_are_zero(make_round: Rounds) -> None:
    updates = make_round().updates.clone()
    updates[2:] = 0
    assert kept(aggregate("signguard", updates=updates)) == set(range(2, 12))


def test_signguard_draws_at_random_or_a_window(make_round: Rounds) -> None:
    round = make_round()
    for coordinates in ("random", "window"):
        stage = SignGuard(SignGuardParameters(coordinates=coordinates))
        drawn = stage.draw(200, round.generator("signguard"))
        assert len(set(drawn.tolist())) == 20
        assert int(drawn.min()) >= 0
        assert int(drawn.max()) < 200
        assert bool((drawn.diff() == 1).all()) == (coordinates == "window")
    whole = SignGuard(SignGuardParameters(coordinates="window", fraction=1.0))
    assert whole.draw(200, round.generator("signguard")).tolist() == list(range(200))


def test_signguard_with_nobody_in_line_has_no_cosine_feature() -> None:
    """The median cosine is negative: the feature tells nobody apart."""
    rows = tensor([[1, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0], [-1, -1, 0]])
    stage = SignGuard(SignGuardParameters(similarity="cosine"))
    ones = torch.ones(5).double()
    round = RoundUpdates(rows, ones, torch.zeros(3).double(), ones, ones.bool(), 3, tuple(range(5)))
    stage.state["previous"] = tensor([1, 1, 0])
    assert stage.features(round)[:, 3].tolist() == [0, 0, 0, 0, 0]
    stage.state["previous"] = tensor([-1, -1, 0])
    assert_near(stage.features(round)[:, 3], [0, 0.2, 0, 0.2, 0.2], 1e-7)


# ---------------------------------------------------------------------------------------- centered clipping


def test_centered_clipping(reference: Cases) -> None:
    for case in reference("defenses/centered_clipping"):
        stage = plugins.create("defense", "centered_clipping", tau=case["tau"], inner_steps=case["inner_steps"])
        for number, (rows, expected) in enumerate(
            zip(case["rounds"], case["expected_output_each_round"], strict=True), start=1
        ):
            examples = range(1, len(rows) + 1)  # play no part
            result = aggregate(stage, updates=tensor(rows), num_examples=examples, round=number)
            assert_near(result.vector, expected, 1e-9)


def test_centered_clipping_with_momentum_and_running_statistics(make_round: Rounds) -> None:
    stage = plugins.create("defense", "centered_clipping", tau=0.5, momentum=0.9)
    first, second = make_round(number=1), make_round(number=2)
    t = first.trainable
    apply_pipeline([stage], first)
    centre = stage.state["centre"]
    result = apply_pipeline([stage], second)
    rows = 0.9 * first.updates[:, :t] + 0.1 * second.updates[:, :t]
    scale = (0.5 / (rows - centre).norm(dim=1)).clamp(max=1)
    assert_near(result.vector[:t], (centre + (scale[:, None] * (rows - centre)).mean(dim=0)).tolist(), 1e-12)
    assert_near(result.weights, (scale / scale.sum()).tolist(), 1e-12)
    assert_near(result.vector[t:], (scale / scale.sum() @ second.updates[:, t:]).tolist(), 1e-12)


def test_centered_clipping_by_default_clips_half_of_the_clients_whatever_their_unit(make_round: Rounds) -> None:
    """The radius is the lower median of the distances to the centre, in every step anew."""
    rows = make_round().updates
    rows[0] *= 1e15
    for unit in (1.0, 1e-6):
        stage = plugins.create("defense", "centered_clipping", inner_steps=2)
        centre = torch.zeros_like(rows[0])
        for number in (1, 2):
            for _ in range(2):
                away = unit * rows - centre
                radius = away.norm(dim=1).sort().values[5]
                centre = centre + (away * (radius / away.norm(dim=1)).clamp(max=1)[:, None]).mean(dim=0)
            result = aggregate(stage, updates=unit * rows, round=number)
            assert_near(result.vector / unit, centre / unit, 1e-12)
            assert int((result.weights < result.weights.max() * (1 - 1e-9)).sum()) == 6
    assert_near(aggregate("centered_clipping", updates=0 * rows).vector, 0 * rows[0], 0)


# ------------------------------------------------------------------------------------------------------ RLR


@pytest.mark.parametrize(("rule", "key"), [("mean", "avg"), ("median", "comed"), ("sign", "sign")])
def test_rlr(reference: Cases, rule: str, key: str) -> None:
    for case in reference("defenses/rlr"):
        start, updates = tensor(case["global_weights"]), tensor(case["updates"])
        given: dict[str, Any] = {"updates": updates, "num_examples": case["num_examples"], "global_vector": start}
        wanted = case[f"expected_{key}"]
        assert case["server_lr"] == 1
        result = aggregate("rlr", **given, theta=case["threshold"], rule=rule)
        plain = tensor(wanted["update_before_rate"])
        assert_near(result.vector, (tensor(case["expected_lr_vector"]) * plain).tolist(), 1e-10)
        assert_near(result.model, wanted["new_global_float32"], 1e-6)
        assert_near(aggregate("rlr", **given, theta=0, rule=rule).vector, plain.tolist(), 1e-10)


def test_rlr_by_default_asks_for_two_fifths_and_leaves_running_statistics(make_round: Rounds) -> None:
    round = make_round()
    t = round.trainable
    result, plain = apply_pipeline([plugins.create("defense", "rlr")], round), apply_pipeline([], round)
    agree = round.updates.sign().sum(dim=0).abs() >= 5  # ⌈0.4 · 12⌉
    agree[t:] = True
    assert_near(result.vector, torch.where(agree, plain.vector, -plain.vector).tolist(), 1e-12)
    assert int((~agree).sum()) > 0
    majority = round.updates[:, :t].sign().sum(dim=0).sign()
    against = (round.updates[:, :t].sign() == -majority) & (majority != 0)
    assert_near(result.scores["rlr.against"], against.double().mean(dim=1).tolist(), 1e-12)


# ------------------------------------------------------------------------------------------------ SparseFed


def test_sparsefed(reference: Cases) -> None:
    for case in reference("defenses/sparsefed"):
        given = {"k": case["k"], "momentum": case["momentum"], "bound": case["l2_clip"]}
        stage = plugins.create("defense", "sparsefed", **given)
        for rows, wanted in zip(case["rounds"], case["expected_rounds"], strict=True):
            result = aggregate(stage, updates=tensor(rows))
            assert_near(case["server_lr"] * result.vector, wanted["update"], 1e-9)
            assert_near(stage.state["momentum"], wanted["momentum_after"], 1e-9)
            assert_near(stage.state["error"], wanted["error_after"], 1e-9)
        port = case["lasa_port_first_round"]
        stage = plugins.create("defense", "sparsefed", k=port["k"], momentum=0.0, bound=None)
        start = tensor(case["global_weights"])
        result = aggregate(stage, updates=tensor(case["rounds"][0]), global_vector=start)
        assert_near(result.model, port["new_global"], 1e-9)
        assert_near(stage.state["error"], port["error_after"], 1e-9)


def test_sparsefed_sparsifies_parameters_only(make_round: Rounds) -> None:
    round = make_round()
    t = round.trainable
    result = apply_pipeline([plugins.create("defense", "sparsefed", share=0.2)], round)
    assert int((result.vector[:t] != 0).sum()) == int(0.2 * t)
    assert bool((result.vector[t:] != 0).all())
    one = apply_pipeline([plugins.create("defense", "sparsefed")], round)
    assert int((one.vector[:t] != 0).sum()) == 1  # never none, however small the share


# ---------------------------------------------------------------------------------------------------- FLAME


@pytest.mark.parametrize("as_points", [True, False], ids=["zhmzm", "3dfed"])
def test_flame(reference: Cases, as_points: bool) -> None:
    for case, slip_is_harmless in zip(reference("defenses/flame"), (True, False), strict=True):
        start, updates = tensor(case["global_weights"]), tensor(case["updates"])
        port = case["expected_zhmzm" if as_points else "expected_3dfed"]
        assert_near(start + updates, case["client_weights"], 1e-12)
        distances = cosine_distances(updates, start)
        labels = hdbscan(squared_distances(distances).sqrt() if as_points else distances, len(updates) // 2 + 1)
        assert labels.tolist() == port["cluster_labels"]
        stage = Flame(FlameParameters(as_points=as_points, noise=case["noise"]))
        examples = range(1, len(updates) + 1)  # play no part
        result = aggregate(stage, updates=updates, global_vector=start, num_examples=examples)
        assert kept(result) == set(port["accepted"])
        assert stage.state["bound"] == pytest.approx(port["clip_value"], rel=1e-8)
        assert_near(result.model, case["own_recompute"]["new_global_zhmzm_selection_correct_index"], 1e-8)
        if as_points and slip_is_harmless:
            assert_near(result.model, port["new_global_with_index_slip"], 1e-8)
        if not as_points:
            assert labels.tolist() == case["own_recompute"]["labels_precomputed_cosine_on_whole_weights"]
            assert_near(result.vector * len(port["accepted"]), port["sum_of_clipped_updates"], 1e-8)


@pytest.mark.parametrize("n", [2, 3, 4, 5, 8, 13])
def test_flame_always_keeps_more_than_half(n: int) -> None:
    for seed in range(10):
        updates = torch.randn(n, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        assert len(kept(aggregate("flame", updates=updates))) > n // 2


def test_flame_adds_noise_in_proportion_to_the_bound(make_round: Rounds) -> None:
    round = make_round()
    t = round.trainable
    quiet = apply_pipeline([plugins.create("defense", "flame", noise=0.0)], round)
    stage = plugins.create("defense", "flame", noise=0.5)
    loud = apply_pipeline([stage], round)
    drawn = torch.randn(t, generator=round.generator("flame"), dtype=torch.float64)
    bound = round.updates[:, :t].norm(dim=1).quantile(0.5).item()
    assert stage.state["bound"] == pytest.approx(bound)
    assert_near((loud.vector - quiet.vector)[:t], (0.5 * bound * drawn).tolist(), 1e-12)
    assert torch.equal(loud.vector[t:], quiet.vector[t:])


# ----------------------------------------------------------------------------------------------- clustering


def test_clusters_of_clients_that_cannot_be_told_apart() -> None:
    assert hdbscan(torch.zeros(1, 1), 1).tolist() == [0]
    assert hdbscan(torch.zeros(4, 4), 3).tolist() == [0, 0, 0, 0]
    assert mean_shift(torch.ones(1, 3)).tolist() == [0]
    assert mean_shift(torch.ones(5, 3)).tolist() == [0] * 5
    pairs = mean_shift(tensor([[0, 1], [0, 1], [1, 0], [1, 0], [1, 0], [0, 1]]), quantile=0.4)
    assert pairs[0] == pairs[1] == pairs[5] != pairs[2]
    assert pairs[2] == pairs[3] == pairs[4]


def test_the_largest_cluster() -> None:
    assert largest_cluster(torch.tensor([-1, -1, -1, 1, 1, 0])).tolist() == [False, False, False, True, True, False]
    assert largest_cluster(torch.tensor([1, 0, 1, 0, -1])).tolist() == [False, True, False, True, False]
    assert largest_cluster(torch.tensor([-1, -1])).tolist() == [False, False]


# ------------------------------------------------------------------------------------------ rounds at the edge

NAMES = ("bulyan", "foolsgold", "dnc", "signguard", "centered_clipping", "rlr", "sparsefed", "flame")
SMALL = [
    *((name, {}) for name in NAMES),
    ("foolsgold", {"combine": "mean"}),
    ("signguard", {"similarity": "cosine"}),
    ("signguard", {"similarity": "distance"}),
    ("rlr", {"rule": "median"}),
    ("rlr", {"rule": "sign"}),
    ("centered_clipping", {"momentum": 0.9, "inner_steps": 3}),
    ("bulyan", {"variant": "ndss21", "f": 1}),
    ("bulyan", {"variant": "flwr"}),
    ("dnc", {"iterations": 4, "fraction": 0.3, "f": 2}),
    ("flame", {"as_points": True}),
]


@pytest.mark.parametrize(("name", "parameters"), SMALL)
@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_small_rounds_of_every_kind_have_a_result(
    make_round: Rounds, name: str, parameters: dict[str, Any], n: int
) -> None:
    stage = plugins.create("defense", name, **parameters)
    if n < stage.required_clients(stage.parameters):
        return
    drawn = make_round(n=n).updates
    huge = drawn.clone()
    huge[-1] *= 1e8
    half = drawn.clone()
    half[: n // 2] = 0
    several = [drawn, drawn[:1].expand(n, -1).clone(), torch.zeros_like(drawn), huge, half, -half]
    for updates, dtype in itertools.product(several, (torch.float64, torch.float32)):
        stage.state = {}
        for number in (1, 2):  # with and without what the first round leaves behind
            result = apply_pipeline([stage], make_round(updates, number=number, dtype=dtype))
            assert bool(torch.isfinite(result.vector).all())
            assert result.vector.dtype == dtype
            assert result.weights.sum().item() == pytest.approx(float(result.accepted.any()), abs=1e-5)
            for key, score in result.scores.items():
                assert bool(torch.isfinite(score).all()), key
