"""Paired differences to a baseline: intervals, tests, Holm's correction, and the detectable difference.

Two arms at the same seed share their prompts and their sampling noise, so they are compared seed by seed: the variation
that they have in common cancels. Comparisons of evaluations on the same questions follow Miller 2024
(https://arxiv.org/abs/2411.00640).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize, stats

from grpo_jax.statistics.intervals import CONFIDENCE, RESAMPLES, Bounds, Estimate, as_sample, interval

POWER = 0.8
ALPHA = 1 - CONFIDENCE
EXACT_PAIRS = 22  # 2^22 sums of signs take a quarter of a second
FEW_QUESTIONS = 10


@dataclass(frozen=True)
class Difference(Estimate):
    """A paired difference to a baseline.

    Attributes:
      p_value: of the hypothesis that the difference is 0; the function that returns this object names the test.
      detectable: the smallest true difference that the same design, with the observed spread, would show in 80 % of
        repetitions; infinite if it would show none.
      num_pairs: how many pairs there were.
      num_higher, num_lower: in how many of them the value was higher, and lower, than the baseline's.
      inner_low, inner_high: the 90 % interval of the same kind, for the test of equivalence.
      adjusted_p: the p-value after Holm's correction for all comparisons that were made together.
      num_comparisons: how many these were.
      limit: the largest possible difference; infinite for an unbounded metric.
    """

    p_value: float
    detectable: float
    num_pairs: int
    num_higher: int
    num_lower: int
    inner_low: float
    inner_high: float
    adjusted_p: float
    num_comparisons: int = 1
    limit: float = math.inf

    @property
    def is_shown(self) -> bool:
        """Whether the test rejects 0 and the interval excludes it. `verdict` calls one of the two better only then."""
        return self.adjusted_p <= ALPHA and (self.low > 0 or self.high < 0)


def paired_difference(
    values: ArrayLike, baseline: ArrayLike, bounds: Bounds | None = None, noise: float = 0.0
) -> Difference:
    """The mean of values [N] - baseline [N], run by run (the same seeds in the same order).

    The interval is Gaffke's if the outcomes have bounds, else Student's, on the N differences. The p-value is that of
    the two-sided sign-flip permutation test (Fisher 1935), exact up to 22 pairs. With N pairs it cannot be smaller than
    2 / 2^N: five seeds never get below .0625, however large the effect is.

    Args:
      bounds: the range of the outcomes; the differences are then between low - high and high - low.
      noise: as in `mean`.

    Raises:
      ValueError: if the two arrays are not paired, are empty, or hold a value that is not finite or out of bounds.
    """
    values, baseline = as_sample(values), as_sample(baseline)
    if values.shape != baseline.shape or values.ndim != 1:
        raise ValueError(f"values {values.shape} and baseline {baseline.shape} must be paired arrays of one dimension.")
    differences = _without_rounding(values - baseline, np.maximum(np.abs(values), np.abs(baseline)))
    limit = math.inf if bounds is None else bounds[1] - bounds[0]
    low, high = _limits(differences, limit, noise)
    inner_low, inner_high = _limits(differences, limit, noise, 2 * CONFIDENCE - 1)
    p_value = sign_flip_test(differences)
    return Difference(
        float(differences.mean()),
        low,
        high,
        p_value,
        _detectable(differences, limit, noise),
        len(differences),
        num_higher=int((differences > 0).sum()),
        num_lower=int((differences < 0).sum()),
        inner_low=inner_low,
        inner_high=inner_high,
        adjusted_p=p_value,
        limit=limit,
    )


def question_difference(scores: ArrayLike, baseline: ArrayLike, bounds: Bounds | None = (0.0, 1.0)) -> Difference:
    """The mean difference of two evaluations [Q, S]: S samples of each of the same Q questions in the same order.

    From `FEW_QUESTIONS` questions on, the result is about questions like these: samples are averaged within their
    question, and the Q differences are treated as in `paired_difference` (Miller 2024, section 4.2). Fewer questions
    say little about others. The result is then about further samples of the same questions, and each pair of samples is
    a pair: `num_pairs` is Q times S.

    The p-value is that of McNemar's exact test if each pair is one sample and all scores are 0 or 1, otherwise that of
    the sign-flip test.
    """
    scores, baseline = as_sample(scores), as_sample(baseline)
    scores, baseline = (s.reshape(len(s), -1) for s in (scores, baseline))
    if len(scores) < FEW_QUESTIONS:
        scores, baseline = scores.reshape(-1, 1), baseline.reshape(-1, 1)
    found = paired_difference(scores.mean(1), baseline.mean(1), bounds)
    outcomes = np.concatenate([scores, baseline], axis=1)
    if outcomes.shape[1] == 2 and np.isin(outcomes, (0, 1)).all():
        p_value = mcnemar(scores[:, 0] == 1, baseline[:, 0] == 1)
        return replace(found, p_value=p_value, adjusted_p=p_value)
    return found


# Tests ---------------------------------------------------------------------------------------------------------------


def sign_flip_test(differences: ArrayLike) -> float:
    """The two-sided p-value of "the differences [N] are symmetric about 0", by flipping their signs.

    Uses all 2^N combinations of signs up to 22 differences, else 10,000 random ones (with a fixed seed).
    """
    differences = as_sample(differences)
    if len(differences) == 1 or not differences.any():
        return 1.0
    # Not `scipy.stats.permutation_test`: it compares sums with a tolerance relative to the observed sum, and it is many
    # times slower.
    if len(differences) <= EXACT_PAIRS:
        sums = differences[:1]  # the other half of all sums are these with the opposite sign
        for difference in differences[1:]:
            sums = np.concatenate([sums + difference, sums - difference])
    else:
        signs = np.random.default_rng(0).choice([-1, 1], size=(RESAMPLES, len(differences)))
        signs[0] = 1  # the observed signs are one of the combinations, so p is never 0
        sums = signs @ differences
    observed = abs(differences.sum())
    return float(np.mean(np.abs(sums) >= observed - 1e-9 * np.abs(differences).sum()))


def mcnemar(right: ArrayLike, baseline_right: ArrayLike) -> float:
    """The exact two-sided p-value of McNemar's test (1947) on outcomes [Q] of the same questions.

    Only the questions that one of the two got right and the other wrong are informative: under the null hypothesis each
    of them goes either way with probability 1/2.
    """
    right, baseline_right = np.asarray(right, bool), np.asarray(baseline_right, bool)
    gained, lost = int((right & ~baseline_right).sum()), int((~right & baseline_right).sum())
    return float(stats.binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values (Holm 1979): the chance of any false rejection among all of them is at most the level.

    The smallest of m is multiplied by m, the next by m - 1 and so on; none is smaller than one before it, or above 1.
    """
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def adjusted(differences: Sequence[Difference]) -> list[Difference]:
    """The same differences with the p-values of Holm's correction, for comparisons that are read together."""
    p_values = holm([each.p_value for each in differences])
    return [
        replace(each, adjusted_p=p, num_comparisons=len(differences))
        for each, p in zip(differences, p_values, strict=True)
    ]


