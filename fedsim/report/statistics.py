"""Statistics over the results of many runs (:func:`fedsim.recording.results.collect`).

A cell is what was run apart from the seed; its runs are a sample over seeds. Numbers of rounds that the end of a run
cuts off are right-censored, and no function here treats them as observed.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from fedsim.recording.labels import LABELS
from fedsim.recording.results import MEASURES, SPANS

Floats = NDArray[np.float64]

LEVEL = 0.95
"""Confidence level of every interval."""

FEWEST_PAIRS = 6
"""Of fewer no test is made: no two-sided test on the signs of 5 pairs can reach p < 0.05 (2 · 2⁻⁵ = 0.0625)."""

SUMMARISED = tuple(
    measure
    for measure in MEASURES
    if measure not in SPANS and not measure.startswith(("main_loss", "asr_at_", "time_to_inject_"))
)
"""What :func:`summary_by_row` gives a median and an interval of; numbers of rounds (``SPANS``) come after it.

Not of the submissions until a backdoor took: a median over the seeds in which it did would pass over the others.
"""

_TOLERANCE = 1e-12  # a product of shares that ought to be one half


@dataclass(frozen=True)
class Interval:
    """A median and its confidence interval over n values; the bounds are None for n < 2, all three for n = 0."""

    median: float | None
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class Survival:
    """A Kaplan–Meier curve: a step function that holds ``alive[i]`` from ``times[i]`` until the next time.

    times: (m,) ascending, in rounds; the first is 0. alive: (m,) the share of backdoors that live longer than that.
    low, high: (m,) the pointwise confidence band; NaN where the share is 0 and the formula has none.
    median: the first time at which the share is at most one half, median_low and median_high its confidence
    interval (where the band crosses one half); None where the curve, or the band, never gets there.
    n: backdoors. events: those seen to end; the other n − events are censored. longest: the longest time seen.
    """

    times: Floats
    alive: Floats
    low: Floats
    high: Floats
    median: float | None
    median_low: float | None
    median_high: float | None
    n: int
    events: int
    longest: float | None


@dataclass(frozen=True)
class Paired:
    """Two methods on the same cells and seeds.

    metric, a, b: what was compared. pairs: how many. seeds: how many different ones among them.
    difference: median of a − b with its bootstrap interval over pairs; None where a value of a pair is censored,
        since its difference is not known.
    effect: share of pairs in which a is larger minus the share in which b is (Cliff's delta within pairs), in
        [−1, 1]; a pair whose order censoring hides counts as neither. None without pairs.
    sign_p: exact two-sided sign test on the pairs whose order is known and not a tie.
    wilcoxon_p: Wilcoxon's signed-rank test on the differences; None where one is censored.
    logrank_p: log-rank test of the two samples of a number of rounds. It knows of censoring, not of pairs.
    Both tests on pairs are None for fewer than ``FEWEST_PAIRS`` pairs that differ.
    """

    metric: str
    a: str
    b: str
    pairs: int
    seeds: int
    difference: Interval | None
    effect: float | None
    sign_p: float | None
    wilcoxon_p: float | None
    logrank_p: float | None


def median_interval(values: ArrayLike, *, level: float = LEVEL, samples: int = 10_000, seed: int = 0) -> Interval:
    """The median of ``values`` (n,) and its percentile bootstrap interval; NaN is dropped.

    The interval holds the middle ``level`` of the medians of ``samples`` resamples of n values with replacement.
    It cannot reach beyond the values themselves, and so says little of two or three seeds: from the smallest to
    the largest of n values covers the true median with a probability of 1 − 2¹⁻ⁿ (50 % for n = 2, 75 % for 3,
    94 % for 5). Below six seeds no interval for a median made from the values alone holds 95 %.

    The draw depends on ``seed`` and n alone, so the same values give the same interval.
    """
    x = np.asarray(values, dtype=np.float64)
    x = np.sort(x[~np.isnan(x)])  # the order of the runs is not to matter
    if not x.size:
        return Interval(None, None, None, 0)
    middle = float(np.median(x))
    if x.size == 1:
        return Interval(middle, None, None, 1)
    lower, upper = _middles(x.size, samples, seed)
    low, high = np.quantile((x[lower] + x[upper]) / 2, [(1 - level) / 2, (1 + level) / 2])
    return Interval(middle, float(low), float(high), int(x.size))


@functools.lru_cache(maxsize=64)
def _middles(n: int, samples: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where the median of each resample of n sorted values lies: (samples,) ranks of its two middle ones."""
    drawn = np.sort(np.random.default_rng(seed).integers(n, size=(samples, n)), axis=1)
    return drawn[:, (n - 1) // 2].copy(), drawn[:, n // 2].copy()


def survival(durations: ArrayLike, censored: ArrayLike, *, level: float = LEVEL) -> Survival:
    """The Kaplan–Meier estimate of how long backdoors live, by :func:`scipy.stats.ecdf`.

    durations: (n,) rounds ≥ 0. A backdoor that never took, or did not outlive the attack, has a lifespan of 0 and
        counts as one that ended at 0. NaN (nobody attacked, nothing was evaluated) is dropped: nothing is known.
    censored: (n,) bool: alive when the run ended.

    The band is pointwise, by Greenwood's variance on the scale log(−log S), which keeps it inside [0, 1]; where
    nothing has ended yet it is [1, 1].
    """
    ended, cut = _split(durations, censored)
    n = ended.size + cut.size
    empty: Floats = np.zeros(0)
    if n == 0:
        return Survival(empty, empty, empty, empty, None, None, None, 0, 0, None)
    curve = stats.ecdf(stats.CensoredData(uncensored=ended, right=cut)).sf
    with warnings.catch_warnings():  # it warns of the places where there is no interval
        warnings.simplefilter("ignore", RuntimeWarning)
        band = curve.confidence_interval(confidence_level=level, method="log-log")
    times, alive = np.asarray(curve.quantiles, dtype=np.float64), np.asarray(curve.probabilities, dtype=np.float64)
    low, high = (np.array(side.probabilities, dtype=np.float64) for side in (band.low, band.high))
    low[alive >= 1], high[alive >= 1] = 1.0, 1.0
    if times[0] > 0:
        times, alive, low, high = np.insert(times, 0, 0.0), *(np.insert(y, 0, 1.0) for y in (alive, low, high))
    sure = np.where(alive <= 0, 0.0, low)  # where all have ended the band has no value, but is not above one half
    bounds = (_first_half(times, sure), _first_half(times, high)) if n > 1 else (None, None)
    return Survival(times, alive, low, high, _first_half(times, alive), *bounds, n, int(ended.size), float(times[-1]))


def logrank(a: ArrayLike, a_censored: ArrayLike, b: ArrayLike, b_censored: ArrayLike) -> float | None:
    """The two-sided p of the log-rank test that two samples of numbers of rounds live equally long.

    It is an approximation for large samples, far too small for a few seeds: None for fewer than ``FEWEST_PAIRS``
    known numbers in either sample, and where it cannot be computed (nothing ended, or all ended at once).
    """
    (ended, cut), (other, other_cut) = _split(a, a_censored), _split(b, b_censored)
    if min(ended.size + cut.size, other.size + other_cut.size) < FEWEST_PAIRS or not ended.size + other.size:
        return None
    with warnings.catch_warnings():  # 0 / 0 where the variance is 0
        warnings.simplefilter("ignore", RuntimeWarning)
        p = stats.logrank(
            stats.CensoredData(uncensored=ended, right=cut), stats.CensoredData(uncensored=other, right=other_cut)
        ).pvalue
    return None if np.isnan(p) else float(p)


def cell_columns(results: pd.DataFrame) -> list[str]:
    """The columns of ``results`` that say what was run, apart from the seed."""
    axes = sorted(str(column) for column in results if str(column).startswith("axis."))
    return [
        *(column for column in LABELS if column in results),
        *axes,
        *(["settings"] if "settings" in results else []),
    ]


def one_a_seed(results: pd.DataFrame) -> pd.DataFrame:
    """``results`` with one run for each cell and seed: a seed played twice is one observation, not two.

    A run with numbers is taken before one without, then the last by its path (run directories are named by time).
    """
    keys = [
        *([] if "row" not in results else ["row"]),
        *cell_columns(results),
        *(["seed"] if "seed" in results else []),
    ]
    if not keys:
        return results
    best_last = ["_measured", *(["run"] if "run" in results else [])]
    order = results[[*keys, *best_last[1:]]].assign(_measured=_measured(results))
    order = order.sort_values(best_last, kind="stable").drop_duplicates(keys, keep="last")
    return results.loc[results.index.isin(order.index)]


def paired(
    results: pd.DataFrame,
    metric: str,
    a: str,
    b: str,
    *,
    column: str = "defense",
    by: Sequence[str] | None = None,
) -> Paired:
    """Compare two values ``a`` and ``b`` of ``column`` (two defenses, say) on the same cells and seeds.

    metric: a column of numbers; one of ``SPANS`` is treated as censored. by: columns in which the two runs of a
    pair agree; default: the seed and everything that says what was run, apart from ``column``.

    The pairs count as independent, which those of one cell are more than those of one seed: where several cells are
    pooled, p is somewhat too small.

    Raises
    ------
    ValueError: ``by`` does not tell the runs of one side apart; pairing would be arbitrary.
    """
    keys = [*(c for c in cell_columns(results) if c != column), "seed"] if by is None else list(by)
    known = results[results[metric].notna()]
    sides = [one_a_seed(known[known[column] == value]) for value in (a, b)]
    for side, value in zip(sides, (a, b), strict=True):
        if side.duplicated(keys).any():
            raise ValueError(f"several runs of {column} {value!r} agree in {', '.join(keys)}; pair by more columns")
    censor = f"{metric}_censored"
    wanted = [*keys, metric, *([censor] if metric in SPANS else [])]
    pairs = sides[0][wanted].merge(sides[1][wanted], on=keys, suffixes=("_a", "_b"))
    x, y = (pairs[f"{metric}_{side}"].to_numpy(dtype=np.float64) for side in "ab")
    seeds = int(pairs["seed"].nunique()) if "seed" in pairs else 0
    if metric not in SPANS:
        none = np.zeros(len(x), dtype=bool)
        return _compared(metric, a, b, seeds, x, y, none, none)
    cut_x, cut_y = (pairs[f"{censor}_{side}"].to_numpy(dtype=bool) for side in "ab")
    return _compared(metric, a, b, seeds, x, y, cut_x, cut_y)


def _compared(
    metric: str,
    a: str,
    b: str,
    seeds: int,
    x: Floats,
    y: Floats,
    cut_x: NDArray[np.bool_],
    cut_y: NDArray[np.bool_],
) -> Paired:
    larger = (x > y) & ~cut_y | (x >= y) & cut_x & ~cut_y  # a censored number is larger than what was seen of it
    smaller = (x < y) & ~cut_x | (x <= y) & cut_y & ~cut_x
    up, down, known = int(larger.sum()), int(smaller.sum()), not (cut_x | cut_y).any()
    d = x - y
    differing = d[np.abs(d) > _TOLERANCE]
    ranked = known and differing.size >= FEWEST_PAIRS
    return Paired(
        metric,
        a,
        b,
        len(x),
        seeds,
        median_interval(d) if known and len(x) else None,
        (up - down) / len(x) if len(x) else None,
        float(stats.binomtest(up, up + down).pvalue) if up + down >= FEWEST_PAIRS else None,
        float(stats.wilcoxon(differing).pvalue) if ranked else None,
        logrank(x, cut_x, y, cut_y) if metric in SPANS else None,
    )


def summary_by_row(results: pd.DataFrame) -> pd.DataFrame:
    """One row a cell, its runs merged over seeds.

    Columns
    -------
    row, undefended, those of :func:`cell_columns`; seeds (how many have numbers).
    <metric>, <metric>_low, <metric>_high, <metric>_n for ``SUMMARISED``: median and bootstrap interval.
    The same for ``SPANS``, by Kaplan–Meier: <span>_events of the <span>_n ended. Where the median is not reached,
    <span>_censored is true and <span> the longest time seen: the median is larger. A bound that is not reached
    is NaN.
    """
    one = one_a_seed(results)
    keys = [*(c for c in ("row", "undefended") if c in one), *cell_columns(one)]
    rows = []
    for _, cell in one.groupby(cell_columns(one), sort=False):
        row: dict[str, Any] = {key: cell[key].iloc[0] for key in keys}
        row["seeds"] = int(_measured(cell).sum())
        for metric in SUMMARISED:
            if metric in cell:
                i = median_interval(cell[metric])
                row |= {metric: i.median, f"{metric}_low": i.low, f"{metric}_high": i.high, f"{metric}_n": i.n}
        for metric in SPANS:
            if metric in cell:
                row |= _span(metric, survival(cell[metric], cell[f"{metric}_censored"]))
        rows.append({key: float("nan") if value is None else value for key, value in row.items()})
    return pd.DataFrame(rows, columns=None if rows else [*keys, "seeds"])


def _span(metric: str, s: Survival) -> dict[str, Any]:
    return {
        metric: s.longest if s.median is None else s.median,
        f"{metric}_low": s.median_low,
        f"{metric}_high": s.median_high,
        f"{metric}_censored": s.n > 0 and s.median is None,
        f"{metric}_n": s.n,
        f"{metric}_events": s.events,
    }


def rank(results: pd.DataFrame, *, baseline: str | None = None) -> pd.DataFrame:
    """The rank of each defense over the attacks, as in Multi-metrics (arXiv 2303.06601, table 1).

    Σ over attacks of (MA − MA₀)/MA₀ − (BA − BA₀)/BA₀, larger is better: what a defense costs the main accuracy MA
    and takes from the backdoor accuracy BA (the ASR at the end), each as a share of what FedAvg (subscript 0) has
    under the same attack. MA and BA are medians over seeds. An attack is a combination of attack, trigger and
    schedule; where tasks, models, partitions, settings or other axes differ, each has a ranking of its own.

    Undefined for BA₀ = 0: such an attack is left out, for every defense, and counted in ``undefined``. A small BA₀ is
    defined but weighs a great deal: from 1 % to 50 % is −49. A defense that was not run under one of the other
    attacks has no rank (NaN), since sums over different attacks cannot be compared; ``missing`` counts those.

    baseline: the label of FedAvg in the column ``defense``; default: the runs marked ``undefended``.

    Columns: those that tell the rankings apart, defense, rank, attacks (summed), missing, undefined; sorted by rank.
    Empty where there is no FedAvg run to compare with.
    """
    one = one_a_seed(results)
    if "t0" in one:
        one = one[one["t0"].notna()]  # nobody attacked
    if "undefended" in one and baseline is None:
        first = one["undefended"].astype(bool)
    else:
        first = one["defense"] == (baseline or "fedavg")
    of = [c for c in ("attack", "trigger", "schedule") if c in one]
    contexts = [c for c in cell_columns(one) if c not in (*of, "defense")]
    values = one[["main_accuracy", "asr"]].astype("float64")
    cells = one.assign(**values, _first=first).dropna(subset=["main_accuracy", "asr"])
    columns = [*contexts, "defense", "rank", "attacks", "missing", "undefined"]
    rows = []
    grouped = cells.groupby(contexts, sort=True) if contexts else [((), cells)]
    for context, group in grouped:
        base = group[group["_first"]].groupby(of)[["main_accuracy", "asr"]].median()
        usable = base[(base["asr"] > 0) & (base["main_accuracy"] > 0)]
        for defense, own in group.groupby("defense", sort=True):
            median = own.groupby(of)[["main_accuracy", "asr"]].median()
            gain = (median / usable - 1).reindex(usable.index)
            summed = gain["main_accuracy"] - gain["asr"]
            missing = int(summed.isna().sum())
            whole = float(summed.sum()) if len(summed) and not missing else float("nan")
            counts = (len(summed) - missing, missing, len(base) - len(usable))
            if len(base):
                rows.append((*context, defense, whole, *counts))
    ranking = pd.DataFrame(rows, columns=columns)
    return ranking.sort_values([*contexts, "rank"], ascending=[*(True for _ in contexts), False], ignore_index=True)


def _measured(results: pd.DataFrame) -> pd.Series[bool]:
    """Which runs have numbers."""
    return results.reindex(columns=["main_accuracy", "asr"]).notna().any(axis=1)


def _split(durations: ArrayLike, censored: ArrayLike) -> tuple[Floats, Floats]:
    """The durations that ended, and those cut off; NaN is dropped.

    Raises
    ------
    ValueError: the lengths differ, or a duration is negative.
    """
    t, cut = np.asarray(durations, dtype=np.float64), np.asarray(censored, dtype=bool)
    if t.shape != cut.shape or t.ndim != 1:
        raise ValueError(f"durations and censored must be of one length, not {t.shape} and {cut.shape}")
    if (t < 0).any():
        raise ValueError("a number of rounds is not negative")
    known = ~np.isnan(t)
    return t[known & ~cut], t[known & cut]


def _first_half(times: Floats, alive: Floats) -> float | None:
    with np.errstate(invalid="ignore"):
        there = np.flatnonzero(alive <= 0.5 + _TOLERANCE)
    return float(times[there[0]]) if there.size else None
