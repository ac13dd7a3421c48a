"""The pipeline itself: order, rejections, and what it refuses."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fedsim.defense import Aggregated, Defense, RoundUpdates, Screening
from fedsim.errors import RunError
from fedsim.pipeline import apply_pipeline
from fedsim.plugins import Parameters


@dataclass(frozen=True)
class SpyParameters(Parameters):
    log: list[str] = field(default_factory=list)
    label: str = "spy"
    reject: tuple[int, ...] = ()
    add: float = 0.0
    need: int = 1


class Spy(Defense):
    """Writes down what it sees; rejects clients by their id."""

    name = "spy"
    Parameters = SpyParameters

    def note(self, hook: str, round: RoundUpdates) -> None:
        self.parameters.log.append(f"{self.parameters.label}.{hook}{list(round.clients)}")

    @classmethod
    def required_clients(cls, parameters: Any) -> int:
        return int(parameters.need)

    def screen(self, round: RoundUpdates) -> Screening:
        self.note("screen", round)
        accepted = torch.tensor([client not in self.parameters.reject for client in round.clients])
        return Screening(accepted, scores={"id": torch.tensor(round.clients, dtype=torch.float32)})

    def transform(self, round: RoundUpdates) -> Tensor:
        self.note("transform", round)
        return round.updates + self.parameters.add

    def finish(self, vector: Tensor, round: RoundUpdates) -> Tensor:
        self.note("finish", round)
        return vector * 2


class Sum(Spy):
    """A spy that aggregates: the unweighted sum."""

    name = "sum"

    def aggregate(self, round: RoundUpdates) -> Aggregated:
        self.note("aggregate", round)
        weights = torch.full((round.count,), 1 / round.count)
        return Aggregated(round.updates.sum(dim=0), weights, {"row": torch.arange(round.count)})


def spy(cls: type[Spy] = Spy, **values: Any) -> Spy:
    return cls(SpyParameters(**values))


@pytest.fixture
def small() -> RoundUpdates:
    """Four clients, 0 to 3, with updates 1, 2, 4 and 8 in every coordinate."""
    return RoundUpdates(
        updates=torch.tensor([1.0, 2.0, 4.0, 8.0])[:, None].expand(-1, 5).clone(),
        num_examples=torch.ones(4),
        global_vector=torch.ones(5),
        weights=torch.tensor([1.0, 1.0, 2.0, 4.0]),
        accepted=torch.ones(4, dtype=torch.bool),
        trainable=4,
        clients=(0, 1, 2, 3),
        round=7,
    )


def test_no_stage_is_the_weighted_mean(small: RoundUpdates) -> None:
    result = apply_pipeline([], small)
    torch.testing.assert_close(result.vector, torch.full((5,), (1 + 2 + 8 + 32) / 8))
    torch.testing.assert_close(result.weights, torch.tensor([1.0, 1.0, 2.0, 4.0]) / 8)
    assert result.accepted.all()
    assert result.scores == {}
    assert torch.equal(result.model, 1 + result.vector)


def test_hooks_run_stage_by_stage_then_the_aggregation_then_every_finish(small: RoundUpdates) -> None:
    log: list[str] = []
    apply_pipeline([spy(Sum, log=log, label="a"), spy(log=log, label="b")], small)
    assert [entry.split("[")[0] for entry in log] == [
        "a.screen",
        "a.transform",
        "b.screen",
        "b.transform",
        "a.aggregate",
        "a.finish",
        "b.finish",
    ]


def test_each_stage_sees_what_the_one_before_made(small: RoundUpdates) -> None:
    result = apply_pipeline([spy(Sum, add=1.0), spy(add=10.0)], small)
    assert torch.equal(result.vector, torch.full((5,), 4.0 * (15 + 44)))  # two finishes, each doubling


def test_rejected_clients_never_reach_a_later_stage(small: RoundUpdates) -> None:
    log: list[str] = []
    stages = [spy(log=log, label="a", reject=(1,)), spy(log=log, label="b", reject=(3,)), spy(Sum, log=log, label="c")]
    result = apply_pipeline(stages, small)
    assert log == [
        "a.screen[0, 1, 2, 3]",
        "a.transform[0, 1, 2, 3]",
        "b.screen[0, 2, 3]",
        "b.transform[0, 2, 3]",
        "c.screen[0, 2]",
        "c.transform[0, 2]",
        "c.aggregate[0, 2]",
        "a.finish[0, 2]",
        "b.finish[0, 2]",
        "c.finish[0, 2]",
    ]
    assert torch.equal(result.vector, torch.full((5,), 8.0 * (1 + 4)))
    assert result.accepted.tolist() == [True, False, True, False]
    assert result.weights.tolist() == [0.5, 0, 0.5, 0]
    nan = float("nan")
    for name, expected in {
        "spy1.id": [0, 1, 2, 3],
        "spy2.id": [0, nan, 2, 3],
        "sum.id": [0, nan, 2, nan],
        "sum.row": [0, nan, 1, nan],
    }.items():
        assert result.scores[name].dtype == torch.float64
        torch.testing.assert_close(
            result.scores[name], torch.tensor(expected, dtype=torch.float64), equal_nan=True, msg=name
        )


def test_an_aggregating_stage_leaves_out_clients_that_a_later_one_rejects(small: RoundUpdates) -> None:
    log: list[str] = []
    result = apply_pipeline([spy(Sum, log=log, label="a"), spy(log=log, label="b", reject=(0, 3))], small)
    assert "a.aggregate[1, 2]" in log
    assert result.weights.tolist() == [0, 0.5, 0.5, 0]


def test_stages_of_one_name_get_numbered_scores(small: RoundUpdates) -> None:
    assert set(apply_pipeline([spy(), spy(), spy()], small).scores) == {"spy1.id", "spy2.id", "spy3.id"}
    assert set(apply_pipeline([spy()], small).scores) == {"spy.id"}


def test_everybody_rejected_keeps_the_model(small: RoundUpdates) -> None:
    log: list[str] = []
    result = apply_pipeline([spy(log=log, reject=(0, 1, 2, 3))], small)
    assert torch.equal(result.vector, torch.zeros(5))
    assert torch.equal(result.model, small.global_vector)
    assert result.weights.tolist() == [0, 0, 0, 0]
    assert not result.accepted.any()
    assert not any("finish" in entry for entry in log)  # no noise on a round that did not happen


def test_new_weights_are_used(small: RoundUpdates) -> None:
    class OnlyLast(Defense):
        name = "only_last"

        def screen(self, round: RoundUpdates) -> Screening:
            return Screening(weights=torch.tensor([0.0, 0.0, 0.0, 5.0], dtype=torch.float64))

    result = apply_pipeline([OnlyLast()], small)
    assert torch.equal(result.vector, small.updates[3])
    assert result.weights.tolist() == [0, 0, 0, 1]


def test_too_few_clients_left(small: RoundUpdates) -> None:
    with pytest.raises(RunError, match=r"round 7: the defense 'spy' needs at least 4 clients, 3 are left"):
        apply_pipeline([spy(reject=(0,)), spy(need=4)], small)


@pytest.mark.parametrize(
    ("hook", "answer", "message"),
    [
        ("screen", Screening(accepted=torch.ones(3, dtype=torch.bool)), r"accepted has shape \(3,\), not \(4,\)"),
        ("screen", Screening(weights=torch.ones(4, 1)), r"weights has shape \(4, 1\), not \(4,\)"),
        ("screen", Screening(weights=torch.tensor([1, 1, float("nan"), 1])), "weights is not finite"),
        ("screen", Screening(scores={"s": torch.ones(5)}), r"score 's' has shape \(5,\), not \(4,\)"),
        ("transform", torch.ones(4, 4), r"transform has shape \(4, 4\), not \(4, 5\)"),
        ("transform", torch.full((4, 5), float("inf")), "transform is not finite"),
        ("aggregate", Aggregated(torch.ones(4), torch.ones(4) / 4), r"aggregate has shape \(4,\), not \(5,\)"),
        ("aggregate", Aggregated(torch.full((5,), float("nan")), torch.ones(4) / 4), "aggregate is not finite"),
        ("aggregate", Aggregated(torch.ones(5), torch.ones(3) / 3), r"weights has shape \(3,\), not \(4,\)"),
        ("finish", torch.ones(1, 5), r"finish has shape \(1, 5\), not \(5,\)"),
        ("finish", torch.full((5,), float("nan")), "finish is not finite"),
    ],
)
def test_a_wrong_answer_names_the_stage(small: RoundUpdates, hook: str, answer: Any, message: str) -> None:
    bad = type("Bad", (Defense,), {hook: lambda self, *arguments: answer, "name": "bad"})()
    with pytest.raises(RunError, match=rf"defense 'bad': {message}"):
        apply_pipeline([bad], small)


def test_an_update_that_is_not_finite_is_refused(small: RoundUpdates) -> None:
    updates = small.updates.clone()
    updates[2, 1] = float("nan")
    with pytest.raises(RunError, match="defense 'spy': transform is not finite"):
        apply_pipeline([spy()], replace(small, updates=updates))


def test_views_and_generators(small: RoundUpdates) -> None:
    assert small.seen("all").shape == (4, 5)
    trainable = small.seen("trainable")
    assert trainable.shape == (4, 4)
    assert trainable.data_ptr() == small.updates.data_ptr()
    first = torch.rand(3, generator=small.generator("a"))
    assert torch.equal(first, torch.rand(3, generator=small.generator("a")))
    assert not torch.equal(first, torch.rand(3, generator=small.generator("b")))
    assert not torch.equal(first, torch.rand(3, generator=replace(small, round=8).generator("a")))
    assert not torch.equal(first, torch.rand(3, generator=replace(small, seed=1).generator("a")))
