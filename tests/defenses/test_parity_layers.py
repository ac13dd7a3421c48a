"""Rflbat, LASA, AlignIns, FLDetector and Snowball against others' numbers; Auror, FreqFed and bucketing by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from defenses._clustering import compact, count_clusters
from defenses._statistics import deviations
from defenses.alignins import Alignins
from defenses.auror import minorities
from defenses.fldetector import hessian_product
from defenses.freqfed import Freqfed, cosine_transform
from defenses.rflbat import principal_plane
from fedsim import plugins
from fedsim.defense import RoundUpdates
from fedsim.direct import aggregate
from fedsim.errors import PluginError, RunError
from fedsim.layout import Entry, Layout
from fedsim.pipeline import Aggregation, apply_pipeline
from tests.support.parity import assert_near, draw, kept, tensor

Cases = Callable[[str], list[dict[str, Any]]]
Rounds = Callable[..., RoundUpdates]


def layered(updates: Tensor, shapes: Mapping[str, tuple[int, ...]], **changes: Any) -> RoundUpdates:
    """A round whose vector is made of the named tensors, all trainable."""
    entries, start = [], 0
    for name, shape in shapes.items():
        entries.append(Entry(name, shape, start, True))
        start += math.prod(shape)
    assert start == updates.shape[1]
    n = len(updates)
    values: dict[str, Any] = {
        "updates": updates,
        "num_examples": torch.ones(n, dtype=updates.dtype),
        "global_vector": torch.zeros_like(updates[0]),
        "weights": torch.ones(n, dtype=updates.dtype),
        "accepted": torch.ones(n, dtype=torch.bool),
        "trainable": start,
        "clients": tuple(range(n)),
        "layout": Layout(tuple(entries)),
    }
    return RoundUpdates(**{**values, **changes})


def run(name: str, round: RoundUpdates, **parameters: Any) -> Aggregation:
    return apply_pipeline([plugins.create("defense", name, **parameters)], round)


# -------------------------------------------------------------------------------------------------- RFLBAT


def test_rflbat(reference: Cases) -> None:
    for case in reference("defenses/rflbat"):
        rows = tensor(case["updates"])
        plane, expected = principal_plane(rows), tensor(case["expected_pca2_up_to_sign_per_axis"])
        assert_near(plane * (plane * expected).sum(dim=0).sign(), expected, 1e-7)
        given = {"updates": rows, "eps1": case["eps1"], "eps2": case["eps2"]}
        result = aggregate("rflbat", **given, clusters=case["expected_k_seed0"])
        assert_near(result.scores["rflbat.distance"], case["expected_stage1_distance_sums"], 1e-7)
        assert kept(result) == set(case["expected_selected"])
        assert_near(result.vector * len(kept(result)), case["expected_sum_of_selected_updates"], 1e-7)
        alike, alive = result.scores["rflbat.alikeness"], case["expected_stage1_kept"]
        labels = case["expected_cluster_labels_of_kept_up_to_renaming"]
        for label, middle in enumerate(case["expected_cluster_median_cosine"]):
            members = [row for row, of in zip(alive, labels, strict=True) if of == label]
            assert_near(alike[members].quantile(0.5), middle, 1e-7)
        assert all(alike[row] == 1 for row in set(range(len(rows))) - set(alive))
        # our gap statistic finds groups, too, and so throws out the colluders
        assert not kept(aggregate("rflbat", **given)) & set(case["malicious_rows"])


def test_rflbat_second_cut() -> None:
    # one cluster on a line: the row at 100 is beyond 2 medians of the distances inside, not beyond 10 of all
    rows = torch.cat([draw(1, 10, 3), tensor([[100.0, 0, 0]])])
    assert kept(aggregate("rflbat", updates=rows, clusters=1, eps1=1e6, eps2=2.0)) == set(range(10))
    assert kept(aggregate("rflbat", updates=rows, clusters=1, eps1=1e6, eps2=1e6)) == set(range(11))
    assert kept(aggregate("rflbat", updates=rows, clusters=1, eps1=2.0, eps2=1e6)) == set(range(10))


def test_rflbat_second_cut_measures_inside_the_cluster() -> None:
    # six alike far away, five around the origin: of these one lies apart, though over all rows its sum is the least
    near, far = tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1], [5, 0]]), tensor([[60.0, 0]]).expand(6, -1)
    result = aggregate("rflbat", updates=torch.cat([near, far]), clusters=2, eps2=1.5)
    assert kept(result) == {0, 1, 2, 3}
    assert result.scores["rflbat.distance"][:5].argmin() == 4


@pytest.mark.parametrize("n", [1, 2, 3])
def test_rflbat_of_few_or_equal_rows(n: int) -> None:
    for rows in (draw(2, n, 5), draw(2, 1, 5).expand(n, -1) / 3, torch.zeros(n, 5, dtype=torch.float64)):
        assert kept(aggregate("rflbat", updates=rows))
    assert len(kept(aggregate("rflbat", updates=draw(3, 1, 5).expand(n, -1) / 3))) == n


def test_compact_rows_keep_lengths_and_angles(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = draw(4, 7, 3000)
    rows[2] *= 1e12  # costs the others no digits
    for center in (False, True):
        exact = rows - rows.mean(dim=0) if center else rows
        small = compact(rows, center=center)
        assert small.shape == (7, 7)
        size = exact.norm(dim=1)
        assert_near((small @ small.T) / size / size[:, None], (exact @ exact.T) / size / size[:, None], 1e-13)
    assert compact(rows[:, :2]).shape == (7, 2)


def test_gap_statistic() -> None:
    points = torch.rand(20, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64).numpy()
    for k in (1, 2, 3, 4):
        moved = points + 100 * np.repeat(np.array([[0, 0], [1, 0], [0, 1], [1, 1]])[:k], 20 // k + 1, axis=0)[:20]
        assert count_clusters(moved, most=7, references=10, seed=3) == k
    two = np.array([[0.0]] * 5 + [[1.0]] * 2)
    assert count_clusters(two, most=7, references=10, seed=0) == 2  # exactly equal points are no obstacle
    assert count_clusters(two[:5], most=7, references=10, seed=0) == 1


# ---------------------------------------------------------------------------------------------------- LASA


def test_lasa(reference: Cases) -> None:
    for case in reference("defenses/lasa"):
        shapes = {name: tuple(shape) for name, shape in case["layer_shapes"].items()}
        round = layered(tensor(case["updates"]), shapes, global_vector=tensor(case["global_weights"]))
        options = {key: case[key] for key in ("sparsity", "lambda_n", "lambda_s")}
        result = run("lasa", round, **options, variant="code")
        assert_near(result.model, case["expected_new_global"], 1e-7)
        share, size = torch.zeros(round.count, dtype=torch.float64), round.updates.shape[1]
        for name, rows in case["recomputed_selected_per_layer"].items():
            share[rows] += math.prod(shapes[name]) / size / len(rows)
        assert_near(result.weights, share, 1e-12)
        assert not torch.allclose(run("lasa", round, **options).model, result.model)


def test_lasa_by_hand() -> None:
    # norms 5, 5, 5, 50: the last is clipped to 5; half of the matrix is set to zero, the bias is left alone
    rows = tensor([[3.0, 1, 0, 0, math.sqrt(15)], [3, 0, 1, 0, math.sqrt(15)], [3, 0, 0, -1, math.sqrt(15)]])
    rows = torch.cat([rows, -10 * rows[:1]])
    round = layered(rows, {"w": (2, 2), "b": (1,)})
    # bias: norms equal, purity 1, 1, 1, 0 with median 1 and σ √3/4: the last deviates by 4/√3 > 1
    # matrix, two entries left: norms √10 all, purity 1, 1, ½, 0: median ¾, σ² = (⅜² + ⅜² + ⅛² + ⅝²) / 4
    result = run("lasa", round, sparsity=0.5)
    assert_near(result.vector, [3.0, 1 / 3, 1 / 3, -1 / 3, math.sqrt(15)], 1e-12)
    assert_near(result.weights, [1 / 3, 1 / 3, 1 / 3, 0], 1e-12)
    spread = math.sqrt((2 * 0.375**2 + 0.125**2 + 0.625**2) / 4)
    expected = [0.25 / spread / 2] * 3 + [0.75 / spread / 2 + 2 / math.sqrt(3)]
    assert_near(result.scores["lasa.score"], expected, 1e-12)
    # the code keeps one entry fewer and averages what is left
    code = run("lasa", round, sparsity=0.5, variant="code")
    assert_near(code.vector, [3.0, 0, 0, 0, math.sqrt(15)], 1e-12)


def test_lasa_clips_to_the_median_of_an_even_number() -> None:
    rows = torch.tensor([1.0, 2, 4, 8], dtype=torch.float64)[:, None] * tensor([[0.6, 0.8]])
    for variant, bound in (("paper", 3.0), ("code", 2.0)):
        lengths = [min(length, bound) for length in (1.0, 2, 4, 8)]
        result = run("lasa", layered(rows, {"w": (2,)}), variant=variant, lambda_n=10.0)
        assert_near(result.vector, tensor([0.6, 0.8]) * sum(lengths) / 4, 1e-12)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_lasa_of_few_rows(n: int) -> None:
    result = aggregate("lasa", updates=draw(6, n, 8), num_examples=[5, 1, 3][:n])
    assert result.weights.sum().item() == pytest.approx(1)
    if n <= 2:  # two deviate alike, one not at all: all stay, unweighted
        assert_near(result.weights, [1 / n] * n, 1e-12)
    assert_near(aggregate("lasa", updates=torch.zeros(n, 8)).vector, [0.0] * 8, 0)


# ------------------------------------------------------------------------------------------------ AlignIns


def test_alignins(reference: Cases) -> None:
    for case in reference("defenses/alignins"):
        options = {"top": case["sparsity_top_fraction"], "lambda_s": case["lambda_s"], "lambda_c": case["lambda_c"]}
        given = {
            "updates": tensor(case["updates"]),
            "num_examples": case["num_examples"],
            "global_vector": tensor(case["global_weights"]),
        }
        result = aggregate("alignins", **given, **options, lower=True)
        tda, mpsa = -result.scores["alignins.tda"], -result.scores["alignins.mpsa"]
        assert_near(tda, case["expected_tda"], 1e-8)
        assert_near(mpsa, case["expected_mpsa"], 1e-8)
        assert_near(deviations(tda), case["expected_mz_tda"], 1e-8)
        assert_near(deviations(mpsa), case["expected_mz_mpsa"], 1e-8)
        assert kept(result) == set(case["expected_selected"])
        assert_near(result.vector, case["expected_aggregate"], 1e-8)
        # by default the clip is the median as everybody knows it
        rows, chosen = given["updates"][case["expected_selected"]], tensor(case["num_examples"])
        chosen = chosen[case["expected_selected"]]
        length = rows.norm(dim=1)
        clipped = rows * (length.quantile(0.5) / length).clamp(max=1)[:, None]
        assert length.quantile(0.5) > case["expected_clip_value"]
        assert_near(aggregate("alignins", **given, **options).vector, (chosen / chosen.sum()) @ clipped, 1e-12)


def test_alignins_signs_by_hand() -> None:
    # principal signs +, 0 (a tie), −; of two coordinates each the second row meets the tie, which it does not match
    rows = tensor([[3.0, 1, -2], [1, -2, -3], [4, 0, 3], [2, 0, -3]])
    stage: Alignins = plugins.create("defense", "alignins", top=0.7)
    assert_near(stage.sign_alignment(rows), [1.0, 0.5, 0.5, 1.0], 0)
    assert_near(stage.sign_alignment(torch.zeros(3, 3)), [1.0, 1.0, 1.0], 0)


def test_alignins_may_keep_nobody_and_keeps_two() -> None:
    result = aggregate("alignins", updates=draw(7, 5, 9), global_vector=draw(8, 9), lambda_s=1e-9, lambda_c=1e-9)
    assert len(kept(result)) <= 1
    # the two who hold the median of one measure differ in the other
    rows = tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]])
    nobody = aggregate("alignins", updates=rows, global_vector=tensor([1.0, 2.0]), lambda_c=1e-3)
    assert not kept(nobody)
    assert_near(nobody.vector, [0.0, 0.0], 0)
    for n in (1, 2):
        assert len(kept(aggregate("alignins", updates=draw(7, n, 9), global_vector=draw(8, 9)))) == n


def test_alignins_scope(make_round: Rounds) -> None:
    round = make_round()
    updates = round.updates.clone()
    updates[:, round.trainable :] *= 100
    odd = replace(round, updates=updates)
    before, after = run("alignins", round, scope="trainable"), run("alignins", odd, scope="trainable")
    assert_near(after.scores["alignins.score"], before.scores["alignins.score"], 1e-12)
    assert_near(after.vector[: round.trainable], before.vector[: round.trainable], 1e-12)
    assert_near(after.vector[round.trainable :] / 100, before.weights @ round.updates[:, round.trainable :], 1e-12)


# ---------------------------------------------------------------------------------------------- FLDetector


def detector_rounds(case: dict[str, Any]) -> list[RoundUpdates]:
    rounds = []
    for number, (weights, gradients) in enumerate(
        zip(case["weights_each_round"], case["gradients_each_round"], strict=True)
    ):
        rows = tensor(gradients)
        rounds.append(
            layered(rows, {"all": (rows.shape[1],)}, global_vector=tensor(weights), round=number + 1, layout=None)
        )
    return rounds


def test_fldetector(reference: Cases) -> None:
    for case in reference("defenses/fldetector"):
        options = {"window": case["window"], "warm_up": 0}
        watching = plugins.create("defense", "fldetector", **options, removal="never")
        acting = plugins.create("defense", "fldetector", **options)
        resting = plugins.create("defense", "fldetector", **options, removal="this_round")
        last = case["rounds_scored"][-1]
        for number, round in enumerate(detector_rounds(case)):
            state = watching.state
            if number in case["rounds_scored"]:
                at = case["rounds_scored"].index(number)
                start, stop = state["vector"], round.global_vector
                sigma, a, b = hessian_product(state["steps"], state["changes"], start, stop)
                product = sigma * (stop - start) + a @ state["steps"] + b @ state["changes"]
                expected = tensor(case["expected_hessian_vector_product_each_scored_round"][at])
                assert ((product - expected).norm() / expected.norm()).item() < 1e-6
                assert_near(product, expected, 1e-6)
            result = apply_pipeline([watching], round)
            assert kept(result) == set(range(round.count))
            assert_near(result.vector, round.updates.mean(dim=0), 1e-12)
            distances = state["distances"]
            assert bool(distances) == (number >= case["rounds_scored"][0])
            if number in case["rounds_scored"]:
                found = tensor([distances[str(client)][-1] for client in round.clients])
                assert_near(found, case["expected_normalised_distances_each_scored_round"][at], 1e-6)
            if number == last:
                sums = result.scores["fldetector.score"] * len(case["rounds_scored"])
                assert_near(sums, case["expected_score_sum"], 1e-6)
            flagged = set(range(round.count)) - kept(apply_pipeline([acting], round))
            expected_flagged = set(case["expected_flagged_by_2_means"])
            assert flagged == (expected_flagged if number >= case["rounds_scored"][0] else set())
            if number == case["rounds_scored"][0]:
                assert kept(apply_pipeline([resting], round)) == set(range(round.count)) - expected_flagged
                assert not resting.state["removed"]
            elif number < case["rounds_scored"][0]:
                apply_pipeline([resting], round)
        assert case["gap_test_says_attack_over_10_seeds"] == [1] * 10
        assert set(acting.state["removed"]) == set(case["expected_flagged_by_2_means"])
        assert "updates" not in acting.state  # nothing more to predict, nothing kept


def test_fldetector_does_not_notice_the_scale(reference: Cases) -> None:
    case = reference("defenses/fldetector")[0]
    plain, scaled = (plugins.create("defense", "fldetector", warm_up=0, removal="never") for _ in range(2))
    for round in detector_rounds(case):
        first = apply_pipeline([plain], round)
        second = apply_pipeline([scaled], replace(round, updates=-0.01 * round.updates))
    assert_near(second.scores["fldetector.score"], first.scores["fldetector.score"], 1e-9)


def test_hessian_product_of_a_quadratic() -> None:
    # steps that span the space of a quadratic with Hessian A, taken along its eigenvectors: B = A there
    a = torch.diag(tensor([1.0, 2.0, 3.0]))
    steps = torch.eye(3, dtype=torch.float64) * tensor([2.0, 1.0, 0.5])
    v = draw(9, 3)
    sigma, of_steps, of_changes = hessian_product(steps, steps @ a, torch.zeros_like(v), v)
    assert_near(sigma * v + of_steps @ steps + of_changes @ (steps @ a), a @ v, 1e-12)
    # one pair: the secant equation B s = y
    s, y = draw(10, 1, 4), draw(11, 1, 4)
    sigma, of_steps, of_changes = hessian_product(s, y, torch.zeros_like(s[0]), s[0])
    assert_near(sigma * s[0] + of_steps @ s + of_changes @ y, y[0], 1e-12)


def test_fldetector_warm_up_absence_and_a_model_at_rest(make_round: Rounds) -> None:
    stage = plugins.create("defense", "fldetector", window=2, warm_up=5, removal="never")
    for number in range(1, 9):
        round = make_round(number=number)
        if number == 7:  # others than before
            round = replace(round, clients=tuple(client + 1000 for client in round.clients))
        result = apply_pipeline([stage], round)
        scores = result.scores["fldetector.score"]
        if number < 6 or number == 7:  # too early; strangers
            assert scores.tolist() == [0.0] * 12
        if number == 6:
            assert scores.sum().item() == pytest.approx(1)
            earlier = scores
    assert torch.equal(scores, earlier)  # back after a round, not yet compared
    assert stage.state["steps"].shape == (2, round.trainable)
    short = plugins.create("defense", "fldetector", window=1, warm_up=0, removal="never")
    for number in range(1, 7):  # a window of one forgets all but the last distances
        scores = apply_pipeline([short], make_round(number=number)).scores["fldetector.score"]
        assert scores.sum().item() == pytest.approx(0 if number < 3 else 1)
        last = tensor([short.state["distances"].get(str(client), [0.0])[-1] for client in round.clients])
        assert torch.equal(scores, last)
    still = plugins.create("defense", "fldetector", window=2, warm_up=0)
    zero = make_round(torch.zeros_like(round.updates))
    for _ in range(6):
        result = apply_pipeline([still], zero)
        assert len(kept(result)) == 12
        assert bool(torch.isfinite(result.scores["fldetector.score"]).all())


def test_fldetector_tests_only_whom_it_knows(reference: Cases) -> None:
    case = reference("defenses/fldetector")[0]
    stage = plugins.create("defense", "fldetector", warm_up=0)
    for number, round in enumerate(detector_rounds(case)[:12]):
        if number == 11:  # half of the honest are new: their score of 0 makes nobody else look bad
            round = replace(round, clients=(0, 1, 2, 3, 4, 5, 16, 17, 18, 19))
        result = apply_pipeline([stage], round)
    assert kept(result) == set(range(3, 10))
    assert result.scores["fldetector.score"][6:].tolist() == [0.0] * 4


def test_fldetector_keeps_clones_and_continues_from_a_checkpoint(make_round: Rounds) -> None:
    import copy

    options: dict[str, Any] = {"window": 2, "warm_up": 0, "removal": "never"}
    first, second = (plugins.create("defense", "fldetector", **options) for _ in range(2))
    memory = make_round().updates.clone()
    for number in range(1, 7):
        round = make_round(number=number)
        memory.copy_(round.updates)
        one = apply_pipeline([first], replace(round, updates=memory))
        two = apply_pipeline([second], round)
        assert torch.equal(one.scores["fldetector.score"], two.scores["fldetector.score"])
        third = plugins.create("defense", "fldetector", **options)
        third.state = copy.deepcopy(second.state)
        second = third


# ------------------------------------------------------------------------------------------------ Snowball


def snowball_round(case: dict[str, Any]) -> RoundUpdates:
    shapes = {name: (1, stop - start) for name, (start, stop) in case["layers"].items()}
    examples = tensor(case["num_examples"])
    return layered(tensor(case["updates"]), shapes, num_examples=examples, weights=examples)


def test_snowball(reference: Cases) -> None:
    for case in reference("defenses/snowball_bottom_up"):
        round, furthest = snowball_round(case), case["cluster_count_ct"]
        for names in ([], ["conv1", "fc2"]):
            result = run("snowball", round, furthest=furthest, tolerance=1e-4, layers=names)
            assert_near(-result.scores["snowball.score"], case["expected_vote_scores"], 1e-7)
            assert kept(result) == set(case["expected_selected"])
            assert_near(result.vector, case["expected_aggregate_of_selected"], 1e-7)
        # labels that settle change the votes beside a huge row, not else
        settled = run("snowball", round, furthest=furthest)
        same = torch.allclose(settled.scores["snowball.score"], result.scores["snowball.score"], atol=1e-6)
        assert same == ("huge" not in case["name"])


def test_snowball_by_hand() -> None:
    # on a line: {0, 1} and {10, 11, 12.5}, every client with one other centre finds them, with the same CH: all get 1
    rows = tensor([[0.0], [1], [10], [11], [12.5]])
    result = aggregate("snowball", updates=rows, furthest=1, keep=0.5)
    assert_near(-result.scores["snowball.score"], [2.0, 2, 3, 3, 3], 1e-12)
    assert kept(result) == {2, 3, 4}
    assert kept(aggregate("snowball", updates=rows, furthest=1, keep=0.1)) == {2}


def test_snowball_tolerance_is_that_of_the_whole_rows() -> None:
    from sklearn.cluster import KMeans
    from sklearn.metrics import calinski_harabasz_score

    rows = torch.zeros(20, 400, dtype=torch.float64)
    rows[:, :2] = torch.randn(20, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows[0] *= 300
    quality, together = np.zeros(20), np.zeros((20, 20))
    for client in range(20):  # the rows themselves, not their compact copies
        differences = (rows - rows[client]).numpy()
        furthest = np.argsort(-np.linalg.norm(differences, axis=1), kind="stable")[:4]
        start = differences[[client, *furthest]]
        labels = KMeans(5, init=start, n_init=1, tol=1e-4).fit(differences).labels_
        together[client] = labels == labels[client]
        quality[client] = calinski_harabasz_score(differences, labels)
    expected = ((quality - quality.min()) / np.ptp(quality)) @ together
    result = aggregate("snowball", updates=rows, furthest=4, tolerance=1e-4)
    assert_near(-result.scores["snowball.score"], expected.tolist(), 1e-7)


def test_snowball_layers(make_round: Rounds) -> None:
    stage = plugins.create("defense", "snowball")
    assert [entry.name for entry in stage.voting_layers(make_round())] == ["0.weight", "2.weight"]
    stage = plugins.create("defense", "snowball", layers=["1.running"])
    assert [entry.name for entry in stage.voting_layers(make_round())] == ["1.running_mean", "1.running_var"]
    with pytest.raises(RunError, match=r"no tensor is called like \['fc'\]; the model has 0.weight"):
        run("snowball", make_round(), layers=["fc"])


# --------------------------------------------------------------------------------------------------- Auror


def test_auror_by_hand() -> None:
    # one minority of two; one of one; two equal halves (nobody); too close together (not indicative)
    rows = tensor([[0.0, 5, 0, 0.01], [0, 1, 0, 0], [1, 1, 4, 0], [1, 1.5, 4, 0], [1.5, 1, 8, 0], [1, 1, 8, 0]])
    rows[4:, 2] = tensor([0.0, 4.0])
    found, indicative = minorities(rows, 0.5)
    assert indicative == 3
    assert found.tolist() == [2, 1, 0, 0, 0, 0]
    result = aggregate("auror", updates=rows, alpha=0.5, num_examples=[9, 1, 1, 1, 1, 2])
    assert_near(result.scores["auror.score"], [2 / 3, 1 / 3, 0, 0, 0, 0], 1e-12)
    assert kept(result) == {1, 2, 3, 4, 5}
    assert_near(result.weights, tensor([0.0, 1, 1, 1, 1, 2]) / 6, 1e-12)
    assert kept(aggregate("auror", updates=rows, alpha=0.5, tau=0.3)) == {2, 3, 4, 5}
    assert kept(aggregate("auror", updates=rows, alpha=100.0)) == set(range(6))


def test_auror_finds_the_best_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = draw(12, 9, 40).exp()
    expected = torch.zeros(9, dtype=torch.int64)
    for column in rows.T:
        order = column.argsort()
        within = [
            float(sum((part - part.mean()).square().sum() for part in (column[order[:k]], column[order[k:]])))
            for k in range(1, 9)
        ]
        k = 1 + int(np.argmin(within))
        expected[order[:k] if k < 5 else order[k:]] += 1
    assert torch.equal(minorities(rows, 0.0)[0], expected)
    monkeypatch.setattr("fedsim.distances.BLOCK", 7)
    assert torch.equal(minorities(rows, 0.0)[0], expected)


def test_auror_of_few_or_equal_rows() -> None:
    for rows in (draw(13, 1, 4), draw(13, 2, 4), draw(13, 1, 4).expand(5, -1).clone()):
        result = aggregate("auror", updates=rows)
        assert len(kept(result)) == len(rows)
        assert_near(result.scores["auror.score"], [0.0] * len(rows), 0)


# ------------------------------------------------------------------------------------------------- FreqFed


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_cosine_transform_is_the_textbook_sum(n: int) -> None:
    x, k = draw(14, 3, n), torch.arange(n, dtype=torch.float64)
    basis = torch.cos(math.pi * (2 * k + 1) * k[:, None] / (2 * n)) * math.sqrt(2 / n)
    basis[0] /= math.sqrt(2)
    assert_near(cosine_transform(x), x @ basis.T, 1e-13)


def test_freqfed_features(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, base = draw(15, 4, 15), draw(16, 15)
    round = layered(rows, {"w": (3, 4), "b": (3,)}, global_vector=base, trainable=15)
    from scipy.fft import dctn

    low = [(i, j) for i in range(3) for j in range(4) if i / 3 + j / 4 <= 0.5]
    assert low == [(0, 0), (0, 1), (0, 2), (1, 0)]
    for of, moved in (("weights", rows + base), ("updates", rows)):
        stage: Freqfed = plugins.create("defense", "freqfed", of=of)
        matrices = dctn(moved[:, :12].reshape(4, 3, 4).numpy(), axes=(1, 2), norm="ortho")
        vectors = dctn(moved[:, 12:].numpy(), axes=(1,), norm="ortho")
        expected = np.concatenate([np.stack([matrices[:, i, j] for i, j in low], axis=1), vectors[:, :2]], axis=1)
        assert_near(stage.features(round), expected.tolist(), 1e-12)
        monkeypatch.setattr("defenses.freqfed.CHUNK", 20)
        assert_near(stage.features(round), expected.tolist(), 1e-12)
    every = plugins.create("defense", "freqfed", low=2.0, of="updates").features(round)
    assert_near(every.norm(dim=1), rows.norm(dim=1), 1e-12)  # the transform is orthonormal
    narrow = plugins.create("defense", "freqfed").features(replace(round, trainable=12))
    assert narrow.shape == (4, 4)


def test_freqfed_keeps_the_larger_cluster() -> None:
    honest, bad = draw(17, 1, 64) + 0.05 * draw(18, 7, 64), draw(19, 1, 64) + 0.05 * draw(20, 4, 64)
    round = layered(torch.cat([bad, honest]), {"w": (8, 8)})
    result = run("freqfed", round)
    assert kept(result) < set(range(4, 11))  # HDBSCAN calls some of them noise
    assert len(kept(result)) >= 5
    score = result.scores["freqfed.score"]
    assert score[:4].min() > score[4:].max()
    assert kept(run("freqfed", round, min_cluster_size=3)) <= set(range(4, 11))
    # high frequencies are not looked at: the fastest wave along a row says nothing
    wave = torch.cos(math.pi * (2 * torch.arange(8, dtype=torch.float64) + 1) * 7 / 16).repeat(8)
    loud = layered(round.updates + 50 * draw(21, 11, 1) * wave, {"w": (8, 8)})
    assert_near(run("freqfed", loud).scores["freqfed.score"], score, 1e-9)


@pytest.mark.parametrize("rows", [torch.zeros(3, 4), torch.ones(5, 4), torch.eye(3)], ids=["zero", "equal", "noise"])
def test_freqfed_always_keeps_somebody(rows: Tensor) -> None:
    result = aggregate("freqfed", updates=rows.double())
    assert kept(result)
    with pytest.raises(RunError, match="at least 3"):
        aggregate("freqfed", updates=rows[:2].double())


# ----------------------------------------------------------------------------------------------- bucketing


def buckets(n: int, s: int, seed: int = 0) -> list[list[int]]:
    """The clients in each bucket, by the definition."""
    round = layered(torch.zeros(n, 1), {"w": (1,)}, seed=seed)
    order = torch.randperm(n, generator=round.generator("bucketing")).tolist()
    return [order[start : start + s] for start in range(0, n, s)]


@pytest.mark.parametrize(("n", "s"), [(9, 2), (9, 3), (9, 1), (4, 9), (1, 2), (2, 2), (3, 2)])
def test_bucketing_gives_means_to_the_rule(n: int, s: int) -> None:
    rows, examples = draw(21, n, 6), draw(22, n).abs() + 1
    round = layered(rows, {"w": (6,)}, num_examples=examples, weights=examples)
    groups = buckets(n, s)
    means = torch.stack([rows[group].mean(dim=0) for group in groups])
    totals = torch.stack([examples[group].sum() for group in groups])
    for rule, arguments in (("coordinate_median", {}), ("fedavg", {}), ("rfa", {}), ("norm_clipping", {"bound": 1.0})):
        expected = aggregate(rule, updates=means, num_examples=totals, **arguments)
        result = run("bucketing", round, s=s, rule=rule, arguments=arguments)
        assert_near(result.vector, expected.vector, 1e-12)
        for group, weight in zip(groups, expected.weights, strict=True):
            assert_near(result.weights[group], weight.expand(len(group)) / len(group), 1e-12)


def test_bucketing_with_a_selecting_rule() -> None:
    rows = draw(23, 10, 6)
    rows[0] += 1e3
    groups = buckets(10, 2)
    means = torch.stack([rows[group].mean(dim=0) for group in groups])
    expected = aggregate("krum", updates=means, f=1)
    result = run("bucketing", layered(rows, {"w": (6,)}), rule="krum", arguments={"f": 1})
    assert_near(result.vector, expected.vector, 1e-12)
    assert kept(result) == set(groups[int(expected.accepted.nonzero())])
    for group, score in zip(groups, expected.scores["krum.score"], strict=True):
        assert result.scores["bucketing.score"][group].tolist() == [score.item()] * 2
    with pytest.raises(RunError, match="needs at least 7 clients, 6 are left"):
        run("bucketing", layered(rows[:6], {"w": (6,)}), rule="krum", arguments={"f": 1})


def test_bucketing_draws_anew_every_round_and_keeps_the_state_of_its_rule() -> None:
    round = layered(draw(24, 8, 6), {"w": (6,)})
    stage = plugins.create("defense", "bucketing", rule="rfa")
    first, again = apply_pipeline([stage], round), run("bucketing", round, rule="rfa")
    assert torch.equal(first.vector, again.vector)
    assert not torch.allclose(apply_pipeline([stage], replace(round, round=2)).vector, first.vector)
    assert stage.state["rule"]["iterations"] == 4


def test_bucketing_refuses_a_rule_that_is_none() -> None:
    with pytest.raises(PluginError, match="no defense is called 'crum'; did you mean 'krum'"):
        plugins.create("defense", "bucketing", rule="crum")
    cls: Any = plugins.get("defense", "bucketing")
    six = SimpleNamespace(federation=SimpleNamespace(clients_per_round=6))
    for parameters, found in (
        ({}, []),
        ({"rule": "crum"}, ["rule"]),
        ({"rule": "krum", "arguments": {"f": 1}}, ["s"]),
        ({"rule": "krum"}, []),
    ):
        assert [problem.path for problem in cls.problems(cls.Parameters(**parameters), six)] == found


def test_snowball_refuses_too_few_clients_before_a_run() -> None:
    cls: Any = plugins.get("defense", "snowball")
    for n, found in ((6, 1), (7, 0)):
        experiment = SimpleNamespace(federation=SimpleNamespace(clients_per_round=n))
        assert len(cls.problems(cls.Parameters(), experiment)) == found


# --------------------------------------------------------------------------------------- all of them, again


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("rflbat", {}),
        ("lasa", {}),
        ("lasa", {"variant": "code"}),
        ("alignins", {}),
        ("snowball", {}),
        ("auror", {}),
        ("freqfed", {}),
    ],
)
def test_blocks_of_columns_do_not_show(
    name: str, parameters: dict[str, Any], make_round: Rounds, monkeypatch: pytest.MonkeyPatch
) -> None:
    round = make_round()
    straight = run(name, round, **parameters)
    monkeypatch.setattr("fedsim.distances.BLOCK", 7)
    cut = run(name, round, **parameters)
    assert_near(cut.vector, straight.vector, 1e-12)
    assert torch.equal(cut.accepted, straight.accepted)
    bare = run(name, replace(round, layout=None), **parameters)  # a vector of one tensor will do
    assert bool(torch.isfinite(bare.vector).all())
