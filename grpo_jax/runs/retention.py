"""Which checkpoints of a run remain, and which steps are saved for their sake."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from grpo_jax.errors import UserError
from grpo_jax.experiment import CheckpointConfig
from grpo_jax.experiment.overrides import nearest
from grpo_jax.runs.files import is_evaluation


def scores(config: CheckpointConfig, rows: Iterable[Mapping[str, Any]]) -> dict[int, float]:
    """What the policy scored after steps that were evaluated, by `config.metric`, from the rows of metrics.jsonl.

    The policy before training has no checkpoint and no score, nor has an evaluation whose metric is not finite.
    Raises `UserError` if the evaluations have no such metric.
    """
    if not config.best:
        return {}
    found = [row for row in rows if is_evaluation(row)]
    names = sorted({name for row in found for name in row if name.startswith("evaluation/")})
    if found and config.metric not in names:
        raise UserError(
            f"checkpoints.metric = {config.metric!r}, and the evaluations have no such metric"
            f"{nearest(config.metric, names)}"
        )
    return {row["step"]: row[config.metric] for row in found if row["step"] and row.get(config.metric) is not None}


def best_of(config: CheckpointConfig, steps: Iterable[int], scores: Mapping[int, float]) -> list[int]:
    """Of some steps the best that `config` keeps, the very best first."""
    scored = [step for step in steps if step in scores]
    return sorted(scored, key=lambda step: (-scores[step], step))[: config.best]


def remaining(config: CheckpointConfig, steps: Sequence[int], scores: Mapping[int, float]) -> set[int]:
    """Of the steps that are saved, in their order, those that remain."""
    kept = {*steps[-config.last :], *best_of(config, steps, scores)}
    return kept | {step for step in steps if config.every and step % config.every == 0}


def is_wanted(config: CheckpointConfig, step: int, scores: Mapping[int, float]) -> bool:
    """Whether a step is to be saved because it would remain as one of the best, or for good."""
    return step in best_of(config, scores, scores) or (config.every > 0 and step % config.every == 0)
