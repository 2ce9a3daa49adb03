"""What trackers are told, with stand-ins for their packages."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from grpo_jax.errors import UserError
from grpo_jax.runs.callbacks import EndEvent, EvaluationEvent, StartEvent, StepEvent
from grpo_jax.runs.trackers import Trackio, Wandb, trackers


class Package(ModuleType):
    """A tracker's package that notes its calls."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.calls: list[tuple[Any, ...]] = []
        self.run = SimpleNamespace(
            id="abc123",
            summary={},
            log=lambda metrics, **options: self.calls.append(("log", metrics, options)),
            define_metric=lambda name, **options: self.calls.append(("define", name, options)),
            finish=lambda **options: self.calls.append(("finish", options)),
        )

    def init(self, **options: Any) -> Any:
        print("* hello")
        self.calls.append(("init", options))
        return self.run

    def finish(self) -> None:
        self.calls.append(("finish", {}))


@pytest.fixture(params=["trackio", "wandb"])
def package(request, monkeypatch):
    found = Package(request.param)
    monkeypatch.setitem(sys.modules, request.param, found)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return found


def start(run_dir: Path, **fields: Any) -> StartEvent:
    return StartEvent(run_dir, **{"name": "one", "group": None, "config": {"loss": {"beta": 0.1}, "seed": 3}, **fields})


def play(tracker: Any, run_dir: Path, status: Any = "finished", **fields: Any) -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    tracker.on_start(start(run_dir, **fields))
    tracker.on_evaluation(EvaluationEvent(0, None, {"evaluation/success": 0.5, "evaluation/note": "text"}))
    tracker.on_step(StepEvent(0, {"reward": 1.0, "loss": float("nan")}))
    tracker.on_end(EndEvent(status))


def test_a_tracker_gets_the_config_the_numbers_and_the_end(package, tmp_path):
    [tracker] = trackers([package.__name__])
    play(tracker, tmp_path)
    calls = [call for call in package.calls if call[0] != "define"]
    (_, options), evaluation, step, (finish, _) = calls
    assert {key: options[key] for key in ("project", "name", "group", "config")} == {
        "project": "grpo_jax", "name": "one", "group": None, "config": {"loss.beta": 0.1, "seed": 3},
    }  # fmt: skip
    expected = [{"evaluation/success": 0.5}, {"reward": 1.0}]
    if package.__name__ == "trackio":
        assert [evaluation[1:], step[1:]] == [(each, {"step": 0}) for each in expected]
    else:  # W&B's own step cannot go back, as that of a resumed run does
        assert [evaluation[1:], step[1:]] == [({"step": 0, **each}, {}) for each in expected]
        assert ("define", "*", {"step_metric": "step"}) in package.calls
        assert package.run.summary == {"status": "finished"}
    assert finish == "finish"


def test_the_runs_of_a_sweep_are_in_one_project_by_arm(package, tmp_path):
    [tracker] = trackers([package.__name__])
    play(tracker, tmp_path / "temperature" / "c0ffee", name="hot seed 3", group="hot")
    options = package.calls[0][1]
    assert (options["project"], options["name"], options["group"]) == ("temperature", "hot seed 3", "hot")


def test_a_tracker_takes_a_project_and_the_options_of_its_package(package, tmp_path):
    kind = {"trackio": Trackio, "wandb": Wandb}[package.__name__]
    play(kind("mine", private=True), tmp_path)
    assert (package.calls[0][1]["project"], package.calls[0][1]["private"]) == ("mine", True)


def test_a_run_that_is_resumed_goes_on_in_its_tracker(package, tmp_path):
    for first_step in (0, 2):
        [tracker] = trackers([package.__name__])
        play(tracker, tmp_path, first_step=first_step)
    first, second = (options for name, options in (call[:2] for call in package.calls) if name == "init")
    if package.__name__ == "trackio":
        assert (first["resume"], second["resume"]) == ("never", "allow")
    else:
        assert "resume" not in first and (second["id"], second["resume"]) == ("abc123", "allow")


def test_what_a_tracker_prints_is_not_on_stdout(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "trackio", Package("trackio"))
    play(Trackio(), tmp_path)
    assert capsys.readouterr() == ("", "* hello\n")


def test_a_run_that_failed_is_one_in_wandb(monkeypatch, tmp_path):
    package = Package("wandb")
    monkeypatch.setitem(sys.modules, "wandb", package)
    play(Wandb(), tmp_path, "failed")
    assert package.calls[-1] == ("finish", {"exit_code": 1})


def test_a_package_that_is_missing_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"^wandb is not installed, and tracking needs it: pip install wandb$"):
        Wandb()


def test_an_unknown_tracker_is_named():
    with pytest.raises(UserError, match="there is no tracker 'wandbb'; did you mean 'wandb'"):
        trackers(["wandbb"])
