"""Our numbers against those of the authors' code, of Flower and of byzfl.

A figure may be off by the tolerance times max(1, |expected|); selections are compared as sets.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedsim import plugins
from fedsim.defense import RoundUpdates
from fedsim.direct import aggregate
from fedsim.pipeline import Aggregation, apply_pipeline
from tests.support.parity import assert_near, kept, tensor

Cases = Callable[[str], list[dict[str, Any]]]
Rounds = Callable[..., RoundUpdates]


def test_krum(reference: Cases) -> None:
    for case in reference("defenses/krum"):
        result = aggregate("krum", updates=tensor(case["client_weights"]), f=case["f"])
        assert_near(result.scores["krum.score"], case["expected_scores_n_minus_f_minus_2"], 1e-9)
        assert len(kept(result)) == 1
        assert kept(result) <= set(case["rows_tied_for_best"])
        assert_near(result.vector, case["expected_aggregate"], 1e-9)
        assert_near(result.vector, case["expected_aggregate_flwr"], 1e-9)


def test_multi_krum(reference: Cases) -> None:
    for case in reference("defenses/multi_krum"):
        given: dict[str, Any] = {
            "updates": tensor(case["client_weights"]),
            "num_examples": case["num_examples"],
            "f": case["f"],
        }
        result = aggregate("multi_krum", **given)
        assert_near(result.scores["multi_krum.score"], case["expected_scores"], 1e-9)
        assert kept(result) == set(case["expected_selected"])
        assert len(kept(result)) == case["m"]
        assert_near(result.vector, case["expected_aggregate_weighted"], 1e-9)
        assert_near(result.vector, case["expected_aggregate_ood_float32"], 1e-6)
        small = aggregate("multi_krum", **given, m=case["m_small"])
        assert_near(small.vector, case["expected_aggregate_weighted_m_small"], 1e-9)
        # byzfl scores with one neighbour more, which changes nothing in the first case's selection
        unweighted = aggregate("multi_krum", **given, weighted=False)
        assert_near(unweighted.vector, case["expected_aggregate_byzfl_unweighted"], 1e-9)


def test_coordinate_median(reference: Cases) -> None:
    for case in reference("defenses/coordinate_median"):
        rows = tensor(case["rows"])
        result = aggregate("coordinate_median", updates=rows)
        assert_near(result.vector, case["expected_aggregate"], 1e-12)
        assert_near(result.vector, case["expected_aggregate_byzfl"], 1e-12)
        lower = aggregate("coordinate_median", updates=rows, lower=True)
        assert_near(lower.vector, case["expected_aggregate_lower_middle_torch"], 1e-12)


def test_trimmed_mean(reference: Cases) -> None:
    for case in reference("defenses/trimmed_mean"):
        rows = tensor(case["rows"])
        assert int(case["beta"] * len(rows)) == case["cut_each_side"]
        by_share = aggregate("trimmed_mean", updates=rows, beta=case["beta"])
        assert_near(by_share.vector, case["expected_aggregate_beta"], 1e-12)
        by_count = aggregate("trimmed_mean", updates=rows, f=case["f"])
        assert_near(by_count.vector, case["expected_aggregate_f"], 1e-12)


def test_rfa(reference: Cases) -> None:
    for case in reference("defenses/rfa_geometric_median"):
        given: dict[str, Any] = {
            "updates": tensor(case["client_weights"]),
            "num_examples": case["num_examples"],
        }
        for steps in (1, 4, 500):
            stage = plugins.create("defense", "rfa", max_iterations=steps)
            result = aggregate(stage, **given)
            assert_near(result.vector, case[f"expected_aggregate_maxiter_{steps}"], 1e-9)
            assert stage.state["iterations"] + 1 == case[f"expected_oracle_calls_maxiter_{steps}"]
        four = aggregate("rfa", **given)
        assert_near(four.vector, case["expected_aggregate_maxiter_4"], 1e-9)  # the default
        assert_near(four.vector, case["expected_aggregate_ood_port_float32_maxiter_4"], 1e-6)
        package = case["geom_median_parameters"]
        converged = aggregate(
            "rfa", **given, nu=package["eps"], max_iterations=package["maxiter"], ftol=package["ftol"]
        )
        assert_near(converged.vector, case["expected_aggregate_geom_median_converged"], 1e-9)


class Seeded(RoundUpdates):
    """A round whose random stream is torch's own with seed 7."""

    def generator(self, purpose: str) -> torch.Generator:
        return torch.Generator().manual_seed(7)


