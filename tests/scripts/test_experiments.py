"""Every file in experiments/: it loads, its docstring names commands that exist, and the small ones train."""

import ast
import contextlib
import io
import re
import shlex
from functools import cache
from pathlib import Path
from statistics import fmean

import pytest

from grpo_jax import cli, training
from grpo_jax.experiment import Ablation, Experiment, load, load_ablation, override, run_file
from grpo_jax.research.reproduction import Cell
from grpo_jax.runs.files import read_rows

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "experiments").rglob("*.py"))
IMPORTED = [path for path in FILES if path.stem.endswith("_case")]  # what several ablations have in common
RUNNABLE = [path for path in FILES if path not in IMPORTED]
FROM_SCRATCH = [path for path in RUNNABLE if path.parent.name in ("wordle", "methods")]
SMALL = {
    "steps": 1,
    "prompts_per_step": 2,
    "group_size": 4,
    "devices": 1,
    "policy.scratch.hidden_size": 16,
    "policy.scratch.num_layers": 1,
    "policy.scratch.num_heads": 2,
    "evaluation.num_prompts": 2,
    "evaluation.num_samples": 2,
    "evaluation.batch_size": 4,
    "warm_start.steps": 1,
    "warm_start.prompts_per_step": 2,
    "warm_start.group_size": 1,
}


def name(path: Path) -> str:
    return str(path.relative_to(ROOT / "experiments"))


def docstring(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text())) or ""


def commands(path: Path) -> list[list[str]]:
    """The commands in a file's docstring, without their comments."""
    lines = [line.strip() for line in docstring(path).splitlines()]
    return [shlex.split(line, comments=True) for line in lines if re.match(r"grpo-jax |python |scripts/", line)]


@cache
def help_of(command: str) -> str:
    """The help text of a command of `grpo-jax`."""
    with contextlib.redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit) as end:
        cli.main([command, "--help"])
    assert end.value.code == 0, f"grpo-jax {command} does not exist"
    return out.getvalue()


@pytest.mark.parametrize("path", RUNNABLE, ids=name)
def test_a_file_declares_an_experiment_an_ablation_or_cells(path):
    module = run_file(path)
    kinds = {"config": Experiment, "ablation": Ablation}
    declared = [key for key, kind in kinds.items() if isinstance(getattr(module, key, None), kind)]
    cells = getattr(module, "cells", [])
    assert len(declared) == (0 if cells else 1)
    assert all(isinstance(cell, Cell) for cell in cells)


@pytest.mark.parametrize("path", IMPORTED, ids=name)
def test_what_ablations_have_in_common_is_an_experiment(path):
    assert any(isinstance(value, Experiment) for value in vars(run_file(path)).values())


@pytest.mark.parametrize("path", RUNNABLE, ids=name)
def test_the_docstring_says_how_to_run_the_file(path):
    assert commands(path), "no command in the docstring"
    assert any(str(path.relative_to(ROOT)) in command for command in commands(path))


@pytest.mark.parametrize("path", FILES, ids=name)
def test_the_commands_of_the_docstring_exist(path):
    for program, *arguments in commands(path):
        if program != "grpo-jax":
            script = arguments[0] if program == "python" else program
            assert (ROOT / script).is_file()
            assert all((ROOT / argument).is_file() for argument in arguments if argument.endswith(".py"))
            continue
        command, source, *options = arguments
        flags = [option for option in options if option.startswith("--")]
        assert all(re.search(rf"{flag}\b", help_of(command)) for flag in flags)
        if command in ("sweep", "table"):
            load_ablation(ROOT / source)
        else:
            assignments = [option for option in options if re.match(r"[a-z_.]+=", option)]
            load(ROOT / source, assignments)


@pytest.mark.parametrize("path", FROM_SCRATCH, ids=name)
def test_an_experiment_from_scratch_trains_after_its_warm_start(path, tmp_path):
    config = override(load(path), SMALL)
    result = training.train(config, tmp_path / "run", source=path, quiet=True)
    rows = list(read_rows(tmp_path / "run" / "metrics.jsonl"))
    [reward] = [row["reward"] for row in rows if "reward" in row]
    completions = list(read_rows(tmp_path / "run" / "completions.jsonl"))
    assert len(completions) == 2 * 4
    assert reward == pytest.approx(fmean(row["reward"] for row in completions))
    assert [row["step"] for row in read_rows(tmp_path / "run" / "warm_start" / "metrics.jsonl") if "loss" in row] == [0]
    assert 0 <= result.after[config.evaluation.splits[0]].success <= 1


@pytest.mark.parametrize("path", [path for path in RUNNABLE if path.parent.name == "papers"], ids=name)
def test_the_commands_of_a_papers_cells_exist(path):
    for cell in run_file(path).cells:
        program, *arguments = shlex.split(cell.command) or [""]
        if program == "grpo-jax":
            command, source, *options = arguments
            assert "--set" in help_of(command)
            load(ROOT / source, [option for option in options if re.match(r"[a-z_.]+=", option)])
        elif program:
            assert (ROOT / program).is_file()
