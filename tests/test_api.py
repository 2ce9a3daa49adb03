"""`import grpo_jax`: it costs nothing, its runs are those of the commands, and a callback may end them."""

import ast
import dataclasses
import importlib
import json
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import letters
import pytest

import grpo_jax as gj
from grpo_jax import api
from grpo_jax.cli import main
from grpo_jax.experiment import load_run, source_of, to_dict
from grpo_jax.experiment.recorded import with_recorded_fields
from grpo_jax.runs.checkpoints import latest_step
from grpo_jax.runs.log import RunLog, display_of

SCRIPT = """
    import grpo_jax as gj
    from my_letters import config as letters

    def length(*, completions, **columns):
        return [len(completion) / 3 for completion in completions]

    config = gj.override(letters, {"rewards": {"length": length}, "steps": 1, "evaluation.num_prompts": 2})
"""


@pytest.fixture
def script(tmp_path, monkeypatch) -> Path:
    """A script that finds the toy experiment beside it, by another name than that of the tests."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(letters.__file__, "my_letters.py")
    return tmp_path / "script.py"


def python(path: Path, *arguments: str) -> str:
    done = subprocess.run([sys.executable, path.name, *arguments], cwd=path.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def begin(path: Path, text: str) -> Path:
    """Runs a script that begins its runs and trains none of them, and returns the folder of the runs."""
    path.write_text(
        # Not when a command loads its copy: that is this process.
        "if __name__ == '__main__':\n"
        "    import grpo_jax.training\n"
        "    def begin(experiment, log):\n"
        "        with log: pass\n"
        "    grpo_jax.training.run = begin\n" + textwrap.dedent(SCRIPT) + textwrap.dedent(text)
    )
    python(path)
    return path.parent / "runs"


def test_the_import_needs_no_jax_and_every_name_is_there():
    code = "import grpo_jax as gj, sys; gj.Experiment, gj.override, gj.Task, gj.train, gj.load_run, gj.__version__; "
    code += "sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    for name in gj.__all__:
        assert getattr(gj, name) is not None and name in dir(gj)
    with pytest.raises(AttributeError, match="module 'grpo_jax' has no attribute 'trian'"):
        gj.trian  # noqa: B018


def test_the_names_for_type_checkers_are_those_that_are_exported():
    tree = ast.parse(Path(gj.__file__).read_text())
    [block] = [node for node in tree.body if isinstance(node, ast.If)]
    imported = {alias.asname or alias.name: (node.module, alias.name)
                for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}  # fmt: skip
    assert {*imported, "__version__"} == set(gj.__all__)
    for name, (module, original) in imported.items():
        assert getattr(gj, name) is getattr(importlib.import_module(module), original)


# Runs ----------------------------------------------------------------------------------------------------------------


class Stop(gj.Callback):
    """Ends the training at a step, or at an evaluation."""

    def __init__(self, hook: str, step: int) -> None:
        self.step = step
        setattr(self, hook, self._stop)

    def _stop(self, event: Any) -> None:
        if event.step == self.step:
            raise gj.StopTraining("enough")


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> tuple[Any, Path]:
    """A run that a callback has ended after two of its four steps, and its directory."""
    run_dir = tmp_path_factory.mktemp("runs") / "stopped"
    config = gj.override(letters.config, {"control": {"optimizer.learning_rate": 1e-3}})
    ends: list[Any] = []

    class Last(gj.Callback):
        def on_end(self, event):
            ends.append(event)
            event.result.after.clear()
            event.result.policy.params.clear()

    result = gj.train(config, run_dir, callbacks=[Stop("on_step", 1), Last()], quiet=True)
    assert ends[0].status == "stopped" and result.after and result.policy.params
    return result, run_dir


def test_a_run_that_was_stopped_says_so_and_is_evaluated_and_saved(stopped):
    result, run_dir = stopped
    assert result.stop == ends_after(2)
    assert latest_step(run_dir / "checkpoints") == 2
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["stop"] == dataclasses.asdict(ends_after(2)) and summary["after"]["held_out"]
    assert json.loads((run_dir / "run.json").read_text())["status"] == "stopped"


def ends_after(steps: int) -> Any:
    from grpo_jax.runs.result import Stop

    return Stop(steps, "Stop", "enough")


def test_a_control_makes_as_many_steps_as_the_run_that_was_stopped(stopped):
    _, run_dir = stopped
    control = gj.load_run(run_dir / "control")
    assert [row["step"] for row in control.metrics] == [0, 1] and control.status == "finished"


def test_a_run_that_is_stopped_at_an_evaluation_is_saved_and_not_evaluated_twice(tmp_path):
    config = gj.override(letters.config, {"evaluation.every": 1})
    result = gj.train(config, tmp_path / "run", callbacks=[Stop("on_evaluation", 1)], quiet=True)
    run = gj.load_run(tmp_path / "run")
    assert result.stop == ends_after(1) and latest_step(tmp_path / "run/checkpoints") == 1
    assert [row["step"] for row in run.evaluations] == [0, 1] and len(run.metrics) == 1


def test_a_run_that_is_stopped_before_its_first_step_has_the_policy_that_it_began_with(tmp_path):
    gj.train(letters.config, tmp_path / "run", callbacks=[Stop("on_evaluation", 0)], quiet=True)
    run = gj.load_run(tmp_path / "run")
    assert (run.status, run.metrics, latest_step(tmp_path / "run/checkpoints")) == ("stopped", [], 0)


def test_a_run_is_read(stopped):
    result, run_dir = stopped
    run = gj.load_run(str(run_dir))
    assert repr(run) == f"Run({str(run_dir)!r}, stopped)"
    assert [row["step"] for row in run.metrics] == [0, 1] and len(run.completions) == 2 * 16
    assert run.evaluations[-1]["evaluation/success"] == result.after["held_out"].success
    assert run.summary["stop"]["steps"] == 2 and run.config["group_size"] == 4
    assert run.sampling == letters.config.sampling
    assert all((run.policy.params[name] == value).all() for name, value in result.policy.params.items())
    with pytest.raises(gj.UserError, match="is not the directory of a run"):
        gj.load_run(run_dir.parent)


def test_a_run_of_no_file_is_evaluated_with_its_experiment_and_says_so_without(stopped, capsys):
    result, run_dir = stopped
    with pytest.raises(gj.UserError, match=r"was made in a notebook or at a prompt.* pass them as grpo_jax.evaluate"):
        gj.evaluate(run_dir)
    assert main(["evaluate", str(run_dir)]) == 2
    assert "was made in a notebook or at a prompt" in capsys.readouterr().err
    again = gj.evaluate(gj.load_run(run_dir), letters.config)
    assert again.records == result.after["held_out"].records
    assert gj.evaluate(result.policy, letters.config).records == again.records
    with pytest.raises(gj.UserError, match=r"on what: evaluate\(policy, experiment\)"):
        gj.evaluate(result.policy)


def test_an_evaluation_is_told_how(stopped):
    _, run_dir = stopped
    found = gj.evaluate(run_dir, letters.config, split="train", num_prompts=3, num_samples=4, temperature=0.5)
    assert (found.split, found.num_prompts, found.num_samples, found.temperature) == ("train", 3, 4, 0.5)
    with pytest.raises(gj.UserError, match=r"EvaluationConfig.num_prompts = 0 is out of range"):
        gj.evaluate(run_dir, letters.config, num_prompts=0)


def test_sampling_takes_a_run_or_its_policy(stopped):
    result, run_dir = stopped
    options = dict(num_samples=2, seed=3)
    found = gj.sample(run_dir, ["b", "cd"], **options)
    assert [len(group) for group in found] == [2, 2] and all(len(text) <= 3 for group in found for text in group)
    assert gj.sample(result.policy, ["b", "cd"], max_tokens=3, **options) == found
    assert gj.sample(gj.load_run(run_dir), "b", temperature=0.0, num_samples=2)[0].count(
        gj.sample(run_dir, "b", temperature=0.0)[0][0]
    ) == 2  # fmt: skip


def test_the_default_length_is_what_the_context_has_room_for(stopped):
    result, run_dir = stopped
    policy = result.policy
    small = dataclasses.replace(policy, config=dataclasses.replace(policy.config, max_positions=5))
    assert gj.sample(small, "bcd", seed=1) == gj.sample(policy, "bcd", seed=1, max_tokens=1)
    training = gj.load_run(run_dir).sampling
    assert api.sampling_for(small, ["b", "bc"], training).max_tokens == 2
    told = api.sampling_for(small, ["b"], training, temperature=0.0, max_tokens=9)
    assert (told.temperature, told.max_tokens) == (0.0, 9)
    with pytest.raises(gj.UserError, match=r"SamplingConfig.max_tokens = 0 is out of range"):
        gj.sample(run_dir, "b", max_tokens=0)


def test_a_finished_run_is_not_done_again_and_says_what_it_came_to(tmp_path, capsys):
    config = gj.override(letters.config, {"steps": 1, "control": {"optimizer.learning_rate": 1e-3}})
    made = gj.train(config, tmp_path / "run", quiet=True)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    read = gj.train(config, tmp_path / "run", resume=True, callbacks=[Stop("on_start", 0)])
    assert capsys.readouterr().out == f"{tmp_path / 'run'} is finished: there is nothing to do\n"
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    for name in ("before", "after", "control"):
        [(split, found)] = getattr(made, name).items()
        assert getattr(read, name) == {split: dataclasses.replace(found, records=[])}
    assert all((read.policy.params[name] == value).all() for name, value in made.policy.params.items())
    assert (read.run_dir, read.seconds, read.stop, read.group_after) == (made.run_dir, made.seconds, None, [])

    run = gj.load_run(tmp_path / "run")
    assert run.is_done(config) and not run.is_done(gj.override(config, {"steps": 2}))  # which goes on
    (tmp_path / "run" / "summary.json").write_text("{}")
    with pytest.raises(gj.UserError, match=r"summary.json is missing, damaged, or was edited"):
        gj.train(config, tmp_path / "run", resume=True, quiet=True)


# Runs of a script ----------------------------------------------------------------------------------------------------


def test_a_run_of_a_script_is_known_to_the_commands(script, capsys):
    script.write_text(
        textwrap.dedent(SCRIPT)
        + "import sys\n"
        + "if __name__ == '__main__':\n"
        + "    steps = int(sys.argv[1])\n"
        + "    gj.train(gj.override(config, {'steps': steps}), 'runs/a', resume=steps > 1, quiet=True)\n"
    )
    python(script, "1")
    info = json.loads(Path("runs/a/run.json").read_text())
    assert sorted(info["code"]["files"]) == ["my_letters.py", "script.py"] and info["source"] == str(script)
    assert main(["evaluate", "runs/a", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    after = json.loads(Path("runs/a/summary.json").read_text())["after"]["held_out"]
    assert found["success"] == after["success"] and found["reward"] == after["reward"]

    python(script, "2")  # goes on by the script, and then by the command
    assert main(["train", "script.py", "--run-dir", "runs/a", "--resume", "--quiet", "--set", "steps=3"]) == 0
    run = gj.load_run("runs/a")
    assert [row["step"] for row in run.metrics] == [0, 1, 2] and run.config["steps"] == run.experiment.steps == 3
    assert main(["report", "runs/a"]) == 0


def test_a_script_that_a_scheduler_ends_has_saved_its_run_and_has_the_status_143(script):
    train = "if __name__ == '__main__':\n    gj.train(gj.override(config, {'steps': 10**6}), 'runs/a', quiet=True)\n"
    script.write_text(textwrap.dedent(SCRIPT) + train)
    process = subprocess.Popen([sys.executable, script.name], cwd=script.parent, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not Path("runs/a/metrics.jsonl").is_file() or '"reward"' not in Path("runs/a/metrics.jsonl").read_text():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.terminate()
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 143 and "Traceback" not in said, said
    run = gj.load_run("runs/a")
    assert run.status == "interrupted" and latest_step("runs/a/checkpoints") == len(run.metrics) > 0


def test_the_runs_of_an_ablation_are_compared_by_the_command(script, capsys):
    Path("arms.py").write_text(
        "from grpo_jax.experiment import Ablation, override\nfrom my_letters import config\n"
        "base = override(config, {'steps': 1, 'evaluation.num_prompts': 2})\n"
        "ablation = Ablation(base=base, arms={'base': {}, 'hot': {'sampling.temperature': 2.0}}, seeds=(0,))\n"
    )
    for run in gj.load_ablation("arms.py").runs():
        gj.train(run.config, f"runs/arms/{run.key}", quiet=True)
    assert main(["table", "arms.py"]) == 0
    assert "| hot |" in capsys.readouterr().out
    assert load_run(f"runs/arms/{run.key}").sampling.temperature == 2.0  # the last arm, found in the copy of the file


@pytest.mark.parametrize(
    "trains",
    [
        "if __name__ == '__main__':\n    gj.train(config, 'runs/a', quiet=True)",
        "gj.train(config, 'runs/a', quiet=True)\nraise SystemExit",  # which loading must not reach
        "for x in (1e-2, 2e-2):\n    gj.train(gj.override(config, {'optimizer.learning_rate': x}), f'runs/{x}')",
        "gj.train(gj.override(config, {'policy.lora': gj.LoRAConfig(rank=2, targets=('q', 'v'))}), 'runs/a')",
        "def main():\n    gj.train(config, 'runs/a')\nif __name__ == '__main__':\n    main()",
    ],
)
def test_the_experiment_of_a_scripts_run_is_found_again(script, trains):
    for run_dir in begin(script, trains).iterdir():
        found, config = load_run(run_dir), json.loads((run_dir / "config.json").read_text())
        assert found.rewards["length"](completions=["abc"]) == [1.0]
        assert gj.load_run(run_dir).config == config
        assert found.optimizer.learning_rate == config["optimizer"]["learning_rate"]
        lora = config["policy"]["lora"]
        assert found.policy.lora == (lora and gj.LoRAConfig(2, targets=("q", "v")))
        assert load_run(run_dir, ["seed=5"]).seed == 5


def test_an_experiment_that_is_made_in_a_function_is_one_sentence(script):
    text = "def main():\n    gj.train(gj.override(config, {'rewards': {'x': lambda **_: [0.0]}}), 'runs/a')\n"
    begin(script, text + "if __name__ == '__main__':\n    main()")
    with pytest.raises(gj.UserError, match=r"script.py defines no experiment with the task and the functions"):
        load_run("runs/a")


def test_an_experiment_comes_from_the_file_that_it_was_loaded_from(script):
    path = Path(shutil.copy(letters.__file__, "mine.py"))
    config = gj.override(gj.load_experiment(path, ["seed=4"]), {"steps": 2})
    assert source_of(config) == path
    assert source_of(dataclasses.replace(config, task=dataclasses.replace(config.task))) is None
    with RunLog("runs/a", config, source=path, overrides=None, display=display_of(config, quiet=True)):
        pass
    found = load_run("runs/a")
    assert (found.seed, found.steps) == (4, 2)


def test_recorded_fields_are_taken_over_only_beside_the_same_functions():
    def record(**changes: Any) -> Any:
        return json.loads(json.dumps(to_dict(gj.override(letters.config, changes))))

    config = letters.config
    assert with_recorded_fields(config, record()) is config
    changes = {"method": "sft", "evaluation.splits": ("train",), "warm_start": {"steps": 1}, "reward.time_limit": 5.0}
    assert with_recorded_fields(config, record(**changes)) == gj.override(config, changes)
    for other in ({"rewards": {"length": len}}, {"loss": len}, {"warm_start": {"rewards": {"x": len}}}):
        assert with_recorded_fields(config, record(**other)) is None
    smaller = dataclasses.replace(config.task, train=config.task.train[:3])
    assert with_recorded_fields(config, record(task=smaller)) is None
