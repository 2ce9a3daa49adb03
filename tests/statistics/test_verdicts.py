"""Verdicts on examples whose answer is known by hand."""

from dataclasses import replace

import numpy as np
import pytest

from grpo_jax import statistics
from grpo_jax.statistics import Score


def verdict(differences, **options) -> str:
    """The verdict on differences of a success rate."""
    return statistics.verdict(
        statistics.paired_difference(np.add(differences, 0.5), [0.5] * len(differences), (0, 1)), **options
    )


def test_one_pair_two_equal_pairs_and_five_cannot_show_anything():
    assert verdict([0.4]) == "1 seed cannot show a difference (6 are needed)"
    assert verdict([-0.3, -0.3]) == "2 seeds cannot show a difference (6 are needed)"
    found = statistics.paired_difference([1, 1, 1, 1, 0], [0] * 5, (0, 1))
    assert found.p_value == 0.125
    assert statistics.verdict(found) == "5 seeds cannot show a difference (6 are needed)"


def test_with_several_arms_more_seeds_are_needed():
    found = statistics.paired_difference([0.95] * 6, [0.05] * 6, (0, 1))
    assert statistics.verdict(found) == "better than the baseline"
    three = statistics.adjusted([found] * 3)
    assert [each.adjusted_p for each in three] == pytest.approx([3 * 2 / 2**6] * 3)
    assert statistics.verdict(three[0]) == "6 seeds cannot show a difference (7 are needed)"


def test_better_and_worse_need_the_test_and_the_interval():
    assert statistics.verdict(statistics.paired_difference([0.1] * 8, [0.9] * 8, (0, 1))) == "worse than the baseline"
    better = statistics.paired_difference([0.9] * 8, [0.1] * 8, (0, 1))
    assert statistics.verdict(better) == "better than the baseline"
    assert not replace(better, adjusted_p=0.06).is_shown
    assert not replace(better, low=-0.01).is_shown


def test_an_arm_that_is_a_little_higher_and_may_collapse_is_not_called_better():
    """+.004 in all twenty of twenty seeds, as 36 % of samples of an arm are that collapses once in twenty."""
    assert verdict([0.004] * 20) == "higher at 20 of 20 seeds; the mean is not shown to be"
    assert verdict([-0.004] * 19 + [0.003]) == "lower at 19 of 20 seeds; the mean is not shown to be"


def test_an_arm_of_equal_mean_that_collapses_is_hardly_ever_called_better():
    """Student's interval excludes 0 in 63 % of repetitions, at ten seeds; its truth is a difference of 0."""
    rows = np.where(np.random.default_rng(0).random((200, 10)) < 0.05, -0.076, 0.004)
    _, low, high = statistics.interval(rows, (-1, 1))
    assert np.mean((low > 0) | (high < 0)) < 0.02  # and a verdict needs the test too
    _, low, high = statistics.interval(rows + 1e-12 * np.arange(10), None)
    assert np.mean((low > 0) | (high < 0)) > 0.5


def test_the_same_needs_a_margin_and_enough_seeds():
    """The 90 % limits of n differences of 0 are ± (1 - .05^(1/n)): .049 at sixty, .095 at thirty."""
    assert verdict([0.0] * 60, margin=0.05) == "the same as the baseline within ±0.05"
    assert verdict([0.0] * 30, margin=0.05) == "no difference (every pair is equal)"
    assert verdict([0.0] * 60) == "no difference (every pair is equal)"
    assert "same" not in verdict([0.01, -0.01] * 30)


def test_what_could_have_been_seen_is_a_possible_difference():
    spread = [0.5, -0.5, 0.3, -0.3, 0.4, -0.4, 0.2, -0.2]
    assert verdict(spread) == "no difference shown (could have seen ≥ 0.76)"
    said = statistics.verdict(statistics.paired_difference([1, 0] * 4, [0, 1] * 4, (0, 1)))
    assert said == "no difference shown (8 seeds with this spread could not have shown any)"
    unbounded = statistics.paired_difference([4.0, -4.0, 1.0, -1.0, 2.0, -2.0], [0.0] * 6)
    assert statistics.verdict(unbounded).startswith("no difference shown (could have seen ≥ ")


def test_the_noise_of_the_evaluations_can_undo_a_verdict():
    """Eight differences of .6 have the lower limit 1.6 x .025^(1/8) - 1 = .009, and less with the noise of prompts."""
    arms = {"new": dict.fromkeys(range(8), Score(0.8)), "old": dict.fromkeys(range(8), Score(0.2))}
    quiet = statistics.compare_arms(arms, "old", (0, 1))["new"].difference
    assert statistics.verdict(quiet) == "better than the baseline" and quiet.low == pytest.approx(0.0088, abs=1e-3)
    noisy = {arm: {seed: Score(score.value, 0.1) for seed, score in scores.items()} for arm, scores in arms.items()}
    found = statistics.compare_arms(noisy, "old", (0, 1))
    assert found["new"].difference.low == pytest.approx(0.6 - np.hypot(0.6 - quiet.low, np.hypot(0.1, 0.1)))
    assert statistics.verdict(found["new"].difference) == "higher at 8 of 8 seeds; the mean is not shown to be"
    assert found["old"].mean.high == pytest.approx(0.2 + np.hypot(0.8 * (1 - 0.025 ** (1 / 8)), 0.1))


