"""What holds of every defense in the registry, on any data: the order of clients, the unit of the updates.

A method for which one of the two does not hold says so here, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedsim import plugins
from fedsim.defense import RoundUpdates
from fedsim.pipeline import Aggregation, apply_pipeline
from tests.support.defenses import REQUIRED

Rounds = Callable[..., RoundUpdates]
few = settings(max_examples=6, deadline=None, derandomize=True, database=None)

ORDER_MATTERS = {
    "bucketing": "clients are put into buckets at random",
    "bulyan": "its last picks score by one neighbour, and two clients nearest to each other tie",
    "deepsight": "it clusters by distances that take few values, and such ties are broken by order",
    "signguard": "its features are shares of few coordinates: clusters of the same size tie",
}
"""Methods whose result depends on the order of the clients' rows, and why."""

UNIT_MATTERS = {
    "norm_clipping": "the bound is a number",
    "weak_dp": "the bound and the noise are numbers",
    "sparsefed": "the bound is a number",
    "rfa": "distances below ν count as ν",
    "auror": "how far centres must be apart is a number",
    "bucketing": "clients are put into buckets at random",
    "flame": "clusters whole models",
    "freqfed": "clusters whole models",
    "multi_metrics": "measures whole models",
}
"""Methods for which twice the updates are not twice the aggregate, and why."""


def stage(name: str) -> Any:
    return plugins.create("defense", name, **REQUIRED.get(name, {}))


def defend(name: str, round: RoundUpdates) -> Aggregation:
    made = stage(name)
    assert round.server is not None
    return apply_pipeline([made], replace(round, global_vector=made.broadcast(round.global_vector, round.server)))


def near(found: Tensor, expected: Tensor) -> None:
    largest = expected.abs().amax().clamp(min=1)
    torch.testing.assert_close(found / largest, expected / largest, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", [n for n in plugins.names("defense") if n not in ORDER_MATTERS])
@few
@given(seed=st.integers(0, 2**32 - 1))
def test_the_order_of_clients_does_not_matter(name: str, seed: int, make_round: Rounds) -> None:
    source = torch.Generator().manual_seed(seed)
    round = make_round(torch.randn(12, make_round().updates.shape[1], generator=source, dtype=torch.float64) * 0.1)
    order = torch.randperm(12, generator=source)
    rows = {key: getattr(round, key)[order] for key in ("updates", "num_examples", "weights")}
    moved = replace(round, **rows, clients=tuple(round.clients[int(row)] for row in order))
    straight, permuted = defend(name, round), defend(name, moved)
    near(permuted.vector, straight.vector)
    near(permuted.weights, straight.weights[order])
    assert torch.equal(permuted.accepted, straight.accepted[order])
    for key, score in straight.scores.items():
        near(permuted.scores[key], score[order])


@pytest.mark.parametrize("name", [n for n in plugins.names("defense") if n not in UNIT_MATTERS])
@few
@given(seed=st.integers(0, 2**32 - 1), power=st.integers(-3, 3))
def test_the_unit_of_the_updates_does_not_matter(name: str, seed: int, power: int, make_round: Rounds) -> None:
    if stage(name).needs_network or stage(name).needs_data:
        pytest.skip("it looks at what the models do")
    source = torch.Generator().manual_seed(seed)
    round = make_round(torch.randn(12, make_round().updates.shape[1], generator=source, dtype=torch.float64) * 0.1)
    scaled = replace(round, updates=2.0**power * round.updates)
    near(defend(name, scaled).vector / 2.0**power, defend(name, round).vector)


@pytest.mark.parametrize("named", [ORDER_MATTERS, UNIT_MATTERS])
def test_the_exceptions_are_methods(named: dict[str, str]) -> None:
    assert set(named) <= set(plugins.names("defense"))
