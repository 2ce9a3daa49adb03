"""The files that the guides print: each of them is complete, and what its guide says of it runs, in a small form."""

import contextlib
import dataclasses
import importlib.util
import io
import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from grpo_jax.cli import main
from grpo_jax.experiment import Experiment, LoRAConfig, override
from grpo_jax.experiment.overrides import parse_overrides

ROOT = Path(__file__).parents[1]
GUIDES = ROOT / "docs" / "guides"
FILE = re.compile(r"^```python\n# file: (\S+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
FILES = {
    name: (guide.stem, text) for guide in sorted(GUIDES.glob("*.md")) for name, text in FILE.findall(guide.read_text())
}
GENERATOR = (GUIDES / "generator.md").read_text()
SMALL = (
    "steps=2", "group_size=4", "devices=1", "evaluation.num_samples=2", "evaluation.num_prompts=2",
    "policy.scratch.hidden_size=16", "policy.scratch.num_layers=1", "policy.scratch.num_heads=2",
)  # fmt: skip


def write(name: str, folder: Path, *changes: tuple[str, str]) -> Path:
    """Writes the file of a guide, with some of its text replaced."""
    text = FILES[name][1]
    for old, new in changes:
        assert old in text, f"{name} has no {old!r}"
        text = text.replace(old, new)
    path = folder / name
    path.write_text(text)
    return path


def grpo_jax(*arguments: str | Path, cwd: Path) -> str:
    """Runs the command as a reader of the guide does, but in this process, and returns what it printed."""
    printed = io.StringIO()
    with contextlib.chdir(cwd), contextlib.redirect_stdout(printed):
        assert main([str(argument) for argument in arguments]) == 0
    return printed.getvalue()


def train(path: Path, *assignments: str) -> list[dict[str, Any]]:
    """Trains a file for two steps and returns the rows of its metrics that steps have written."""
    options = [*SMALL, *assignments]
    run_dir = path.parent / f"run-{len(list(path.parent.iterdir()))}"
    grpo_jax("train", path.name, "--run-dir", run_dir, "--quiet", "--set", *options, cwd=path.parent)
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert "held_out" in json.loads((run_dir / "summary.json").read_text())["after"]
    return [row for row in rows if "loss" in row]


def load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def completions(path: Path) -> list[dict[str, Any]]:
    [run_dir] = path.parent.glob("run-*")
    return [json.loads(line) for line in (run_dir / "completions.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("guide", "names"),
    [
        ("reward", ["my_reward.py"]),
        ("task", ["my_task.py", "my_data.py"]),
        ("several_turns", ["my_game.py"]),
        ("loss", ["my_loss.py", "my_scalar_loss.py"]),
        ("advantages", ["my_advantages.py", "my_token_advantages.py"]),
        ("method", ["my_method.py"]),
        ("generator", ["my_generator.py"]),
        ("ablation", ["my_ablation.py"]),
        ("trl", ["moved_from_trl.py"]),
        ("install", ["dots.py"]),
        ("python", ["my_script.py", "one_update.py"]),
    ],
)
def test_a_guide_has_its_files(guide, names):
    assert [name for name, (where, _) in FILES.items() if where == guide] == names


@pytest.mark.parametrize("name", FILES)
def test_the_command_under_a_file_names_it(name):
    guide, text = FILES[name]
    assert re.search(rf"^    (grpo-jax train|grpo-jax sweep|python) {re.escape(name)}", text, re.MULTILINE), (
        "its docstring says how"
    )
    assert name in FILE.sub("", (GUIDES / f"{guide}.md").read_text()), "the guide says how the file is called"


def test_reward(tmp_path):
    path = write("my_reward.py", tmp_path)
    rows = train(path, 'warm_start={"method": "sft", "steps": 1}')
    assert len(rows) == 2
    assert all(0 <= row["rewards/letters_in_place/mean"] <= 1 for row in rows)
    reward = load(path).letters_in_place
    assert reward(completions=["POUND", "MOUND"], secret=["POUND", "POUND"]) == [1.0, 0.8]
    for row in completions(path):
        assert row["rewards"]["letters_in_place"] == pytest.approx(
            reward(completions=[row["completion"]], secret=["POUND"])[0]
        )
        assert row["reward"] == pytest.approx(sum(row["rewards"].values()))


def test_task(tmp_path):
    path = write("my_task.py", tmp_path)
    assert len(train(path, "warm_start=None")) == 2
    task = load(path).sorting()
    assert (len(task.train), len(task.held_out)) == (236, 100)
    assert not {e["prompt"] for e in task.train} & {e["prompt"] for e in task.held_out}
    example = task.train[0]
    assert task.success(completions=task.demonstrate(example, None), answer=[example["answer"]]) == [True]


def test_task_from_data(tmp_path):
    guide = (GUIDES / "task.md").read_text()
    [make] = re.findall(r"^python -c '\n(.*?)^' > sorting.jsonl$", guide, re.DOTALL | re.MULTILINE)
    with (tmp_path / "sorting.jsonl").open("w") as file, contextlib.redirect_stdout(file):
        exec(make, {})
    path = write("my_data.py", tmp_path)
    assert len(train(path)) == 2
    [row, *_] = completions(path)
    assert row["prompt"][3] == ":" and row["columns"] == {"answer": "".join(sorted(row["prompt"][:3]))}
    [run_dir] = tmp_path.glob("run-*")
    assert len(list((run_dir / "code").rglob("sorting.jsonl"))) == 1
    origin = json.loads((run_dir / "config.json").read_text())["task"]["origin"]
    assert origin == {"file": "sorting.jsonl", "rows": 336, "held_out": 100, "seed": 0}
    [other] = re.findall(
        r"^```python\n(from grpo_jax.tasks import Task\n\nrows.*?)^```$", guide, re.DOTALL | re.MULTILINE
    )
    made: dict[str, Any] = {}
    exec(other, made)
    task = made["task"]
    assert (len(task.train), len(task.held_out)) == (8, 2) and task.train[0]["answer"].isdigit()
    said = [[{"role": "assistant", "content": task.train[0]["answer"]}]]
    assert task.success(completions=said, answer=[task.train[0]["answer"]]) == [True]


def test_several_turns(tmp_path):
    path = write("my_game.py", tmp_path)
    assert len(train(path)) == 2
    module = load(path)
    assert [module.reply({"secret": "3"}, [guess]) for guess in ("4", "2", "3", "9", "", "34")] == [
        "<", ">", None, "?", "?", "?",
    ]  # fmt: skip
    episodes = [row["completion"] for row in completions(path)]
    games = [episode for episode in episodes if not isinstance(episode, str)]  # of more than one turn
    assert max(len(episode) for episode in games) == 5  # three turns and two answers
    assert all(message["content"] in "<>?" for episode in games for message in episode[1::2])
    [run_dir] = tmp_path.glob("run-*")
    shown = grpo_jax("sample", run_dir, cwd=tmp_path)
    assert re.findall(r"^(\d): assistant: ", shown, re.MULTILINE) == ["1", "2", "3", "4"]
    lines = grpo_jax("sample", run_dir, "--example", "3", "--num", "1", cwd=tmp_path).splitlines()
    said = [line.partition(": ")[2] for line in lines]
    assert [line.partition(": ")[0] for line in lines] == ["assistant", "user"] * (len(lines) // 2) + ["assistant"]
    secret = load(path).config.task.held_out[3]
    assert said[1::2] == [module.reply(secret, said[: n + 1 : 2]) for n in range(0, len(said) - 1, 2)]


@pytest.mark.parametrize("name", ["my_loss.py", "my_scalar_loss.py"])
def test_loss(name, tmp_path):
    """Gradient accumulation changes neither the loss of a step, nor its gradient, nor the metrics."""
    path = write(name, tmp_path)
    options = ("warm_start=None", "prompts_per_step=2", "steps=1", "num_iterations=1")
    whole, pieces = (train(path, *options, f"gradient_accumulation_steps={n}")[0] for n in (1, 2))
    metric = {"my_loss.py": "my_loss/ratio", "my_scalar_loss.py": "kl"}[name]
    assert math.isfinite(whole["loss"])
    assert pieces["loss"] == pytest.approx(whole["loss"], abs=1e-6)
    assert pieces["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-4)
    assert pieces[metric] == pytest.approx(whole[metric], abs=1e-6)
    assert whole[metric] == pytest.approx({"kl": 0.0}.get(metric, 1.0), abs=1e-4)


def test_the_range_of_the_loss_shrinks(tmp_path):
    """A ratio of 2 is clipped where A > 0, at 1.3, 1.2 and 1.1, and not where A < 0."""
    import numpy as np

    from grpo_jax.losses import LossInputs

    my_loss = load(write("my_loss.py", tmp_path)).my_loss
    ones = np.ones((2, 3), np.float32)
    inputs = LossInputs(np.log(2) * ones, 0 * ones, ones * [[1], [-1]], ones > 0, entropy=0 * ones)
    loss, metrics = my_loss(inputs)
    np.testing.assert_allclose(loss, [[-1.3, -1.2, -1.1], [2, 2, 2]], rtol=1e-6)
    np.testing.assert_allclose(metrics["my_loss/ratio"], 2 * ones, rtol=1e-6)


@pytest.mark.parametrize("name", ["my_advantages.py", "my_token_advantages.py"])
def test_advantages(name, tmp_path):
    path = write(name, tmp_path)
    assert len(train(path, "warm_start=None")) == 2
    assert all(math.isfinite(row["advantage"]) for row in completions(path))


def test_advantages_are_what_the_guide_says(tmp_path):
    import numpy as np

    ranks = load(write("my_advantages.py", tmp_path)).rank_advantages
    mask = np.array([[True, True, True, False]])
    np.testing.assert_allclose(ranks(np.array([[0.1, 0.7, 0.7, 9.0]]), mask)[0, :3], [-2.0, 1.0, 1.0])
    early = load(write("my_token_advantages.py", tmp_path)).early_advantages
    found = early(np.array([[0.0, 1.0]]), np.ones((1, 2), bool), np.ones((1, 2, 3), bool))
    np.testing.assert_allclose(found[0], [[-1, -0.9, -0.81], [1, 0.9, 0.81]], rtol=1e-3)


def test_method(tmp_path):
    """Gradient accumulation changes neither the loss of a step nor its gradient."""
    path = write("my_method.py", tmp_path)
    options = ("warm_start=None", "prompts_per_step=2", "steps=1")
    whole, pieces = (train(path, *options, f"gradient_accumulation_steps={n}")[0] for n in (1, 2))
    assert whole["weight"] > 0 and math.isfinite(whole["loss"])
    for key in ("loss", "weight", "grad_norm"):
        assert pieces[key] == pytest.approx(whole[key], rel=1e-4)


def test_generator(tmp_path):
    path = write("my_generator.py", tmp_path)
    command, environment = [sys.executable, path.name], {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.stdout == "success 0.50, reward 0.50\n", done.stderr


def test_a_generator_around_the_policy(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    [code] = re.findall(
        r"^```python\n(from grpo_jax.rollout import Actor\n.*?)^```$", GENERATOR, re.DOTALL | re.MULTILINE
    )
    config = load(write("my_generator.py", tmp_path)).config
    small = {"steps": 1, "prompts_per_step": 2, "group_size": 2, "devices": 1, "policy.scratch.num_layers": 1}
    exec(code, {"config": override(config, small)})
    found = re.findall(r"^step (\d+): (\d+) tokens$", capsys.readouterr().out, re.MULTILINE)
    [in_training] = [int(tokens) for step, tokens in found if step == "0"]
    rows = [json.loads(line) for line in Path("runs/counted/completions.jsonl").read_text().splitlines()]
    assert in_training == sum(row["tokens"] for row in rows)


def test_ablation(tmp_path):
    path = write(
        "my_ablation.py", tmp_path,
        ("range(10)", "range(2)"), ("steps=200", "steps=2"), ("group_size=64", "group_size=4"),
        ('    warm_start={"method": "sft", "steps": 100},\n', ""),
        ('QRSTUVWXYZ")', 'QRSTUVWXYZ", hidden_size=16, num_layers=1, num_heads=2)'),
    )  # fmt: skip
    grpo_jax("sweep", path.name, "--vectorize", cwd=tmp_path)
    table = grpo_jax("table", path.name, cwd=tmp_path)
    arms = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("|")]
    assert arms[2:] == ["as it is", "no entropy bonus", "temperature 0"]


def test_trl(tmp_path):
    path = write("moved_from_trl.py", tmp_path)
    letters = "policy.scratch.alphabet=abcdefghijklmnopqrstuvwxyzW ."
    assert len(train(path, "policy.source=scratch", "policy.lora=None", letters)) == 2
    for row in completions(path):
        assert row["reward"] == len(set(row["completion"]))


TRL = json.loads((ROOT / "tests" / "golden" / "trl_grpo_config.json").read_text())["fields"]


def table_of_trl() -> list[tuple[str, str, str, str]]:
    """The rows of the table of all fields: TRL's name and default, what is here, and its default."""
    section = (GUIDES / "trl.md").read_text().split("## Every field of `GRPOConfig`")[1].split("\n## ")[0]
    rows = [line.strip("|").split(" | ") for line in section.splitlines() if line.startswith("| `")]
    return [tuple(cell.strip() for cell in row) for row in rows if row[0] != " `GRPOConfig`"]  # type: ignore[misc]


def test_every_field_of_trls_config_is_in_the_table_once_with_its_default():
    assert [(name.strip("`"), default.strip("`")) for name, default, *_ in table_of_trl()] == list(TRL.items())


def test_every_field_that_the_table_names_exists_and_has_the_default_that_it_says():
    """A default in bold differs from TRL's; the others are the same, or the row says how they differ."""
    defaults = {}
    for field in dataclasses.fields(Experiment):
        if field.name not in ("task", "rewards"):
            section = field.default if field.default is not dataclasses.MISSING else {}
            defaults[field.name] = section
            if dataclasses.is_dataclass(section):
                names = [each.name for each in dataclasses.fields(section)]
                defaults |= {f"{field.name}.{name}": getattr(section, name) for name in names}
    for name, theirs, here, ours in table_of_trl():
        if here.startswith(("missing", "not needed")):
            assert not ours, name
            continue
        field, said = here.split("`")[1], ours.split("`")[1]
        assert repr(defaults[field]) == said, (name, field)
        if field.split(".")[-1] == name:  # the same field under the same name
            assert ours.startswith("**") == (said != theirs.strip("`")), name


def test_install(tmp_path):
    """The experiment and a module beside it are in one folder, and the command is called in another."""
    guide = (GUIDES / "install.md").read_text()
    [rewards] = re.findall(r"^```python\n# rewards.py\n(.*?)^```$", guide, re.DOTALL | re.MULTILINE)
    [script] = re.findall(r"^```python\n(from pathlib import Path\n.*?)^```$", guide, re.DOTALL | re.MULTILINE)
    project, elsewhere = tmp_path / "my_project", tmp_path / "elsewhere"
    project.mkdir()
    elsewhere.mkdir()
    (project / "rewards.py").write_text(rewards)
    path = write("dots.py", project)
    grpo_jax("train", path, "--run-dir", "dots", "--quiet", "--set", "steps=2", cwd=elsewhere)
    assert {file.name for file in (elsewhere / "dots" / "code").rglob("*.py")} == {"rewards.py", "dots.py"}
    printed = io.StringIO()
    with contextlib.chdir(project), contextlib.redirect_stdout(printed):
        exec(script, {})
    summary = json.loads((project / "runs" / "dots" / "summary.json").read_text())
    assert printed.getvalue().splitlines()[-1] == str(summary["after"]["held_out"]["success"])


HARDWARE = (GUIDES / "hardware.md").read_text()


@pytest.mark.parametrize(
    ("changes", "frozen_bytes"),
    [
        ({}, None),
        ({"policy.dtype": "bfloat16"}, None),
        ({"policy.lora": LoRAConfig(rank=4)}, 4),
        ({"policy.lora": LoRAConfig(rank=4), "policy.dtype": "bfloat16"}, 2),
    ],
)
def test_a_run_holds_as_many_bytes_for_a_parameter_as_the_guide_says(changes, frozen_bytes, tmp_path):
    """12 for one that is trained (4, and 8 for Adam's two moments), 4 or 2 for a frozen one."""
    import jax
    import letters

    from grpo_jax.runs.log import RunLog, display_of
    from grpo_jax.runs.restore import source_policy
    from grpo_jax.training import Trainer

    config = override(letters.config, changes)
    with RunLog(tmp_path / "run", config, display=display_of(config, quiet=True)) as log:
        trainer = Trainer(config, source_policy(config), log)

    def count(tree: Any) -> tuple[int, int]:
        leaves = [x for x in jax.tree.leaves(tree) if x.ndim > 1]  # not the counters of the optimizer
        return sum(x.size for x in leaves), sum(x.nbytes for x in leaves)

    num_trained, trained_bytes = count(trainer.state.trainable)
    assert trained_bytes == 4 * num_trained
    assert count(trainer.state.optimizer)[1] == 8 * num_trained
    num_frozen, held = count(trainer.actor.frozen)
    assert held == num_frozen * (frozen_bytes or 0) and (num_frozen > 0) == (frozen_bytes is not None)


def test_the_memory_of_seven_billion_parameters_is_worked_out_as_the_guide_says():
    """Rank r adds r * (inputs + outputs) parameters to a matrix: q and o, k and v, gate and up, and down."""
    billion, layers, hidden, inner, kv = 7.6, 28, 3584, 18944, 4 * 128
    pairs = [(hidden, hidden)] * 2 + [(hidden, kv)] * 2 + [(hidden, inner)] * 2 + [(inner, hidden)]
    adapters = layers * sum(16 * (a + b) for a, b in pairs) / 1e9
    assert round(1000 * adapters) == 40
    whole, lora, loaded = (12 * billion, 8 * billion), (2 * billion + 12 * adapters, 8 * adapters), 2 * billion
    cache = 64 * 1024 * 2 * layers * kv * 2 / 1e9
    rows = re.findall(r"^\| (?:\*\*)?([a-z][^|*]*?)(?:\*\*)? \| ([^|]*) \| ([^|]*) \|$", HARDWARE, re.MULTILINE)
    said = {name: (a.strip("*"), b.strip("*")) for name, a, b in rows}
    assert said["between steps"] == (f"{whole[0]:.1f}", f"{2 * billion:.1f} + {12 * adapters:.1f}")
    assert said["gradients"] == (f"{whole[1]:.1f}", f"{lora[1]:.1f}")
    assert said["sum"] == (f"{sum(whole):.1f}", f"{sum(lora):.1f}")
    before = said["before training, with the policy as it was loaded"]
    assert before == (f"{whole[0] + loaded:.1f}", f"{lora[0] + loaded:.1f}")
    assert said["cache of 64 completions of 1,024 tokens"] == (f"{cache:.1f}", f"{cache:.1f}")


def test_what_the_guides_set_on_the_command_line_is_taken():
    import letters

    code = re.sub(r"\\\n +", "", HARDWARE)
    commands = [line for line in code.splitlines() if "grpo-jax train" in line and "--set" in line]
    assert len(commands) == 3
    for command in commands:
        given = shlex.split(command.replace("&", "").replace("$seed", "1").split("--set ")[1])
        config = override(letters.config, parse_overrides(letters.config, given))
        assert config != letters.config


def test_prompts_that_devices_cannot_share_are_refused_before_anything_compiles():
    import letters

    from grpo_jax.algorithms.minibatches import shared_out
    from grpo_jax.errors import UserError

    changes = {"prompts_per_step": 24, "group_size": 1, "devices": 8, "gradient_accumulation_steps": 2, "method": "sft"}
    with pytest.raises(UserError, match="prompts_per_step should be a multiple of 16"):
        shared_out(override(letters.config, changes))


def test_python(tmp_path):
    """The script stops early and its run is known to the commands; the update by hand is that of its first step."""
    write("my_script.py", tmp_path, ("EnoughReward(0.7)", "EnoughReward(0.0)"))
    path = write("one_update.py", tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def python(name: str) -> str:
        command = [sys.executable, name]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        return done.stdout

    said = python("my_script.py")
    assert "stopped: Stop(steps=1, by='EnoughReward', reason='the reward is " in said
    assert "\nstopped 1 steps, the last reward 0." in said
    [row] = [row for row in rows_of(tmp_path / "runs/letters") if "loss" in row]
    assert python(path.name) == f"reward {row['reward']:.4f}, gradient norm {row['grad_norm']:.4f}\n"

    [success] = re.findall(r"^success (\S+)$", said, re.MULTILINE)
    options = ("--num-samples", "4", "--temperature", "1", "--json")
    found = json.loads(grpo_jax("evaluate", "runs/letters", *options, cwd=tmp_path))
    assert found["success"] == float(success)
    assert (tmp_path / "runs/letters/code/my_script.py").is_file()


def rows_of(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
