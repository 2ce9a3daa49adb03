"""Means, interquartile means and paired differences of a few seeds, with 95 % intervals and the detectable difference.

Everything is a pure function of arrays. Two arms at the same seed share their prompts and their sampling noise, so they
are compared seed by seed: the variation that they have in common cancels. Intervals of means are Student's t, because
with five seeds the percentile bootstrap covers about 83 % instead of 95 % (measured in
tests/statistics/test_intervals.py). The interquartile mean has no such formula: its interval is rliable's bootstrap, so
with few seeds it is too narrow.

The definitions for runs follow rliable (Agarwal et al. 2021, https://arxiv.org/abs/2108.13264) and are tested against
it. Those for evaluations on the same questions follow Miller 2024 (https://arxiv.org/abs/2411.00640). Unbiased pass@k
is in `grpo_jax.evaluation.pass_at_k`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize, stats

CONFIDENCE = 0.95
POWER = 0.8
RESAMPLES = 10_000


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % confidence interval; the bounds are infinite if the data cannot bound it."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference(Estimate):
    """A paired difference to a baseline.

    Attributes:
      p_value: of the hypothesis that the difference is 0; the function that returns this object names the test.
      detectable: the smallest true difference that the same design, with the observed spread, would show in 80 % of
        repetitions; infinite if there is one pair.
      num_pairs: how many pairs there were.
    """

    p_value: float
    detectable: float
    num_pairs: int

    @property
    def is_shown(self) -> bool:
        """Whether the interval excludes 0. `verdict` calls one of the two better only then."""
        return self.low > 0 or self.high < 0


def mean(values: ArrayLike) -> Estimate:
    """The mean of values [N] with Student's t interval; the values are independent repetitions, such as seeds."""
    values = _sample(values)
    centre, half = float(values.mean()), _half_width(values)
    return Estimate(centre, centre - half, centre + half)


def interquartile_mean(scores: ArrayLike, axis: int | None = None) -> np.ndarray:
    """The mean of the middle half of the scores along `axis`, or of all of them (rliable's `aggregate_iqm`).

    A quarter of the values, rounded down, is left out at each end: of five seeds, the best and the worst.
    """
    return stats.trim_mean(_sample(scores), 0.25, axis=axis)


