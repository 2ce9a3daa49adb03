"""Paired differences, their tests, and what they can detect: against statsmodels, SciPy and arithmetic by hand."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from grpo_jax import statistics
from grpo_jax.confidence import bounded_limits

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "statistics.json").read_text())
SCORES, BASELINE = np.array(GOLDEN["scores"]), np.array(GOLDEN["baseline"])


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
    for bounds in (None, (0, 1)):
        found = statistics.paired_difference([0.1 + 0.2] * 5, [0.3] * 5, bounds)
        assert (found.value, found.p_value, found.num_higher, found.num_lower) == (0, 1, 0, 0)
        assert found.low < 0 < found.high  # five equal pairs do not prove that the sixth is equal
        assert statistics.verdict(found) == "no difference (every pair is equal)"


def test_pairs_must_be_pairs_and_numbers():
    with pytest.raises(ValueError, match="paired arrays"):
        statistics.paired_difference([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="within -1 and 1"):
        statistics.paired_difference([3.0, 0.0], [0.0, 0.0], (0, 1))


def test_the_interval_of_bounded_outcomes_is_gaffkes_on_the_differences():
    found = statistics.paired_difference([0.9, 0.8, 0.7], [0.1, 0.3, 0.2], (0, 1))
    assert (found.low, found.high) == bounded_limits([0.8, 0.5, 0.5], (-1, 1))
    assert (found.inner_low, found.inner_high) == bounded_limits([0.8, 0.5, 0.5], (-1, 1), level=0.9)
    assert (found.limit, found.num_higher, found.num_lower) == (1, 3, 0)


def test_two_equal_differences_have_an_interval_with_a_width():
    found = statistics.paired_difference([0.4, 0.4], [0.5, 0.5], (0, 1))
    assert found.low < -0.5 and found.high > 0.5
    unbounded = statistics.paired_difference([4.0, 4.0], [5.0, 5.0])
    assert (unbounded.low, unbounded.high, unbounded.is_shown) == (-math.inf, math.inf, False)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=8))
@settings(max_examples=30, deadline=None)
def test_differences_of_bounded_outcomes_stay_within_bounds_and_contain_their_mean(pairs):
    ours, theirs = np.array(pairs).T
    found = statistics.paired_difference(ours, theirs, (0, 1), noise=0.3)
    assert -1 <= found.low <= found.value <= found.high <= 1
    assert 2 / 2 ** len(pairs) <= found.p_value <= 1


# Tests ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [14, 20])
def test_the_test_is_exact_beyond_ten_thousand_combinations(n):
    """Ones of both signs: the sum of random signs is 2 B - n for a binomial B. Sampled signs would differ by 1 %."""
    differences = np.array([1.0] * (n - 3) + [-1.0] * 3)
    expected = 2 * stats.binom.sf(n - 4, n, 0.5)
    assert statistics.sign_flip_test(differences) == pytest.approx(expected, rel=1e-9)
    assert statistics.sign_flip_test(np.arange(1.0, n + 1)) == 2 / 2**n


def test_all_signs_of_a_few_differences_by_enumeration():
    differences = np.array([0.3, -0.1, 0.7, 0.2, 0.05])
    sums = np.array([np.dot(signs, differences) for signs in itertools.product([-1, 1], repeat=5)])
    expected = np.mean(np.abs(sums) >= differences.sum() - 1e-12)
    assert statistics.sign_flip_test(differences) == pytest.approx(expected)


def test_holms_correction_by_hand():
    # Sorted: 4 x .005, 3 x .01, 2 x .03, and 1 x .04, which is raised to the .06 before it.
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([0.5, 0.9]) == [1.0, 1.0] and statistics.holm([]) == []


@pytest.mark.parametrize("case", GOLDEN["holm"], ids=lambda case: str(case["p"]))
def test_holms_correction_is_statsmodels(case):
    assert statistics.holm(case["p"]) == pytest.approx(case["adjusted"], rel=1e-12)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_a_corrected_p_is_never_smaller_and_keeps_the_order(p_values):
    found = statistics.holm(p_values)
    assert all(p <= q <= 1 for p, q in zip(p_values, found, strict=True))
    order = np.argsort(p_values)
    assert (np.diff(np.array(found)[order]) >= 0).all()


def test_more_arms_need_more_seeds_before_any_outcome_can_be_significant():
    assert [statistics.least_pairs(m) for m in (1, 2, 4, 8)] == [6, 7, 8, 9]
    for m in (1, 2, 4, 8):
        n = statistics.least_pairs(m)
        assert m * 2 / 2**n <= 0.05 < m * 2 / 2 ** (n - 1)


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


def test_the_detectable_difference_of_an_unbounded_metric_is_found_in_four_of_five_designs():
    effect = statistics.detectable_difference(2.0, 10)
    samples = np.random.default_rng(1).normal(effect, 2.0, size=(1000, 10))
    shown = [statistics.paired_difference(sample, np.zeros(10)).is_shown for sample in samples]
    assert np.mean(shown) == pytest.approx(0.8, abs=0.04)


def test_the_detectable_difference_of_a_bounded_metric_is_found_in_four_of_five_designs():
    """Measured in each of 200 designs with another sample; the spread is estimated, so not exactly four of five."""
    rng = np.random.default_rng(1)
    values = rng.beta(6, 6, (100, 12)) - 0.5  # a spread of .14 about 0
    effects = [statistics.paired_difference(v + 0.5, np.full(12, 0.5), (0, 1)).detectable for v in values[:5]]
    effect = float(np.median(effects))
    low, _ = bounded_limits(values + effect, (-1, 1))
    assert (low > 0).mean() == pytest.approx(0.8, abs=0.1)


def test_a_difference_that_is_as_large_as_the_range_cannot_be_detected():
    """Three equal differences of d have the lower limit w (1 + d) - 1 with w = .025^(1/3) = .29: below 0 for d = 1."""
    assert statistics.paired_difference([0.5] * 3, [0.4] * 3, (0, 1)).detectable == math.inf
    w = 0.025 ** (1 / 10)
    found = statistics.paired_difference([0.5] * 10, [0.4] * 10, (0, 1))
    assert found.detectable == pytest.approx(1 / w - 1, abs=3e-4)


def test_the_noise_of_the_evaluations_makes_a_detectable_difference_larger():
    """Unbounded: in quadrature, with noise .3 / 1.96 of which 1.96 and .84 more are needed.

    Bounded, ten equal differences: the shift s whose lower limit s - sqrt(((1 - w)(1 + s))² + .1²) is 0, and .84
    standard errors of .1 / 1.96 more.
    """
    alone = statistics.paired_difference([1.0, -1.0, 2.0, -2.0], [0.0] * 4)
    deviation = math.sqrt((1 + 1 + 4 + 4) / 3)
    assert alone.detectable == pytest.approx(statistics.detectable_difference(deviation, 4))
    noisy = statistics.paired_difference([1.0, -1.0, 2.0, -2.0], [0.0] * 4, noise=0.3)
    assert noisy.detectable == pytest.approx(math.hypot(alone.detectable, 0.3 * (1 + 0.841621 / 1.959964)))
    w = 0.025 ** (1 / 10)
    shifts = np.linspace(0, 1, 100_001)
    shift = shifts[shifts > np.hypot((1 - w) * (1 + shifts), 0.1)][0]
    found = statistics.paired_difference([0.5] * 10, [0.4] * 10, (0, 1), noise=0.1)
    assert found.detectable == pytest.approx(shift + 0.841621 * 0.1 / 1.959964, abs=5e-4)


def test_one_pair_has_an_interval_only_if_it_is_bounded_and_detects_nothing():
    """Its lower limit is w (1 + d) - 1 with w = .025: the interval of one Dirichlet weight."""
    found = statistics.paired_difference([0.9], [0.4], (0, 1))
    assert (found.value, found.p_value, found.num_pairs, found.detectable) == (0.5, 1, 1, math.inf)
    assert found.low == pytest.approx(0.025 * 1.5 - 1)
    unbounded = statistics.paired_difference([9.0], [4.0])
    assert (unbounded.value, unbounded.low, unbounded.high, unbounded.limit) == (5, -math.inf, math.inf, math.inf)


def test_a_range_that_is_not_one_limits_the_differences():
    found = statistics.paired_difference([5.0, 4.0], [1.0, 2.0], (1, 5))
    assert (found.value, found.limit) == (3, 4)
    assert (found.low, found.high) == bounded_limits([4.0, 2.0], (-4, 4))


def test_a_corrected_difference_keeps_the_rest_and_says_of_how_many_it_is_one():
    one = statistics.paired_difference([9.0, 8.5] * 3, [1.0] * 6)  # 2 / 2^6 = .03125
    other = statistics.paired_difference([0.5, 0.6, 0.4], [0.4, 0.5, 0.5], (0, 1))
    first, second = statistics.adjusted([other, one])
    assert (first.p_value, second.p_value) == (other.p_value, one.p_value) == (1.0, 2 / 64)
    assert (first.adjusted_p, second.adjusted_p) == (1.0, 4 / 64)
    assert [each.num_comparisons for each in (first, second)] == [2, 2] and one.num_comparisons == 1
    assert (second.low, second.num_higher) == (one.low, 6) and one.is_shown and not second.is_shown


# Evaluations on the same questions -----------------------------------------------------------------------------------


def test_questions_with_one_outcome_each_are_compared_by_mcnemar():
    scores, baseline = np.array([1] * 9 + [0] * 11), np.array([0] * 9 + [1] + [0] * 10)
    found = statistics.question_difference(scores[:, None], baseline[:, None])
    assert found.value == pytest.approx(8 / 20)
    assert found.p_value == pytest.approx(22 / 1024)


def test_the_samples_of_a_question_are_one_cluster():
    """Twelve questions of four samples each."""
    scores = np.array([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 0, 0]] * 3)
    found = statistics.question_difference(scores, np.zeros_like(scores))
    means = np.array([0.5, 1.0, 0.0, 0.25] * 3)
    assert (found.value, found.num_pairs) == (means.mean(), 12)
    assert (found.low, found.high) == bounded_limits(means, (-1, 1))
    clusters = np.repeat(np.arange(12), 4)  # the same error by the formula for clusters, but for the divisor n - 1
    clustered = statistics.clustered_standard_error(scores.ravel(), clusters)
    assert clustered == pytest.approx(stats.sem(means) * math.sqrt(11 / 12), rel=0.02)


def test_from_ten_questions_on_a_question_is_a_pair_and_below_a_sample_is():
    rng = np.random.default_rng(0)
    for questions, pairs in ((9, 18), (10, 10)):
        scores = (rng.random((questions, 2)) < 0.5).astype(float)
        found = statistics.question_difference(scores, np.zeros((questions, 2)))
        assert (found.num_pairs, found.value) == (pairs, pytest.approx(scores.mean()))
        expected = scores if questions == 9 else scores.mean(1)
        assert found.num_higher == (expected > 0).sum()


def test_samples_that_are_not_0_or_1_are_compared_by_the_sign_flip_test():
    scores, baseline = np.linspace(0.1, 0.9, 12), np.linspace(0.2, 0.8, 12)[::-1].copy()
    found = statistics.question_difference(scores, baseline)
    assert found.p_value == found.adjusted_p == statistics.sign_flip_test(scores - baseline)
    shares = statistics.question_difference(np.tile([[1.0, 0.0]], (12, 1)), np.zeros((12, 2)))
    assert (shares.value, shares.num_higher, shares.p_value) == (0.5, 12, 2 / 2**12)  # a mean of 2 is no outcome
    lost = statistics.question_difference([0, 0, 1] * 4, [1, 1, 1] * 4)
    assert (lost.num_lower, lost.num_higher, lost.value) == (8, 0, pytest.approx(-2 / 3))
    assert lost.p_value == lost.adjusted_p == pytest.approx(2 / 2**8)
    points = statistics.question_difference(100 * scores, 100 * baseline, bounds=(0, 100))
    assert points.limit == 100 and points.low == pytest.approx(100 * found.low, abs=1e-6)


def test_the_samples_of_a_single_question_are_compared_with_each_other():
    """POUND: 510 of 512 samples of one prompt succeed, against none."""
    scores, baseline = np.array([[1] * 510 + [0] * 2]), np.zeros((1, 512))
    found = statistics.question_difference(scores, baseline)
    assert (found.num_pairs, found.num_higher) == (512, 510)
    assert 0.95 < found.low < 510 / 512 < found.high <= 1
    assert found.p_value == pytest.approx(2 / 2.0**510) and found.is_shown
    assert statistics.verdict(found, unit="samples") == "better than the baseline"


def test_two_policies_that_are_equally_good_are_called_different_once_in_twenty():
    rng = np.random.default_rng(0)
    rows = (rng.random((300, 12, 8)) < 0.5).mean(2) - (rng.random((300, 12, 8)) < 0.5).mean(2)
    _, low, high = statistics.interval(rows, (-1, 1))
    assert ((low <= 0) & (high >= 0)).mean() > 0.94
