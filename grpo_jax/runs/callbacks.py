"""Callbacks: objects of the user that a run tells what happens, and that may end it early.

    class Watch(grpo_jax.Callback):
        def on_step(self, event):
            print(event.step, event.metrics["reward"])
            if event.metrics["reward"] > 0.9:
                raise grpo_jax.StopTraining("the reward is above 0.9")

A callback has any of the four methods of `Callback`; it need not be a subclass. Each call gets an event of its own, a
copy, so that nothing that a callback does to it changes the run. An exception ends the run with a sentence that names
the callback. TensorBoard (`grpo_jax.runs.tensorboard`) and the trackers (`grpo_jax.runs.trackers`) are callbacks.
"""

import copy
import json
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from grpo_jax.errors import RunError, UserError, failure_of
from grpo_jax.evaluation import Evaluation
from grpo_jax.experiment.overrides import nearest
from grpo_jax.runs.result import Result, Stop

Status = Literal["finished", "stopped", "interrupted", "failed"]


@dataclass(frozen=True)
class StartEvent:
    """A run begins, or goes on.

    Attributes:
      run_dir: the directory of the run.
      name: what the run is called: its arm and seed in a sweep, else the name of its directory.
      group: its arm in a sweep; None elsewhere.
      config: the experiment as JSON, as in config.json: functions by name, and the task by name and digest.
      first_step: the first step that is made; above 0 for a run that is resumed.
    """

    run_dir: Path
    name: str
    group: str | None
    config: dict[str, Any]
    first_step: int = 0

    def fields(self) -> dict[str, Any]:
        """The config's fields with dotted names, as `--set` takes them: numbers, truth values, texts and None."""
        return dict(_flat(self.config))


@dataclass(frozen=True)
class StepEvent:
    """A training step is done.

    Attributes:
      step: its number, counted from 0.
      metrics: as in metrics.jsonl.
      completions: its completions with their rewards and advantages, as in completions.jsonl; none for demonstrations.
      histograms: arrays of values, such as all advantages, by name.
    """

    step: int
    metrics: dict[str, Any]
    completions: list[dict[str, Any]] = field(default_factory=list)
    histograms: dict[str, np.ndarray] = field(default_factory=dict)

    def first_group(self) -> list[dict[str, Any]]:
        """The completions of the first prompt."""
        return [row for row in self.completions if row["prompt_id"] == self.completions[0]["prompt_id"]]


@dataclass(frozen=True)
class EvaluationEvent:
    """The policy was evaluated on a split.

    Attributes:
      step: after how many steps; 0 is before training.
      evaluation: what it scored, with every completion in `records`.
      metrics: the same as it stands in metrics.jsonl, such as `evaluation/success`.
    """

    step: int
    evaluation: Evaluation
    metrics: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class EndEvent:
    """The run is over.

    Attributes:
      status: `finished`; `stopped`, by `StopTraining`; `interrupted`, by Ctrl-C; or `failed`.
      result: what the run came to; None for a run that was interrupted or that failed.
      error: why it failed.
      stop: which callback stopped it after how many steps, and why.
    """

    status: Status
    result: Result | None = None
    error: str | None = None
    stop: Stop | None = None


class StopTraining(Exception):
    """Raised by a callback in `on_step` or `on_evaluation`: training ends after the step under way.

    The run is evaluated and saved as it would be after its last step, and its status is `stopped`.
    """


class Callback:
    """What a run tells an object of yours. Override what you need; these methods do nothing."""

    def on_start(self, event: StartEvent) -> None:
        """The run's directory exists, and nothing has been trained or evaluated yet."""

    def on_step(self, event: StepEvent) -> None:
        """A step is done and written to the run's files. May raise `StopTraining`."""

    def on_evaluation(self, event: EvaluationEvent) -> None:
        """An evaluation is done and written to the run's files. May raise `StopTraining`."""

    def on_end(self, event: EndEvent) -> None:
        """The run is over, however it ended."""


HOOKS = ("on_start", "on_step", "on_evaluation", "on_end")


