"""Confidence intervals and paired tests (intervals.py), and the tables of an ablation (tables.py)."""

from grpo_jax.statistics.intervals import (
    CONFIDENCE,
    POWER,
    Difference,
    Estimate,
    clustered_standard_error,
    detectable_difference,
    interquartile_mean,
    mcnemar,
    mean,
    paired_difference,
    probability_of_improvement,
    question_difference,
    sign_flip_test,
    stratified_bootstrap,
    verdict,
)

__all__ = [
    "CONFIDENCE",
    "POWER",
    "Difference",
    "Estimate",
    "clustered_standard_error",
    "detectable_difference",
    "interquartile_mean",
    "mcnemar",
    "mean",
    "paired_difference",
    "probability_of_improvement",
    "question_difference",
    "sign_flip_test",
    "stratified_bootstrap",
    "verdict",
]