def test_norm_clipping_and_weak_dp(reference: Cases) -> None:
    for case in reference("defenses/norm_clipping_weak_dp"):
        start = tensor(case["global_weights"])
        updates, examples = tensor(case["client_weights"]) - start, tensor(case["num_examples"])
        stage = plugins.create("defense", "norm_clipping", bound=case["norm_bound"])
        round = Seeded(
            updates=updates,
            num_examples=examples,
            global_vector=start,
            weights=examples,
            accepted=torch.ones(len(updates), dtype=torch.bool),
            trainable=len(start),
            clients=tuple(range(len(updates))),
        )
        assert_near(start + stage.transform(round), case["expected_clipped_client_weights"], 1e-10)
        result = apply_pipeline([stage], round)
        assert_near(result.scores["norm_clipping.norm"], case["expected_update_norms"], 1e-10)
        assert_near(result.model, case["expected_weighted_aggregate_after_clipping"], 1e-10)
        noisy = apply_pipeline(
            [plugins.create("defense", "weak_dp", bound=case["norm_bound"], sigma=case["weak_dp_stddev"])], round
        )
        assert_near(noisy.vector - result.vector, case["weak_dp_noise_added_seed7"], 1e-10)


@pytest.mark.parametrize("whole", [True, False], ids=["rows as updates from zero", "rows as whole weights"])
def test_multi_metrics(reference: Cases, whole: bool) -> None:
    for case in reference("defenses/multi_metrics"):
        rows = tensor(case["client_weights"])
        start = torch.zeros_like(rows[0]) if whole else rows.mean(dim=0).round(decimals=2)
        assert case["keep_fraction"] == 0.3  # the default
        result = aggregate(
            "multi_metrics", updates=rows - start, num_examples=case["num_examples"], global_vector=start
        )
        assert_near(result.scores["multi_metrics.score"], case["expected_scores"], 1e-8)
        assert kept(result) == set(case["expected_selected"])
        assert_near(result.model, case["expected_aggregate"], 1e-6)


SERVER_RULES: dict[str, tuple[str, dict[str, Any]]] = {
    "trimmed_mean": ("trimmed_mean", {}),
    "median": ("coordinate_median", {"lower": True}),
    "krum": ("krum", {"distance": "plain"}),
    "multi_krum": ("multi_krum", {"distance": "plain", "select": "around_winner", "weighted": False}),
}


