"""What two runs differ in, from files that are written by hand: no JAX and no training is needed."""

import json
from pathlib import Path
from typing import Any

import pytest

from grpo_jax.errors import UserError
from grpo_jax.experiment import sources
from grpo_jax.runs import difference
from grpo_jax.runs.code_difference import NO_CODE, NO_PYTHON, changed_names, code_differences
from grpo_jax.runs.difference import ABSENT, Pair, Parting
from grpo_jax.runs.run import Run


@pytest.mark.parametrize(
    ("pair", "relative", "is_rounding"),
    [
        (Pair("grad_norm", 1.0, 1.0000001), 1e-7, True),
        (Pair("grad_norm", 1.0, 1.002), 0.002, False),
        (Pair("grad_norm", -1.5, 1.5001), 2, False),
        (Pair("loss", 1e-9, -3e-9), 4 / 3, True),  # near 0: a mean that cancels
        (Pair("learning_rate", 1e-6, 2e-6), 0.5, False),  # small, but exact
        (Pair("learning_rate", 1e-6, 1.0000001e-6), 1e-7, True),
        (Pair("num_tokens", 1000000, 1000001), 1e-6, False),  # counts are not rounded
        (Pair("kl", 0.0, 1e-9), 1, True),
        (Pair("completion", "ab", "ac"), None, False),
        (Pair("reward", None, 1.5), None, False),
        (Pair("reward", ABSENT, 1.5), None, False),
        (Pair("dropped", True, False), None, False),
    ],
)
def test_what_may_be_rounding(pair, relative, is_rounding):
    assert pair.relative == (None if relative is None else pytest.approx(relative, rel=1e-2))
    assert pair.is_rounding == is_rounding


def test_values_are_compared_by_their_place_and_times_are_not():
    one = {"step": 1, "step_time": 1.0, "tokens_per_second": 5, "rewards": {"a": 1.0, "b": None}, "turns": [1, 2]}
    other = {"step": 1, "step_time": 2.0, "tokens_per_second": 6, "rewards": {"a": 1, "c": 0.5}, "turns": [1, 3]}
    assert difference.row_differences(one, other) == [
        Pair("rewards/b", None, ABSENT),
        Pair("rewards/c", ABSENT, 0.5),
        Pair("turns", [1, 2], [1, 3]),
    ]


def test_a_field_that_was_added_since_is_no_difference_at_its_default():
    one = {"steps": 4, "rewards": {"r": "m.<lambda> at 0x7f12"}, "loss": {"beta": 0.0}, "policy": {"lora": None}}
    other = {
        "steps": 4,
        "rewards": {"r": "m.<lambda> at 0x7eee"},
        "num_minibatches": 1,
        "loss": {"beta": 0.1, "epsilon": 0.2},
        "policy": {"lora": {"rank": 8}},
    }
    assert difference.config_differences(one, other) == [
        Pair("policy.lora", None, {"rank": 8}),
        Pair("loss.beta", 0.0, 0.1),
    ]
    assert difference.config_differences(one, one | {"num_minibatches": 2}) == [Pair("num_minibatches", 1, 2)]


def test_a_commit_counts_where_the_training_code_differs():
    def info(digest: str, commit: str) -> dict[str, Any]:
        package = {"digest": digest, "git": {"commit": commit, "dirty": False}}
        return {"versions": {"jax": "1"}, "package": package, "processor": {"name": "P"}, "platform": commit}

    assert difference.condition_differences(info("d", "1"), info("d", "2")) == []
    assert difference.condition_differences(info("d", "1"), info("e", "2") | {"versions": {"jax": "2"}}) == [
        Pair("training code", "d", "e"),
        Pair("commit of grpo_jax", "1", "2"),
        Pair("versions.jax", "1", "2"),
    ]
    assert difference.condition_differences(info("d", "1"), {}) == [
        Pair("training code", "d", ABSENT),
        Pair("commit of grpo_jax", "1", ABSENT),
        Pair("versions.jax", "1", ABSENT),
        Pair("processor.name", "P", ABSENT),
    ]


def test_resumptions_differ_by_their_step_and_what_they_changed():
    one = {"resumed": [{"step": 2, "changes": {"steps": [3, 5]}, "code": {}}]}
    other = {"resumed": [{"step": 2, "changes": {"steps": [3, 5]}}, {"step": 4, "code": {"directory": "code-3"}}]}
    assert difference.visit_differences(one, other) == [Pair("resumption 2", ABSENT, "from step 4: its files changed")]
    assert difference.visit_differences({}, one) == [Pair("resumption 1", ABSENT, "from step 2: steps 3 → 5")]


