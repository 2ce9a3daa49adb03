"""Means and interquartile means of a few seeds, and the 95 % intervals of means.

Everything is a pure function of arrays. The interval of a bounded outcome, such as a success rate, is Gaffke's
(`grpo_jax.confidence`): with three to twenty seeds it covered the mean in at least 95 % of simulated repetitions, also
where a few runs collapse. Student's, the percentile bootstrap's and BCa's did not: docs/results/interval_coverage.md.
An unbounded metric has no interval that is valid for every distribution. It has Student's, which needs differences that
are roughly normal.

The definitions for runs follow rliable (Agarwal et al. 2021, https://arxiv.org/abs/2108.13264) and are tested against
it. Unbiased pass@k is in `grpo_jax.evaluation.pass_at_k`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from grpo_jax.confidence import LEVEL as CONFIDENCE
from grpo_jax.confidence import bounded_limits

RESAMPLES = 10_000

Bounds = tuple[float, float]


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % confidence interval; the limits are infinite if the data cannot bound it."""

    value: float
    low: float
    high: float


def mean(values: ArrayLike, bounds: Bounds | None = None, noise: float = 0.0) -> Estimate:
    """The mean of values [N] with its interval; the values are independent repetitions, such as seeds.

    Args:
      bounds: the range of the values: the interval is then Gaffke's and inside of it. None: the interval is Student's,
        and infinite if the values have no spread.
      noise: half the width of a further interval of the same mean. The two are added in quadrature. For a success rate
        it is that of the evaluation: all seeds are asked the same prompts, so which prompts these are is a source of
        variation that the spread over seeds lacks.
    """
    centre, low, high = interval(as_sample(values), bounds, noise)
    return Estimate(float(centre), float(low), float(high))


def bounded_mean(values: ArrayLike, bounds: Bounds = (0.0, 1.0)) -> Estimate:
    """The mean of bounded values [N] with Gaffke's interval, which is inside of the bounds."""
    return mean(values, bounds)


def interval(
    values: np.ndarray, bounds: Bounds | None, noise: ArrayLike = 0.0, level: float = CONFIDENCE
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The means [...] of samples [..., N] and the limits of their intervals, of any level.

    `noise` [...] is as in `mean`, at the level of 95 %.
    """
    centre = values.mean(-1)
    if bounds is None:
        half = _student_half_width(values, level)
        low, high = centre - half, centre + half
    else:
        low, high = bounded_limits(values, bounds, level)
    noise = np.asarray(noise) * (stats.norm.ppf((1 + level) / 2) / stats.norm.ppf((1 + CONFIDENCE) / 2))
    low, high = centre - np.hypot(centre - low, noise), centre + np.hypot(high - centre, noise)
    return centre, *((low, high) if bounds is None else (np.maximum(low, bounds[0]), np.minimum(high, bounds[1])))


def interquartile_mean(scores: ArrayLike, axis: int | None = None) -> np.ndarray:
    """The mean of the middle half of the scores along `axis`, or of all of them (rliable's `aggregate_iqm`).

    A quarter of the values, rounded down, is left out at each end: of five seeds, the best and the worst.
    """
    return stats.trim_mean(as_sample(scores), 0.25, axis=axis)


def stratified_bootstrap(
    scores: ArrayLike, statistic: Callable[..., np.ndarray] = interquartile_mean, *, seed: int = 0
) -> Estimate:
    """A statistic of scores [N, M], N runs on each of M tasks, with its percentile bootstrap interval.

    Each task is a stratum: its N runs are resampled from its own N runs (Agarwal et al. 2021, section 4.1). Scores [N]
    are those of one task. The interval of a single run is infinite. `statistic` takes `axis`, as `np.mean` does.

    With few runs on one task the interval is too narrow: where values are spread out, that of three runs covers 75 %
    and that of five 90 % (measured in docs/results/interval_coverage.md). So the tables of ablations print an
    interquartile mean without an interval.
    """
    scores = as_sample(scores)
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
    scores, baseline = (s.reshape(len(s), -1) for s in (as_sample(scores), as_sample(baseline)))
    sign = np.sign(scores[:, None, :] - baseline[None, :, :])
    return float((1 + sign).mean() / 2)


def clustered_standard_error(scores: ArrayLike, clusters: Sequence[object]) -> float:
    """The standard error of the mean of scores [N] that come in clusters (Miller 2024, equation 4).

    The samples of one question, or the questions about one passage, are not independent: their covariances are added
    to the variance of the mean. If every score is its own cluster, this is the ordinary standard error.
    """
    scores = as_sample(scores)
    deviations = scores - scores.mean()
    _, index = np.unique(np.asarray(list(clusters)), return_inverse=True)
    sums = np.bincount(index, weights=deviations)
    n = len(scores)
    covariances = (sums**2).sum() - (deviations**2).sum()  # of different members of the same cluster
    return math.sqrt(max(deviations.var(ddof=1) / n + covariances / n**2, 0.0))


def as_sample(values: ArrayLike) -> np.ndarray:
    """The values as float64. Raises `ValueError` if there are none, or one that is not finite."""
    values = np.asarray(values, np.float64)
    if not values.size or not np.isfinite(values).all():
        raise ValueError("statistics need at least one value, and all values must be finite.")
    return values


def _student_half_width(values: np.ndarray, level: float) -> np.ndarray:
    """Half the widths [...] of Student's t intervals; infinite for samples without a spread."""
    n = values.shape[-1]
    if n < 2:
        return np.full(values.shape[:-1], math.inf)
    half = stats.t.ppf((1 + level) / 2, n - 1) * values.std(-1, ddof=1) / math.sqrt(n)
    return np.where(np.ptp(values, axis=-1) <= 1e-12 * np.abs(values).max(-1), math.inf, half)
