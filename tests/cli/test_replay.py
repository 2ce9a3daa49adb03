"""The commands `replay` and `diff`: what they print, and their exit status."""

import json
import os
import shutil
from pathlib import Path

import letters
import pytest

from grpo_jax import training
from grpo_jax.cli import main
from grpo_jax.experiment import load


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run of two steps, in a folder with its experiment's file."""
    folder = tmp_path_factory.mktemp("trained")
    shutil.copy(letters.__file__, folder / "letters.py")
    config = load(folder / "letters.py", ["steps=2"])
    training.train(config, folder / "run", source=folder / "letters.py", overrides=["steps=2"], quiet=True)
    return folder


@pytest.fixture
def run(trained, tmp_path, monkeypatch) -> Path:
    """A copy of it, in the current directory, that may be edited."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    shutil.copytree(trained / "run", "run")
    return Path("run")


def status(*arguments: str) -> int:
    """The exit status of a command line."""
    try:
        return main(arguments)
    except SystemExit as end:
        assert isinstance(end.code, int)
        return end.code


def edit_reward(run_dir: Path) -> None:
    copy = run_dir / "code" / "letters.py"
    copy.write_text(copy.read_text().replace('count("a") / 3', 'count("b") / 3'))


def test_replay_shows_a_step_and_says_that_it_is_the_same(run, capsys):
    assert status("replay", "run", "--step", "1", "--prompts", "1") == 0
    said = capsys.readouterr().out
    rows = [json.loads(line) for line in (run / "completions.jsonl").read_text().splitlines()]
    group = [row for row in rows if row["step"] == 1][:4]
    for row in group:
        assert f"│ {row['completion']} " in said and f" {row['reward']:.3f} │" in said
    assert "and 3 more prompts (all with --prompts 4)" in said
    assert said.endswith(
        "run: step 1, made again from the start, is the same to the last digit (28 metrics and 16 completions).\n"
    )
    assert "not as when" not in said and "what differs" not in said


def test_replay_says_what_differs_and_what_was_edited(run, capsys):
    edit_reward(run)
    assert status("replay", "run", "--step", "0") == 1
    said = capsys.readouterr().out
    assert "not as when the run began" in said and "code/letters.py  as copied  edited" in said
    assert "rewards/share_of_a/mean" in said and "completion 0: " in said
    assert said.splitlines()[-1].startswith("run: step 0, made again from the start, is not the same: ")


def test_replay_says_what_is_rounding(run, capsys):
    """As if the run had been made on a processor that rounds another way."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in lines:
        if row["step"] == 0 and "grad_norm" in row:
            row["grad_norm"] *= 1 + 2e-6
            row["loss"] += 1e-9
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    info = json.loads((run / "run.json").read_text())
    info["processor"]["name"] = "Another"
    (run / "run.json").write_text(json.dumps(info))
    assert status("replay", "run", "--step", "0") == 0
    said = capsys.readouterr().out
    assert "is the same up to rounding (largest relative difference 2e-06 in grad_norm; 28 metrics and 16" in said
    assert "processor.name  Another" in said and " grad_norm " in said and " loss " in said


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["replay", "run", "--step", "7"], "error: the run 'run' has no step 7: it has logged steps 0 to 1."),
        (["replay", "run", "--step", "-1"], "error: the run 'run' has no step -1: it has logged steps 0 to 1."),
        (["replay", "nowhere", "--step", "0"], "error: 'nowhere' is not the directory of a run"),
        (["diff", "run", "nowhere"], "error: 'nowhere' is not the directory of a run"),
        (["replay", "run"], "--step"),
        (["diff", "run"], "RUN_B"),
    ],
)
def test_a_mistake_is_one_sentence(run, capsys, arguments, says):
    assert status(*arguments) == 2
    assert says in capsys.readouterr().err


def test_diff_says_that_nothing_differs(run, capsys):
    shutil.copytree(run, "other")
    assert status("diff", "run", "other") == 0
    assert capsys.readouterr().out == (
        "A  run, seed 0\nB  other, seed 0\n"
        "the same  config, versions, processor and training code, resumptions, how far they are, files, "
        "numbers of the training (2 steps), last evaluations\n"
    )


def test_diff_says_what_differs(run, capsys):
    shutil.copytree(run, "other")
    edit_reward(Path("other"))
    config = json.loads(Path("other/config.json").read_text())
    config["optimizer"]["learning_rate"] = 0.5
    Path("other/config.json").write_text(json.dumps(config))
    info = json.loads(Path("other/run.json").read_text())
    info["versions"]["jax"] = "9.9"
    info["status"], info["overrides"] = "interrupted", ["arm=hot\x1b[31m", "seed=0"]
    info["code"]["files"]["letters.py"] = "0" * 64
    Path("other/run.json").write_text(json.dumps(info))
    rows = [json.loads(line) for line in Path("other/metrics.jsonl").read_text().splitlines()]
    rows[-1]["evaluation/success"] += 0.25
    rows[1]["grad_norm"] = 0.25
    Path("other/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert status("diff", "run", "other", "--code") == 1
    said = capsys.readouterr().out
    assert "\x1b" not in said and "B  other, arm hot\\x1b[31m, seed 0" in said
    lines = [line.split() for line in said.splitlines()]
    for line in (
        ["optimizer.learning_rate", "0.01", "0.5"],
        ["status", "finished", "interrupted"],
        ["letters.py", "share_of_a"],
        ["B", "−", "A", "+25.0", "points"],
    ):
        assert line in lines
    assert any(words[:2] == ["0", "grad_norm"] and words[-1] == "1/2" for words in lines)
    assert '+    return [completion.count("b") / 3 for completion in completions]' in said
    assert "the same  resumptions" in said and "evaluate run --against other" in said


def test_diff_of_runs_without_numbers_or_files(run, capsys):
    """As of a run of a notebook that was killed at once."""
    shutil.copytree(run, "other")
    for name in ("metrics.jsonl", "completions.jsonl", "summary.json"):
        os.remove(f"other/{name}")
    info = json.loads(Path("other/run.json").read_text())
    Path("other/run.json").write_text(json.dumps({"status": "running", "versions": info["versions"], "code": None}))
    assert status("diff", "run", "other") == 1
    said = capsys.readouterr().out
    assert "B  other\n" in said and "Files are not compared" in said and "training code" in said
    assert "numbers of the" not in said and "last evaluations" not in said
