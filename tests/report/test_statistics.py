"""Statistics over runs: bootstrap, Kaplan–Meier, pairs, the rank; by hand, by scipy, by a published table."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from fedsim.report import statistics
from fedsim.report.statistics import logrank, median_interval, one_a_seed, paired, rank, summary_by_row, survival

NAN = math.nan


def table(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Results with the columns the statistics look at; what a row leaves out is as in the first lines here."""
    usual = {"task": "vision", "attack": "pgd", "trigger": "pixel", "settings": "", "seed": 0, "undefended": False}
    return pd.DataFrame(
        [usual | {"main_accuracy": 0.9, "asr": 0.5, "t0": 9.0, "run": f"r{i}"} | row for i, row in enumerate(rows)]
    )


# ------------------------------------------------------------------------------------------------ intervals


def test_median_interval_is_the_percentile_bootstrap() -> None:
    values = np.random.default_rng(3).normal(size=15)
    found = median_interval(values)
    reference = stats.bootstrap((values,), np.median, method="percentile", n_resamples=20_000, rng=1)
    assert found.median == np.median(values)
    assert found.n == 15
    spread = np.diff(np.sort(values)).max()
    assert found.low == pytest.approx(reference.confidence_interval.low, abs=spread)
    assert found.high == pytest.approx(reference.confidence_interval.high, abs=spread)
    assert found.low is not None
    assert found.high is not None
    assert values.min() < found.low < found.median < found.high < values.max()


def test_median_interval_of_three_values_by_enumeration() -> None:
    """All 27 resamples are equally likely: a median of 1 has 7/27, of 2 13/27, of 4 7/27."""
    medians = [np.median(resample) for resample in itertools.product([1.0, 2.0, 4.0], repeat=3)]
    assert medians.count(1.0) == 7
    assert median_interval([4.0, 1.0, 2.0]) == statistics.Interval(2.0, 1.0, 4.0, 3)
    assert median_interval([4.0, 1.0, 2.0], level=0.4) == statistics.Interval(2.0, 2.0, 2.0, 3)  # 7/27 < 0.3


def test_median_interval_of_two_values_by_enumeration() -> None:
    """Of the 4 equally likely resamples of 0 and 1 one half have the median 0.5."""
    assert median_interval([1.0, 0.0], level=0.4) == statistics.Interval(0.5, 0.5, 0.5, 2)
    assert median_interval([1.0, 0.0], level=0.6) == statistics.Interval(0.5, 0.0, 1.0, 2)


def test_median_interval_narrows_with_the_level_and_with_n() -> None:
    def width(n: int, level: float) -> float:
        found = median_interval(np.linspace(0, 1, n), level=level)
        assert found.low is not None
        assert found.high is not None
        return found.high - found.low

    assert width(10, 0.95) > width(10, 0.5) > 0
    assert width(10, 0.95) > width(100, 0.95) > 0


def test_median_interval_of_next_to_nothing() -> None:
    assert median_interval([]) == statistics.Interval(None, None, None, 0)
    assert median_interval([NAN, None]) == statistics.Interval(None, None, None, 0)
    assert median_interval([NAN, 0.25]) == statistics.Interval(0.25, None, None, 1)
    assert median_interval([0.5, NAN, 0.25]) == statistics.Interval(0.375, 0.25, 0.5, 2)


def test_median_interval_is_the_same_every_time_and_in_any_order() -> None:
    values = [0.3, 0.1, 0.7, 0.2, 0.9, 0.4]
    assert median_interval(values) == median_interval(values[::-1])
    assert median_interval(values, seed=1, samples=50) != median_interval(values, seed=2, samples=50)


# ------------------------------------------------------------------------------------------------- survival