def test_arms_share_their_correction_and_an_arm_without_common_seeds_has_no_difference():
    arms = {
        "old": {seed: Score(0.1) for seed in range(8)},
        "new": {seed: Score(0.9) for seed in range(8)},
        "newer": {seed: Score(0.2 - 0.15 * (seed % 2)) for seed in range(8)},
        "other seeds": {9: Score(0.5)},
        "nothing": {},
    }
    found = statistics.compare_arms(arms, "old", (0, 1))
    assert found["new"].difference.adjusted_p == 2 * found["new"].difference.p_value
    assert found["newer"].difference.num_comparisons == 2
    assert found["other seeds"].difference is None and found["other seeds"].mean is not None
    assert found["nothing"].mean is None and found["old"].difference is None


def test_the_explanation_says_which_interval_it_is():
    rates = statistics.explanation((0, 1), has_noise=True, margin=0.05)
    assert "Gaffke's" in rates and "added in quadrature" in rates and "±0.05" in rates
    other = statistics.explanation(None, has_noise=False)
    assert "Student's" in other and "quadrature" not in other and "margin" not in other
    assert "P(better)" not in other and other == (
        "Intervals: 95 %, over seeds; Student's, which needs roughly normal values: where runs collapse it is too "
        "narrow. Each is of one comparison. Differences are paired by seed with the baseline. p: exact sign-flip test, "
        "corrected by Holm for all arms. Better or worse: p ≤ .05 and the interval excludes 0."
    )
    assert rates.endswith("excludes 0. The same: the 90 % interval is within ±0.05.")


def test_pairs_have_the_same_seed_whatever_the_order_and_each_interval_the_noise_of_its_own_seeds():
    """New has the noises .1, .3 and .8 at seeds 2, 0 and 9, and old .2 and .4 at 0 and 2.

    Of new alone the mean noise is .4. Of the pairs, seeds 0 and 2, it is .2 and .3.
    """
    new = {2: Score(0.9, 0.1), 0: Score(0.5, 0.3), 9: Score(0.1, 0.8)}
    old = {0: Score(0.4, 0.2), 2: Score(0.2, 0.4)}
    found = statistics.compare_arms({"new": new, "old": old}, "old", (0, 1))
    expected = statistics.paired_difference([0.9, 0.5], [0.2, 0.4], (0, 1), noise=(0.2**2 + 0.3**2) ** 0.5)
    difference = found["new"].difference
    for name in ("value", "low", "high", "inner_low", "inner_high", "detectable", "p_value", "num_higher"):
        assert getattr(difference, name) == pytest.approx(getattr(expected, name)), name
    assert expected.value == pytest.approx((0.7 + 0.1) / 2)
    assert found["new"].mean.low == pytest.approx(statistics.mean([0.9, 0.5, 0.1], (0, 1), noise=0.4).low)
    assert found["old"].mean.high == pytest.approx(statistics.mean([0.4, 0.2], (0, 1), noise=0.3).high)
    reward = statistics.compare_arms({"new": new, "old": old}, "old", None)
    assert reward["new"].difference.limit == np.inf
    assert reward["old"].mean.high == pytest.approx(statistics.mean([0.4, 0.2], noise=0.3).high)


def test_a_score_has_no_noise_unless_it_is_given():
    found = statistics.compare_arms({"old": {0: Score(0.4), 1: Score(0.6)}}, "old", (0, 1))
    assert found["old"].mean == statistics.mean([0.4, 0.6], (0, 1))


def test_limits_of_a_verdict_are_where_they_are_said_to_be():
    """At p = .05 exactly the test rejects; an interval that touches 0 does not exclude it; nor is ±margin inside."""
    shown = replace(statistics.paired_difference([0.9] * 8, [0.1] * 8, (0, 1)), adjusted_p=0.05)
    assert shown.is_shown and not replace(shown, low=0.0).is_shown
    worse = replace(shown, value=-0.8, low=-0.9, high=-0.1)
    assert worse.is_shown and not replace(worse, high=0.0).is_shown
    assert statistics.verdict(worse) == "worse than the baseline"
    inner = replace(shown, low=-0.1, inner_low=-0.04, inner_high=0.05)
    assert statistics.verdict(inner, 0.06, points=True) == "the same as the baseline within ±6 points"
    for margin in (0.05, 0.04):
        assert statistics.verdict(inner, margin) == "higher at 8 of 8 seeds; the mean is not shown to be"
    assert statistics.verdict(replace(inner, inner_low=-0.05, inner_high=0.04), 0.05).startswith("higher")


def test_a_difference_that_could_not_be_shown_says_so_in_its_unit():
    few = statistics.paired_difference([0.5, 0.6], [0.1, 0.1], (0, 1))
    assert statistics.verdict(few, unit="samples") == "2 samples cannot show a difference (6 are needed)"
    assert verdict([0.4], unit="samples") == "1 sample cannot show a difference (6 are needed)"
    plain = replace(statistics.paired_difference([1.0, 0.0] * 4, [0.5] * 8, (0, 1)), detectable=0.305)
    assert statistics.verdict(plain, points=True) == "no difference shown (could have seen ≥ 30.5 points)"
    assert statistics.verdict(plain) == "no difference shown (could have seen ≥ 0.3)"
    none = "no difference shown (8 seeds with this spread could not have shown any)"
    assert statistics.verdict(replace(plain, detectable=1.0)) == none
    assert statistics.verdict(replace(plain, detectable=np.inf, limit=np.inf)) == none
