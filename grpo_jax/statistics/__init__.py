"""Confidence intervals, paired tests and verdicts, and the tables of an ablation (tables.py)."""

from grpo_jax.statistics.arms import Arm, Score, compare_arms, explanation
from grpo_jax.statistics.differences import (
    FEW_QUESTIONS,
    POWER,
    Difference,
    adjusted,
    detectable_difference,
    holm,
    least_pairs,
    mcnemar,
    paired_difference,
    question_difference,
    sign_flip_test,
)
from grpo_jax.statistics.intervals import (
    CONFIDENCE,
    Bounds,
    Estimate,
    bounded_mean,
    clustered_standard_error,
    interquartile_mean,
    interval,
    mean,
    probability_of_improvement,
    stratified_bootstrap,
)
from grpo_jax.statistics.metrics import RATES, SHARES, bounds_of
from grpo_jax.statistics.verdicts import verdict

__all__ = [
    "CONFIDENCE",
    "FEW_QUESTIONS",
    "POWER",
    "RATES",
    "SHARES",
    "Arm",
    "Bounds",
    "Difference",
    "Estimate",
    "Score",
    "adjusted",
    "bounded_mean",
    "bounds_of",
    "clustered_standard_error",
    "compare_arms",
    "detectable_difference",
    "explanation",
    "holm",
    "interquartile_mean",
    "interval",
    "least_pairs",
    "mcnemar",
    "mean",
    "paired_difference",
    "probability_of_improvement",
    "question_difference",
    "sign_flip_test",
    "stratified_bootstrap",
    "verdict",
]