def test_kaplan_meier_by_hand() -> None:
    """Ends at 2, 5 and 8, cut off at 3 and 8: S is 4/5 from 2, 4/5 · 2/3 from 5, that · 1/2 from 8."""
    curve = survival([5, 2, 8, 3, 8], [False, False, False, True, True])
    assert curve.times.tolist() == [0, 2, 3, 5, 8]
    np.testing.assert_allclose(curve.alive, [1, 0.8, 0.8, 0.8 * 2 / 3, 0.8 / 3])
    assert (curve.n, curve.events, curve.median, curve.longest) == (5, 3, 8, 8)
    # Greenwood's variance of S at 5 is S² · (1/(5·4) + 1/(3·2)); the band is made on the scale log(−log S).
    s = 0.8 * 2 / 3
    spread = stats.norm.ppf(0.975) * math.sqrt(1 / 20 + 1 / 6) / math.log(s)
    assert sorted([curve.low[3], curve.high[3]]) == pytest.approx(
        [s ** math.exp(abs(spread)), s ** math.exp(-abs(spread))]
    )
    assert (curve.low[0], curve.high[0]) == (1, 1)


def test_treating_censored_lives_as_ended_would_give_another_median() -> None:
    cut = [False, False, True, True, True]
    assert survival([1, 3, 4, 4, 9], cut).median is None
    assert survival([1, 3, 4, 4, 9], [False] * 5).median == 4


def test_all_alive_is_a_curve_at_one_without_a_median() -> None:
    curve = survival([6, 9], [True, True])
    assert curve.alive.tolist() == [1, 1, 1]
    assert (curve.low.tolist(), curve.high.tolist()) == ([1, 1, 1], [1, 1, 1])
    assert (curve.median, curve.median_low, curve.median_high) == (None, None, None)
    assert (curve.n, curve.events, curve.longest) == (2, 0, 9)


def test_a_backdoor_that_never_took_ends_at_zero() -> None:
    curve = survival([0, 0, 4], [False, False, False])
    assert curve.times.tolist() == [0, 4]
    np.testing.assert_allclose(curve.alive, [1 / 3, 0])
    assert curve.median == 0


def test_unknown_lifespans_are_dropped() -> None:
    curve = survival([NAN, 3, NAN], [False, False, True])
    assert (curve.n, curve.events, curve.median) == (1, 1, 3)
    nothing = survival([NAN], [False])
    assert (nothing.n, nothing.median, nothing.times.size) == (0, None, 0)


def test_the_median_is_where_the_curve_reaches_one_half() -> None:
    assert survival([1, 2, 3, 4], [False] * 4).median == 2  # exactly one half
    assert survival([1, 2, 3], [False] * 3).median == 2


def test_the_median_s_interval_is_where_the_band_reaches_one_half() -> None:
    curve = survival(range(1, 21), [False] * 20)
    assert curve.median == 10
    assert curve.median_low == curve.times[np.flatnonzero(curve.low <= 0.5)[0]]
    assert curve.median_high == curve.times[np.flatnonzero(curve.high <= 0.5)[0]]
    assert curve.median_low < 10 < curve.median_high
    together = survival([3, 3], [False, False])
    assert (together.median, together.median_low, together.median_high) == (3, 3, None)
    alone = survival([3], [False])
    assert (alone.median, alone.median_low, alone.median_high) == (3, None, None)


@pytest.mark.parametrize(("durations", "censored"), [([1, 2], [True]), ([-1], [False]), ([[1]], [[True]])])
def test_survival_refuses_what_is_no_sample(durations: Any, censored: Any) -> None:
    with pytest.raises(ValueError, match=r"length|negative"):
        survival(durations, censored)


