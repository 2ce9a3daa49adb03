"""Intervals of means against rliable, SciPy, arithmetic worked by hand, and their own claims of coverage."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from grpo_jax import statistics
from grpo_jax.confidence import bounded_limits

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "statistics.json").read_text())
SCORES, BASELINE = np.array(GOLDEN["scores"]), np.array(GOLDEN["baseline"])


# Against others' numbers ---------------------------------------------------------------------------------------------


def test_the_interquartile_mean_is_rliables():
    assert statistics.interquartile_mean(SCORES) == pytest.approx(GOLDEN["interquartile_mean"], rel=1e-12)


def test_the_interquartile_mean_of_five_seeds_leaves_out_the_best_and_the_worst():
    assert statistics.interquartile_mean([0.0, 0.5, 0.6, 0.7, 100.0]) == pytest.approx((0.5 + 0.6 + 0.7) / 3)


def test_the_stratified_bootstrap_interval_is_rliables():
    found = statistics.stratified_bootstrap(SCORES)
    assert found.value == pytest.approx(GOLDEN["interquartile_mean"])
    assert (found.low, found.high) == pytest.approx(GOLDEN["interval"], abs=3e-3)  # two different sets of resamples


def test_strata_are_drawn_from_themselves():
    apart = np.array([[0.0, 100.0], [1.0, 101.0]])  # a mean over one draw of each stratum is 50, 50.5 or 51
    found = statistics.stratified_bootstrap(apart, np.mean)
    assert (found.value, found.low, found.high) == (50.5, 50.0, 51.0)


def test_the_bootstrap_interval_of_a_mean_is_scipys():
    values = SCORES[:, 0]
    expected = stats.bootstrap((values,), np.mean, method="percentile", rng=np.random.default_rng(3))
    found = statistics.stratified_bootstrap(values, np.mean)
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval), abs=0.01)


def test_the_probability_of_improvement_is_rliables_and_of_one_task_mann_whitneys():
    found = statistics.probability_of_improvement(SCORES, BASELINE)
    assert found == pytest.approx(GOLDEN["probability_of_improvement"], rel=1e-12)
    x, y = SCORES[:, 0], BASELINE[:, 0]
    expected = stats.mannwhitneyu(x, y).statistic / (len(x) * len(y))
    assert statistics.probability_of_improvement(x, y) == pytest.approx(expected)


def test_a_tie_is_half_an_improvement():
    assert statistics.probability_of_improvement([1, 2], [1, 1]) == (0.5 + 0.5 + 1 + 1) / 4


# Means of seeds ------------------------------------------------------------------------------------------------------


def test_the_interval_of_an_unbounded_mean_is_students():
    values = SCORES[:5, 0]
    found = statistics.mean(values)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx(tuple(expected))


def test_the_interval_of_success_rates_stays_within_0_and_1():
    """POUND's five seeds, of which one collapsed; Student's interval is [.255, 1.251]."""
    values = [0.99, 0.95, 0.9, 0.92, 0.005]
    found = statistics.mean(values, bounds=(0, 1))
    assert 0 < found.low < found.value < found.high < 1
    assert statistics.mean(values).high > 1
    assert statistics.bounded_mean(values) == found


def test_five_seeds_that_collapse_once_in_ten_are_covered_where_student_covers_two_in_five():
    """The chance that none of five collapses is .59: Student's interval then has no width and misses .891."""
    rows = np.where(np.random.default_rng(0).random((1000, 5)) < 0.1, 0.0, 0.99)
    _, low, high = statistics.interval(rows, (0, 1))
    assert ((low <= 0.891) & (high >= 0.891)).mean() > 0.95
    _, low, high = statistics.interval(rows + 1e-9 * np.arange(5), None)
    assert ((low <= 0.891) & (high >= 0.891)).mean() < 0.45


def test_equal_values_without_bounds_have_no_interval():
    found = statistics.mean([0.3, 0.3, 0.1 + 0.2])
    assert (found.low, found.high) == (-math.inf, math.inf)


def test_the_noise_of_the_evaluations_is_added_in_quadrature_and_stays_within_bounds():
    alone = statistics.mean([0.5, 0.6, 0.7], (0, 1))
    wider = statistics.mean([0.5, 0.6, 0.7], (0, 1), noise=0.1)
    assert wider.value - wider.low == pytest.approx(math.hypot(alone.value - alone.low, 0.1))
    assert wider.high - wider.value == pytest.approx(math.hypot(alone.high - alone.value, 0.1))
    assert statistics.mean([1.0] * 3, (0, 1), noise=0.1).high == 1


