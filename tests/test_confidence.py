"""Limits of bounded means: against Clopper and Pearson's, random draws, and their own claim of coverage."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from grpo_jax import confidence
from grpo_jax.confidence import bounded_limits


@pytest.mark.parametrize(("won", "n"), [(0, 1), (1, 1), (2, 5), (5, 5), (9, 10), (0, 30), (7, 30), (13, 300)])
def test_of_outcomes_0_and_1_they_are_clopper_and_pearsons(won, n):
    expected = stats.binomtest(won, n).proportion_ci(0.95, method="exact")
    found = bounded_limits(np.repeat([1.0, 0.0], [won, n - won]))
    assert found == pytest.approx((expected.low, expected.high), abs=1e-7)


def test_of_more_outcomes_they_are_drawn_and_within_half_a_point():
    for won in (0, 3, 300, 597):
        expected = stats.binomtest(won, 600).proportion_ci(0.95, method="exact")
        found = bounded_limits(np.repeat([1.0, 0.0], [won, 600 - won]))
        assert found == pytest.approx((expected.low, expected.high), abs=2e-3)
        assert bounded_limits(np.repeat([1.0, 0.0], [won, 600 - won])) == found  # the seed is fixed


def test_drawn_and_computed_limits_agree_on_values_with_and_without_ties(monkeypatch):
    rng = np.random.default_rng(0)
    for values in (rng.beta(2, 1, 40), rng.binomial(8, 0.7, 40) / 8):
        computed = bounded_limits(values)
        monkeypatch.setattr(confidence, "EXACT", 10)
        assert np.allclose(bounded_limits(values), computed, atol=3e-3)
        monkeypatch.undo()


def test_the_distribution_function_is_that_of_weighted_sums():
    points = np.array([0.1, 0.2, 0.2, 0.7, 1.0])
    draws = np.random.default_rng(0).dirichlet(np.ones(5), 100_000) @ points
    for at in (0.15, 0.2, 0.35, 0.6, 0.9):
        found = confidence.weighted_sum_cdf(points[None], np.array([at]))
        assert found == pytest.approx((draws <= at).mean(), abs=0.005)


def test_limits_by_hand():
    """Three times .5: the upper limit is .5 w + 1 - w, and w has the distribution function w^3."""
    low, high = bounded_limits([0.5, 0.5, 0.5])
    w = 0.025 ** (1 / 3)
    assert (low, high) == pytest.approx((0.5 * w, 1 - 0.5 * w))
    assert bounded_limits([0.0, 0.0, 0.0], (-1, 1)) == pytest.approx((w - 1, 1 - w))
    assert bounded_limits([0.5, 0.5, 0.5], level=0.9)[0] == pytest.approx(0.5 * 0.05 ** (1 / 3))


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=12))
def test_limits_stay_within_the_bounds_and_contain_the_mean(values):
    low, high = bounded_limits(values, (-1, 1))
    assert -1 <= low <= np.mean(values) + 1e-12 and np.mean(values) - 1e-12 <= high <= 1
    inner_low, inner_high = bounded_limits(values, (-1, 1), level=0.9)
    assert low <= inner_low + 1e-9 and inner_high <= high + 1e-9


@given(st.lists(st.floats(0, 1), min_size=2, max_size=8))
def test_limits_depend_on_no_order_and_mirror_with_the_values(values):
    low, high = bounded_limits(values)
    assert bounded_limits(values[::-1]) == (low, high)
    assert bounded_limits(1 - np.array(values)) == pytest.approx((1 - high, 1 - low), abs=1e-7)


def test_each_row_has_its_own_limits():
    rows = np.random.default_rng(0).random((2, 3, 4))
    low, high = bounded_limits(rows)
    assert low.shape == high.shape == (2, 3)
    assert (low[1, 2], high[1, 2]) == bounded_limits(rows[1, 2])


def test_values_beyond_the_bounds_are_refused_and_rounding_is_not():
    with pytest.raises(ValueError, match="within 0 and 1"):
        bounded_limits([0.5, 1.2])
    with pytest.raises(ValueError, match="at least one"):
        bounded_limits([])
    assert bounded_limits([0.1 + 0.2 - 0.3 - 1e-10, 1 + 1e-10]) == bounded_limits([0.0, 1.0])


@pytest.mark.parametrize("n", [3, 5, 10, 20])
@pytest.mark.parametrize("collapses", [0.05, 0.1, 0.2, 0.5])
def test_the_mean_of_runs_that_collapse_is_covered(n, collapses):
    """500 repetitions; of 95 % the standard error is 1 point."""
    rows = np.where(np.random.default_rng(n).random((500, n)) < collapses, 0.0, 0.99)
    low, high = bounded_limits(rows)
    truth = 0.99 * (1 - collapses)
    assert ((low <= truth) & (truth <= high)).mean() > 0.94
