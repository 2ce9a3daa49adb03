"""Callbacks are told what happens, cannot change it, may end it, and are named when they fail."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from grpo_jax.errors import RunError, UserError
from grpo_jax.experiment import Experiment
from grpo_jax.runs import checkpoints
from grpo_jax.runs.callbacks import Callback, StopTraining
from grpo_jax.runs.log import RunLog, display_of

TASK = SimpleNamespace(name="toy", train=[{"prompt": "a"}], held_out=[])
CONFIG = Experiment(task=TASK, rewards={"length": len}, steps=4, seed=3)
ROW = {
    "prompt_id": 0,
    "prompt": "say",
    "completion": "abc",
    "rewards": {"length": 1.0},
    "reward": 1.0,
    "advantage": 0.5,
}


@dataclass
class Evaluation:
    """As much of an evaluation as a log needs."""

    success: float = 0.5
    success_low: float = 0.4
    success_high: float = 0.6
    split: str = "held_out"
    records: list = field(default_factory=lambda: [{"success": True}])

    def to_dict(self) -> dict[str, Any]:
        return {"split": self.split, "success": self.success}


class Notes:
    """Notes all events; need not be a `Callback`."""

    def __init__(self) -> None:
        self.events: list[Any] = []

    def on_start(self, event: Any) -> None:
        self.events.append(event)

    on_step = on_evaluation = on_end = on_start


class Raises(Callback):
    """Raises an error in one of its methods."""

    def __init__(self, hook: str, error: Exception) -> None:
        setattr(self, hook, self._raise)
        self.error = error

    def _raise(self, event: Any) -> None:
        raise self.error


def log_of(run_dir: Path, *callbacks: Any, **options: Any) -> RunLog:
    return RunLog(run_dir, CONFIG, display=display_of(CONFIG, quiet=True), callbacks=callbacks, **options)


def info(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "run.json").read_text())


def test_a_callback_is_told_of_the_start_steps_evaluations_and_the_end(tmp_path):
    notes = Notes()
    with log_of(tmp_path / "one", notes) as log:
        log.evaluation(0, Evaluation())
        log.step(0, {"reward": 1.0}, [ROW], {"rewards": np.ones(2)})
    start, evaluation, step, end = notes.events
    assert (start.name, start.group, start.first_step, start.run_dir) == ("one", None, 0, tmp_path / "one")
    assert start.config["steps"] == 4 and start.fields()["optimizer.learning_rate"] == 1e-3
    assert (evaluation.step, evaluation.evaluation.success) == (0, 0.5)
    assert evaluation.metrics == {"evaluation/success": 0.5}
    assert (step.step, step.metrics, step.completions) == (0, {"reward": 1.0}, [ROW])
    assert step.histograms["rewards"].tolist() == [1, 1]
    assert (end.status, end.result, end.error, end.stop) == ("finished", None, None, None)


def test_a_run_of_a_sweep_is_named_by_its_arm_and_seed(tmp_path):
    notes = Notes()
    with log_of(tmp_path / "c0ffee", notes, overrides=["arm=hot", "seed=3"]):
        pass
    assert (notes.events[0].name, notes.events[0].group) == ("hot seed 3", "hot")


def test_a_callback_cannot_change_what_it_is_told(tmp_path):
    class Vandal(Callback):
        def on_start(self, event):
            event.config["steps"] = 99

        def on_step(self, event):
            event.metrics["reward"] = 99.0
            event.completions[0]["rewards"]["length"] = 99.0
            event.histograms["rewards"][:] = 99

        def on_evaluation(self, event):
            event.evaluation.success = 99.0
            event.evaluation.records.clear()

    notes, row, rewards, evaluation = Notes(), json.loads(json.dumps(ROW)), np.ones(2), Evaluation()
    with log_of(tmp_path, Vandal(), notes) as log:
        log.evaluation(0, evaluation)
        log.step(0, {"reward": 1.0}, [row], {"rewards": rewards})
    assert row == ROW and rewards.tolist() == [1, 1] and evaluation == Evaluation()
    start, told, step, _ = notes.events
    assert start.config["steps"] == 4 and told.evaluation == Evaluation()
    assert (step.metrics, step.completions, step.histograms["rewards"].tolist()) == ({"reward": 1.0}, [ROW], [1, 1])


@pytest.mark.parametrize("hook", ["on_step", "on_evaluation"])
def test_a_callback_that_stops_the_run_is_recorded_and_the_others_are_told(tmp_path, hook):
    notes = Notes()
    with log_of(tmp_path, Raises(hook, StopTraining("enough")), notes) as log:
        log.step(0, {"reward": 1.0})
        log.evaluation(1, Evaluation())
        assert log.stop is not None
    stop = {"steps": 1, "by": "Raises", "reason": "enough"}
    assert info(tmp_path)["status"] == "stopped" and info(tmp_path)["stop"] == stop
    assert len(notes.events) == 4 and vars(notes.events[-1].stop) == stop
    assert notes.events[-1].status == "stopped"
    with log_of(tmp_path, resume=True):  # and made to its end
        pass
    assert (info(tmp_path)["status"], info(tmp_path)["stop"]) == ("finished", None)


def test_a_run_that_goes_on_is_stopped_after_the_steps_that_it_has(tmp_path):
    notes = Notes()
    with log_of(tmp_path) as log:
        for step in range(3):
            log.step(step, {"reward": 1.0})
        checkpoints.save(tmp_path / "checkpoints", 3, {"x": np.ones(1)}, files=log.seal())
    with log_of(tmp_path, notes, Raises("on_evaluation", StopTraining()), resume=True) as log:
        log.evaluation(0, Evaluation())  # the policy before training, which is shown again
    assert notes.events[0].first_step == 3 and info(tmp_path)["stop"]["steps"] == 3


@pytest.mark.parametrize("hook", ["on_start", "on_step", "on_evaluation", "on_end"])
def test_a_callback_that_raises_ends_the_run_with_its_name(tmp_path, hook):
    notes = Notes()
    with (
        pytest.raises(
            RunError, match=rf"callback 'Raises' raised ValueError: no in {hook} \(at test_callbacks.py:\d+\)"
        ),
        log_of(tmp_path, notes, Raises(hook, ValueError("no"))) as log,
    ):
        log.step(0, {"reward": 1.0})
        log.evaluation(1, Evaluation())
    assert info(tmp_path)["status"] == "failed" and "'Raises' raised ValueError" in info(tmp_path)["error"]
    assert notes.events[-1].status == ("finished" if hook == "on_end" else "failed")


@pytest.mark.parametrize("hook", ["on_start", "on_end"])
def test_a_run_cannot_be_stopped_where_there_is_nothing_to_stop(tmp_path, hook):
    with (
        pytest.raises(RunError, match=f"'Raises' raised StopTraining in {hook}, where it cannot"),
        log_of(tmp_path, Raises(hook, StopTraining())),
    ):
        pass


def test_what_failed_first_is_told_first(tmp_path):
    notes = Notes()
    with (
        pytest.raises(RunError, match="the reward"),
        log_of(tmp_path, Raises("on_end", ValueError("second")), notes),
    ):
        raise RunError("the reward failed.")
    assert (notes.events[-1].status, notes.events[-1].error) == ("failed", "the reward failed.")
    assert info(tmp_path)["error"] == "the reward failed."


def test_a_mistake_in_a_callback_is_found_before_the_run(tmp_path):
    class Typo(Callback):
        def on_evaluate(self, event):
            pass

    for wrong, says in (
        (Typo(), "callback 'Typo' has a method 'on_evaluate'; did you mean 'on_evaluation'?"),
        (Notes, "callbacks are objects, and Notes is a class: write Notes()."),
        (print, "is no callback: it has none of the methods on_start, on_step, on_evaluation, on_end."),
    ):
        with pytest.raises(UserError, match=re.escape(says)):
            log_of(tmp_path / "run", wrong)
    assert not (tmp_path / "run").exists()
