"""What a run writes and shows: its directory, metrics, TensorBoard events, completions, and the progress display."""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from rich.console import Console
from tensorboardX import summary as proto
from tensorboardX.event_file_writer import EventsWriter  # without the thread of SummaryWriter, which hides a full disk
from tensorboardX.proto.event_pb2 import Event, SessionLog

from grpo_jax.errors import RunError, UserError
from grpo_jax.experiment import Experiment
from grpo_jax.runs import record
from grpo_jax.runs.display import Display, markdown_table
from grpo_jax.runs.files import append_rows, json_line, jsonable, read_rows, write_json, write_text, writing

SAMPLE_TEXTS = 20  # how many times in a run a whole group is written to TensorBoard


class RunLog:
    """Creates a run directory and writes to it while the run goes on.

    The directory holds `code` (the experiment's file and all files of the user that it uses, see
    `grpo_jax.experiment.sources`), `config.json`, `run.json`, `metrics.jsonl`, `completions.jsonl`, TensorBoard's
    `events`, `summary.json`, and `checkpoints` (see `grpo_jax.runs.checkpoints`).

    Steps count from 0: step s is the one made with the parameters after s updates, and an evaluation "at s" is one of
    those parameters. With `resume` nothing is written twice: the first step that arrives, s, removes what an
    interrupted run had written from s on, and an evaluation replaces an earlier one at its step. The record of how the
    run began stays: `config.json` is not written again, and run.json lists each visit under `resumed`, with the fields
    and files that have changed since (see `grpo_jax.runs.record`). The status in run.json ends as `finished`,
    `interrupted` (KeyboardInterrupt) or `failed`. Raises `UserError` for a directory that holds another run, and
    `RunError` when something cannot be written.
    """

    def __init__(
        self,
        run_dir: str | Path,
        experiment: Experiment,
        *,
        source: Path | None = None,
        overrides: Iterable[str] = (),
        resume: bool = False,
        display: Display | None = None,
    ) -> None:
        self.run_dir = Path(run_dir)
        self.display = display_of(experiment) if display is None else display
        self._experiment = experiment
        self._source = source
        self._overrides = list(overrides)
        self._resume = resume
        self._info: dict[str, Any] = {}
        self._rewound = not resume
        self._events: EventsWriter | None = None

    def __enter__(self) -> Self:
        with writing(self.run_dir):
            self.run_dir.mkdir(parents=True, exist_ok=True)
            occupied = any(self.run_dir.iterdir())
        if occupied and not self._resume:
            raise UserError(
                f"the run directory {str(self.run_dir)!r} is not empty: choose another with --run-dir, or add --resume "
                "to go on with the run that it holds."
            )
        changes: dict[str, Any] = {}
        if self._resume and (self.run_dir / "run.json").is_file():
            self._info = record.continue_run(self.run_dir, self._experiment, self._source, self._overrides)
            changes = self._info["resumed"][-1]["changes"]
        else:
            self._info = record.begin_run(self.run_dir, self._experiment, self._source, self._overrides)
        self._write_status("running", finished=None)
        if not self.display.title:
            self.note(f"writing to {self.run_dir}")
        for name, (before, now) in changes.items():
            self.note(f"changed since the run began: {name} was {before}, and is {now} from here on")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.display.close()
        if error is None:
            self._write_status("finished", finished=record.now())
            self._close_events()
            return
        interrupted = isinstance(error, KeyboardInterrupt)
        try:
            self._write_status(
                "interrupted" if interrupted else "failed",
                finished=record.now(),
                error=None if interrupted else str(error),
            )
            self._close_events()
        except RunError:  # the disk is full, say: what went wrong first is what must be told
            pass

    def step(
        self,
        step: int,
        metrics: Mapping[str, float],
        completions: Sequence[Mapping[str, Any]] | None = None,
        histograms: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """Records training step `step`: its metrics, its completions (`completions.jsonl`) and arrays to histogram."""
        if not self._rewound:
            self._rewind(step)
        append_rows(self.run_dir / "metrics.jsonl", [{"step": step, **metrics}])
        append_rows(self.run_dir / "completions.jsonl", ({"step": step, **row} for row in completions or ()))
        group = _first_group(completions or ())
        with writing(self.run_dir):
            self._add_scalars(step, metrics)
            for name, values in (histograms or {}).items():
                finite = np.asarray(values, np.float64)
                finite = finite[np.isfinite(finite)]
                if finite.size:
                    self._add(step, proto.histogram(name, finite, bins=30))
            if group and step % max(1, self._experiment.num_steps // SAMPLE_TEXTS) == 0:
                self._add(step, proto.text("completions", markdown_table(group)))
            self._writer.flush()
        self.display.update(step, metrics, group)

    def evaluation(self, step: int, evaluation: Any) -> None:
        """Records an `Evaluation` (anything with its `to_dict`) of the policy after `step` updates."""
        values = evaluation.to_dict()
        split = values.pop("split", "held_out")
        prefix = "evaluation" if split == "held_out" else f"evaluation/{split}"
        row = {"step": step, **{f"{prefix}/{key}": value for key, value in _flat(values)}}
        path = self.run_dir / "metrics.jsonl"
        if self._resume:
            others = [r for r in read_rows(path) if r["step"] != step or f"{prefix}/success" not in r]
            write_text(path, "".join(map(json_line, sorted([*others, row], key=_place))))
        else:
            append_rows(path, [row])
        with writing(self.run_dir):
            self._add_scalars(step, row)
            self._writer.flush()
        self.display.evaluation(step, evaluation)

    def summary(self, values: Mapping[str, Any]) -> None:
        """Writes `summary.json`: what the run came to."""
        write_json(self.run_dir / "summary.json", values)

    def note(self, message: str) -> None:
        """Shows one line about what happens now."""
        self.display.note(message)

    def _rewind(self, step: int) -> None:
        """Removes what an interrupted run has written from `step` on; evaluations at `step` itself still hold."""
        self._rewound = True
        with writing(self.run_dir):
            self._writer.write_event(Event(step=step, session_log=SessionLog(status=SessionLog.START)))
            for name in ("metrics.jsonl", "completions.jsonl"):
                rows = [row for row in read_rows(self.run_dir / name) if _place(row) < (step, 1)]
                write_text(self.run_dir / name, "".join(map(json_line, rows)))
                for row in rows:
                    if row["step"] == step:  # TensorBoard takes the event above to end all that it had at this step
                        self._add_scalars(step, row)

    @property
    def _writer(self) -> EventsWriter:
        if self._events is None:
            # The suffix keeps a run that is resumed within the second from overwriting its own events.
            self._events = EventsWriter(str(self.run_dir / "events"), filename_suffix=f".{time.time_ns()}")
        return self._events

    def _add(self, step: int, summary: Any) -> None:
        self._writer.write_event(Event(step=step, wall_time=time.time(), summary=summary))

    def _add_scalars(self, step: int, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            if name != "step" and isinstance(value := jsonable(value), (int, float)):
                self._add(step, proto.scalar(name, value))

    def _close_events(self) -> None:
        if self._events is not None:
            with writing(self.run_dir):
                self._events.close()

    def _write_status(self, status: str, **more: Any) -> None:
        self._info |= {"status": status, **more}
        write_json(self.run_dir / "run.json", self._info)


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
    return row["step"], int(not any(key.startswith("evaluation/") for key in row))


def _first_group(completions: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [row for row in completions if row["prompt_id"] == completions[0]["prompt_id"]]
