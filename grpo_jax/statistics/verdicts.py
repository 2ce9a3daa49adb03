"""What a paired difference shows, in a few words."""

import math

from grpo_jax.statistics.differences import ALPHA, Difference, least_pairs


def verdict(difference: Difference, margin: float | None = None, unit: str = "seeds", *, points: bool = False) -> str:
    """A phrase about a value against its baseline. The first rule that holds decides.

    1. "better" or "worse than the baseline": the sign-flip test has an adjusted p of at most .05, and the 95 % interval
       of the mean difference excludes 0. Both are needed. The test asks whether the differences are symmetric about 0:
       it rejects that of an arm that is usually a little higher and sometimes collapses, whose mean is not higher.
    2. "the same within" a margin, if one is given: the 90 % interval is inside of ±margin. These are two one-sided
       tests at the 5 % level (Schuirmann 1987).
    3. "every pair is equal".
    4. "N seeds cannot show a difference": no outcome of so few pairs has an adjusted p of at most .05.
    5. "higher" or "lower at K of N seeds; the mean is not shown to be": the test rejects, and the interval includes 0.
       A collapse that is too rare to be among N seeds could undo the difference in the mean.
    6. "no difference shown", with the smallest difference that would have been found in 80 % of repetitions. If it is
       not smaller than the largest possible difference, none could have been found.

    Args:
      margin: the largest difference that counts as none, in the unit of the metric.
      unit: what the pairs are.
      points: whether differences of shares are said in points, 0.12 as 12 points.
    """
    n, is_higher = difference.num_pairs, difference.value > 0
    if difference.is_shown:
        return f"{'better' if is_higher else 'worse'} than the baseline"
    if margin is not None and -margin < difference.inner_low and difference.inner_high < margin:
        return f"the same as the baseline within ±{_said(margin, f'{margin:g}', points)}"
    if not difference.num_higher and not difference.num_lower:
        return "no difference (every pair is equal)"
    if n < (needed := least_pairs(difference.num_comparisons)):
        return f"{n} {unit if n > 1 else unit.removesuffix('s')} cannot show a difference ({needed} are needed)"
    if difference.adjusted_p <= ALPHA:
        word, times = ("higher", difference.num_higher) if is_higher else ("lower", difference.num_lower)
        return f"{word} at {times} of {n} {unit}; the mean is not shown to be"
    if difference.detectable >= difference.limit or math.isinf(difference.detectable):
        return f"no difference shown ({n} {unit} with this spread could not have shown any)"
    seen = _said(difference.detectable, f"{difference.detectable:.2g}", points)
    return f"no difference shown (could have seen ≥ {seen})"


def _said(value: float, plain: str, points: bool) -> str:
    return f"{100 * value:.3g} points" if points else plain
