"""Statistics against rliable, statsmodels, SciPy, arithmetic worked by hand, and their own claims of coverage."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from grpo_jax import statistics
from grpo_jax.statistics import Difference

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


@pytest.mark.parametrize("case", GOLDEN["mcnemar"], ids=lambda case: str(case["table"]))
def test_mcnemars_exact_test_is_statsmodels(case):
    (both, first), (second, neither) = case["table"]
    right = np.repeat([True, True, False, False], [both, first, second, neither])
    other = np.repeat([True, False, True, False], [both, first, second, neither])
    assert statistics.mcnemar(right, other) == pytest.approx(case["p"], rel=1e-9)


def test_mcnemar_by_hand():
    # Of ten questions one is lost and nine are gained: 2 * (1 + 10) / 2^10.
    assert statistics.mcnemar([1] * 9 + [0], [0] * 9 + [1]) == pytest.approx(22 / 1024)
    assert statistics.mcnemar([1, 0], [1, 0]) == 1.0


@pytest.mark.parametrize("n", [3, 5, 10, 34])
def test_the_detectable_difference_is_statsmodels(n):
    expected = GOLDEN["detectable"][str(n)]
    assert statistics.detectable_difference(1.0, n) == pytest.approx(expected, rel=1e-5)
    assert statistics.detectable_difference(3.0, n) == pytest.approx(3 * expected, rel=1e-5)


def test_one_pair_detects_nothing_and_many_pairs_what_the_normal_formula_says():
    assert statistics.detectable_difference(1.0, 1) == math.inf
    assert statistics.detectable_difference(1.0, 10_000) == pytest.approx((1.959964 + 0.841621) / 100, rel=1e-3)


# Paired differences --------------------------------------------------------------------------------------------------


def test_the_paired_interval_is_that_of_scipys_paired_t_test():
    x, y = SCORES[:5, 0], BASELINE[:, 0]
    expected = stats.ttest_rel(x, y).confidence_interval(0.95)
    found = statistics.paired_difference(x, y)
    assert (found.value, found.low, found.high) == pytest.approx((np.mean(x - y), *expected))


def test_five_differences_of_one_sign_have_the_smallest_p_that_five_can_have():
    assert statistics.sign_flip_test([1, 2, 3, 4, 5]) == 2 / 2**5


@given(st.lists(st.integers(-20, 20), min_size=2, max_size=9))
def test_the_exact_sign_flip_test_is_scipys(differences):
    options = dict(permutation_type="samples", n_resamples=np.inf, vectorized=True)
    sample = np.array(differences, float)
    expected = stats.permutation_test((sample, np.zeros(len(sample))), lambda x, y, axis: (x - y).mean(axis), **options)
    assert statistics.sign_flip_test(sample) == pytest.approx(expected.pvalue)


def test_many_pairs_are_flipped_at_random_and_repeatably():
    sample = np.random.default_rng(0).normal(0.4, 1, 40)
    found = statistics.sign_flip_test(sample)
    assert found == statistics.sign_flip_test(sample) == pytest.approx(stats.ttest_1samp(sample, 0).pvalue, abs=0.01)


def test_differences_that_are_rounding_alone_are_none():
    found = statistics.paired_difference([0.1 + 0.2] * 5, [0.3] * 5)
    assert (found.value, found.low, found.high, found.p_value) == (0, 0, 0, 1)
    assert statistics.verdict(found) == "no difference (every pair is equal)"


def test_pairs_must_be_pairs_and_numbers():
    with pytest.raises(ValueError, match="paired arrays"):
        statistics.paired_difference([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="finite"):
        statistics.mean([1.0, math.nan])


def test_student_covers_five_seeds_as_claimed_where_the_percentile_bootstrap_does_not():
    """2,000 repetitions of five normal differences of mean 1: the standard error of the first coverage is .5 %."""
    rng = np.random.default_rng(0)
    samples = rng.normal(1.0, 2.0, size=(2000, 5))
    intervals = [statistics.paired_difference(sample, np.zeros(5)) for sample in samples]
    assert np.mean([i.low <= 1 <= i.high for i in intervals]) == pytest.approx(0.95, abs=0.015)
    boots = [statistics.stratified_bootstrap(sample, np.mean) for sample in samples[:200]]
    assert 0.75 < np.mean([b.low <= 1 <= b.high for b in boots]) < 0.9


def test_the_detectable_difference_is_found_in_four_of_five_designs():
    effect = statistics.detectable_difference(2.0, 5)
    samples = np.random.default_rng(1).normal(effect, 2.0, size=(2000, 5))
    shown = [statistics.paired_difference(sample, np.zeros(5)).is_shown for sample in samples]
    assert np.mean(shown) == pytest.approx(0.8, abs=0.03)


# Evaluations on the same questions -----------------------------------------------------------------------------------


def test_clustered_errors_by_hand():
    # Scores 1 1 0 0 in two clusters of equals: deviations ±.5, variance 1/3, over n: 1/12; covariances 4 * .25 = 1,
    # over n²: 1/16. Each its own cluster: 1/12 alone.
    assert statistics.clustered_standard_error([1, 1, 0, 0], "aabb") == pytest.approx(math.sqrt(1 / 12 + 1 / 16))
    assert statistics.clustered_standard_error([1, 1, 0, 0], "abcd") == pytest.approx(math.sqrt(1 / 12))


def test_questions_with_one_outcome_each_are_compared_by_mcnemar():
    scores, baseline = np.array([1] * 9 + [0] * 11), np.array([0] * 9 + [1] + [0] * 10)
    found = statistics.question_difference(scores[:, None], baseline[:, None])
    assert found.value == pytest.approx(8 / 20)
    assert found.p_value == pytest.approx(22 / 1024)


def test_the_samples_of_a_question_are_one_cluster():
    scores = np.array([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 0, 0]])
    baseline = np.zeros_like(scores)
    found = statistics.question_difference(scores, baseline)
    means = np.array([0.5, 1.0, 0.0, 0.25])
    assert (found.value, found.num_pairs) == (means.mean(), 4)
    assert found.high - found.value == pytest.approx(stats.t.ppf(0.975, 3) * stats.sem(means))
    clusters = np.repeat(np.arange(4), 4)  # the same error by the formula for clusters, but for the divisor n - 1
    clustered = statistics.clustered_standard_error(scores.ravel(), clusters)
    assert clustered == pytest.approx(stats.sem(means) * math.sqrt(3 / 4), rel=0.02)


# Verdicts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "says"),
    [
        (0.1, 0.5, "better than the baseline"),
        (-0.5, -0.1, "worse than the baseline"),
        (-0.1, 0.5, "no difference shown (could have seen ≥ 0.25)"),
        (0.0, 0.5, "no difference shown (could have seen ≥ 0.25)"),
    ],
)
def test_a_verdict_is_better_or_worse_only_if_the_interval_excludes_0(low, high, says):
    assert statistics.verdict(Difference((low + high) / 2, low, high, 0.01, 0.25, 5)) == says


def test_one_seed_shows_no_difference():
    found = statistics.paired_difference([1.0], [0.0])
    assert (found.low, found.high) == (-math.inf, math.inf)
    assert statistics.verdict(found) == "no difference shown (one pair cannot show any)"
    assert statistics.stratified_bootstrap([1.0]).low == -math.inf