def least_pairs(num_comparisons: int = 1) -> int:
    """The number of pairs below which no outcome has an adjusted p of at most .05: six, and more for several arms."""
    return math.ceil(math.log2(2 * num_comparisons / ALPHA) - 1e-9)


# The detectable difference -------------------------------------------------------------------------------------------


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


def _detectable(differences: np.ndarray, limit: float, noise: float) -> float:
    """The smallest mean difference that the verdict would find in 80 % of repetitions with the observed spread.

    For unbounded outcomes it is that of the t-test. For bounded ones it is the smallest shift of the observed
    differences whose interval excludes 0, and .84 standard errors more: in 80 % of repetitions the mean is above that.
    """
    n = len(differences)
    if n < 2:
        return math.inf
    deviation = float(differences.std(ddof=1))
    per_error, power = stats.norm.ppf((1 + CONFIDENCE) / 2), float(stats.norm.ppf(POWER))
    if math.isinf(limit):
        return math.hypot(detectable_difference(deviation, n), noise * (1 + power / per_error))
    centred = differences - differences.mean()

    def is_shown(shift: float) -> bool:
        return _limits(np.clip(centred + shift, -limit, limit), limit, noise)[0] > 0

    low, high = 0.0, limit
    if not is_shown(high):
        return math.inf
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (low, middle) if is_shown(middle) else (middle, high)
    return high + power * math.hypot(deviation / math.sqrt(n), noise / per_error)


def _limits(differences: np.ndarray, limit: float, noise: float, level: float = CONFIDENCE) -> tuple[float, float]:
    _, low, high = interval(differences, None if math.isinf(limit) else (-limit, limit), noise, level)
    return float(low), float(high)


def _without_rounding(differences: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Sets differences that are only rounding errors (0.1 + 0.2 - 0.3) to 0; several could look like an effect."""
    return np.where(np.abs(differences) <= 1e-12 * scale, 0.0, differences)
