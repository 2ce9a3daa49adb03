"""Arms with several seeds against a baseline: what the tables and the report of an ablation have in common."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from grpo_jax.statistics.differences import Difference, adjusted, paired_difference
from grpo_jax.statistics.intervals import Bounds, Estimate, mean


@dataclass(frozen=True)
class Score:
    """The value of a run, and half the width of its evaluation's own 95 % interval; 0 if it has none."""

    value: float
    noise: float = 0.0


@dataclass(frozen=True)
class Arm:
    """An arm's mean over its seeds, and its difference to the baseline.

    Both are None without a finished seed. `difference` is None for the baseline, and for an arm that has no seed in
    common with it.
    """

    mean: Estimate | None
    difference: Difference | None


def compare_arms(arms: Mapping[str, Mapping[int, Score]], baseline: str, bounds: Bounds | None) -> dict[str, Arm]:
    """Compares each arm (a score for each seed) with the baseline, seed by seed, with Holm's correction.

    All runs are evaluated on the same held-out prompts. So the spread over seeds lacks the variation that other prompts
    would bring. The intervals therefore include the evaluations' own intervals, added in quadrature: of an arm the mean
    over its seeds, of a difference those of both arms. They are then rather too wide: samples that vary from seed to
    seed count twice, and what makes a prompt hard for one arm often makes it hard for the other.
    """
    differences = {arm: found for arm, scores in arms.items()
                   if arm != baseline and (found := _difference(scores, arms[baseline], bounds))}  # fmt: skip
    corrected = dict(zip(differences, adjusted(list(differences.values())), strict=True))
    return {arm: Arm(_mean(list(scores.values()), bounds), corrected.get(arm)) for arm, scores in arms.items()}


def explanation(bounds: Bounds | None, *, has_noise: bool, margin: float | None = None) -> str:
    """One paragraph on what the intervals, the p-values and the verdicts of `compare_arms` are."""
    if bounds is None:
        kind = "Student's, which needs roughly normal values: where runs collapse it is too narrow"
    else:
        kind = "Gaffke's, which assume nothing but the metric's range and are therefore wide with few seeds"
    spread = "over seeds"
    if has_noise:
        spread += ", with the evaluation's own 95 % interval added in quadrature because all runs have the same prompts"
    same = "" if margin is None else f" The same: the 90 % interval is within ±{margin:g}."
    return (
        f"Intervals: 95 %, {spread}; {kind}. Each is of one comparison. Differences are paired by seed with the "
        "baseline. p: exact sign-flip test, corrected by Holm for all arms. Better or worse: p ≤ .05 and the interval "
        f"excludes 0.{same}"
    )


def _difference(scores: Mapping[int, Score], baseline: Mapping[int, Score], bounds: Bounds | None) -> Difference | None:
    """The paired difference at the seeds that both have; None if there is none."""
    seeds = [seed for seed in scores if seed in baseline]
    if not seeds:
        return None
    ours, theirs = [scores[seed] for seed in seeds], [baseline[seed] for seed in seeds]
    noise = (_noise(ours) ** 2 + _noise(theirs) ** 2) ** 0.5
    return paired_difference([s.value for s in ours], [s.value for s in theirs], bounds, noise)


def _mean(scores: Sequence[Score], bounds: Bounds | None) -> Estimate | None:
    return mean([score.value for score in scores], bounds, _noise(scores)) if scores else None


def _noise(scores: Sequence[Score]) -> float:
    return sum(score.noise for score in scores) / len(scores)