def test_the_server_of_anticipate(reference: Cases) -> None:
    """Scaling the attackers' updates, clipping everybody's, then the rule, on the whole state."""
    for case in reference("attacks/anticipate_server"):
        settings, names = case["settings"], list(case["global_start"])

        def flat(state: dict[str, Any], names: list[str] = names) -> Tensor:
            return torch.cat([tensor(state[name]).flatten() for name in names])

        updates = torch.stack([flat(update) for update in case["raw_updates"]])
        attackers = settings["attackers_first"]
        updates[:attackers] *= settings["attacker_scale"]
        assert_near(updates.norm(dim=1), case["expected"]["norm_before_clip"], 1e-12)
        stages = []
        if settings["clip_norm"] is not None:
            stages.append(plugins.create("defense", "norm_clipping", bound=settings["clip_norm"]))
        if settings["defense"] is not None:
            rule, *argument = settings["defense"]
            name, parameters = SERVER_RULES[rule]
            if rule == "trimmed_mean":
                parameters = {"beta": float(argument[0])}
            if "krum" in rule:
                parameters = {**parameters, "f": settings["clients"] // 2}
            stages.append(plugins.create("defense", name, **parameters))
        n, ones = len(updates), torch.ones(len(updates), dtype=torch.float64)
        round = RoundUpdates(
            updates=updates,
            num_examples=ones,
            global_vector=flat(case["global_start"]),
            weights=ones,
            accepted=ones.bool(),
            trainable=sum(tensor(case["global_start"][x]).numel() for x in names if "running" not in x),
            clients=tuple(range(n)),
        )
        submitted = stages[0].transform(round) if stages else updates
        for row, expected in zip(submitted, case["expected"]["submitted"], strict=True):
            assert_near(row, flat(expected).tolist(), 1e-12)
        result = apply_pipeline(stages, round)
        assert_near(result.model, flat(case["expected"]["global_after"]).tolist(), 1e-12)
        # what of the attackers survived: coordinates for trimmed mean and median, else submissions
        survival = case["expected"]["attack_survival"]
        if settings["defense"] is None or "krum" in settings["defense"][0]:
            assert int(result.accepted[:attackers].sum()) == survival["survive"]
        else:
            values = 1 if rule == "median" else n - 2 * int(parameters["beta"] * n)
            coordinates = result.weights[:attackers].sum().item() * updates.shape[1] * values
            assert coordinates == pytest.approx(survival["survive"])


# ------------------------------------------------------------------------------------------ Flower as a stage


def flower(round: RoundUpdates, strategy: str, **arguments: Any) -> Aggregation:
    return apply_pipeline([plugins.create("defense", "flower", strategy=strategy, arguments=arguments)], round)


@pytest.mark.parametrize("layout", [True, False], ids=["one array per tensor", "one array"])
@pytest.mark.parametrize(
    ("strategy", "arguments", "name", "parameters"),
    [
        ("FedAvg", {}, "fedavg", {}),
        ("FedMedian", {}, "coordinate_median", {}),
        ("FedTrimmedAvg", {"beta": 0.25}, "trimmed_mean", {"beta": 0.25}),
        ("Krum", {"num_malicious_nodes": 3}, "krum", {"f": 3}),
        ("MultiKrum", {"num_malicious_nodes": 3, "num_nodes_to_select": 6}, "multi_krum", {"f": 3, "m": 6}),
    ],
)
def test_flower_agrees_with_our_own(
    colluders: Rounds, layout: bool, strategy: str, arguments: Any, name: str, parameters: Any
) -> None:
    round = colluders() if layout else colluders(layout=None)
    theirs = flower(round, strategy, **arguments)
    ours = apply_pipeline([plugins.create("defense", name, **parameters)], round)
    torch.testing.assert_close(theirs.vector, ours.vector, rtol=0, atol=1e-11)
    if name in {"fedavg", "krum", "multi_krum"}:
        torch.testing.assert_close(theirs.weights, ours.weights)
        assert torch.equal(theirs.accepted, ours.accepted)


def test_flower_bulyan(reference: Cases) -> None:
    for case in reference("defenses/bulyan"):
        result = aggregate(
            "flower",
            updates=tensor(case["client_weights"]),
            num_examples=case["num_examples"],
            strategy="Bulyan",
            arguments={"num_malicious_nodes": case["f"]},
        )
        assert_near(result.vector, case["expected_aggregate_flwr"], 1e-12)
        assert len(kept(result)) == len(case["expected_selected_flwr"])  # exact copies are interchangeable


def test_flower_momentum_runs_over_rounds(make_round: Rounds) -> None:
    """FedAvgM: m ← μ m + (w − mean), w ← w − η m."""
    arguments = {"server_momentum": 0.9, "server_learning_rate": 0.5}
    stage = plugins.create("defense", "flower", strategy="FedAvgM", arguments=arguments)
    momentum = torch.zeros_like(make_round().global_vector)
    for number in (1, 2, 3):
        round = make_round(number=number)
        momentum = 0.9 * momentum - apply_pipeline([], round).vector
        torch.testing.assert_close(apply_pipeline([stage], round).vector, -0.5 * momentum, rtol=0, atol=1e-12)


@pytest.mark.parametrize("strategy", ["FedAdagrad", "FedAdam", "FedYogi"])
def test_flower_server_optimisers_run_over_rounds(make_round: Rounds, strategy: str) -> None:
    """Reddi et al., arXiv 2003.00295, algorithm 2; Flower corrects Adam's bias with exponent round + 1."""
    eta, tau = 0.1, 1e-2
    first, second = (0.0, 0.0) if strategy == "FedAdagrad" else (0.9, 0.99)
    betas = {} if strategy == "FedAdagrad" else {"beta_1": first, "beta_2": second}
    stage = plugins.create("defense", "flower", strategy=strategy, arguments={"eta": eta, "tau": tau, **betas})
    m = v = torch.zeros_like(make_round().global_vector)
    for number in (1, 2, 3):
        round = make_round(number=number)
        delta = apply_pipeline([], round).vector
        m = first * m + (1 - first) * delta
        square = delta.square()
        v = {
            "FedAdagrad": v + square,
            "FedAdam": second * v + (1 - second) * square,
            "FedYogi": v - (1 - second) * square * (v - square).sign(),
        }[strategy]
        rate = eta
        if strategy == "FedAdam":
            rate = eta * np.sqrt(1 - second ** (number + 1)) / (1 - first ** (number + 1))
        found = apply_pipeline([stage], round).vector
        torch.testing.assert_close(found, rate * m / (v.sqrt() + tau), rtol=1e-9, atol=1e-12)
