"""What a run came to."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from grpo_jax.errors import UserError
from grpo_jax.evaluation import Evaluation
from grpo_jax.experiment import Experiment
from grpo_jax.policy import Policy
from grpo_jax.runs.run import Run


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


def read_result(run: Run) -> Result:
    """What a run came to, from its files: without the records of its evaluations, and without its groups.

    Raises `UserError` if summary.json is missing, or is not as a run writes it.
    """
    path = run.run_dir / "summary.json"

    def evaluations(name: str) -> dict[str, Evaluation]:
        found = {split: {**values, "records": []} for split, values in run.summary[name].items()}
        for values in found.values():
            values["pass_at_k"] = {int(k): value for k, value in values["pass_at_k"].items()}
        return {split: Evaluation(**values) for split, values in found.items()}

    try:
        before, after, control = map(evaluations, ("before", "after", "control"))
        seconds = float(run.summary["seconds"])
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(f"{path} is missing, damaged, or was edited: it does not say what the run came to.") from None
    return Result(run.run_dir, run.policy, before, after, control, [], [], seconds)


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
