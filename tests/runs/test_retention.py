"""Which checkpoints of a run remain: the newest, the best, and those of every so many steps."""

import json
import shutil
from pathlib import Path
from typing import Any

import letters
import pytest
from simple_run import simple_training

from grpo_jax import cli, training
from grpo_jax.errors import UserError
from grpo_jax.experiment import CheckpointConfig, override
from grpo_jax.runs import retention
from grpo_jax.runs.checkpoints import kept_steps
from grpo_jax.runs.log import RunLog, display_of


@pytest.fixture(scope="module", autouse=True)
def _simple():
    with simple_training():
        yield


@pytest.mark.parametrize(
    ("fields", "remain"),
    [
        ({}, {50, 60}),
        ({"last": 1}, {60}),
        ({"last": 9}, {10, 20, 30, 40, 50, 60}),
        ({"best": 1}, {20, 50, 60}),  # 20 and 40 are equal: the earlier one
        ({"best": 2}, {20, 40, 50, 60}),
        ({"best": 9, "last": 1}, {10, 20, 40, 60}),  # 30 and 50 were not evaluated
        ({"every": 30}, {30, 50, 60}),
        ({"last": 1, "best": 1, "every": 25}, {20, 50, 60}),
    ],
)
def test_what_remains_is_all_that_a_field_asks_for(fields, remain):
    scores = {10: 0.1, 20: 0.7, 40: 0.7, 45: 0.9}
    assert retention.remaining(CheckpointConfig(**fields), [10, 20, 30, 40, 50, 60], scores) == remain


def test_a_step_is_saved_for_its_score_if_it_is_one_of_the_best_so_far():
    config = CheckpointConfig(best=2, every=8)
    wanted = [step for step in (4, 5, 6, 7, 8) if retention.is_wanted(config, step, {4: 0.5, 5: 0.1, 6: 0.3})]
    assert wanted == [4, 6, 8]
    assert not retention.is_wanted(CheckpointConfig(), 4, {4: 0.5})


def test_scores_are_those_of_the_metric_that_is_named_and_not_of_the_policy_before_training():
    rows: list[dict[str, Any]] = [
        {"step": 0, "evaluation/success": 0.9},
        {"step": 0, "reward": 1.0},
        {"step": 1, "evaluation/success": 0.2, "evaluation/reward": 3.0},
        {"step": 1, "evaluation/train/success": 0.8},
        {"step": 2, "evaluation/success": None},
    ]
    assert retention.scores(CheckpointConfig(best=1), rows) == {1: 0.2}
    assert retention.scores(CheckpointConfig(best=1, metric="evaluation/reward"), rows) == {1: 3.0}
    assert retention.scores(CheckpointConfig(best=1, metric="evaluation/train/success"), rows) == {1: 0.8}
    with pytest.raises(UserError, match=r"have no such metric; did you mean 'evaluation/success'\?$"):
        retention.scores(CheckpointConfig(best=1, metric="evaluation/succes"), rows)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"checkpoints.last": 0}, "CheckpointConfig.last = 0 is out of range"),
        ({"checkpoints.best": -1}, "CheckpointConfig.best = -1 is out of range"),
        ({"checkpoints.every": -1}, "CheckpointConfig.every = -1 is out of range"),
        ({"checkpoints.metric": "reward"}, "must be the name of an evaluation's metric"),
        ({"checkpoints.best": 1}, "with evaluation.every = 0 the policy is not evaluated"),
        ({"checkpoints.metric": "evaluation/reward"}, "it is read with checkpoints.best alone"),
    ],
)
def test_what_cannot_be_kept_is_refused(changes, says):
    with pytest.raises(UserError, match=says):
        override(letters.config, changes)


SUCCESSES = {0: 0.9, 1: 0.5, 2: 0.8, 3: 0.1, 4: 0.8, 5: 0.2, 6: 0.3}


def run(run_dir: Path, monkeypatch: pytest.MonkeyPatch, *, resume: bool = False, **fields: Any) -> None:
    """A run whose policy scores `SUCCESSES`, by the number of updates."""
    changes = {"steps": 6, "evaluation.every": 1, "checkpoint_every": 50, "checkpoints.last": 1, **fields}
    config = override(letters.config, changes)
    evaluate = RunLog.evaluation

    def scored(log: RunLog, step: int, evaluation: Any) -> None:
        object.__setattr__(evaluation, "success", SUCCESSES[step])
        evaluate(log, step, evaluation)

    monkeypatch.setattr(RunLog, "evaluation", scored)
    training.run(config, RunLog(run_dir, config, resume=resume, display=display_of(config, quiet=True)))
    monkeypatch.undo()


def test_the_best_checkpoints_of_a_run_remain_and_are_known_when_it_is_resumed(tmp_path, monkeypatch, capsys):
    run(tmp_path / "run", monkeypatch, **{"checkpoints.best": 2, "steps": 3})
    assert kept_steps(tmp_path / "run" / "checkpoints") == [1, 2, 3]
    run(tmp_path / "run", monkeypatch, resume=True, **{"checkpoints.best": 2})
    assert kept_steps(tmp_path / "run" / "checkpoints") == [2, 4, 6]
    source = shutil.copy(letters.__file__, tmp_path / "toy.py")
    assert source and cli.main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--step", "2"]) == 0
    assert cli.main(["export", str(tmp_path / "run"), str(tmp_path / "other"), "--step", "5"]) == 2
    assert "keeps those of step 2 and 4 and 6" in capsys.readouterr().err


def test_every_so_many_steps_remain_though_no_checkpoint_was_due(tmp_path, monkeypatch):
    run(tmp_path / "run", monkeypatch, **{"checkpoints.every": 2, "steps": 5})
    assert kept_steps(tmp_path / "run" / "checkpoints") == [2, 4, 5]


def test_a_metric_that_there_is_not_is_found_before_training(tmp_path, monkeypatch):
    fields = {"checkpoints.best": 1, "checkpoints.metric": "evaluation/rewrd"}
    with pytest.raises(UserError, match="did you mean 'evaluation/reward'"):
        run(tmp_path / "run", monkeypatch, **fields)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0]
