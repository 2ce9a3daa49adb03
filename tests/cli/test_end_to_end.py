"""The whole command line on a tiny experiment: real processes, real training, nothing replaced."""

import csv
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean

import letters
import pytest

import grpo_jax

PACKAGE = Path(grpo_jax.__file__).parents[1]
ABLATION = """
from grpo_jax.experiment import Ablation, override

base = override(config, {"steps": 1, "checkpoint_every": 1})
ablation = Ablation(base=base, arms={"base": {}, "fast": {"optimizer.learning_rate": 0.3}}, seeds=(0, 1))
"""


CHANGES = ["steps=2", "optimizer.learning_rate=0.1"]  # so large that two steps change what is sampled


def grpo_jax_command(*arguments: str, status: int = 0) -> subprocess.CompletedProcess:
    """Runs `grpo-jax` as a process of its own in the current directory, and checks its exit status."""
    code = "import sys; from grpo_jax.cli import main; sys.exit(main())"
    environment = os.environ | {"PYTHONPATH": str(PACKAGE), "COLUMNS": "150"}
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    return done


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def successes(metrics: Iterable[dict]) -> list[float]:
    return [row["evaluation/success"] for row in metrics if "evaluation/success" in row]


@pytest.fixture
def experiment(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    shutil.copy(letters.__file__, "letters.py")
    return Path("letters.py")


def test_from_training_to_the_report(experiment):
    done = grpo_jax_command("train", str(experiment), "--run-dir", "run", "--set", *CHANGES)
    run = Path("run")
    metrics, summary = rows(run / "metrics.jsonl"), json.loads((run / "summary.json").read_text())
    assert [row["step"] for row in metrics if "reward" in row] == [0, 1]
    before, after = successes(metrics)
    assert summary["before"]["held_out"]["success"] == before
    assert summary["after"]["held_out"]["success"] == after
    assert [f"{100 * value:.1f} %" for value in (before, after)] == re.findall(
        r"│ (?:before|after) +│ +([\d.]+ %)", done.stdout
    )
    assert json.loads((run / "run.json").read_text())["status"] == "finished"
    assert len(rows(run / "completions.jsonl")) == 2 * 4 * 4  # steps x prompts x group size
    for row in rows(run / "completions.jsonl"):
        assert row["reward"] == pytest.approx(row["completion"].count("a") / 3)

    # What is restored is what was trained.
    evaluated = json.loads(grpo_jax_command("evaluate", "run", "--json").stdout)
    assert (evaluated["source"], evaluated["num_prompts"], evaluated["num_samples"]) == ("run", 4, 2)
    assert evaluated["success"] == after and evaluated["reward"] == summary["after"]["held_out"]["reward"]

    # So is what was exported: the same prompt at the same seed has the same completions.
    assert grpo_jax_command("export", "run", "tuned").stdout == "tuned\n"
    assert {"config.json", "model.safetensors"} <= set(os.listdir("tuned"))
    options = ["--prompt", "b", "--num", "9", "--max-tokens", "3", "--temperature", "1"]
    answers = grpo_jax_command("sample", "run", *options).stdout
    assert [line.split(":")[0] for line in answers.splitlines()] == list("123456789")
    assert all(re.fullmatch(r"\d: [abcd]{0,3}", line) for line in answers.splitlines())
    assert grpo_jax_command("sample", "tuned", *options).stdout == answers

    assert grpo_jax_command("report", "run").stdout == "run/report.html\n"
    page = (run / "report.html").read_text()
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])
    [rewards] = [chart["series"][0] for chart in data["charts"] if chart["title"] == "Training reward"]
    assert rewards["y"] == pytest.approx([row["reward"] for row in metrics if "reward" in row], rel=1e-4)


def test_a_run_is_resumed_with_its_own_config_and_says_what_changed(experiment):
    """The learning rate and the seed that the run was given hold after it is resumed with two steps more."""
    given = ["seed=3", "optimizer.learning_rate=0.125", "steps=1"]
    grpo_jax_command("train", str(experiment), "--run-dir", "run", "--set", *given)
    config = Path("run/config.json").read_text()
    resume = ["train", str(experiment), "--run-dir", "run", "--resume"]
    said = grpo_jax_command(*resume, "--set", "steps=3").stdout
    assert "changed since the run began: steps was 1, and is 3 from here on" in said
    metrics = rows(Path("run/metrics.jsonl"))
    assert [(m["step"], m["learning_rate"]) for m in metrics if "reward" in m] == [(s, 0.125) for s in range(3)]
    info = json.loads(Path("run/run.json").read_text())
    assert Path("run/config.json").read_text() == config and json.loads(config)["seed"] == info["seed"] == 3
    assert info["overrides"] == given
    [visit] = info["resumed"]
    assert (visit["step"], visit["overrides"], visit["changes"]) == (1, ["steps=3"], {"steps": [1, 3]})
    assert json.loads(grpo_jax_command("evaluate", "run", "--json").stdout)["success"] == successes(metrics)[-1]
    # A second visit has what the first has changed, so nothing is left to do; what a run was made from is fixed.
    before = {path: path.stat().st_mtime_ns for path in Path("run").rglob("*")}
    assert grpo_jax_command(*resume).stdout.startswith("run is finished: there is nothing to do.")
    assert {path: path.stat().st_mtime_ns for path in Path("run").rglob("*")} == before
    refused = grpo_jax_command(*resume, "--set", "seed=4", status=2).stderr
    assert "was begun with seed = 3, and cannot go on with 4" in refused
    assert len(json.loads(Path("run/run.json").read_text())["resumed"]) == 1


