"""TensorBoard's event files of a run, as a callback: scalars, histograms, a group as text, and the HParams tab."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX import summary as proto
from tensorboardX.event_file_writer import EventsWriter  # without the thread of SummaryWriter, which hides a full disk
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from grpo_jax.runs.callbacks import Callback, EndEvent, EvaluationEvent, StartEvent, StepEvent, as_metrics
from grpo_jax.runs.display import markdown_table
from grpo_jax.runs.files import jsonable, writing

SAMPLE_TEXTS = 20  # how many times in a run a whole group is written


class TensorBoard(Callback):
    """Writes a run's events.

    The HParams tab shows the fields of the config beside the last value of every metric. When a run is resumed, what an
    interrupted visit wrote from the first new step on is hidden, except for the evaluations at that step.

    Args:
      prefix: what the names of the event files begin with.
      text_every: after how many steps a group is written again.
    """

    def __init__(self, prefix: Path, *, text_every: int = 1) -> None:
        self._prefix, self._text_every = prefix, text_every
        self._events: EventsWriter | None = None
        self._hparams: dict[str, Any] = {}

    def on_start(self, event: StartEvent) -> None:
        self._hparams = {name: "None" if value is None else value for name, value in event.fields().items()}

    def rewind(self, step: int, evaluations: list[dict[str, Any]]) -> None:
        """Hides what was written from `step` on, but for some rows at `step` itself."""
        with writing(self._prefix.parent):
            self._writer.write_event(Event(step=step, session_log=SessionLog(status=SessionLog.START)))
            for row in evaluations:
                self._add_scalars(step, row)

    def on_step(self, event: StepEvent) -> None:
        with writing(self._prefix.parent):
            self._add_scalars(event.step, event.metrics)
            for name, values in event.histograms.items():
                finite = np.asarray(values, np.float64)
                finite = finite[np.isfinite(finite)]
                if finite.size:
                    self._add(event.step, proto.histogram(name, finite, bins=30))
            if event.completions and event.step % self._text_every == 0:
                self._add(event.step, proto.text("completions", markdown_table(event.first_group())))
            self._writer.flush()

    def on_evaluation(self, event: EvaluationEvent) -> None:
        with writing(self._prefix.parent):
            self._add_scalars(event.step, event.metrics)
            self._writer.flush()

    def on_end(self, event: EndEvent) -> None:
        if self._events is None:
            return
        with writing(self._prefix.parent):
            if event.status in ("finished", "stopped"):
                self._add(0, proto.hparams(self._hparams, {})[2])
            self._events.close()

    @property
    def _writer(self) -> EventsWriter:
        if self._events is None:
            # The suffix keeps a run that is resumed within the second from overwriting its own events.
            self._events = EventsWriter(str(self._prefix), filename_suffix=f".{time.time_ns()}")
            # Without the summary of an experiment, which names the fields of one run alone: TensorBoard then collects
            # the fields and metrics of all runs that it shows.
            self._add(0, proto.hparams(self._hparams, {})[1])
        return self._events

    def _add(self, step: int, summary: Summary) -> None:
        self._writer.write_event(Event(step=step, wall_time=time.time(), summary=summary))

    def _add_scalars(self, step: int, values: Mapping[str, Any]) -> None:
        for name, value in as_metrics(jsonable(values)).items():
            self._add(step, proto.scalar(name, value))