def test_metrics_part_in_the_order_in_which_a_step_finds_them():
    one = [
        {"step": 0, "evaluation/success": 0.5},
        {"step": 0, "grad_norm": 1.0, "loss": 0.5, "reward": 1.0, "step_time": 3.0},
        {"step": 1, "grad_norm": 1.0, "loss": 0.5, "reward": 1.0, "completions/mean_length": 2.0},
        {"step": 2, "grad_norm": 1.0, "loss": 0.5, "reward": 1.0},
    ]
    other = [
        {"step": 0, "evaluation/success": 0.5},
        {"step": 0, "grad_norm": 1.0, "loss": 0.5, "reward": 1.0, "step_time": 4.0},
        {"step": 1, "grad_norm": 2.0, "loss": 0.6, "reward": 0.5},
        {"step": 2, "grad_norm": 1.0, "loss": 0.7, "reward": 1.0},
        {"step": 2, "evaluation/success": 0.6},
        {"step": 3, "grad_norm": 9.0},
    ]
    assert difference.metric_partings(one, other) == [
        Parting(Pair("completions/mean_length", 2.0, ABSENT), 1, 1, 1),
        Parting(Pair("reward", 1.0, 0.5), 1, 1, 3),
        Parting(Pair("loss", 0.5, 0.6), 1, 2, 3),
        Parting(Pair("grad_norm", 1.0, 2.0), 1, 1, 3),
    ]
    assert difference.metric_partings(one, one) == []


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_completions_part_at_the_first_step_that_both_runs_have(tmp_path):
    def row(step: int, sample: int, text: str, reward: float) -> dict[str, Any]:
        return {"step": step, "sample": sample, "prompt": "p", "completion": text, "reward": reward, "advantage": 0.0}

    one = [row(s, g, "a", 1.0) for s in (0, 2, 3) for g in range(3)]
    other = [row(s, g, "a", 1.0) for s in (0, 1, 2, 3) for g in range(3)]
    other[3]["completion"] = "of step 1, which the first run has not"
    other[8]["reward"] = 0.5  # step 2, sample 2
    other[10]["completion"] = other[11]["completion"] = "b"  # step 3, samples 1 and 2
    paths = write_rows(tmp_path / "one.jsonl", one), write_rows(tmp_path / "other.jsonl", other)
    assert difference.completion_partings(*paths) == [
        Parting(Pair("completion 2: reward", 1.0, 0.5), 2, 1, 3),
        Parting(Pair("completion 1: completion", "a", "b"), 3, 2, 3),
    ]
    assert difference.completion_partings(paths[0], paths[0]) == []
    assert difference.completion_partings(paths[0], tmp_path / "missing.jsonl") == []
    fewer = write_rows(tmp_path / "fewer.jsonl", one[:2])
    assert [parting.pair.name for parting in difference.completion_partings(paths[0], fewer)] == [
        "completion 2: sample",
        "completion 2: completion",
        "completion 2: reward",
        "completion 2: advantage",
    ]


def test_a_damaged_row_is_named(tmp_path):
    path = write_rows(tmp_path / "completions.jsonl", [{"step": -1}])
    with pytest.raises(UserError, match=r"completions.jsonl:1 is damaged"):
        difference.completion_partings(path, path)


def test_the_last_evaluation_of_each_split():
    rows = [
        {"step": 0, "evaluation/success": 0.1},
        {"step": 4, "evaluation/success": 0.5, "evaluation/pass_at_k/2": 0.6},
        {"step": 4, "evaluation/train/success": 0.7},
        {"step": 4, "loss": 1.0},
    ]
    assert difference.last_evaluations(rows) == {
        "held_out": {"step": 4, "success": 0.5, "pass_at_k/2": 0.6},
        "train": {"step": 4, "success": 0.7},
    }


SOURCE = b'''"""Docstring."""
import math
LIMIT = 3
class Task:
    size = 4
    def ask(self):
        return 1
    def tell(self):
        return 2
def reward(*, completions, **columns):
    """Docstring."""
    return [1.0 for _ in completions]  # comment
'''


def test_the_functions_methods_and_variables_that_differ():
    other = SOURCE.replace(b"LIMIT = 3", b"LIMIT: int = 4").replace(b"return 2", b"return 3").replace(b"1.0", b"2.0")
    assert changed_names(SOURCE, other) == ["LIMIT", "Task.tell", "reward"]
    assert changed_names(SOURCE, SOURCE.replace(b"size = 4", b"size = 5")) == ["Task"]
    assert changed_names(SOURCE, SOURCE + b"def more(): ...\nprint(1)\n") == ["more", "other statements"]
    assert changed_names(SOURCE, SOURCE.replace(b"import math", b"import math, os")) == ["imports"]
    assert changed_names(SOURCE, SOURCE.replace(b"Docstring", b"Other").replace(b"# comment", b"")) == []
    assert "a syntax error" in changed_names(SOURCE, b"def (")


def run_with(directory: Path, entry: str, contents: dict[str, str]) -> Run:
    """A run that keeps copies of some files; they are not executed."""
    for name, text in contents.items():
        path = directory / "code" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    digests = {name: sources._digest_of(directory / "code" / name) for name in contents}
    code = {"directory": "code", "entry": entry, "paths": ["."], "files": digests}
    (directory / "run.json").write_text(json.dumps({"code": code}))
    return Run(directory)


def test_files_are_compared_from_the_experiments_file_on_and_none_is_executed(tmp_path):
    fails = "raise SystemExit('executed')\n"
    one = run_with(
        tmp_path / "one",
        "my/a.py",
        {"my/a.py": fails, "lib/r.py": "def f(): return 1\n", "my/words.txt": "x", "my/same.py": "", "my/old.py": ""},
    )
    other = run_with(
        tmp_path / "other",
        "b.py",
        {"b.py": f"# more\n{fails}", "words.txt": "y", "same.py": "", "new.py": ""},
    )
    found = code_differences(one, other)
    assert [(file.name, file.where) for file in found] == [
        ("a.py / b.py", [NO_CODE]),
        ("../lib/r.py", ["only A has it"]),
        ("words.txt", [NO_PYTHON]),
        ("old.py", ["only A has it"]),
        ("new.py", ["only B has it"]),
    ]
    assert found[0].diff == ["--- A/a.py", "+++ B/b.py", "@@ -1 +1,2 @@", "+# more", f" {fails.strip()}"]
    assert code_differences(one, one) == []
