"""Persistence on curves small enough to work out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsim.persistence import (
    Curve,
    Span,
    area,
    asr_at,
    first_crossing,
    half_life,
    last_submission,
    lifespan,
    time_to_inject,
)

# t0 = 10; ages 0 to 10
DECAY = Curve.of(range(10, 21), [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.1, 0.1])
# t0 = 5; crosses 0.5 downwards at ages 2, 4, 6 and 8
NOISY = Curve.of(range(5, 14), [0.9, 0.6, 0.4, 0.6, 0.4, 0.7, 0.3, 0.6, 0.2])


@pytest.mark.parametrize(
    ("kappa", "life", "fall"),
    [(0.25, 6, 7), (0.5, 3, 4), (0.75, 1, 2)],  # 0.5 at age 4 is not above κ = 0.5
)
def test_monotone_decay(kappa: float, life: int, fall: int) -> None:
    assert lifespan(DECAY, 10, kappa) == Span(life, False)
    assert first_crossing(DECAY, 10, kappa) == Span(fall, False)


def test_noisy_curve_tells_first_fall_from_lifespan() -> None:
    assert first_crossing(NOISY, 5, 0.5) == Span(2, False)
    assert lifespan(NOISY, 5, 0.5) == Span(7, False)
    assert lifespan(NOISY, 5, 0.65) == Span(5, False)


def test_alive_at_the_end_is_censored() -> None:
    curve = Curve.of([1, 2, 3, 4], [0.9, 0.8, 0.4, 0.8])
    assert lifespan(curve, 1, 0.5) == Span(3, True)
    assert first_crossing(curve, 1, 0.5) == Span(2, False)  # it fell once, which is observed
    assert first_crossing(curve, 1, 0.25) == Span(3, True)
    assert half_life(Curve.of([1, 2, 3], [0.9, 0.8, 0.7]), 1) == Span(2, True)
    assert str(Span(3, True)) == "> 3"
    assert str(Span(3, False)) == "3"


def test_never_injected() -> None:
    curve = Curve.of([4, 5, 6, 7], [0.1, 0.2, 0.1, 0.1])
    assert lifespan(curve, 5, 0.5) == Span(0, False)
    assert first_crossing(curve, 5, 0.5) == Span(0, False)
    assert time_to_inject(curve, {4: 1, 5: 1}, 0.5) is None


def test_dead_at_t0_but_back_later() -> None:
    curve = Curve.of([5, 6, 7, 8], [0.1, 0.2, 0.6, 0.1])
    assert lifespan(curve, 5, 0.5) == Span(2, False)
    assert first_crossing(curve, 5, 0.5) == Span(0, False)


@pytest.mark.parametrize(("last", "censored"), [(0.9, True), (0.1, False)])
def test_attack_in_the_last_round(last: float, censored: bool) -> None:
    curve = Curve.of([1, 2, 3], [0.1, 0.6, last])
    assert lifespan(curve, 3, 0.5) == Span(0, censored)
    assert first_crossing(curve, 3, 0.5) == Span(0, censored)
    assert half_life(curve, 3) == Span(0, True)
    assert area(curve, 3, 10) is None


def test_evaluated_every_five_rounds() -> None:
    curve = Curve.of([5, 10, 15, 20, 25, 30], [0.1, 0.9, 0.8, 0.6, 0.3, 0.2])
    assert lifespan(curve, 10, 0.5) == Span(10, False)
    assert first_crossing(curve, 10, 0.5) == Span(15, False)
    assert half_life(curve, 10) == Span(15, False)
    assert area(curve, 10, 10) == pytest.approx((0.8 + 0.6) / 2)
    assert area(curve, 10, 3) is None  # no evaluated age in 1..3
    assert asr_at(curve, 10, 10) == 0.6
    assert asr_at(curve, 10, 11) is None
    # t0 = 12 was not evaluated: age 3 is the first that is seen, and the excess at t0 is unknown
    assert first_crossing(curve, 12, 0.5) == Span(13, False)
    assert half_life(curve, 12) is None


def test_nothing_evaluated_since_t0_says_nothing() -> None:
    curve = Curve.of([1, 2], [0.9, 0.9])
    assert lifespan(curve, 3, 0.5) is None
    assert first_crossing(curve, 3, 0.5) is None
    assert half_life(curve, 3) is None
    assert area(curve, 3, 1) is None


def test_half_life_without_and_with_a_floor() -> None:
    assert half_life(DECAY, 10) == Span(5, False)  # 0.4 <= 0.45
    floor = Curve.of(range(1, 21), np.full(20, 0.3))
    assert half_life(DECAY, 10, floor) == Span(3, False)  # excess 0.6; 0.6 − 0.3 = 0.3 is half of it
    above = Curve.of(range(10, 21), np.full(11, 0.9))
    assert half_life(DECAY, 10, above) is None


def test_half_life_takes_the_floor_of_the_same_round() -> None:
    curve = Curve.of([1, 2, 3], [0.8, 0.8, 0.8])
    rising = Curve.of([1, 2, 3], [0.0, 0.3, 0.5])
    assert half_life(curve, 1, rising) == Span(2, False)  # excess 0.8, 0.5, 0.3
    late = Curve.of([1, 3], [0.0, 0.5])
    assert half_life(curve, 1, late) == Span(2, False)
    assert half_life(curve, 1, Curve.of([2, 3], [0.0, 0.5])) is None  # no floor at t0


def test_half_life_forgives_rounding() -> None:
    # (0.7 − 0.1) / 2 is 0.29999999999999993 and 0.4 − 0.1 is 0.30000000000000004
    curve, floor = Curve.of([1, 2, 3], [0.7, 0.4, 0.1]), Curve.of([1, 2, 3], [0.1, 0.1, 0.1])
    assert half_life(curve, 1, floor) == Span(1, False)


def test_area_and_rate_at_an_age() -> None:
    assert area(DECAY, 10, 10) == pytest.approx(0.38)  # (0.8+0.7+0.6+0.5+0.4+0.3+0.2+0.1+0.1+0.1) / 10
    assert area(DECAY, 10, 2) == pytest.approx(0.75)
    assert area(DECAY, 10, 11) is None
    assert asr_at(DECAY, 10, 3) == 0.6
    assert asr_at(DECAY, 10, 11) is None


def test_attacked_twice() -> None:
    curve = Curve.of(range(1, 9), [0.1, 0.8, 0.4, 0.1, 0.9, 0.7, 0.6, 0.2])
    submitted = {1: 0, 2: 2, 3: 0, 4: 0, 5: 3, 6: 0, 7: 0, 8: 0}
    assert last_submission(submitted) == 5
    assert lifespan(curve, 5, 0.5) == Span(2, False)
    assert time_to_inject(curve, submitted, 0.5) == 2
    assert time_to_inject(curve, submitted, 0.85) == 5


def test_time_to_inject_counts_submissions_and_only_from_the_first_on() -> None:
    curve = Curve.of([1, 2, 3, 4, 5], [1.0, 0.1, 0.3, 0.45, 0.6])  # round 1: an untrained model
    assert time_to_inject(curve, {3: 1, 4: 2, 5: 1}, 0.5) == 4
    assert time_to_inject(curve, {3: 1, 4: 2, 5: 1}, 0.4) == 3
    # attacked in rounds 2 and 3, and seen at round 5 only: by then all three were sent
    assert time_to_inject(Curve.of([5], [0.6]), {2: 1, 3: 2}, 0.5) == 3


def test_no_attack() -> None:
    assert last_submission({1: 0, 2: 0}) is None
    assert time_to_inject(DECAY, {10: 0}, 0.5) is None


def test_curve_drops_what_was_not_evaluated_and_refuses_nonsense() -> None:
    curve = Curve.of([1, 2, 3], [0.1, float("nan"), 0.3])
    assert curve.rounds.tolist() == [1, 3]
    assert curve.at(2) is None
    for rounds, asr, message in (
        ([1, 2], [0.1], "one length"),
        ([2, 1], [0.1, 0.2], "ascending"),
        ([1, 1], [0.1, 0.2], "ascending"),
        ([1], [1.1], r"\[0, 1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            Curve.of(rounds, asr)


rates = st.lists(st.floats(0, 1), min_size=1, max_size=40)
kappas = st.floats(0.01, 0.99)


@given(rates, kappas, st.integers(1, 500))
def test_first_fall_is_at_most_one_round_after_the_lifespan(values: list[float], kappa: float, t0: int) -> None:
    curve = Curve.of(range(t0, t0 + len(values)), values)
    life, fall = lifespan(curve, t0, kappa), first_crossing(curve, t0, kappa)
    assert life is not None
    assert fall is not None
    if fall.censored:
        assert life == fall  # never at or below κ: alive at the end
    else:
        assert fall.rounds <= life.rounds + 1
    assert life.censored == (values[-1] > kappa)


@given(rates, kappas)
def test_on_a_falling_curve_the_two_agree(values: list[float], kappa: float) -> None:
    curve = Curve.of(range(len(values)), sorted(values, reverse=True))
    life, fall = lifespan(curve, 0, kappa), first_crossing(curve, 0, kappa)
    assert life is not None
    assert fall is not None
    if not life.censored:
        assert fall.rounds == (life.rounds + 1 if max(values) > kappa else 0)


@given(rates, kappas, kappas)
def test_a_higher_threshold_is_never_outlived_longer(values: list[float], one: float, other: float) -> None:
    curve = Curve.of(range(len(values)), values)
    low, high = lifespan(curve, 0, min(one, other)), lifespan(curve, 0, max(one, other))
    assert low is not None
    assert high is not None
    assert high.rounds <= low.rounds
    assert low.censored or not high.censored


@given(rates, st.integers(1, 40))
def test_area_lies_between_the_extremes(values: list[float], horizon: int) -> None:
    curve = Curve.of(range(len(values)), values)
    mean = area(curve, 0, horizon)
    if mean is None:
        assert horizon > len(values) - 1
    else:
        inside = values[1 : horizon + 1]
        assert min(inside) - 1e-9 <= mean <= max(inside) + 1e-9


@given(rates, st.floats(0, 0.5))
def test_half_life_is_the_first_age_below_the_half(values: list[float], base: float) -> None:
    curve = Curve.of(range(len(values)), values)
    floor = Curve.of(range(len(values)), [base] * len(values))
    found = half_life(curve, 0, floor)
    if values[0] <= base:
        assert found is None
        return
    assert found is not None
    limit = base + (values[0] - base) / 2
    before = values[1 : found.rounds + 1 if found.censored else found.rounds]
    assert all(value > limit - 1e-9 for value in before)
    if not found.censored:
        assert values[found.rounds] <= limit + 1e-9