def test_a_run_whose_files_were_edited_is_resumed_only_if_that_is_said_and_needs_none_of_them_later(experiment):
    """The reward is in a module beside the experiment's file, and imports another."""
    Path("pay.py").write_text("LETTER = 'a'\n")
    Path("my_reward.py").write_text(
        "from pay import LETTER\ndef share(*, completions, **columns):\n"
        "    return [c.count(LETTER) / 3 for c in completions]\n"
    )
    Path("toy.py").write_text(
        "from letters import config\nfrom my_reward import share\nfrom grpo_jax.experiment import override\n"
        "config = override(config, {'rewards': {'share': share}, 'steps': 1, 'checkpoint_every': 1})\n"
    )
    grpo_jax_command("train", "toy.py", "--run-dir", "run")
    Path("pay.py").write_text("LETTER = 'b'  # another reward\n")
    resume = ["train", "toy.py", "--run-dir", "run", "--resume", "--set", "steps=2"]
    refused = grpo_jax_command(*resume, status=2).stderr
    assert "pay.py changed since 'run' was made" in refused and "run/code/toy.py" in refused
    grpo_jax_command("train", "run/code/toy.py", "--run-dir", "run", "--resume", "--set", "steps=2")
    paid = {row["step"]: row for row in rows(Path("run/completions.jsonl"))}
    assert all(row["reward"] == pytest.approx(row["completion"].count("a") / 3) for row in paid.values())
    grpo_jax_command(*resume[:-1], "steps=3", "--accept-changes")
    last = [row for row in rows(Path("run/completions.jsonl")) if row["step"] == 2]
    assert all(row["reward"] == pytest.approx(row["completion"].count("b") / 3) for row in last) and len(last) == 16
    visits = json.loads(Path("run/run.json").read_text())["resumed"]
    assert [visit["code"] and visit["code"]["directory"] for visit in visits] == [None, "code-3"]

    for name in ("toy.py", "pay.py", "my_reward.py", "letters.py"):
        Path(name).unlink()
    evaluated = json.loads(grpo_jax_command("evaluate", "run", "--json").stdout)
    assert evaluated["success"] == successes(rows(Path("run/metrics.jsonl")))[-1]
    shutil.rmtree("run/code")
    shutil.rmtree("run/code-3")  # none of these runs code of the user
    assert grpo_jax_command("export", "run", "tuned").stdout == "tuned\n"
    assert len(grpo_jax_command("sample", "run", "--prompt", "b", "--num", "2").stdout.splitlines()) == 2
    assert "steps was 2, and is 3" in grpo_jax_command("report", "run").stdout + Path("run/report.html").read_text()


def test_rewards_before_training(experiment):
    options = ["--attack-budget", "100", "--num-prompts", "2", "--num-groups", "2", "--run-dir", "rewards"]
    out = grpo_jax_command("rewards", str(experiment), *options).stdout
    assert "attacks on share_of_a" in out and out.splitlines()[-1] == "rewards/rewards.png"
    scored = [row["rewards"]["share_of_a"] for row in rows(Path("rewards/groups.jsonl"))]
    assert len(scored) == 2 * 2 * 4  # prompts x groups x group size
    figures = json.loads(Path("rewards/rewards.json").read_text())
    assert figures["readings"][0]["signals"]["share_of_a"]["mean"] == pytest.approx(fmean(scored))
    # "aaa" earns 1 and is right; of the wrong answers, those with one a earn most: 1/3.
    best = max(attack["value"] for attack in figures["attacks"]["share_of_a"])
    assert best == pytest.approx(1 / 3) and figures["warnings"][0].startswith("share_of_a pays answers")


def test_a_sweep_and_its_table(experiment):
    Path("toy.py").write_text(experiment.read_text() + ABLATION)
    out = grpo_jax_command("sweep", "toy.py", "--dir", "runs", "--jobs", "2").stdout
    assert out.count("finished") == 4 and "table toy.py --dir runs" in out
    found: dict[str, list[float]] = {"base": [], "fast": []}
    for path in Path("runs").glob("*/run.json"):
        info = json.loads(path.read_text())
        [arm] = [each.removeprefix("arm=") for each in info["overrides"] if each.startswith("arm=")]
        found[arm].append(successes(rows(path.parent / "metrics.jsonl"))[-1])
    table = grpo_jax_command("table", "toy.py", "--dir", "runs", "--format", "csv").stdout
    arms = list(csv.DictReader(line for line in table.splitlines() if not line.startswith("#")))
    assert [(arm["arm"], arm["seeds"]) for arm in arms] == [("base", "2"), ("fast", "2")]
    for arm in arms:
        assert float(arm["mean"]) == pytest.approx(fmean(found[arm["arm"]]), rel=1e-5)
    assert math.isclose(float(arms[1]["difference"]), fmean(found["fast"]) - fmean(found["base"]), abs_tol=1e-6)


def test_a_mistake_is_one_sentence_and_status_2(experiment):
    done = grpo_jax_command("train", str(experiment), "--set", "stepz=3", status=2)
    assert done.stdout == ""
    assert done.stderr == "error: 'stepz' is not a field: Experiment has no 'stepz'; did you mean 'steps'?\n"
    assert not Path("runs").exists()
