"""A step of a run, made again: are its completions and its metrics those that the run's files have?

The run's directory is read and never written to, so that the run may still be under way.
"""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from grpo_jax.errors import UserError
from grpo_jax.experiment import Experiment, code_of, info_at, load_run, read_run
from grpo_jax.experiment.recorded import jsonable
from grpo_jax.guards import Alarm
from grpo_jax.policy import Policy
from grpo_jax.runs import checkpoints, record, rollback
from grpo_jax.runs.difference import TIMES, Pair, condition_differences, rank, row_differences
from grpo_jax.runs.display import Display
from grpo_jax.runs.files import is_evaluation, read_rows
from grpo_jax.runs.log import RunLog
from grpo_jax.runs.restore import restore_policy, source_policy
from grpo_jax.training import Trainer


@dataclass(frozen=True)
class Replay:
    """A step that was made again.

    Attributes:
      step: its number.
      first_step: the step from which on the training was repeated, which is that of a checkpoint, or 0.
      completions: the step's completions, as rows of completions.jsonl.
      num_metrics: how many metrics were compared.
      metrics: those that differ: first as the run has them, then as they are now.
      completion_differences: the same for the completions, by their place in the step.
      conditions: what differs from the versions, devices and code that the run was begun with.
    """

    step: int
    first_step: int
    completions: list[dict[str, Any]]
    num_metrics: int
    metrics: list[Pair]
    completion_differences: dict[int, list[Pair]]
    conditions: list[Pair]

    @property
    def pairs(self) -> list[Pair]:
        """All values that differ."""
        return [*self.metrics, *(pair for pairs in self.completion_differences.values() for pair in pairs)]

    @property
    def is_same(self) -> bool:
        """Whether every number is the same, up to rounding."""
        return all(pair.is_rounding for pair in self.pairs)


def replay(run_dir: str | Path, step: int, *, quiet: bool = True) -> Replay:
    """Makes a step of a run again, and compares it with what the run has logged.

    The steps before it are made again from the run's newest checkpoint that is not after it, or else from the run's
    start. The experiment is that of the run's own copies of the user's files, as it was when the step was made.

    Args:
      run_dir: a run, a warm start or a control.
      quiet: show no progress.

    Raises:
      UserError: if the directory holds no run, or if the run has not logged that step. RunError: if a step fails.
    """
    run_dir = Path(run_dir)
    info = read_run(run_dir)
    metrics, completions = logged(run_dir, step)
    first, found = _make_again(run_dir, info, step, quiet=quiet)
    names = (metrics.keys() | found.metrics.keys()) - {"step", *TIMES}
    rows = {place: _at(completions, place) for place in range(max(len(completions), len(found.completions)))}
    differing = {place: row_differences(row, _at(found.completions, place)) for place, row in rows.items()}
    return Replay(
        step,
        first,
        found.completions,
        len(names),
        sorted(row_differences(metrics, found.metrics), key=lambda pair: rank(pair.name)),
        {place: pairs for place, pairs in differing.items() if pairs},
        [*condition_differences(info, record.conditions()), *_edited_files(run_dir, info_at(info, step))],
    )


def logged(run_dir: Path, step: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What a run has logged of a step: its metrics, and its completions.

    Raises:
      UserError: if there is no such step; it says which there are.
    """
    rows = {row["step"]: row for row in _steps(run_dir)}
    if not rows:
        raise UserError(f"the run {str(run_dir)!r} has logged no step yet.")
    if step not in rows:
        steps = f"steps {min(rows)} to {max(rows)}" if len(rows) > 1 else f"step {min(rows)} alone"
        raise UserError(f"the run {str(run_dir)!r} has no step {step}: it has logged {steps}.")
    return rows[step], [row for row in read_rows(run_dir / "completions.jsonl") if row.get("step") == step]


def _steps(run_dir: Path) -> Iterator[dict[str, Any]]:
    """The metrics of a run's steps, without its evaluations."""
    return (row for row in read_rows(run_dir / "metrics.jsonl") if not is_evaluation(row))


class _Memory(RunLog):
    """A log that writes nothing and keeps the last step, as a run's files would have it."""

    def __init__(self, place: Path, experiment: Experiment, display: Display) -> None:
        super().__init__(place, experiment, display=display)
        self.metrics: dict[str, Any] = {}
        self.completions: list[dict[str, Any]] = []

    def step(
        self,
        step: int,
        metrics: Mapping[str, float],
        completions: Sequence[Mapping[str, Any]] | None = None,
        histograms: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        self.metrics = jsonable({"step": step, **metrics})
        self.completions = [jsonable({"step": step, **row}) for row in completions or ()]
        self.display.update(step, metrics)

    def warn(self, alarm: Alarm) -> None:
        self.note(alarm.message)


def _make_again(run_dir: Path, info: Mapping[str, Any], step: int, *, quiet: bool) -> tuple[int, _Memory]:
    """Makes the steps up to `step` again; returns the first of them, and a log that has kept the last.

    Where the run was resumed, a new trainer goes on from a checkpoint, as it did in the run: the config or the files
    may have changed there.
    """
    directory = run_dir / "checkpoints"
    last = load_run(run_dir, step=step)
    possible = [kept for kept in checkpoints.kept_steps(directory) if kept <= step]
    if rolls_back := rollback.rolls_back(last):  # a spike goes back to a regular checkpoint, so begin with one
        possible = [kept for kept in possible if rollback.is_regular(last, kept)]
    begun = max(possible, default=0)
    resumed = {visit.get("step", 0) for visit in info_at(info, step)["resumed"]}
    edges = [begun, *sorted(edge for edge in resumed if edge > begun), step + 1]
    start: Policy | None = None
    with tempfile.TemporaryDirectory() as place:
        for first, stop in pairwise(edges):
            experiment = load_run(run_dir, step=first)
            start = _start_of(run_dir, experiment) if start is None else start
            display = Display(step + 1, title=f"replay of step {step}", quiet=quiet or begun == step)
            log = _Memory(Path(place), experiment, display)
            trainer = Trainer(experiment, start, log)
            if first:
                trainer.load_checkpoint(directory, first)
                trainer.guard.replay(row for row in _steps(run_dir) if row["step"] < first)
            for each in range(first, stop):
                if rolls_back and rollback.is_regular(experiment, each):
                    trainer.save(each)
                trainer.step(each)
            display.close()
            if stop <= step:
                trainer.save(stop)
                directory = Path(place) / "checkpoints"
    return begun, log


def _start_of(run_dir: Path, experiment: Experiment) -> Policy:
    """The policy that a run began with. A control begins where its run did."""
    parent = run_dir.resolve().parent
    if run_dir.resolve().name == "control" and (parent / "run.json").is_file():
        return _start_of(parent, load_run(parent))
    if experiment.warm_start is not None:
        return restore_policy(run_dir / "warm_start")
    return source_policy(experiment, read_run(run_dir).get("policy_commit"))


def _edited_files(run_dir: Path, info: Mapping[str, Any]) -> list[Pair]:
    """The run's copies of the user's files that are not what they were when they were copied."""
    return [
        Pair(str(path.relative_to(run_dir)), "as copied", "edited" if path.is_file() else "missing")
        for path in record.edited(run_dir, record.copies(code_of(info)))
    ]


def _at(rows: Sequence[Mapping[str, Any]], place: int) -> Mapping[str, Any]:
    return rows[place] if place < len(rows) else {}