def test_logrank_by_hand() -> None:
    """Observed minus expected ends in the first sample, over the hypergeometric variance."""
    a, b = [1, 2, 3, 5, 8, 9], [4, 6, 10, 12, 15, 20]
    a_cut, b_cut = [False] * 6, [False, False, False, False, True, True]
    t, cut, first = np.array(a + b), np.array(a_cut + b_cut), np.array([True] * 6 + [False] * 6)
    difference = variance = 0.0
    for when in np.unique(t[~cut]):
        risk, ended = t >= when, (t == when) & ~cut
        share, n, d = (risk & first).sum() / risk.sum(), risk.sum(), ended.sum()
        difference += (ended & first).sum() - d * share
        variance += d * share * (1 - share) * (n - d) / (n - 1) if n > 1 else 0
    expected = 2 * stats.norm.sf(abs(difference) / math.sqrt(variance))
    assert logrank(a, a_cut, b, b_cut) == pytest.approx(expected)
    assert expected < 0.05


def test_logrank_where_there_is_nothing_to_test() -> None:
    assert logrank(range(5), [False] * 5, range(10, 20), [False] * 10) is None  # five are too few
    assert logrank([NAN, *range(5)], [False] * 6, range(10, 20), [False] * 10) is None
    assert logrank([3] * 6, [True] * 6, [4] * 6, [True] * 6) is None  # nothing ended
    assert logrank([3] * 6, [False] * 6, [3] * 6, [False] * 6) is None  # all at once
    assert logrank([], [], [1] * 6, [False] * 6) is None


# ---------------------------------------------------------------------------------------------------- pairs


def seeds(defense: str, values: list[float], **more: Any) -> list[dict[str, Any]]:
    return [{"defense": defense, "seed": i, "asr": v} | more for i, v in enumerate(values)]


def test_paired_differences_are_those_of_equal_seeds() -> None:
    """The medians differ by 0.05, the pairs by 0.1 each: seeds, not sorted values, are paired."""
    a, b = [0.2, 0.5, 0.9], [0.1, 0.4, 0.8]
    rows = seeds("krum", a) + seeds("fedavg", b)[::-1]
    found = paired(table(rows), "asr", "krum", "fedavg")
    assert (found.pairs, found.seeds, found.effect) == (3, 3, 1.0)
    assert found.difference is not None
    assert found.difference.median == pytest.approx(0.1)
    assert (found.difference.low, found.difference.high) == (pytest.approx(0.1), pytest.approx(0.1))
    assert (found.sign_p, found.wilcoxon_p, found.logrank_p) == (None, None, None)  # three pairs prove nothing
    assert paired(table(rows), "asr", "fedavg", "krum").effect == -1.0


def test_paired_needs_the_same_cell() -> None:
    rows = seeds("krum", [0.5, 0.6], attack="alie") + seeds("fedavg", [0.1, 0.1], attack="pgd")
    found = paired(table(rows), "asr", "krum", "fedavg")
    assert (found.pairs, found.difference, found.effect) == (0, None, None)
    assert paired(table(rows), "asr", "krum", "fedavg", by=["seed"]).pairs == 2
    with_settings = table(seeds("krum", [0.5], settings="lr=1") + seeds("fedavg", [0.1], settings="lr=2"))
    assert paired(with_settings, "asr", "krum", "fedavg").pairs == 0


def test_paired_drops_seeds_without_a_number_or_a_counterpart() -> None:
    rows = seeds("krum", [0.5, NAN, 0.6, 0.7]) + seeds("fedavg", [0.1, 0.2, NAN])
    assert paired(table(rows), "asr", "krum", "fedavg").pairs == 1


def test_paired_tests_are_scipy_s() -> None:
    rng = np.random.default_rng(0)
    a = rng.normal(0.6, 0.1, 12)
    b = np.concatenate([a[:1], a[1:] - rng.normal(0.05, 0.06, 11)])  # one tie
    found = paired(table(seeds("a", list(a)) + seeds("b", list(b))), "asr", "a", "b")
    d = (a - b)[1:]
    assert found.wilcoxon_p == pytest.approx(stats.wilcoxon(d).pvalue)
    assert found.sign_p == pytest.approx(stats.binomtest(int((d > 0).sum()), 11).pvalue)
    assert found.effect == pytest.approx(((d > 0).sum() - (d < 0).sum()) / 12)
    assert found.logrank_p is None


