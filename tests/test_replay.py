"""A step that is made again has the numbers of its run: for every method, from checkpoints, and where runs go on."""

import json
import shutil
from pathlib import Path
from typing import Any

import letters
import pytest

from grpo_jax import training
from grpo_jax.errors import UserError
from grpo_jax.experiment import load
from grpo_jax.replay import Replay, replay
from grpo_jax.runs.difference import Pair
from grpo_jax.runs.lock import only_writer

SMALL = ["steps=3", "checkpoint_every=2", "evaluation.num_prompts=1", "evaluation.num_samples=1"]
TURNS = """
from dataclasses import replace
from grpo_jax.experiment import override

config = override(config, {"task": replace(task, reply=lambda example, turns: "cc", max_turns=2)})
"""


def begin(directory: Path, *assignments: str, more: str = "") -> Path:
    """Trains the toy experiment from a file of its own, and returns the run's directory."""
    source = directory / "letters.py"
    source.write_text(Path(letters.__file__).read_text() + more)
    go_on(directory, *SMALL, *assignments)
    return directory / "run"


def go_on(directory: Path, *assignments: str, before: tuple[str, ...] = (), resume: bool = False) -> None:
    source = directory / "letters.py"
    config = load(source, [*before, *assignments])
    training.train(config, directory / "run", source=source, overrides=list(assignments), resume=resume, quiet=True)


def files(run_dir: Path) -> dict[Path, tuple[int, int]]:
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in run_dir.rglob("*") if path.is_file()}


def said(found: Replay) -> tuple[Any, ...]:
    return found.first_step, found.metrics, found.completion_differences, found.conditions


@pytest.mark.parametrize(
    "assignments",
    [
        ("loss.beta=0.1", "loss.sync_ref_model=True", "loss.ref_model_sync_steps=1", "num_iterations=2"),
        ("num_minibatches=2", "loss.loss_type=dapo"),
        ("method=ppo", "ppo.kl_coef=0.1"),
        ("method=rft",),
        ("method=dpo",),
        ("method=sft",),
        ("method=reward_model",),
    ],
    ids=lambda assignments: assignments[0],
)
def test_a_step_of_any_method_is_the_same_to_the_last_digit_from_a_checkpoint(assignments, tmp_path):
    run_dir = begin(tmp_path, *assignments)
    with only_writer(run_dir):  # as of a run that is under way
        before = files(run_dir)
        found = replay(run_dir, 2)
        assert files(run_dir) == before
    assert said(found) == (2, [], {}, []) and found.is_same and found.num_metrics > 3
    logged = [json.loads(line) for line in (run_dir / "completions.jsonl").read_text().splitlines()]
    assert found.completions == [row for row in logged if row["step"] == 2]


def test_a_game_of_several_turns_is_played_again(tmp_path):
    found = replay(begin(tmp_path, "sampling.max_tokens=2", more=TURNS), 1)  # before any checkpoint
    assert said(found) == (0, [], {}, []) and {len(row["turns"]) for row in found.completions} == {3}


def test_a_run_begins_at_its_warm_start_and_so_does_its_control_and_both_are_runs(tmp_path):
    stages = ["warm_start={'method': 'sft', 'steps': 2}", "control={'optimizer.learning_rate': 0.5}"]
    run_dir = begin(tmp_path, *stages)
    for part in ("", "warm_start", "control"):
        assert said(replay(run_dir / part, 1)) == (0, [], {}, []), part


def test_a_step_is_made_with_the_config_and_the_files_that_it_had_before_the_run_was_resumed(tmp_path):
    run_dir = begin(tmp_path)
    first = (tmp_path / "letters.py").read_text()
    (tmp_path / "letters.py").write_text(first.replace("/ 3 for", "/ 2 for"))
    go_on(tmp_path, "steps=5", "optimizer.learning_rate=0.5", before=tuple(SMALL), resume=True)
    shutil.rmtree(run_dir / "checkpoints")
    assert said(replay(run_dir, 1)) == (0, [], {}, [])
    found = replay(run_dir, 4)  # over the resumption, where the files and the rate change
    assert said(found) == (0, [], {}, [])
    assert {row["reward"] for row in found.completions} <= {0, 0.5, 1, 1.5}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    return begin(tmp_path_factory.mktemp("trained"), "optimizer.learning_rate=1e-7")


@pytest.fixture
def run_dir(trained, tmp_path) -> Path:
    """A copy of a run of three steps, which may be edited."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def test_a_reward_that_was_edited_differs_and_the_edited_copy_is_named(run_dir):
    copy = run_dir / "code" / "letters.py"
    copy.write_text(copy.read_text().replace('count("a") / 3', 'count("b") / 3'))
    found = replay(run_dir, 1)
    assert not found.is_same and found.metrics[0].name == "reward"
    assert {pair.name for pairs in found.completion_differences.values() for pair in pairs} >= {"reward", "advantage"}
    assert found.conditions == [Pair("code/letters.py", "as copied", "edited")]


def test_another_learning_rate_differs_though_it_is_small(run_dir):
    info = json.loads((run_dir / "run.json").read_text())
    info["overrides"][-1] = "optimizer.learning_rate=2e-7"
    info["versions"]["numpy"] = "1.0"
    (run_dir / "run.json").write_text(json.dumps(info))
    found = replay(run_dir, 0)
    assert [pair.name for pair in found.metrics] == ["learning_rate"] and not found.is_same
    assert [pair.name for pair in found.conditions] == ["versions.numpy"]


def test_a_step_that_was_not_logged_is_refused_with_those_that_were(run_dir):
    with pytest.raises(UserError, match="has no step 3: it has logged steps 0 to 2"):
        replay(run_dir, 3)
    (run_dir / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match="has logged no step yet"):
        replay(run_dir, 0)
