"""What a run came to."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from grpo_jax.evaluation import Evaluation
from grpo_jax.experiment import Experiment
from grpo_jax.policy import Policy


@dataclass(frozen=True)
class Stop:
    """What ended training early: after how many steps, by which callback or field of `GuardConfig`, and why."""

    steps: int
    by: str
    reason: str


@dataclass(frozen=True)
class Result:
    """What a run came to: evaluations by split, of the policy it began with, its own, and its control's.

    `group_before` and `group_after` are the completions of one held-out prompt with their rewards and advantages.
    `stop` says what ended training early; None for a run that made all of its steps.
    """

    run_dir: Path
    policy: Policy
    before: dict[str, Evaluation]
    after: dict[str, Evaluation]
    control: dict[str, Evaluation]
    group_before: list[dict[str, Any]]
    group_after: list[dict[str, Any]]
    seconds: float
    stop: Stop | None = None


def summarize(result: Result, experiment: Experiment) -> dict[str, Any]:
    """What summary.json says of a run."""

    def rows(evaluations: dict[str, Evaluation]) -> dict[str, Any]:
        return {split: evaluation.to_dict() for split, evaluation in evaluations.items()}

    return {
        "before": rows(result.before),
        "after": rows(result.after),
        "control": rows(result.control),
        "references": dict(experiment.task.references),
        "seconds": result.seconds,
        "stop": None if result.stop is None else asdict(result.stop),
    }