def test_tests_begin_at_six_pairs_that_differ() -> None:
    six = table(seeds("a", [0.5] * 6) + seeds("b", [0.1, 0.2, 0.3, 0.4, 0.45, 0.0]))
    assert paired(six, "asr", "a", "b").sign_p == pytest.approx(2 * 0.5**6)
    assert paired(six, "asr", "a", "b").wilcoxon_p == pytest.approx(2 * 0.5**6)
    tied = table(seeds("a", [0.5] * 6) + seeds("b", [0.1, 0.2, 0.3, 0.4, 0.45, 0.5]))
    assert paired(tied, "asr", "a", "b").sign_p is None
    assert paired(tied, "asr", "a", "b").wilcoxon_p is None


def test_censored_lifespans_are_compared_only_as_far_as_is_known() -> None:
    lives = [  # a, b: a longer for certain; b longer for certain; unknown, unknown, tie, a longer (cut where b ended)
        ((50, True), (20, False)),
        ((10, False), (50, True)),
        ((30, True), (40, False)),
        ((50, True), (50, True)),
        ((20, False), (20, False)),
        ((20, True), (20, False)),
    ]
    rows = []
    for seed, pair in enumerate(lives):
        for defense, (life, cut) in zip("ab", pair, strict=True):
            rows.append({"defense": defense, "seed": seed, "lifespan_50": float(life), "lifespan_50_censored": cut})
    found = paired(table(rows), "lifespan_50", "a", "b")
    assert found.pairs == 6
    assert found.difference is None
    assert found.wilcoxon_p is None
    assert found.effect == pytest.approx((2 - 1) / 6)
    assert found.sign_p is None
    a, b = ([pair[i] for pair in lives] for i in (0, 1))
    assert found.logrank_p == logrank(*zip(*a, strict=True), *zip(*b, strict=True))
    assert found.logrank_p is not None


def test_lifespans_that_all_ended_have_a_difference() -> None:
    rows = [
        {"defense": d, "seed": s, "lifespan_50": life, "lifespan_50_censored": False}
        for d, lives in (("a", [10.0, 20.0]), ("b", [4.0, 6.0]))
        for s, life in enumerate(lives)
    ]
    difference = paired(table(rows), "lifespan_50", "a", "b").difference
    assert difference is not None
    assert (difference.median, difference.low, difference.high) == (10, 6, 14)


def test_pairing_that_would_be_arbitrary_is_refused() -> None:
    rows = seeds("a", [0.1]) + seeds("a", [0.2], attack="alie") + seeds("b", [0.3])
    with pytest.raises(ValueError, match="pair by more columns"):
        paired(table(rows), "asr", "a", "b", by=["seed"])


def test_a_seed_played_twice_counts_once() -> None:
    rows = [
        *seeds("a", [0.1, 0.2]),
        {"defense": "a", "seed": 0, "asr": 0.9},
        {"defense": "a", "seed": 1, "asr": NAN, "main_accuracy": NAN},
    ]
    kept = one_a_seed(table(rows))
    assert kept["asr"].tolist() == [0.2, 0.9]  # the later of two; of a finished and an unfinished one the finished
    assert summary_by_row(table(rows))["asr_n"].tolist() == [2]


# -------------------------------------------------------------------------------------------------- summary


def test_summary_merges_seeds_and_nothing_else() -> None:
    rows = seeds("a", [0.1, 0.2, 0.6], row="r1") + seeds("a", [0.3], attack="alie", row="r2")
    rows += [{"defense": "a", "seed": 7, "asr": NAN, "main_accuracy": NAN, "row": "r1"}]
    found = summary_by_row(table(rows)).set_index("row")
    assert found.loc["r1", ["asr", "asr_low", "asr_high", "asr_n", "seeds"]].tolist() == [0.2, 0.1, 0.6, 3, 3]
    assert found.loc["r2", ["asr", "asr_n", "attack"]].tolist() == [0.3, 1, "alie"]
    assert np.isnan(found.loc["r2", "asr_low"])


