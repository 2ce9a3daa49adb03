"""What a run writes and shows: its directory, metrics, completions, its callbacks, and the progress display."""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from rich.console import Console

from grpo_jax.errors import RunError, UserError
from grpo_jax.experiment import Experiment, to_dict
from grpo_jax.guards import Alarm
from grpo_jax.runs import record
from grpo_jax.runs.callbacks import Callbacks, EndEvent, EvaluationEvent, StartEvent, Status, StepEvent
from grpo_jax.runs.display import Display
from grpo_jax.runs.files import (
    append_rows,
    assigned,
    is_evaluation,
    json_line,
    jsonable,
    read_rows,
    replace_bytes,
    sync,
    write_json,
    write_text,
    writing,
)
from grpo_jax.runs.lock import only_writer
from grpo_jax.runs.result import Result, Stop
from grpo_jax.runs.rows import COMPLETIONS, LOG, METRICS, Checksums, KeptLog, add_line, kept_log, key_of
from grpo_jax.runs.tensorboard import SAMPLE_TEXTS, TensorBoard


class RunLog:
    """Creates a run directory and writes to it while the run goes on.

    The directory holds `code` (the experiment's file and all files of the user that it uses, see
    `grpo_jax.experiment.sources`), `config.json`, `run.json`, `metrics.jsonl`, `completions.jsonl`, TensorBoard's
    `events`, `summary.json`, and `checkpoints` (see `grpo_jax.runs.checkpoints`).

    Steps count from 0: step s is the one made with the parameters after s updates, and an evaluation "at s" is one of
    those parameters. With `resume` nothing is written twice: what an interrupted run had written after its newest
    checkpoint is removed, and an evaluation replaces an earlier one at its step. Before that, the checkpoint and the
    rows of all steps before it are checked (see `grpo_jax.runs.rows`), and a run that is refused is left as it was. The
    record of how the run began stays: `config.json` is not written again, and run.json lists each visit under
    `resumed`, with the fields and files that have changed since (see `grpo_jax.runs.record`). The status in run.json
    ends as `finished`, `stopped` (a callback ended training early, which run.json names), `interrupted`
    (KeyboardInterrupt) or `failed`. A run that is refused before its first step (`UserError`) leaves no directory
    behind.
    With `resume` a run also begins where there is none: in a new or an empty directory, or in one whose run was killed
    before it had written run.json. While it goes on, no other process can write to the directory (see
    `grpo_jax.runs.lock`).
    Raises `UserError` for a directory that holds another run or that another process writes to, and `RunError` when
    something cannot be written.

    Args:
      source, overrides: the experiment's file and the assignments for it; `overrides` is None for an experiment that a
        program made (see `grpo_jax.experiment.source_of`).
      callbacks: what is told of the run, besides TensorBoard (see `grpo_jax.runs.callbacks`).

    Attributes:
      evaluations: the rows of all evaluations so far, in their order.
    """

    def __init__(
        self,
        run_dir: str | Path,
        experiment: Experiment,
        *,
        source: Path | None = None,
        overrides: Iterable[str] | None = (),
        resume: bool = False,
        display: Display | None = None,
        callbacks: Sequence[Any] = (),
    ) -> None:
        self.run_dir = Path(run_dir)
        self.display = display_of(experiment) if display is None else display
        self._experiment = experiment
        self._source = source
        self._overrides = None if overrides is None else list(overrides)
        self.resume = resume
        self._result: Result | None = None
        self._info: dict[str, Any] = {}
        self._kept: KeptLog | None = None
        self._checksums: dict[str, Checksums] = {METRICS: {}, COMPLETIONS: {}}
        self.evaluations: list[dict[str, Any]] = []
        self._is_new = False
        self._board = TensorBoard(self.run_dir / "events", text_every=max(1, experiment.num_steps // SAMPLE_TEXTS))
        self._callbacks = Callbacks(callbacks)
        self._lock = ExitStack()

    def __enter__(self) -> Self:
        with writing(self.run_dir):
            self._is_new = not self.run_dir.exists()
            record.require_place(self.run_dir, resume=self.resume)
            self.run_dir.mkdir(parents=True, exist_ok=True)
        with ExitStack() as undo:
            undo.enter_context(only_writer(self.run_dir))
            record.require_place(self.run_dir, resume=self.resume)  # now that nobody else writes there
            self._lock = undo.pop_all()
        try:
            self._begin()
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def _begin(self) -> None:
        """Writes how the run begins or goes on, and tells its callbacks."""
        changes: dict[str, Any] = {}
        if self.resume and (self.run_dir / "run.json").exists():
            record.require_whole(self.run_dir)
            self._kept = kept_log(self.run_dir)
            self._info = record.continue_run(self.run_dir, self._experiment, self._source, self._overrides)
            changes = self._info["resumed"][-1]["changes"]
        else:
            self._info = record.begin_run(self.run_dir, self._experiment, self._source, self._overrides)
        self._write_status("running", finished=None, stop=None)
        if not self.display.title:
            self.note(f"writing to {self.run_dir}")
        if (note := record.certificate_note(self.run_dir, self._experiment)) is not None:
            self.note(note)
        for name, (before, now) in changes.items():
            self.note(f"changed since the run began: {name} was {before}, and is {now} from here on")
        event = self._start_event()
        self._board.on_start(event)
        if self._kept is not None:
            self._rewind(self._kept)
        self._callbacks.start(event)

    def _start_event(self) -> StartEvent:
        arm = assigned(self._info).get("arm")
        name = self.run_dir.resolve().name if arm is None else f"{arm} seed {self._experiment.seed}"
        first_step = 0 if self._kept is None else self._kept.step
        return StartEvent(self.run_dir, name, arm, jsonable(to_dict(self._experiment)), first_step)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        with self._lock:
            self.display.close()
            if error is None:
                self._succeed()
            else:
                self._fail(error)

    def _succeed(self) -> None:
        try:
            self._end("finished" if self.stop is None else "stopped")
        except UserError as failure:  # of a callback at the end, or of the disk
            with suppress(RunError):  # the disk may still be full: the failure is what must be told
                self._write_status("failed", finished=record.now(), error=str(failure))
            raise

    def _fail(self, error: BaseException) -> None:
        refused = isinstance(error, UserError) and not isinstance(error, RunError)
        if refused and self._is_new and not self._has_begun():
            shutil.rmtree(self.run_dir, ignore_errors=True)  # refused before anything was done: nothing is left of it
            return
        if not self._info:
            return  # the run has not begun here: what is there is as it was
        status: Status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        with suppress(UserError):  # the disk is full, say: what went wrong first is what must be told
            self._end(status, error=None if status == "interrupted" else str(error))

    def _has_begun(self) -> bool:
        """Whether the run has anything to show: a step, an evaluation, or a warm start that was trained."""
        return any((self.run_dir / name).exists() for name in ("metrics.jsonl", "checkpoints", "warm_start"))

    def _end(self, status: Status, *, error: str | None = None) -> None:
        """Writes how the run ended and tells its callbacks: all of it that can be, and then what failed first."""
        event = EndEvent(status, self._result, error, self.stop)
        stop = None if self.stop is None else asdict(self.stop)
        ended = {"finished": record.now(), "stop": stop, **({} if error is None else {"error": error})}
        errors = []
        for part in (
            lambda: self._write_status(status, **ended),
            lambda: self._board.on_end(event),
            lambda: self._callbacks.end(event),
        ):
            try:
                part()
            except UserError as failure:
                errors.append(failure)
        if errors:
            raise errors[0]

    @property
    def stop(self) -> Stop | None:
        """Which callback or guard has ended training early; None if none has."""
        return self._callbacks.stop

    def step(
        self,
        step: int,
        metrics: Mapping[str, float],
        completions: Sequence[Mapping[str, Any]] | None = None,
        histograms: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """Records training step `step`: its metrics, its completions (`completions.jsonl`) and arrays to histogram."""
        self._append(METRICS, [{"step": step, **metrics}])
        self._append(COMPLETIONS, [{"step": step, **row} for row in completions or ()])
        event = StepEvent(step, dict(metrics), [dict(row) for row in completions or ()], dict(histograms or {}))
        self._board.on_step(event)
        self.display.update(step, metrics, event.first_group())
        self._callbacks.step(event)

    def evaluation(self, step: int, evaluation: Any) -> None:
        """Records an `Evaluation` (anything with its `to_dict`) of the policy after `step` updates."""
        values = evaluation.to_dict()
        split = values.pop("split", "held_out")
        prefix = "evaluation" if split == "held_out" else f"evaluation/{split}"
        row = {"step": step, **{f"{prefix}/{key}": value for key, value in _flat(values)}}
        if key_of(row) in self._checksums[METRICS]:  # of a run that was resumed: it is made again
            self._replace(row)
        else:
            self._append(METRICS, [row])
        others = [other for other in self.evaluations if key_of(other) != key_of(row)]
        self.evaluations = sorted([*others, row], key=_place)
        event = EvaluationEvent(step, evaluation, {name: value for name, value in row.items() if name != "step"})
        self._board.on_evaluation(event)
        self.display.evaluation(step, evaluation)
        self._callbacks.evaluation(event)

    def summary(self, values: Mapping[str, Any], result: Result | None = None) -> None:
        """Writes `summary.json`: what the run came to. The callbacks get `result` when the run ends."""
        write_json(self.run_dir / "summary.json", values)
        self._result = result

    def note(self, message: str) -> None:
        """Shows one line about what happens now."""
        self.display.note(message)

    @property
    def lacks_evaluation(self) -> bool:
        """Whether the evaluation at the step from which a run goes on is to be made again."""
        return self._kept is not None and not self._kept.is_evaluated

    @property
    def policy_commit(self) -> str | None:
        """The commit of the hub that the run's policy was loaded from when it began; None if that is not known."""
        return self._info.get("policy_commit")

    def starts_from(self, commit: str | None) -> None:
        """Records the commit of the hub that the policy was loaded from, so that it is loaded from there again."""
        if commit is not None and commit != self.policy_commit:
            self._write_status("running", policy_commit=commit)
            self.note(f"the policy is from the hub, at commit {commit}")

    def warn(self, alarm: Alarm) -> None:
        """Shows what is wrong with the training, and writes it to run.json, where reports find it.

        A warning is written under `warnings`. An alarm that stops the run does so after the step under way, as a
        callback's `StopTraining` does, and is the reason of `stop`.
        """
        warnings = list(self._info.get("warnings", ()))
        warning = {"kind": alarm.kind, "message": alarm.message}
        if alarm.stopped_by:
            self._callbacks.stop = self._callbacks.stop or Stop(alarm.step + 1, alarm.stopped_by, alarm.message)
        elif warning not in warnings:  # a run that is resumed may come to the same step again
            self._info = record.with_checksum({**self._info, "warnings": [*warnings, warning]})
            write_json(self.run_dir / "run.json", self._info)
        self.note(alarm.message)

    def seal(self) -> dict[str, str]:
        """Makes the log as durable as a checkpoint; returns the file by which the checkpoint knows the log's rows."""
        with writing(self.run_dir):
            for path in (self.run_dir / METRICS, self.run_dir / COMPLETIONS, self.run_dir):
                if path.exists():
                    sync(path)
        return {LOG: json.dumps(self._checksums)}

    def _append(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        for row, line in zip(rows, append_rows(self.run_dir / name, rows), strict=True):
            add_line(self._checksums[name], key_of(row), line)

    def _replace(self, row: Mapping[str, Any]) -> None:
        """Puts an evaluation where it belongs, instead of one that was made before. Other lines stay as they are."""
        path, key = self.run_dir / METRICS, key_of(row)
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        rows = zip(read_rows(path), lines, strict=True)
        others = [(_place(other), line) for other, line in rows if key_of(other) != key]
        self._checksums[METRICS].pop(key, None)
        line = json_line(row).encode()
        add_line(self._checksums[METRICS], key, line)
        placed = sorted([*others, (_place(row), line)], key=lambda each: each[0])
        write_text(path, b"".join(line for _, line in placed).decode())

    def _rewind(self, kept: KeptLog) -> None:
        """Removes what an interrupted run has written after its checkpoint."""
        for name, rows in kept.files.items():
            path = self.run_dir / name
            self._checksums[name] = dict(rows.checksums)
            if path.exists():
                write_text(path, b"".join(rows.lines).decode())
        self.evaluations = [row for row in read_rows(self.run_dir / METRICS) if is_evaluation(row)]
        self._board.rewind(kept.step, [row for row in self.evaluations if row["step"] == kept.step])

    def _write_status(self, status: str, **more: Any) -> None:
        self._info = record.with_checksum({**self._info, "status": status, **more})
        path = self.run_dir / "run.json"
        try:
            write_json(path, self._info)
        except RunError:
            if status == "failed":  # a full disk has no room for another file, but this one can be changed in its place
                replace_bytes(path, b'"status": "running"', b'"status": "failed" ')
            raise


def display_of(
    experiment: Experiment, *, title: str = "", quiet: bool = False, console: Console | None = None
) -> Display:
    """The progress display of a run, a warm start or a control (its `title`)."""
    return Display(experiment.num_steps, experiment.token_budget, title=title, quiet=quiet, console=console)


def _flat(values: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def _place(row: Mapping[str, Any]) -> tuple[int, int]:
    """Where a row belongs in a file: the evaluations at a step come before the step, which moves the parameters."""
    return row["step"], int(not is_evaluation(row))
