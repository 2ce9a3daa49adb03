"""Experiment trackers as callbacks: Trackio (local first) and Weights & Biases.

Both get the config's fields, the metrics of steps and evaluations, and how the run ended. A run of a sweep is named by
its arm and seed, in the group of its arm; another one by its directory. Their packages are optional:
`pip install trackio`, `pip install wandb`.
"""

import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

from grpo_jax.errors import UserError
from grpo_jax.experiment.overrides import nearest
from grpo_jax.runs.callbacks import Callback, EndEvent, EvaluationEvent, StartEvent, StepEvent, as_metrics
from grpo_jax.runs.files import jsonable, write_text


class _Tracker(Callback, ABC):
    """What trackers have in common: a package that is needed, a project, and the package's run."""

    package: ClassVar[str]

    def __init__(self, project: str | None = None, **options: Any) -> None:
        self._package = _require(self.package)
        self._project, self._options = project, options
        self._run: Any = None

    def on_step(self, event: StepEvent) -> None:
        self._log(event)

    def on_evaluation(self, event: EvaluationEvent) -> None:
        self._log(event)

    @abstractmethod
    def _log(self, event: StepEvent | EvaluationEvent) -> None:
        """Sends the metrics of an event."""


class Trackio(_Tracker):
    """Logs a run to Trackio: to this machine (`trackio show` opens it), or where Trackio's own variables say.

    Args:
      project: the project that the run is in. Default: the sweep's directory, else `grpo_jax`.
      options: further arguments of `trackio.init`, such as `space_id`.

    Raises:
      UserError: if the package is not installed.
    """

    package = "trackio"

    def on_start(self, event: StartEvent) -> None:
        # What Trackio prints is no part of what a command prints on stdout.
        with redirect_stdout(sys.stderr):
            self._run = self._package.init(
                project=self._project or _project_of(event),
                name=event.name,
                group=event.group,
                config=event.fields(),
                resume="allow" if event.first_step else "never",
                **self._options,
            )

    def _log(self, event: StepEvent | EvaluationEvent) -> None:
        self._run.log(_numbers(event), step=event.step)

    def on_end(self, event: EndEvent) -> None:
        if self._run is not None:
            with redirect_stdout(sys.stderr):
                self._package.finish()


class Wandb(_Tracker):
    """Logs a run to Weights & Biases, or with WANDB_MODE=offline to the run's directory.

    Metrics are drawn over the metric `step`, since a run that is resumed repeats steps, which W&B's own count cannot.

    Args:
      project: the project that the run is in. Default: WANDB_PROJECT, else the sweep's directory, else `grpo_jax`.
      options: further arguments of `wandb.init`, such as `entity` or `tags`.

    Raises:
      UserError: if the package is not installed.
    """

    package = "wandb"

    def on_start(self, event: StartEvent) -> None:
        note = event.run_dir / "wandb_id.txt"
        resumed: dict[str, Any] = {}
        if event.first_step and note.is_file():
            resumed = {"id": note.read_text().strip(), "resume": "allow"}
        self._run = self._package.init(
            project=self._project or os.environ.get("WANDB_PROJECT") or _project_of(event),
            name=event.name,
            group=event.group,
            config=event.fields(),
            dir=str(event.run_dir),
            **{**resumed, **self._options},
        )
        write_text(note, f"{self._run.id}\n")
        self._run.define_metric("*", step_metric="step")

    def _log(self, event: StepEvent | EvaluationEvent) -> None:
        self._run.log({"step": event.step, **_numbers(event)})

    def on_end(self, event: EndEvent) -> None:
        if self._run is not None:
            self._run.summary["status"] = event.status
            self._run.finish(exit_code=int(event.status == "failed"))


TRACKERS: dict[str, type[Trackio] | type[Wandb]] = {"trackio": Trackio, "wandb": Wandb}


def trackers(names: Sequence[str]) -> list[Callback]:
    """The trackers of these names, with their defaults.

    Raises:
      UserError: for another name than `trackio` and `wandb`, and if a package is not installed.
    """
    for name in names:
        if name not in TRACKERS:
            raise UserError(f"there is no tracker {name!r}{nearest(name, list(TRACKERS))}")
    return [TRACKERS[name]() for name in dict.fromkeys(names)]


def _require(package: str) -> ModuleType:
    try:
        return import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise UserError(f"{package} is not installed, and tracking needs it: pip install {package}") from None


def _project_of(event: StartEvent) -> str:
    return "grpo_jax" if event.group is None else Path(event.run_dir).resolve().parent.name


def _numbers(event: StepEvent | EvaluationEvent) -> dict[str, float]:
    """The metrics of an event that are finite numbers."""
    return as_metrics(jsonable(event.metrics))