def test_summary_of_lifespans_is_kaplan_meier_s() -> None:
    lives = [(5.0, False), (7.0, True), (9.0, True), (NAN, False)]
    rows = [{"defense": "a", "seed": i, "lifespan_50": t, "lifespan_50_censored": c} for i, (t, c) in enumerate(lives)]
    row = summary_by_row(table(rows)).iloc[0]
    assert (row["lifespan_50"], row["lifespan_50_censored"]) == (9, True)
    assert (row["lifespan_50_n"], row["lifespan_50_events"]) == (3, 1)
    ended = summary_by_row(table(rows[:1])).iloc[0]
    assert (ended["lifespan_50"], ended["lifespan_50_censored"]) == (5, False)
    unknown = summary_by_row(table(rows[3:])).iloc[0]
    assert np.isnan(unknown["lifespan_50"])
    assert not unknown["lifespan_50_censored"]


def test_summary_of_no_runs_is_empty() -> None:
    assert summary_by_row(table([{}]).iloc[:0]).empty


# ----------------------------------------------------------------------------------------------------- rank

CIFAR10 = """
FedAvg     86.95/64.80  79.23/90.44  87.04/14.44  87.14/55.10   0
RFA        86.69/25.56  79.6/57.69   87.1/52.56   86.47/65.31  -1.86
FoolsGold  85.71/6.67   77.56/3.43   84.92/14.44  85.72/45.41   1.96
Krum       82.17/6.11   78.18/6.01   82.32/66.67  81.23/59.18  -2.04
M-Krum     86.55/1.67   79.33/91.39  86.52/17.78  87.4/60.2     0.63
Weak-DP    74.41/46.11  10.00/0.00   73.61/12.78  73.84/53.06   0.12
FLAME      80.58/.56    76.78/37.24  81.24/.56    81.41/5.12    3.21
Ours       86.34/.56    79.61/9.98   86.44/.56    86.86/3.06    3.77
"""
EMNIST = """
FedAvg     99.54/96.00  97.68/94.13  99.55/10.00  99.37/96.00   0
RFA        99.57/6.00   97.87/1.39   99.32/4.00   99.29/97.00   2.51
FoolsGold  96.42/98.00  97.24/.64    99.07/94.00  99.13/98.00  -7.49
Krum       99.22/0      97.7/.56     99.12/1.00   99.14/12.00   3.76
M-Krum     99.58/0      97.85/47.43  99.54/0      99.57/84.00   2.63
Weak-DP    99.37/86.00  10.00/0.00   99.41/14.00  99.39/89.00  -0.12
FLAME      99.39/0      97.12/17.38  99.39/0      99.44/13.00   3.67
Ours       99.53/0      97.39/4.23   99.54/0      99.58/0       3.95
"""
"""Multi-metrics, arXiv 2303.06601, table 1: main and backdoor accuracy in percent under four attacks, and the rank."""


def published(task: str, text: str) -> tuple[list[dict[str, Any]], dict[str, float]]:
    rows, ranks = [], {}
    for line in text.split("\n")[1:-1]:
        defense, *cells, whole = line.split()
        ranks[defense] = float(whole)
        for attack, cell in zip(("replacement", "DBA", "PGD", "Edge-PGD"), cells, strict=True):
            ma, ba = (float(x) / 100 for x in cell.split("/"))
            rows.append({"task": task, "attack": attack, "defense": defense, "main_accuracy": ma, "asr": ba})
    return rows, ranks


