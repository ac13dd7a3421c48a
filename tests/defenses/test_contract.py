"""What every registered defense must keep to, and what is impossible about the parameters of ours."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fedsim import plugins
from fedsim.defense import Defense, RoundUpdates, Screening
from fedsim.direct import aggregate
from fedsim.errors import PluginError, RunError
from fedsim.pipeline import Aggregation, apply_pipeline
from tests.support.defenses import REQUIRED

Rounds = Callable[..., RoundUpdates]

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("coordinate_median", {"lower": True}),
    ("flower", {"strategy": "Bulyan", "arguments": {"num_malicious_nodes": 2}}),
    ("flower", {"strategy": "FedAdagrad"}),
    ("flower", {"strategy": "FedAdam", "arguments": {"eta": 0.01}}),
    ("flower", {"strategy": "FedAvgM", "arguments": {"server_momentum": 0.9, "server_learning_rate": 0.5}}),
    ("flower", {"strategy": "FedTrimmedAvg", "arguments": {"beta": 0.25}}),
    ("flower", {"strategy": "FedYogi", "arguments": {"tau": 0.01}}),
    ("flower", {"strategy": "Krum", "arguments": {"num_malicious_nodes": 3}}),
    ("flower", {"strategy": "MultiKrum", "arguments": {"num_malicious_nodes": 3, "num_nodes_to_select": 5}}),
    ("krum", {"f": 5, "distance": "plain", "scope": "trainable"}),
    ("multi_krum", {"f": 3, "m": 4, "weighted": False}),
    ("multi_krum", {"f": 5, "distance": "plain", "select": "around_winner"}),
    ("multi_metrics", {"variant": "paper"}),
    ("multi_metrics", {"scope": "all", "keep": 0.5}),
    ("norm_clipping", {"scope": "trainable", "bound": 0.5}),
    ("rfa", {"scope": "trainable", "max_iterations": 50}),
    ("trimmed_mean", {"f": 4}),
    ("weak_dp", {"sigma": 0.0, "scope": "trainable"}),
]
CASES = [(name, REQUIRED.get(name, {})) for name in plugins.names("defense")] + VARIANTS
IDS = [name + "".join(f" {v}" for v in parameters.values()) for name, parameters in CASES]


@pytest.fixture(params=CASES, ids=IDS)
def stage(request: pytest.FixtureRequest) -> Callable[[], Defense]:
    """Makes a fresh stage of the case."""
    name, parameters = request.param
    return lambda: plugins.create("defense", name, **parameters)


def run(stage: Defense, round: RoundUpdates) -> Aggregation:
    """The stage's whole round: the clients' updates are those of the round, whatever model was sent out."""
    assert round.server is not None
    sent = stage.broadcast(round.global_vector, round.server)
    return apply_pipeline([stage], replace(round, global_vector=sent))


def check(result: Aggregation, round: RoundUpdates) -> None:
    """The promises about shapes, types and ranges."""
    assert result.vector.shape == round.global_vector.shape
    assert result.vector.dtype == round.updates.dtype
    assert bool(torch.isfinite(result.vector).all())
    assert result.weights.shape == result.accepted.shape == (round.count,)
    assert result.accepted.dtype == torch.bool
    assert bool((result.weights >= 0).all())
    assert result.weights.sum().item() == pytest.approx(float(result.accepted.any()), abs=1e-5)
    assert bool((result.weights[~result.accepted] == 0).all())
    for name, score in result.scores.items():
        assert score.shape == (round.count,), name
        assert bool(torch.isfinite(score).all()), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shapes_types_and_ranges(stage: Callable[[], Defense], make_round: Rounds, dtype: torch.dtype) -> None:
    round = make_round(dtype=dtype)
    check(run(stage(), round), round)


def test_precisions_agree(stage: Callable[[], Defense], make_round: Rounds) -> None:
    narrow = make_round(dtype=torch.float32)
    wide = replace(
        narrow,
        **{key: getattr(narrow, key).double() for key in ("updates", "weights", "global_vector", "num_examples")},
    )
    found, expected = run(stage(), narrow).vector.double(), run(stage(), wide).vector
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_same_round_gives_the_same_result(stage: Callable[[], Defense], make_round: Rounds) -> None:
    torch.manual_seed(1)
    first = run(stage(), make_round())
    torch.manual_seed(2)  # a method that draws from the global stream would notice
    second = run(stage(), make_round())
    assert torch.equal(first.vector, second.vector)
    assert torch.equal(first.weights, second.weights)
    assert torch.equal(first.accepted, second.accepted)
    for name, score in first.scores.items():
        assert torch.equal(score, second.scores[name])


def test_the_inputs_are_left_alone(stage: Callable[[], Defense], colluders: Rounds) -> None:
    round = colluders()
    tensors = ("updates", "num_examples", "weights", "accepted", "global_vector")
    before = {name: getattr(round, name).clone() for name in tensors}
    run(stage(), round)
    vector = round.global_vector.clone()
    stage().finish(vector, round)
    assert torch.equal(vector, before["global_vector"])
    for name in tensors:
        assert torch.equal(getattr(round, name), before[name]), name


def test_equal_updates(stage: Callable[[], Defense], make_round: Rounds) -> None:
    round = make_round()
    equal = make_round(round.updates[:1].expand(12, -1).clone())
    check(run(stage(), equal), equal)


def test_zero_updates(stage: Callable[[], Defense], make_round: Rounds) -> None:
    zero = make_round(torch.zeros_like(make_round().updates))
    check(run(stage(), zero), zero)
    nothing = replace(zero, global_vector=torch.zeros_like(zero.global_vector))
    check(run(stage(), nothing), nothing)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_huge_update(stage: Callable[[], Defense], make_round: Rounds, dtype: torch.dtype) -> None:
    updates = make_round().updates.clone()
    updates[4] *= 1e4
    round = make_round(updates, dtype=dtype)
    check(run(stage(), round), round)


def test_one_update_beyond_measure(stage: Callable[[], Defense], make_round: Rounds) -> None:
    """It may take the average with it, but nothing breaks."""
    updates = make_round().updates.clone()
    updates[4] *= 1e12
    round = make_round(updates, dtype=torch.float32)
    result = run(stage(), round)
    assert bool(torch.isfinite(result.vector).all())
    assert bool(torch.isfinite(result.weights).all())


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("what", ["drawn", "equal", "zero", "huge"])
def test_few_clients(stage: Callable[[], Defense], make_round: Rounds, n: int, what: str) -> None:
    """Too few to work on is said; enough is enough, whatever they send."""
    made, round = stage(), make_round(n=n)
    rows = {"drawn": round.updates, "equal": round.updates[:1].expand(n, -1).clone(), "zero": 0 * round.updates}
    rows["huge"] = torch.cat([1e6 * round.updates[:1], round.updates[1:]])
    round = make_round(rows[what])
    if n < made.required_clients(made.parameters):
        with pytest.raises(RunError, match="needs at least"):
            run(made, round)
        return
    result = run(made, round)
    if bool(result.accepted.any()):
        check(result, round)
    else:
        assert not bool(result.vector.any()), "nobody is accepted: the model stays"
        assert result.weights.sum() == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_gpu_says_the_same(stage: Callable[[], Defense], make_round: Rounds) -> None:
    if stage().needs_network or stage().needs_data:
        pytest.skip("the round's network lies on the CPU")
    round = make_round(dtype=torch.float64)
    tensors = ("updates", "num_examples", "weights", "accepted", "global_vector")
    moved = replace(round, **{name: getattr(round, name).cuda() for name in tensors})
    expected, found = apply_pipeline([stage()], round), apply_pipeline([stage()], moved)
    assert found.vector.is_cuda
    assert torch.equal(found.accepted.cpu(), expected.accepted)
    torch.testing.assert_close(found.weights.cpu(), expected.weights)


def test_least_number_of_clients(stage: Callable[[], Defense], make_round: Rounds) -> None:
    made = stage()
    need = made.required_clients(made.parameters)
    assert 1 <= need <= 12
    enough = make_round(n=need)
    check(run(made, enough), enough)
    with pytest.raises(RunError, match=rf"'{made.name}' needs at least {need} clients, {need - 1} are left"):
        run(stage(), make_round(enough.updates[: need - 1]))


@pytest.mark.parametrize(
    ("name", "parameters", "least"),
    [
        ("fedavg", {}, 1),
        ("coordinate_median", {}, 1),
        ("rfa", {}, 1),
        ("krum", {}, 3),
        ("krum", {"f": 4}, 7),
        ("multi_krum", {"f": 1, "m": 2}, 4),
        ("multi_krum", {"f": 1, "m": 8}, 8),
        ("trimmed_mean", {"beta": 0.4}, 1),
        ("trimmed_mean", {"f": 3}, 7),
        ("multi_metrics", {}, 4),
        ("flower", {"strategy": "FedMedian"}, 1),
        ("flower", {"strategy": "Krum", "arguments": {"num_malicious_nodes": 2}}, 5),
        ("flower", {"strategy": "MultiKrum", "arguments": {"num_nodes_to_select": 6}}, 6),
        ("flower", {"strategy": "Bulyan", "arguments": {"num_malicious_nodes": 2}}, 11),
    ],
)
def test_required_clients(name: str, parameters: dict[str, Any], least: int) -> None:
    cls: Any = plugins.get("defense", name)
    assert cls.required_clients(cls.Parameters(**parameters)) == least


class Reject(Defense):
    """Rejects the given rows."""

    name = "reject"

    def screen(self, round: RoundUpdates) -> Screening:
        accepted = torch.ones_like(round.accepted)
        accepted[list(self.parameters.rows)] = False
        return Screening(accepted)


@dataclass(frozen=True)
class Rows(plugins.Parameters):
    rows: tuple[int, ...] = ()


def test_clients_rejected_before_do_not_matter(stage: Callable[[], Defense], make_round: Rounds) -> None:
    drawn = make_round(n=14)
    keep = [row for row in range(14) if row not in (2, 9)]
    wild = drawn.updates.clone()
    wild[[2, 9]] = 1e6
    without = replace(
        drawn,
        **{name: getattr(drawn, name)[keep] for name in ("updates", "num_examples", "weights", "accepted")},
        clients=tuple(drawn.clients[row] for row in keep),
    )
    expected = run(stage(), without)
    made = stage()
    assert drawn.server is not None
    sent = made.broadcast(drawn.global_vector, drawn.server)
    result = apply_pipeline([Reject(Rows((2, 9))), made], replace(drawn, updates=wild, global_vector=sent))
    torch.testing.assert_close(result.vector, expected.vector, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(result.weights[keep], expected.weights, rtol=1e-9, atol=1e-12)
    assert torch.equal(result.accepted[keep], expected.accepted)
    assert not bool(result.accepted[[2, 9]].any())
    assert result.weights[[2, 9]].tolist() == [0, 0]
    for name, score in result.scores.items():
        assert bool(score[[2, 9]].isnan().all())
        torch.testing.assert_close(score[keep], expected.scores[name], rtol=1e-9, atol=1e-12)


def test_it_does_something(stage: Callable[[], Defense], colluders: Rounds) -> None:
    round = colluders(number=2)
    if type(stage()).broadcast is not Defense.broadcast:
        sent = stage().broadcast(round.global_vector, round.server)  # type: ignore[arg-type]
        assert (sent - round.global_vector).norm() > 1e-3 * round.global_vector.norm()
        return
    plain = apply_pipeline([], round).vector
    difference = (run(stage(), round).vector - plain).norm() / plain.norm()
    if stage().name == "fedavg" or type(stage()).client_side():
        assert difference == 0
    else:
        assert difference > 1e-3


def test_a_checkpoint_continues_exactly(stage: Callable[[], Defense], make_round: Rounds) -> None:
    straight, first, second = stage(), stage(), stage()
    for number in (1, 2):
        run(straight, make_round(number=number))
        run(first, make_round(number=number))
    assert_storable(first.state)
    second.state = copy.deepcopy(first.state)
    third = make_round(number=3)
    assert torch.equal(run(second, third).vector, run(straight, third).vector)


def assert_storable(value: Any) -> None:
    """Tensors, numbers, strings, lists and mappings of these: what a checkpoint holds."""
    if isinstance(value, dict):
        assert all(isinstance(key, str) for key in value)
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            assert_storable(item)
    else:
        assert isinstance(value, (Tensor, bool, int, float, str)), f"{type(value)} cannot be checkpointed"


@pytest.mark.parametrize("name", plugins.names("defense"))
def test_it_is_documented(name: str) -> None:
    cls = plugins.get("defense", name)
    assert 10 < len(cls.summary()) < 110
    assert cls.summary().endswith(".")
    assert cls.paper
    for field in cls.Parameters.__dataclass_fields__.values():
        assert field.metadata.get("doc"), field.name


def problems(name: str, clients: int = 10, **parameters: Any) -> list[str]:
    cls: Any = plugins.get("defense", name)
    experiment = SimpleNamespace(federation=SimpleNamespace(clients_per_round=clients, rounds=60))
    return [str(problem) for problem in cls.problems(cls.Parameters(**parameters), experiment)]


@pytest.mark.parametrize(
    ("name", "clients", "parameters", "expected"),
    [
        ("krum", 10, {"f": 8}, r"f: with 10 clients .* use at most 7 \(the theorem holds up to 3\), or null"),
        ("krum", 2, {"f": 1}, "f: .* use null"),
        ("multi_krum", 10, {"f": 8}, "f: .* use at most 7"),
        ("multi_krum", 10, {"m": 11}, "m: cannot keep 11 of 10 clients a round; use at most 10, or null"),
        ("trimmed_mean", 10, {"f": 5}, "f: cutting 5 from each side of 10 clients a round leaves none; use at most 4"),
        ("trimmed_mean", 4, {}, r"beta: .* cuts nobody: this is the plain mean; use at least 0.25, or set f"),
        ("fldetector", 10, {"warm_up": 60}, "warm_up: scores nobody before round 61, and federation.rounds is 60"),
        ("fldetector", 10, {"window": 59}, "window: scores nobody before round 61"),
        ("flower", 10, {"strategy": "FedMedain"}, "strategy: 'FedMedain' cannot be used: Flower has no such strategy"),
        ("flower", 10, {"strategy": "QFedAvg"}, r"needs every client's training loss.* \(what works: Bulyan, "),
        ("flower", 10, {"strategy": "FedProx"}, "strategy: .*use FedAvg"),
        (
            "flower",
            10,
            {"strategy": "DifferentialPrivacyServerSideFixedClipping"},
            "strategy: .* wraps another strategy",
        ),
        (
            "flower",
            10,
            {"strategy": "FedTrimmedAvg", "arguments": {"bata": 0.2}},
            r"arguments\.bata: FedTrimmedAvg takes no such argument here; it takes: beta",
        ),
        (
            "flower",
            10,
            {"strategy": "FedMedian", "arguments": {"fraction_train": 0.2}},
            r"arguments\.fraction_train: .* it takes: none",
        ),
        ("flower", 10, {"strategy": "Bulyan", "arguments": {"selection_rule": 1}}, r"arguments\.selection_rule: "),
        ("flower", 10, {"strategy": "FedTrimmedAvg", "arguments": {"beta": 0.5}}, "arguments: .*beta.*0.5"),
        ("flower", 10, {"strategy": "FedTrimmedAvg", "arguments": {"beta": "a"}}, r"arguments\.beta: 'a' .* a number"),
        (
            "flower",
            10,
            {"strategy": "Krum", "arguments": {"num_malicious_nodes": 1.5}},
            r"arguments\.num_malicious_nodes: 1.5 is not allowed; use a whole number >= 0",
        ),
    ],
)
def test_impossible_parameters(name: str, clients: int, parameters: dict[str, Any], expected: str) -> None:
    found = problems(name, clients, **parameters)
    assert len(found) == 1
    assert re.search(expected, found[0]), found[0]


@pytest.mark.parametrize(
    ("name", "clients", "parameters"),
    [
        ("krum", 10, {"f": 7}),
        ("krum", 2, {}),
        ("multi_krum", 10, {"m": 10, "f": 2}),
        ("trimmed_mean", 9, {"f": 4}),
        ("trimmed_mean", 4, {"beta": 0.0}),
        ("fldetector", 10, {"warm_up": 59, "window": 58}),
        ("flower", 11, {"strategy": "Bulyan", "arguments": {"num_malicious_nodes": 2}}),
    ],
)
def test_possible_parameters(name: str, clients: int, parameters: dict[str, Any]) -> None:
    assert problems(name, clients, **parameters) == []


def test_a_flower_strategy_that_cannot_be_used_is_refused_when_made() -> None:
    with pytest.raises(PluginError, match="cannot be used"):
        aggregate("flower", updates=torch.zeros(4, 3), strategy="FedXgbCyclic")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("norm_clipping", {"bound": 0.0}),
        ("weak_dp", {"sigma": -1.0}),
        ("krum", {"f": -1}),
        ("krum", {"distance": "cosine"}),
        ("multi_krum", {"m": 0}),
        ("trimmed_mean", {"beta": 0.5}),
        ("rfa", {"nu": 0.0}),
        ("rfa", {"max_iterations": 0}),
        ("multi_metrics", {"keep": 0.0}),
        ("multi_metrics", {"keep": 1.5}),
        ("multi_metrics", {"variant": "poster"}),
    ],
)
def test_values_out_of_range_are_refused(name: str, value: dict[str, Any]) -> None:
    with pytest.raises(PluginError, match=next(iter(value))):
        plugins.create("defense", name, **value)