def test_student_covers_five_normal_seeds_and_the_percentile_bootstrap_does_not():
    """2,000 repetitions of five normal values of mean 1: the standard error of the first coverage is .5 %."""
    rng = np.random.default_rng(0)
    samples = rng.normal(1.0, 2.0, size=(2000, 5))
    _, low, high = statistics.interval(samples, None)
    assert ((low <= 1) & (high >= 1)).mean() == pytest.approx(0.95, abs=0.015)
    boots = [statistics.stratified_bootstrap(sample, np.mean) for sample in samples[:200]]
    assert 0.75 < np.mean([b.low <= 1 <= b.high for b in boots]) < 0.9


def test_clustered_errors_by_hand():
    # Scores 1 1 0 0 in two clusters of equals: deviations ±.5, variance 1/3, over n: 1/12; covariances 4 * .25 = 1,
    # over n²: 1/16. Each its own cluster: 1/12 alone.
    assert statistics.clustered_standard_error([1, 1, 0, 0], "aabb") == pytest.approx(math.sqrt(1 / 12 + 1 / 16))
    assert statistics.clustered_standard_error([1, 1, 0, 0], "abcd") == pytest.approx(math.sqrt(1 / 12))


def test_values_must_be_numbers_and_there_must_be_some():
    for values in ([1.0, math.nan], []):
        with pytest.raises(ValueError, match="finite"):
            statistics.mean(values)


def test_an_interval_of_another_level_has_noise_of_that_level():
    """Half a width of .2 at 95 % is .2 x 1.645 / 1.96 at 90 %."""
    values = np.array([0.2, 0.4, 0.5])
    centre, low, high = statistics.interval(values, (0, 1), 0.2, level=0.9)
    alone_low, alone_high = bounded_limits(values, (0, 1), level=0.9)
    noise = 0.2 * 1.644854 / 1.959964
    assert low == pytest.approx(max(centre - math.hypot(centre - alone_low, noise), 0))
    assert high == pytest.approx(centre + math.hypot(alone_high - centre, noise))
    _, low, high = statistics.interval(values, None, level=0.9)
    assert (low, high) == pytest.approx(tuple(stats.ttest_1samp(values, 0).confidence_interval(0.9)))


def test_each_row_has_the_noise_of_its_own_and_stays_within_its_bounds():
    rows = np.array([[0.0, 0.1], [0.9, 1.0]])
    _, low, high = statistics.interval(rows, (0, 1), np.array([0.5, 0.0]))
    alone = bounded_limits(rows, (0, 1))
    assert low[0] == 0 and (low[1], high[1]) == pytest.approx((alone[0][1], alone[1][1]))
    assert high[0] == pytest.approx(0.05 + math.hypot(alone[1][0] - 0.05, 0.5))


def test_the_probability_of_improvement_is_of_the_first_over_the_second():
    assert statistics.probability_of_improvement([3, 4], [1, 2, 3]) == (1 + 1 + 0.5 + 1 + 1 + 1) / 6


def test_the_seed_of_the_bootstrap_makes_its_draws():
    values = np.random.default_rng(0).normal(size=7)
    one = statistics.stratified_bootstrap(values, np.mean)
    assert one == statistics.stratified_bootstrap(values, np.mean, seed=0)
    assert one != statistics.stratified_bootstrap(values, np.mean, seed=1)


def test_one_run_has_no_bootstrap_interval():
    assert statistics.stratified_bootstrap([1.0]).low == -math.inf


# Bounds of metrics ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "metric",
    [
        *statistics.RATES,
        "evaluation/pass_at_k/4",
        "pass@8",
        "frac_dropped",
        "clip_ratio/low_mean",
        "rewards/accuracies",
        "win_rate",
        "evaluation/win_rate",
        "accuracy",
        "evaluation/accuracy",
        "pass_at_k/2",
        "completions/top_share",
        "completions/most_common_ratio",
        "completions/clipped_ratio",
        "completions/unique_fraction",
    ],
)
def test_shares_are_bounded(metric):
    assert statistics.bounds_of(metric) == (0, 1)


@pytest.mark.parametrize(
    "metric",
    ["reward", "evaluation/mean_length", "rewards/success_bonus/mean", "kl", "entropy", "success/count", "my_success",
     "clip_ratios", "rewards/frac/std", "completions/mean_length"],
)  # fmt: skip
def test_rewards_and_lengths_are_not(metric):
    assert statistics.bounds_of(metric) is None
