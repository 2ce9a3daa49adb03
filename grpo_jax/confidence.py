"""Confidence limits of the mean of a bounded outcome, such as a success rate over seeds or over prompts.

The limits are those of Gaffke (2005), described by Learned-Miller & Thomas (2019, https://arxiv.org/abs/1905.06208).
They assume independent values in a known range, and nothing else. For outcomes of 0 and 1 they are Clopper and
Pearson's (1934). That they cover the mean for every distribution is a conjecture of these authors;
docs/results/interval_coverage.md has what a simulation found.
"""

import numpy as np
from numpy.typing import ArrayLike

LEVEL = 0.95
EXACT = 300  # with more values, the limits are quantiles of random draws
DRAWS = 20_000
HALVINGS = 30


def bounded_limits(
    values: ArrayLike, bounds: tuple[float, float] = (0.0, 1.0), level: float = LEVEL
) -> tuple[np.ndarray, np.ndarray]:
    """The lower and upper confidence limits [...] of the means of values [..., N], each row a sample of its own.

    The upper limit is a quantile, at `level` of .95 the 97.5 % quantile, of the sum of w_i x_i over N + 1 points: the
    values and the upper bound. The weights w have the flat Dirichlet distribution. The lower limit mirrors it. Up to
    `EXACT` values the quantile is computed from the distribution function, with an error of 1e-9 of the range. Beyond,
    it is that of `DRAWS` draws with a fixed seed, whose error is about 1 % of the interval's width.

    Raises:
      ValueError: if a value is outside of the bounds.
    """
    values = np.asarray(values, np.float64)
    bottom, top = bounds
    slack = 1e-9 * (top - bottom)  # of rounding, as in 1 - .9 - .1
    if not values.size or not ((values >= bottom - slack) & (values <= top + slack)).all():
        raise ValueError(f"values must be within {bottom:g} and {top:g}, and at least one.")
    rows = np.clip(values, bottom, top).reshape(-1, values.shape[-1])
    tail = (1 + level) / 2
    low, high = -_upper_limits(-rows, -bottom, tail), _upper_limits(rows, top, tail)
    shape = values.shape[:-1]
    means = rows.mean(-1)  # the limits contain the mean but for rounding
    return np.minimum(low, means).reshape(shape), np.maximum(high, means).reshape(shape)


def weighted_sum_cdf(points: np.ndarray, at: np.ndarray) -> np.ndarray:
    """P(sum of w_i z_i <= at [R]) for the sorted points z [R, N + 1] and weights w of the flat Dirichlet distribution.

    The density is the B-spline with the points as its knots (Curry & Schoenberg 1966). So the distribution function is
    the spline of degree N whose coefficients are 0 for the basis functions that begin before the first point, else 1.
    De Boor's recursion takes weighted means of these coefficients only, so rounding errors do not grow.
    """
    n = points.shape[1] - 1
    knots = np.concatenate([np.repeat(points[:, :1], n, 1), points, np.repeat(points[:, -1:], n, 1)], axis=1)
    interval = n + np.clip((points <= at[:, None]).sum(1) - 1, 0, n - 1)
    near = np.take_along_axis(knots, interval[:, None] + np.arange(-n, n + 1), axis=1)
    coefficients = (interval[:, None] + np.arange(-n, 1) >= n).astype(np.float64)
    for step in range(1, n + 1):
        left, right = near[:, step : n + 1], near[:, n + 1 : 2 * n + 2 - step]
        share = (at[:, None] - left) / np.where(right > left, right - left, 1.0)
        coefficients = coefficients[:, :-1] * (1 - share) + coefficients[:, 1:] * share
    return coefficients[:, 0]


def _upper_limits(rows: np.ndarray, top: float, tail: float) -> np.ndarray:
    """The quantile of order `tail` for each row [R, N] of values."""
    if rows.shape[1] > EXACT:
        return np.array([_drawn_limit(row, top, tail) for row in rows])
    points = np.sort(np.concatenate([rows, np.full((len(rows), 1), top)], axis=1), axis=1)
    low, high = points[:, 0].copy(), points[:, -1].copy()
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        is_below = weighted_sum_cdf(points, middle) < tail
        low, high = np.where(is_below, middle, low), np.where(is_below, high, middle)
    return high


def _drawn_limit(values: np.ndarray, top: float, tail: float) -> float:
    """The same quantile from random draws. Equal points share one weight, so that many of them cost little."""
    points, counts = np.unique(np.append(values, top), return_counts=True)
    rng = np.random.default_rng(0)
    weighted, total = np.zeros(DRAWS), np.zeros(DRAWS)
    for point, count in zip(points, counts, strict=True):
        weights = rng.standard_gamma(count, DRAWS)
        weighted += weights * point
        total += weights
    return float(np.quantile(weighted / total, tail))
