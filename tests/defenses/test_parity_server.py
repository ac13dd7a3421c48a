"""Defenses that run the network at the server, against the numbers of their authors' code."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from defenses.crfl import bounds, radius, shares
from fedsim import plugins
from fedsim.direct import aggregate, make_server
from fedsim.local import LocalSettings
from tests.support.parity import tensor

Cases = Callable[[str], list[dict[str, Any]]]


def state(named: dict[str, Any]) -> dict[str, Tensor]:
    return {name: tensor(values) for name, values in named.items()}


def assert_near(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert found.shape == expected.shape
    deviation = float((found - expected).abs().max())
    assert deviation <= tolerance, f"off by {deviation:.3g}, allowed {tolerance:g}"


@pytest.mark.parametrize("index", [0, 1])
def test_backdoor_indicator(reference: Cases, index: int) -> None:
    case = reference("defenses/backdoor_indicator")[index]
    given, batches = case["injection"], case["ood_batches"]
    parts = OrderedDict(a=nn.Linear(6, 5), bn=nn.BatchNorm1d(5), relu=nn.ReLU(), b=nn.Linear(5, 4))
    network = nn.Sequential(parts).double()
    inputs = torch.cat([tensor(batch["x"]) for batch in batches])
    labels = torch.cat([torch.tensor(batch["y"]) for batch in batches])
    server = make_server(network, 4, data=(inputs, labels))
    layout = server.model.layout
    stage = plugins.create(
        "defense",
        "backdoor_indicator",
        epochs=given["iterations"],
        batch_size=len(batches[0]["y"]),
        lr=given["lr"],
        momentum=given["momentum"],
        weight_decay=given["weight_decay"],
        mu=given["mu"],
        milestones=given["lr_milestones"],
        decay=given["lr_factor"],
        proximal="plain",
        threshold=case["threshold_percent"] / 100,
    )
    stage.state["labels"] = labels
    before = layout.flatten(state(given["state_before"]))
    sent = stage.broadcast(before, server)
    after = layout.flatten(state(given["expected_state_after"]))
    assert_near(sent[: layout.trainable], after[: layout.trainable], 1e-7)
    assert_near(stage.state["statistics"], after[layout.trainable :], 1e-7)
    assert torch.equal(sent[layout.trainable :], before[layout.trainable :])

    clients = torch.stack([layout.flatten(state(client)) for client in case["client_states"]])
    result = aggregate(stage, updates=clients - sent, global_vector=sent, trainable=layout.trainable, server=server)
    percent = 100 * result.scores["backdoor_indicator.known"]
    assert_near(percent, tensor(case["expected_indicator_accuracy_percent"]), 0.005 + 1e-7)  # theirs has two decimals
    assert result.accepted.nonzero().flatten().tolist() == case["expected_accepted"]


@pytest.mark.parametrize("index", [0, 1])
def test_crfl(reference: Cases, index: int) -> None:
    case = reference("defenses/crfl")[index]
    weights = tensor(case["weights_before"])
    clipped = aggregate("crfl", updates=weights[None], rho=case["clip_rho"])
    assert_near(clipped.model, tensor(case["expected_weights_after_clip"]), 1e-8)
    assert float(clipped.model.norm()) == pytest.approx(case["returned_norm"], abs=1e-8)

    votes = torch.tensor(case["votes_per_smoothed_model"])
    winner, first, second = shares(votes, 4)
    assert winner.tolist() == case["expected_majority_class"]
    assert (winner == torch.tensor(case["labels"])).long().tolist() == case["expected_correct"]
    assert_near(first, tensor(case["expected_pa"]), 1e-8)
    assert_near(second, tensor(case["expected_pb"]), 1e-8)
    lower, upper = bounds(first, second, len(votes), case["alpha"])
    assert_near(lower, tensor(case["expected_pa_lower"]), 1e-8)
    assert_near(upper, tensor(case["expected_pb_upper"]), 1e-8)

    given = case["certificate_parameters"]
    stage = plugins.create(
        "defense",
        "crfl",
        rho_start=2.0,
        rho_growth=0.1,
        sigma=given["sigma_train"],
        boost=given["boost"],
        poisoned=given["poisoned_per_batch"] / given["batch"],
        steps=given["local_iterations"],
        attackers=given["attackers"],
        attack_round=given["attack_round"],
    )
    stage.state["share"] = 1 / given["clients"]
    server = make_server(
        nn.Linear(3, 4, bias=False), 4, settings=LocalSettings(lr=given["lr"]), round=given["final_round"]
    )
    short = torch.eye(3)  # no input longer than 1: the paper's constant
    assert stage.bound(given["attack_round"]) == given["lipschitz_rho_fixed"]
    lipschitz = stage.lipschitz(server.model.vector, short, server)
    found = radius(lower, upper, given["sigma_train"], lipschitz, stage.pull(server), given["attackers"])
    expected = tensor([float("nan") if r is None else r for r in case["expected_certified_radius"]])
    assert torch.equal(found.isnan(), expected.isnan())
    assert_near(found.nan_to_num(), expected.nan_to_num(), 1e-8)
