"""Defenses that run the network at the server, against numbers of other people's code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from defenses._statistics import cosines
from defenses.deepsight import Deepsight, DeepsightParameters, count_exceedings, energies, merge
from defenses.fdcr import Fdcr, FdcrParameters, discrepancies, farthest, first_neighbours
from defenses.flare import Flare, FlareParameters, count_votes, neighbours, weigh
from defenses.flare import discrepancies as mmd
from fedsim.defense import RoundUpdates, Server
from fedsim.direct import aggregate, make_server
from fedsim.distances import cosine_distances, squared_distances
from tests.support.parity import assert_near, kept, tensor

Cases = Callable[[str], list[dict[str, Any]]]


def off_diagonal(matrix: Tensor) -> Tensor:
    """(N, N − 1): each row without its own entry."""
    n = len(matrix)
    return matrix[~torch.eye(n, dtype=torch.bool)].reshape(n, n - 1)


# --------------------------------------------------------------------------------------------------- FLTrust


def trained_to(update: Tensor, size: int) -> Server:
    """A server whose own training changes a model of ``size`` parameters by ``update``."""
    data = torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64)
    server = make_server(nn.Linear(5, size // 6).double(), size // 6, data=data)

    def fit(model: Any, *arguments: Any, **options: Any) -> float:
        model.vector += update
        return 0.0

    return replace(server, fit=fit)


def test_fltrust(reference: Cases) -> None:
    cases = reference("defenses/fltrust")
    assert len(cases) == 2
    for case in cases:
        updates, start, root = tensor(case["updates"]), tensor(case["global_weights"]), tensor(case["server_update"])
        examples = range(1, len(updates) + 1)  # play no part
        given: dict[str, Any] = {"updates": updates, "num_examples": examples, "global_vector": start}
        for scope in ("trainable", "all"):
            result = aggregate("fltrust", **given, server=trained_to(root, len(root)), scope=scope)
            expected = tensor(case["expected_trust_scores"])
            score = 1 - result.scores["fltrust.distance"]
            assert_near(score.clamp(min=0), expected.tolist(), 1e-8)
            assert_near(score.clamp(min=0), case["expected_trust_scores_zhmzm_fltrust_repo"], 1e-7)
            assert_near(result.weights, (expected / expected.sum()).tolist(), 1e-8)
            assert kept(result) == set(torch.nonzero(expected > 0).flatten().tolist())
            assert case["server_lr"] == 1
            assert_near(result.model, case["expected_new_global"], 1e-8)
            assert_near(start + case["backfed_eta"] * result.vector, case["expected_new_global_backfed"], 1e-8)
            assert_near(cosines(updates, root), score.tolist(), 1e-12)


# ----------------------------------------------------------------------------------------------------- FLARE


def test_flare(reference: Cases, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = reference("defenses/flare")
    assert len(cases) == 2
    for case in cases:
        start, weights, features = (tensor(case[k]) for k in ("global_weights", "client_weights", "client_features"))
        n, m, _ = features.shape
        distances = mmd(features, case["kernel_sigma"])
        diagonal = 2 / (m - 1)  # the port keeps the diagonal
        assert_near(off_diagonal(distances) + diagonal, case["expected_mmd_to_others"], 1e-8)
        count = neighbours(n, case["neighbour_fraction"])
        assert count == case["neighbours"]
        votes = count_votes(distances, count)
        assert_near(votes, case["expected_votes"], 0)
        assert_near(weigh(votes, "share", 1.0), case["expected_trust"], 1e-8)

        monkeypatch.setattr(Flare, "features", lambda self, round, features=features: features)
        server = make_server(nn.Linear(5, 4).double(), 4, data=(torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64)))
        stage = Flare(FlareParameters(case["neighbour_fraction"], case["kernel_sigma"], "share"))
        result = aggregate(
            stage, updates=weights - start, global_vector=start, server=server, num_examples=range(1, n + 1)
        )
        assert_near(result.weights, case["expected_trust"], 1e-8)
        assert_near(start + case["eta"] * result.vector, case["expected_new_global"], 1e-8)
        assert_near(-result.scores["flare.votes"], case["expected_votes"], 0)
        mean = tensor(case["expected_mmd_to_others"]).mean(dim=1) - diagonal
        assert_near(result.scores["flare.mmd"], mean.tolist(), 1e-8)


# ------------------------------------------------------------------------------------------------- DeepSight


class Small(nn.Sequential):
    """The network of the reference numbers, without its softmax."""

    def __init__(self) -> None:
        super().__init__(nn.Flatten())
        self.add_module("h", nn.Linear(9, 4))
        self.add_module("relu", nn.ReLU())
        self.add_module("fc", nn.Linear(4, 10))
        self.double()


def test_deepsight(reference: Cases) -> None:
    cases = reference("defenses/deepsight")
    assert len(cases) == 2
    for case in cases:
        start, noise = tensor(case["global_weights"]), tensor(case["noise_inputs_per_seed"])
        updates, ones = tensor(case["client_weights"]) - start, torch.ones(len(case["client_weights"])).double()
        left: list[Tensor] = []

        def draw(count: int, source: torch.Generator, left: list[Tensor] = left) -> Tensor:
            return torch.stack([left.pop(0) for _ in range(count)])

        server = replace(make_server(Small(), case["num_classes"], shape=(1, 3, 3)), random_inputs=draw)
        layout = server.model.layout
        assert {entry.name: list(entry.shape) for entry in layout.entries} == case["layer_shapes"]
        stage = Deepsight(
            DeepsightParameters(
                inputs=noise.shape[1],
                sets=noise.shape[0],
                threshold=case["threshold_factor"],
                tau=case["tau"],
                epsilon=case["epsilon"],
                min_cluster_size=5,
                min_samples=case["min_samples"],
            )
        )
        round = RoundUpdates(updates, ones, start, ones, ones.bool(), layout.size, tuple(range(len(updates))))

        energy = energies(round, server)
        assert_near(energy, case["expected_neup"], 1e-7)
        exceedings = count_exceedings(energy, case["threshold_factor"])
        assert_near(exceedings, case["expected_threshold_exceedings"], 0)
        assert_near(exceedings, case["threedfed_threshold_exceedings"], 0)
        left.extend(noise.flatten(0, 1))
        differences = stage.differences(round, server)
        assert_near(differences, case["expected_ddif_per_seed"], 1e-7)
        bias = cosine_distances(updates[:, -10:])
        assert_near(bias, case["expected_bias_cosine_distance"], 1e-7)
        cosine, neup = stage.clusters(bias), stage.clusters(squared_distances(energy).sqrt())
        ddif = [stage.clusters(squared_distances(one).sqrt()) for one in differences]
        assert cosine.tolist() == case["expected_labels_cosine"]
        assert neup.tolist() == case["expected_labels_neup"]
        assert [labels.tolist() for labels in ddif] == case["expected_labels_ddif"]
        merged = merge(cosine, neup, ddif)
        assert_near(merged, case["expected_merged_distance"], 1e-7)
        assert stage.clusters(merged, single=True).tolist() == case["expected_final_labels"]

        left.extend(noise.flatten(0, 1))
        examples = range(1, len(updates) + 1)  # play no part
        result = aggregate(stage, updates=updates, global_vector=start, server=server, num_examples=examples)
        assert not left
        assert_near(-result.scores["deepsight.exceedings"], case["expected_threshold_exceedings"], 0)
        assert (result.scores["deepsight.cluster"] >= case["tau"]).tolist() == case["expected_suspicious"]
        assert kept(result) == set(case["expected_accepted"])
        assert_near(updates.norm(dim=1).quantile(0.5), case["expected_clip_norm"], 1e-7)
        assert_near(result.model, case["expected_new_global"], 1e-7)


# ------------------------------------------------------------------------------------------------------ FDCR


def test_fdcr(reference: Cases, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = reference("defenses/fdcr")
    assert len(cases) == 2
    for case in cases:
        start, fisher = tensor(case["global_weights"]), tensor(case["fisher_information"])
        updates, examples = tensor(case["client_weights"]) - start, tensor(case["num_examples"])
        shares, lr = examples / examples.sum(), case["local_lr"]
        distances = discrepancies(updates, fisher, shares, offset=-1e-6 * lr) / lr  # of gradients, −Δ / lr
        assert_near(distances, case["expected_discrepancy"], 1e-8)
        assert len(first_neighbours(distances).unique()) == case["expected_number_of_clusters_first_partition"]
        assert torch.nonzero(farthest(distances)).flatten().tolist() == case["expected_flagged"]

        monkeypatch.setattr(Fdcr, "at_the_server", lambda self, round, fisher=fisher: fisher)
        stage = Fdcr(FdcrParameters(fisher="server_data"))
        result = aggregate(stage, updates=updates, global_vector=start, num_examples=examples)
        assert_near(result.weights, case["expected_aggregation_weights"], 1e-8)
        assert kept(result) == set(range(len(updates))) - set(case["expected_flagged"])
        assert_near(result.model, case["expected_new_global"], 1e-8)
        assert_near(result.scores["fdcr.discrepancy"], discrepancies(updates, fisher, shares).tolist(), 1e-12)