class Callbacks:
    """The callbacks of a run.

    Attributes:
      stop: which of them has stopped the run; None if none has.
    """

    def __init__(self, callbacks: Sequence[Any]) -> None:
        for callback in callbacks:
            require_callback(callback)
        self._callbacks = list(callbacks)
        self.stop: Stop | None = None
        self._first_step = 0

    def start(self, event: StartEvent) -> None:
        """Tells all of them that the run begins."""
        self._first_step = event.first_step
        for callback in self._callbacks:
            self._call(callback, "on_start", event)

    def step(self, event: StepEvent) -> None:
        """Tells all of them that a step is done. One that stops the run keeps no other from being told."""
        for callback in self._callbacks:
            try:
                self._call(callback, "on_step", event)
            except StopTraining as reason:
                self._stopped(callback, event.step + 1, reason)

    def evaluation(self, event: EvaluationEvent) -> None:
        """Tells all of them of an evaluation."""
        for callback in self._callbacks:
            try:
                self._call(callback, "on_evaluation", event)
            except StopTraining as reason:
                self._stopped(callback, event.step, reason)

    def end(self, event: EndEvent) -> None:
        """Tells all of them that the run is over, and then raises what the first of them raised."""
        errors = []
        for callback in self._callbacks:
            try:
                self._call(callback, "on_end", event)
            except UserError as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def _stopped(self, callback: Any, steps: int, reason: StopTraining) -> None:
        if self.stop is None:
            # A run that is resumed evaluates the policy before its first step again.
            self.stop = Stop(max(steps, self._first_step), name_of(callback), str(reason))

    def _call(self, callback: Any, hook: str, event: Any) -> None:
        """Calls a callback with a copy of the event.

        Raises:
          RunError: for an exception, with the name of the callback.
        """
        function = getattr(callback, hook, None)
        if function is None or getattr(function, "__func__", None) is getattr(Callback, hook):
            return  # nothing is told, so nothing is copied
        try:
            function(_copy(event))
        except UserError as error:
            raise RunError(f"callback {name_of(callback)!r} in {hook}: {error}") from error
        except StopTraining as error:
            if hook in ("on_step", "on_evaluation"):
                raise
            raise RunError(f"callback {name_of(callback)!r} raised StopTraining in {hook}, where it cannot.") from error
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # `sys.exit` is no way to end a run with success
            raise RunError(
                f"callback {name_of(callback)!r} raised {failure_of(error)} in {hook}{_place(error)}."
            ) from error


def require_callback(callback: Any) -> None:
    """Raises `UserError` for what is no callback, such as a class without its (), or a method with a wrong name."""
    if isinstance(callback, type):
        raise UserError(f"callbacks are objects, and {callback.__name__} is a class: write {callback.__name__}().")
    for name in (name for name in dir(callback) if name.startswith("on_")):
        if name not in HOOKS:
            raise UserError(f"callback {name_of(callback)!r} has a method {name!r}{nearest(name, HOOKS)}")
    if not any(callable(getattr(callback, hook, None)) for hook in HOOKS):
        raise UserError(f"{callback!r} is no callback: it has none of the methods {', '.join(HOOKS)}.")


def name_of(callback: Any) -> str:
    """What a callback is called in messages: its class."""
    return type(callback).__name__


def _copy(event: Any) -> Any:
    """A copy of an event. Arrays of a policy cannot be changed, so they are shared."""
    if isinstance(event, EndEvent) and event.result is not None:
        policy = replace(event.result.policy, params=dict(event.result.policy.params))
        fields = {name: value for name, value in vars(event.result).items() if name != "policy"}
        return replace(event, result=Result(policy=policy, **copy.deepcopy(fields)))
    return copy.deepcopy(event)


def _place(error: BaseException) -> str:
    """Where in the callback's own file the error occurred, as ` (at file:line)`."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    own = [frame for frame in frames if frame.filename == frames[0].filename]
    return f" (at {Path(own[-1].filename).name}:{own[-1].lineno})" if own else ""


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, json.dumps(value) if isinstance(value, (list, Mapping)) else value


def as_metrics(values: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of an event that are numbers, as trackers take them."""
    return {name: value for name, value in values.items() if isinstance(value, (int, float)) and name != "step"}
