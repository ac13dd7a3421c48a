"""The plan of a run: how many clients, which of them, who attacks when, and what drop-out takes away."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim import plugins
from fedsim.config import Choice, Config, load_config
from fedsim.federation.schedule import Attackers, RoundPlan, plan, plan_problems

BASE = load_config({"attack": {"name": "data_poisoning"}})


def configured(schedule: dict[str, Any] | None, *, seed: int = 0, **federation: Any) -> Config:
    """A config with another schedule and federation, without the cost of reading one."""
    config = _copy(seed)
    for key, value in federation.items():
        setattr(config.federation, key, value)
    if schedule is None:
        config.attack = None
    else:
        assert config.attack is not None
        values = dict(schedule)
        name = values.pop("name")
        config.attack.schedule = Choice("schedule", name, plugins.get("schedule", name).Parameters(**values))
    return config


def _copy(seed: int) -> Config:
    config = copy.deepcopy(BASE)
    config.seed = seed
    return config


def attack_rounds(rounds: list[RoundPlan]) -> list[int]:
    return [round.round for round in rounds if round.malicious]


@st.composite
def experiments(draw: st.DrawFn, names: tuple[str, ...] = ()) -> Config:
    """A federation with a possible schedule."""
    rounds, clients = draw(st.integers(1, 25)), draw(st.integers(1, 20))
    n = draw(st.integers(1, clients))
    name = draw(st.sampled_from(names or tuple(plugins.names("schedule"))))
    start = draw(st.integers(1, rounds))
    stop = draw(st.none() | st.integers(start, rounds))
    length = (stop or rounds) - start + 1
    window: dict[str, Any] = {"start": start, "stop": stop}
    colluders: dict[str, Any] = {"attackers": draw(st.integers(1, n)), "fixed": draw(st.booleans())}
    schedule: dict[str, Any] = {
        "single_shot": lambda: {**colluders, "rounds": draw(st.lists(st.integers(1, rounds), min_size=1, max_size=4))},
        "fixed_frequency": lambda: {**colluders, **window, "every": draw(st.integers(1, 7))},
        "random_rounds": lambda: {**colluders, **window, "count": draw(st.integers(1, length))},
        "continuous": lambda: {**colluders, **window},
        "pool": lambda: {**window, "fraction": draw(st.floats(0.01, 1))},
    }[name]()
    return configured(
        {"name": name, **schedule},
        seed=draw(st.integers(0, 2**40)),
        rounds=rounds,
        clients=clients,
        clients_per_round=n,
        dropout=draw(st.sampled_from([0.0, 0.0, 0.3, 0.9])),
        stragglers=draw(st.sampled_from([0.0, 0.0, 0.3, 0.9])),
    )


def test_these_are_the_schedules():
    assert plugins.names("schedule") == ["continuous", "fixed_frequency", "pool", "random_rounds", "single_shot"]


# --------------------------------------------------------------------------------- true of every schedule


@given(experiments())
def test_every_round_is_whole(config):
    rounds = plan(config)
    f = config.federation
    assert [round.round for round in rounds] == list(range(1, f.rounds + 1))
    for round in rounds:
        parts = [round.replying, round.dropped, round.stragglers]
        everybody = [client for part in parts for client in part]
        assert len(set(everybody)) == len(everybody) == f.clients_per_round
        assert set(everybody) <= set(range(f.clients))
        assert all(list(part) == sorted(part) for part in parts)
        assert set(round.malicious) <= set(round.replying)
        assert list(round.malicious) == sorted(round.malicious)


@given(experiments())
def test_a_plan_is_a_function_of_the_config(config):
    assert plan(config) == plan(config)


@given(experiments())
def test_the_adversary_changes_nobody_elses_place(config):
    """But for the places it takes: those of the first sampled, or who would have dropped out, as an attacker."""
    adversary = plan(config)
    config.attack = None
    for with_it, without in zip(adversary, plan(config), strict=True):
        if not with_it.malicious:
            assert with_it == without
            continue
        ours = {*without.replying, *without.dropped, *without.stragglers}
        theirs = {*with_it.replying, *with_it.dropped, *with_it.stragglers}
        assert len(ours - theirs) == len(theirs - ours) <= len(with_it.malicious)
        assert theirs - ours <= set(with_it.malicious)
        assert set(with_it.dropped) <= set(without.dropped)
        assert set(with_it.stragglers) <= set(without.stragglers)
        assert set(with_it.replying) - set(without.replying) <= set(with_it.malicious)


@given(experiments(names=("single_shot", "fixed_frequency", "random_rounds", "continuous")))
def test_the_asked_number_of_attackers_replies_in_exactly_the_asked_rounds(config):
    assert config.attack is not None
    p = config.attack.schedule.parameters
    first, last = getattr(p, "start", 1), getattr(p, "stop", None) or config.federation.rounds
    window = range(first, last + 1)
    expected = {
        "single_shot": lambda: sorted(set(p.rounds)),
        "fixed_frequency": lambda: list(window[:: p.every]),
        "continuous": lambda: list(window),
    }
    rounds = plan(config)
    found = attack_rounds(rounds)
    if config.attack.schedule.name in expected:
        assert found == expected[config.attack.schedule.name]()
    else:
        assert len(found) == p.count
        assert set(found) <= set(window)
    assert all(len(round.malicious) == p.attackers for round in rounds if round.malicious)
    numbers = [number for round in rounds for number in sorted(round.malicious.values())]
    assert numbers == list(range(len(numbers))), "attackers are numbered through, so that they share a trigger's parts"


@given(experiments(names=("single_shot", "fixed_frequency", "random_rounds", "continuous")))
def test_fixed_attackers_are_always_the_same(config):
    assert config.attack is not None
    groups = {frozenset(round.malicious) for round in plan(config) if round.malicious}
    if config.attack.schedule.parameters.fixed:
        assert len(groups) == 1


@given(experiments(names=("pool",)))
def test_a_pool_attacks_whenever_one_of_it_is_sampled_and_replies(config):
    assert config.attack is not None
    p, f = config.attack.schedule.parameters, config.federation
    attackers: Attackers = config.attack.schedule.create().attackers(f.rounds, f.clients, config.seed)
    assert attackers.population is not None
    assert len(attackers.population) == max(1, round(p.fraction * f.clients))
    window = range(p.start, (p.stop or f.rounds) + 1)
    for one in plan(config):
        expected = set(one.replying) & set(attackers.population) if one.round in window else set()
        assert set(one.malicious) == expected
        assert all(attackers.population[number] == client for client, number in one.malicious.items())


# ------------------------------------------------------------------------------------------- in the large


def test_moving_attackers_move():
    rounds = plan(configured({"name": "continuous"}, clients=50, clients_per_round=5, rounds=60))
    assert len({client for round in rounds for client in round.malicious}) > 20


def test_another_seed_is_another_plan():
    one, two = (plan(configured({"name": "random_rounds", "count": 10}, seed=seed, rounds=100)) for seed in (1, 2))
    assert attack_rounds(one) != attack_rounds(two)
    assert [r.replying for r in one] != [r.replying for r in two]


def test_random_rounds_lie_all_over_their_window():
    hits = np.zeros(21)
    for seed in range(300):
        schedule = plugins.create("schedule", "random_rounds", count=5, start=6, stop=15)
        hits[schedule.attack_rounds(20, seed)] += 1
    assert hits[:6].sum() == hits[16:].sum() == 0
    assert hits.sum() == 1500
    assert (abs(hits[6:16] - 150) < 50).all()


def test_clients_are_sampled_evenly():
    rounds = plan(configured(None, clients=20, clients_per_round=5, rounds=2000))
    counts = np.bincount([client for round in rounds for client in round.replying], minlength=20)
    assert counts.sum() == 10_000
    assert (abs(counts - 500) < 5 * np.sqrt(500 * 0.75)).all()


def test_drop_out_and_stragglers_take_their_share():
    f = {"clients": 40, "clients_per_round": 20, "rounds": 400, "dropout": 0.2, "stragglers": 0.1}
    rounds = plan(configured(None, **f))
    total = 400 * 20
    dropped = sum(len(round.dropped) for round in rounds)
    late = sum(len(round.stragglers) for round in rounds)
    assert abs(dropped / total - 0.2) < 0.02
    assert abs(late / total - 0.8 * 0.1) < 0.015
    assert rounds == plan(configured(None, **f))


def test_more_drop_out_loses_the_same_clients_and_more():
    """Common random numbers: experiments at two rates differ by the rate only."""
    few, many = (plan(configured(None, dropout=rate, rounds=50)) for rate in (0.1, 0.4))
    for low, high in zip(few, many, strict=True):
        assert set(low.dropped) <= set(high.dropped)
    assert sum(len(r.dropped) for r in few) < sum(len(r.dropped) for r in many)


def test_an_attacker_with_a_place_always_replies_a_pool_may_drop_out():
    f: dict[str, Any] = {"rounds": 200, "dropout": 0.5, "stragglers": 0.5}
    assert len(attack_rounds(plan(configured({"name": "continuous"}, **f)))) == 200
    pool = plan(configured({"name": "pool", "fraction": 1.0}, **f))
    assert all(set(round.malicious) == set(round.replying) for round in pool)
    assert any(round.dropped for round in pool)


def test_everybody_may_drop_out():
    rounds = plan(configured(None, clients_per_round=1, dropout=0.99, rounds=50))
    assert any(round.replying == () for round in rounds)


def test_no_attack_no_attackers():
    config = _copy(0)
    assert config.attack is not None
    config.attack.name = "none"
    assert attack_rounds(plan(config)) == []


@settings(max_examples=50)
@given(experiments())
def test_problems_of_a_plan_name_the_emptiest_round(config):
    config.defense = [Choice("defense", "krum", plugins.get("defense", "krum").Parameters(f=2))]
    rounds = plan(config)
    least = min(len(round.replying) for round in rounds)
    found = plan_problems(config, rounds)
    assert bool(found) == (least < 5)
    assert all(f"leave {least}" in problem.message for problem in found)
    assert plan_problems(config, []) == []


@pytest.mark.parametrize("name", plugins.names("schedule"))
def test_every_schedule_says_what_is_impossible(name):
    """Beyond the last round, whatever the schedule calls it."""
    values: dict[str, Any] = {"rounds": [31]} if name == "single_shot" else {"start": 31}
    cls = plugins.get("schedule", name)
    config = configured(None, rounds=30, clients_per_round=3)
    assert cls.problems(cls.Parameters(**values), config)
    possible: dict[str, Any] = {"rounds": [30]} if name == "single_shot" else {"start": 30}
    possible |= {"count": 1} if name == "random_rounds" else {}
    assert cls.problems(cls.Parameters(**possible), config) == []
    if name != "pool":
        assert cls.problems(cls.Parameters(**possible, attackers=4), config)
        assert cls.problems(cls.Parameters(**possible, attackers=3), config) == []


@pytest.mark.parametrize("name", [name for name in plugins.names("schedule") if name != "single_shot"])
def test_a_window_that_is_wrong_at_both_ends_has_two_problems(name):
    cls = plugins.get("schedule", name)
    found = cls.problems(cls.Parameters(start=50, stop=40), configured(None, rounds=30))
    assert [problem.path for problem in found] == ["stop", "start"]