def stratified_bootstrap(
    scores: ArrayLike, statistic: Callable[..., np.ndarray] = interquartile_mean, *, seed: int = 0
) -> Estimate:
    """A statistic of scores [N, M], N runs on each of M tasks, with its percentile bootstrap interval.

    Each task is a stratum: its N runs are resampled from its own N runs (Agarwal et al. 2021, section 4.1). Scores [N]
    are those of one task. The interval of a single run is infinite. `statistic` takes `axis`, as `np.mean` does.
    """
    scores = _sample(scores)
    scores = scores.reshape(len(scores), -1)
    value = float(statistic(scores, axis=None))
    if len(scores) == 1:
        return Estimate(value, -math.inf, math.inf)
    draws = np.random.default_rng(seed).integers(len(scores), size=(RESAMPLES, *scores.shape))
    resampled = np.take_along_axis(scores[None], draws, axis=1)
    found = statistic(resampled.reshape(RESAMPLES, -1), axis=1)
    low, high = np.quantile(found, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Estimate(value, float(low), float(high))


def probability_of_improvement(scores: ArrayLike, baseline: ArrayLike) -> float:
    """The probability that a run of `scores` [N, M] beats a run of `baseline` [K, M] on a task; a tie counts half.

    This is the Mann-Whitney statistic of each task, divided by N · K and averaged over the M tasks (rliable's
    definition). Runs are not paired here.
    """
    scores, baseline = (s.reshape(len(s), -1) for s in (_sample(scores), _sample(baseline)))
    sign = np.sign(scores[:, None, :] - baseline[None, :, :])
    return float((1 + sign).mean() / 2)


def paired_difference(values: ArrayLike, baseline: ArrayLike) -> Difference:
    """The mean of values [N] - baseline [N], run by run (the same seeds in the same order).

    The interval is Student's t on the N differences. The p-value is that of the two-sided sign-flip permutation test
    (Fisher 1935), which assumes no distribution and is exact up to 13 pairs. With N pairs it cannot be smaller than
    2 / 2^N: five seeds never get below .0625, however large the effect is. So verdicts follow the interval.

    Raises:
      ValueError: if the two arrays are not paired, are empty, or hold a value that is not finite.
    """
    values, baseline = _sample(values), _sample(baseline)
    if values.shape != baseline.shape or values.ndim != 1:
        raise ValueError(f"values {values.shape} and baseline {baseline.shape} must be paired arrays of one dimension.")
    differences = _without_rounding(values - baseline, np.maximum(np.abs(values), np.abs(baseline)))
    n, centre, half = len(differences), float(differences.mean()), _half_width(differences)
    deviation = float(differences.std(ddof=1)) if n > 1 else math.inf
    return Difference(
        centre, centre - half, centre + half, sign_flip_test(differences), detectable_difference(deviation, n), n
    )


def sign_flip_test(differences: ArrayLike) -> float:
    """The two-sided p-value of "the differences [N] are symmetric about 0", by flipping their signs.

    Uses all 2^N combinations of signs if they are at most 10,000, else 10,000 random ones (with a fixed seed).
    """
    differences = _sample(differences)
    if len(differences) == 1 or not differences.any():
        return 1.0
    # Not `scipy.stats.permutation_test`: it compares sums with a tolerance relative to the observed sum, and it is many
    # times slower.
    n = len(differences)
    if 2**n <= RESAMPLES:
        signs = 1 - 2 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
    else:
        signs = np.random.default_rng(0).choice([-1, 1], size=(RESAMPLES, n))
        signs[0] = 1  # the observed signs are one of the combinations, so p is never 0
    sums = np.abs(signs @ differences)
    observed = abs(differences.sum())
    return float(np.mean(sums >= observed - 1e-9 * np.abs(differences).sum()))


def detectable_difference(deviation: float, num_pairs: int) -> float:
    """The smallest mean difference that a paired t-test at the 5 % level detects with a power of 80 %.

    Args:
      deviation: the standard deviation (ddof 1) of the pairs' differences, in the unit of the result.
      num_pairs: N. With one pair nothing can be detected: the result is infinite.
    """
    return math.inf if num_pairs < 2 else deviation * _detectable_effect(num_pairs)


@cache
def _detectable_effect(num_pairs: int) -> float:
    """The same in standard deviations: the shift at which 80 % of the noncentral t lie above the critical value."""
    df, critical = num_pairs - 1, stats.t.ppf((1 + CONFIDENCE) / 2, num_pairs - 1)
    # The other tail is left out: it holds less than 1e-6 there, and SciPy returns NaN for it at some shifts.
    shift = optimize.brentq(lambda shift: POWER - stats.nct.sf(critical, df, shift), 0.0, 40.0)  # 17 at two pairs
    return float(shift) / math.sqrt(num_pairs)


def clustered_standard_error(scores: ArrayLike, clusters: Sequence[object]) -> float:
    """The standard error of the mean of scores [N] that come in clusters (Miller 2024, equation 4).

    The samples of one question, or the questions about one passage, are not independent: their covariances are added
    to the variance of the mean. If every score is its own cluster, this is the ordinary standard error.
    """
    scores = _sample(scores)
    deviations = scores - scores.mean()
    _, index = np.unique(np.asarray(list(clusters)), return_inverse=True)
    sums = np.bincount(index, weights=deviations)
    n = len(scores)
    covariances = (sums**2).sum() - (deviations**2).sum()  # of different members of the same cluster
    return math.sqrt(max(deviations.var(ddof=1) / n + covariances / n**2, 0.0))


def question_difference(scores: ArrayLike, baseline: ArrayLike) -> Difference:
    """The mean difference of two evaluations [Q, S]: S samples of each of the same Q questions in the same order.

    Samples are averaged within their question, which is the cluster. The Q differences of questions are then treated as
    in `paired_difference` (Miller 2024, section 4.2). The p-value is that of McNemar's exact test if S is 1 and all
    scores are 0 or 1, otherwise that of the sign-flip test.
    """
    scores, baseline = _sample(scores), _sample(baseline)
    scores, baseline = (s.reshape(len(s), -1) for s in (scores, baseline))
    found = paired_difference(scores.mean(1), baseline.mean(1))
    outcomes = np.concatenate([scores, baseline], axis=1)
    if outcomes.shape[1] == 2 and np.isin(outcomes, (0, 1)).all():
        p_value = mcnemar(scores[:, 0] == 1, baseline[:, 0] == 1)
        return Difference(found.value, found.low, found.high, p_value, found.detectable, found.num_pairs)
    return found


def mcnemar(right: ArrayLike, baseline_right: ArrayLike) -> float:
    """The exact two-sided p-value of McNemar's test (1947) on outcomes [Q] of the same questions.

    Only the questions that one of the two got right and the other wrong are informative: under the null hypothesis each
    of them goes either way with probability 1/2.
    """
    right, baseline_right = np.asarray(right, bool), np.asarray(baseline_right, bool)
    gained, lost = int((right & ~baseline_right).sum()), int((~right & baseline_right).sum())
    return float(stats.binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def verdict(difference: Difference) -> str:
    """A phrase: better or worse if the interval excludes 0, otherwise how large a difference could have been seen."""
    if difference.is_shown:
        return "better than the baseline" if difference.value > 0 else "worse than the baseline"
    if difference.low == difference.high:
        return "no difference (every pair is equal)"
    if difference.num_pairs < 2:
        return "no difference shown (one pair cannot show any)"
    return f"no difference shown (could have seen ≥ {difference.detectable:.3g})"


def _sample(values: ArrayLike) -> np.ndarray:
    """The values as float64. Raises `ValueError` if there are none, or one that is not finite."""
    values = np.asarray(values, np.float64)
    if not values.size or not np.isfinite(values).all():
        raise ValueError("statistics need at least one value, and all values must be finite.")
    return values


def _half_width(values: np.ndarray) -> float:
    """Half the width of Student's t interval of the mean; infinite for a single value."""
    n = len(values)
    if n < 2:
        return math.inf
    return float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * values.std(ddof=1) / math.sqrt(n))


def _without_rounding(differences: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Sets differences that are only rounding errors (0.1 + 0.2 - 0.3) to 0; several could look like an effect."""
    return np.where(np.abs(differences) <= 1e-12 * scale, 0.0, differences)