def test_rank_gives_the_published_numbers_for_both_data_sets_at_once() -> None:
    found = [published("cifar10", CIFAR10), published("emnist", EMNIST)]
    ranking = rank(table([row for rows, _ in found for row in rows]), baseline="FedAvg")
    assert len(ranking) == 16
    for task, (_, expected) in zip(("cifar10", "emnist"), found, strict=True):
        own = ranking[ranking["task"] == task]
        assert dict(zip(own["defense"], own["rank"].round(2) + 0.0, strict=True)) == expected
        assert own["rank"].is_monotonic_decreasing
        assert set(own["attacks"]) == {4}
        assert set(own["missing"]) == set(own["undefined"]) == {0}


def by_defense(ranking: pd.DataFrame, column: str = "rank") -> dict[str, float]:
    return dict(zip(ranking["defense"], ranking[column], strict=True))


BASE: list[dict[str, Any]] = [
    {"defense": "fedavg", "attack": "x", "main_accuracy": 0.8, "asr": 0.5, "undefended": True},
    {"defense": "fedavg", "attack": "y", "main_accuracy": 0.5, "asr": 1.0, "undefended": True},
]


def test_rank_by_hand_over_medians_of_seeds() -> None:
    """x: (0.6 − 0.8)/0.8 − (0.25 − 0.5)/0.5 = 0.25; y: 0 − (0.1 − 1)/1 = 0.9."""
    krum = [
        {"defense": "krum", "attack": "x", "main_accuracy": 0.6, "asr": a, "seed": s}
        for s, a in enumerate((0.0, 0.25, 0.9))
    ]
    ranking = rank(table([*BASE, *krum, {"defense": "krum", "attack": "y", "main_accuracy": 0.5, "asr": 0.1}]))
    assert by_defense(ranking) == {"krum": pytest.approx(1.15), "fedavg": 0.0}


def test_rank_has_no_number_for_a_defense_that_misses_an_attack() -> None:
    ranking = rank(table([*BASE, {"defense": "krum", "attack": "x", "asr": 0.1}]))
    assert math.isnan(by_defense(ranking)["krum"])
    assert by_defense(ranking, "missing") == {"fedavg": 0, "krum": 1}
    assert by_defense(ranking, "attacks") == {"fedavg": 2, "krum": 1}


def test_rank_leaves_out_attacks_that_do_nothing_to_fedavg() -> None:
    rows = [*BASE, {"defense": "fedavg", "attack": "z", "asr": 0.0, "undefended": True}]
    rows += [
        {"defense": "krum", "attack": a, "main_accuracy": m, "asr": 0.25}
        for a, m in (("x", 0.8), ("y", 0.5), ("z", 0.1))
    ]
    ranking = rank(table(rows))
    assert by_defense(ranking)["krum"] == pytest.approx(0.5 + 0.75)
    assert by_defense(ranking, "undefined") == {"fedavg": 1, "krum": 1}
    assert by_defense(ranking, "attacks") == {"fedavg": 2, "krum": 2}
    alone = rank(table(rows[2:3]))
    assert math.isnan(alone["rank"].iloc[0])


def test_rank_is_kept_apart_for_each_setting_and_ignores_runs_that_nobody_attacked() -> None:
    other = [row | {"settings": "lr=1", "asr": row["asr"] / 2} for row in BASE]
    krum = [
        {"defense": "krum", "attack": a, "settings": s, "main_accuracy": m, "asr": 0.25}
        for a, m in (("x", 0.8), ("y", 0.5))
        for s in ("", "lr=1")
    ]
    clean = {"defense": "fedavg", "attack": "none", "undefended": True, "t0": NAN}
    ranking = rank(table([*BASE, *other, *krum, clean])).set_index(["settings", "defense"])["rank"]
    assert ranking["", "krum"] == pytest.approx(0.5 + 0.75)
    assert ranking["lr=1", "krum"] == pytest.approx(0 + 0.5)


def test_rank_without_fedavg_is_empty() -> None:
    assert rank(table([{"defense": "krum"}])).empty
