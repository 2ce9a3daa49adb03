"""Whose code is executed: that of a run of somebody else never by a command that needs only what the run has stored."""

import json
import shutil
from pathlib import Path

import letters
import pytest

from grpo_jax.cli import main
from grpo_jax.errors import UserError
from grpo_jax.experiment import PolicyConfig, load, override
from grpo_jax.experiment.files import is_code_allowed, run_file, without_code
from grpo_jax.runs.log import RunLog
from grpo_jax.runs.restore import source_policy
from grpo_jax.training import run as train


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with a finished run whose files leave a mark when they are executed, also as the only run of a sweep."""
    place = tmp_path_factory.mktemp("foreign")
    mark = f"import pathlib\npathlib.Path({str(place / 'mark')!r}).touch()\n"
    source = place / "foreign.py"
    ablation = "from grpo_jax.experiment import Ablation\nablation = Ablation(config, {'base': {}}, seeds=(0,))\n"
    source.write_text(Path(letters.__file__).read_text() + mark)
    (place / "arms.py").write_text(source.read_text() + ablation)
    overrides = ["steps=1", "checkpoint_every=1", "evaluation.num_prompts=1"]
    config = load(source, overrides)
    train(config, RunLog(place / "run", config, source=source, overrides=overrides))
    shutil.copytree(place / "run", place / "sweep" / "key")
    plan = {"arms": ["base"], "baseline": "base", "metric": "reward", "runs": [{"arms": ["base"], "seed": 0}]}
    plan["runs"][0]["key"] = "key"
    (place / "sweep" / "sweep.json").write_text(json.dumps(plan))
    shutil.copytree(place / "run", place / "game")
    turns = [{"role": role, "content": "a"} for role in ("assistant", "user", "assistant")]
    rows = [
        json.loads(line) | {"completion": turns} for line in (place / "run/completions.jsonl").read_text().splitlines()
    ]
    (place / "game" / "completions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


@pytest.fixture
def place(made, monkeypatch) -> Path:
    monkeypatch.chdir(made)
    (made / "mark").unlink(missing_ok=True)
    return made


STORED = (
    "sample run --prompt b --num 1",
    "sample game --prompt b --num 1 --replies nobody",
    "export run {new}",
    "report run",
    "report run --pictures svg",
    "report sweep",
    "table sweep",
    "list .",
)
CODE = (
    "evaluate run",
    "evaluate foreign.py",
    "sample run --example 0",
    "rewards run",
    "rewards foreign.py",
    "table arms.py",
    "train foreign.py",
    "train foreign.py --run-dir run --resume",
    "sweep arms.py",
)


@pytest.mark.parametrize("flag", ["", " --no-code"])
@pytest.mark.parametrize("command", STORED)
def test_what_a_run_has_stored_needs_none_of_its_code(place, tmp_path, capsys, command, flag):
    assert main(f"{command.format(new=tmp_path / 'new')}{flag}".split()) == 0, capsys.readouterr().err
    assert not (place / "mark").exists()


@pytest.mark.parametrize("command", CODE)
def test_with_no_code_what_needs_code_is_refused_in_one_sentence(place, capsys, command):
    assert main(["--no-code", *command.split()]) == 2
    [said] = capsys.readouterr().err.splitlines()
    assert said.endswith("its task and its functions, and --no-code lets none run.") and ".py" in said
    assert not (place / "mark").exists() and is_code_allowed()


def test_without_the_option_the_same_files_are_executed(place, capsys):
    """So that the mark of the tests above is one that code would leave."""
    assert main(["table", "arms.py", "--dir", "sweep"]) == 2 and "none of the 1 runs" in capsys.readouterr().err
    assert (place / "mark").exists()


def test_with_no_code_a_game_is_sampled_for_one_turn(place, capsys):
    assert main(["sample", "game", "--prompt", "b", "--num", "1", "--no-code"]) == 0
    assert "--no-code: the task's environment is not run" in capsys.readouterr().err
    assert not (place / "mark").exists()


def test_a_run_that_begins_with_the_policy_of_another_executes_none_of_its_code(place):
    config = override(letters.config, {"policy": PolicyConfig(source=str(place / "run"))})
    with without_code():
        assert source_policy(config).params
        with pytest.raises(UserError, match="--no-code"):
            run_file("foreign.py")
    assert not (place / "mark").exists()


def test_no_module_is_imported_for_a_reward(place, capsys):
    Path("mine.py").write_text("import pathlib\npathlib.Path('mark').touch()\n")
    from grpo_jax.reward_lab.groups import import_rewards

    with without_code(), pytest.raises(UserError, match="this needs the code of 'mine'"):
        import_rewards(["mine:reward"], place)
    assert not (place / "mark").exists()
