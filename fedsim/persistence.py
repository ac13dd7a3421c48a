"""How long a backdoor lives: pure functions on the curve of its attack success rate.

Throughout, ``a_t`` is the attack success rate (ASR) of the global model after round t, ``t0`` the last round
to which a malicious client submitted, and ``s = t − t0`` the age of the backdoor, in rounds. Only evaluated
rounds are on a curve; nothing is interpolated between them.

A number of rounds that the end of the run cuts off is *right-censored*: the true number is larger, and no
statistic may treat it as observed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

_TOLERANCE = 1e-12
"""Differences of shares are compared with it: (0.8 − 0.1) / 2 and 0.45 − 0.1 are equal but for rounding."""


@dataclass(frozen=True)
class Span:
    """A number of rounds ≥ 0; if ``censored`` the run ended first and the true number is larger."""

    rounds: int
    censored: bool

    def __str__(self) -> str:
        return f"> {self.rounds}" if self.censored else str(self.rounds)


@dataclass(frozen=True)
class Curve:
    """An attack success rate over evaluated rounds; build it with :meth:`of`.

    rounds: (n,) int, strictly ascending. asr: (n,) float in [0, 1].
    """

    rounds: NDArray[np.int64]
    asr: NDArray[np.float64]

    @classmethod
    def of(cls, rounds: ArrayLike, asr: ArrayLike) -> Curve:
        """The curve through the points given; a NaN rate marks a round that was not evaluated and is dropped.

        Raises
        ------
        ValueError: the lengths differ, the rounds do not ascend strictly, or a rate lies outside [0, 1].
        """
        t = np.asarray(rounds, dtype=np.int64)
        a = np.asarray(asr, dtype=np.float64)
        if t.shape != a.shape or t.ndim != 1:
            raise ValueError(f"rounds and asr must be of one length, not {t.shape} and {a.shape}")
        kept = ~np.isnan(a)
        t, a = t[kept], a[kept]
        if np.any(np.diff(t) <= 0):
            raise ValueError("rounds must be strictly ascending")
        if np.any((a < 0) | (a > 1)):
            raise ValueError("an attack success rate lies in [0, 1]")
        return cls(t, a)

    def since(self, t0: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Ages s ≥ 0 (m,) and the rates (m,) there."""
        kept = self.rounds >= t0
        return self.rounds[kept] - t0, self.asr[kept]

    def at(self, t: int) -> float | None:
        """The rate after round t, or None if it was not evaluated."""
        where = np.flatnonzero(self.rounds == t)
        return float(self.asr[where[0]]) if where.size else None


def last_submission(submitted: Mapping[int, int]) -> int | None:
    """t0, the last round with a malicious submission, or None; ``submitted``: round → how many."""
    return max((t for t, count in submitted.items() if count > 0), default=None)


def lifespan(curve: Curve, t0: int, kappa: float) -> Span | None:
    """The largest age s ≥ 1 with a > κ, 0 if there is none (Neurotoxin's definition).

    Censored if the backdoor is alive (a > κ) at the last evaluated round. None if no round since t0 was
    evaluated: then nothing is known.
    """
    ages, asr = curve.since(t0)
    if not ages.size:
        return None
    above = ages[asr > kappa]  # age 0 alone gives 0, as nothing at all does
    return Span(int(above[-1]) if above.size else 0, bool(asr[-1] > kappa))


def first_crossing(curve: Curve, t0: int, kappa: float) -> Span | None:
    """The first age s ≥ 0 with a ≤ κ; censored, at the last evaluated age, if there is none.

    On a noisy curve this comes before :func:`lifespan`, which waits for the last time the curve is above.
    None if no round since t0 was evaluated.
    """
    ages, asr = curve.since(t0)
    return _first(ages, asr <= kappa)


def half_life(curve: Curve, t0: int, floor: Curve | None = None) -> Span | None:
    """The first age s at which the excess over the floor is at most half of what it was at t0.

    floor: the clean twin's ASR, taken at the same rounds (rounds that only one of the two evaluated are left
    out); None: 0 everywhere. None is returned if t0 was not evaluated or there is no excess (a_t0 ≤ floor).
    """
    ages, asr = curve.since(t0)
    if floor is not None:
        common = np.isin(ages + t0, floor.rounds)
        ages, asr = ages[common], asr[common]
        asr = asr - floor.asr[np.isin(floor.rounds, ages + t0)]
    if not ages.size or ages[0] != 0 or asr[0] <= 0:
        return None
    return _first(ages, asr <= asr[0] / 2 + _TOLERANCE)


def area(curve: Curve, t0: int, horizon: int) -> float | None:
    """The mean ASR over the evaluated ages 1..horizon, in [0, 1]; None if the curve ends before that."""
    ages, asr = curve.since(t0)
    inside = (ages >= 1) & (ages <= horizon)
    if not inside.any() or ages[-1] < horizon:
        return None
    return float(asr[inside].mean())


def asr_at(curve: Curve, t0: int, age: int) -> float | None:
    """The ASR at age ``age``, in [0, 1]; None if that round was not evaluated."""
    return curve.at(t0 + age)


def time_to_inject(curve: Curve, submitted: Mapping[int, int], kappa: float) -> int | None:
    """How many malicious submissions it took until a > κ first; None if that never happened.

    submitted: round → malicious submissions. Rounds before the first submission do not count: an untrained
    model that maps everything to the target holds no backdoor.
    """
    attacks = [t for t, count in submitted.items() if count > 0]
    if not attacks:
        return None
    above = curve.rounds[(curve.asr > kappa) & (curve.rounds >= min(attacks))]
    return sum(submitted[t] for t in attacks if t <= above[0]) if above.size else None


def _first(ages: NDArray[np.int64], happened: NDArray[np.bool_]) -> Span | None:
    if not ages.size:
        return None
    when = ages[happened]
    return Span(int(when[0]), False) if when.size else Span(int(ages[-1]), True)
