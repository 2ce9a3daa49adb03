"""`grpo-jax doctor` as its user sees it, with few checks; and training in the directory that it has written to."""

import json
import shutil
from pathlib import Path

import letters
import pytest

from grpo_jax import cli
from grpo_jax.doctor import Check, examination, rewards
from grpo_jax.errors import RunError


@pytest.fixture
def source(tmp_path, monkeypatch) -> Path:
    checks = {"rewards are finite": rewards.rewards_are_finite, "nothing": lambda subject: Check("not applicable")}
    monkeypatch.setattr(examination, "CHECKS", checks)
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copy(letters.__file__, tmp_path))


def test_an_experiment_that_holds_is_certified_and_then_trained_in_the_same_directory(source, tmp_path, capsys):
    run_dir = tmp_path / "run"
    assert cli.main(["doctor", str(source), "--set", "steps=1", "--run-dir", str(run_dir)]) == 0
    said = capsys.readouterr().out
    assert "rewards are finite" in said and "proved: none of 2 checks is refuted" in said
    assert "the policy before" not in said and str(run_dir / "certificate.json") in said
    before = (run_dir / "certificate.json").read_text()
    assert [path.name for path in run_dir.iterdir()] == ["certificate.json"]
    assert cli.main(["train", str(source), "--set", "steps=1", "--run-dir", str(run_dir)]) == 0
    said = capsys.readouterr().out
    assert "is about another config" not in said
    assert (run_dir / "certificate.json").read_text() == before
    key = json.loads((run_dir / "run.json").read_text())["key"]
    assert json.loads(before)["key"] == key and json.loads(before)["overrides"] == ["steps=1"]


def test_a_run_says_that_the_certificate_in_its_directory_is_not_its_own(source, tmp_path, capsys):
    run_dir = tmp_path / "run"
    assert cli.main(["doctor", str(source), "--run-dir", str(run_dir)]) == 0
    assert cli.main(["train", str(source), "--set", "steps=0", "--run-dir", str(run_dir), "--resume"]) == 0
    assert "certificate.json is about another config" in capsys.readouterr().out


def test_a_refutation_is_status_1_with_its_sentence(source, tmp_path, monkeypatch, capsys):
    def failing(subject):
        raise RunError("reward 'share_of_a' raised ValueError.")

    monkeypatch.setattr(examination, "CHECKS", {"rewards are finite": failing})
    assert cli.main(["doctor", str(source), "--run-dir", str(tmp_path / "run")]) == 1
    said = capsys.readouterr()
    assert "refuted: rewards are finite: reward 'share_of_a' raised ValueError." in said.out
    assert said.err.startswith("error: 1 of 1 checks are refuted")
    assert json.loads((tmp_path / "run/certificate.json").read_text())["verdict"] == "refuted"


def test_a_mistake_in_the_config_or_the_directory_is_status_2(source, tmp_path, capsys):
    assert cli.main(["doctor", str(source), "--set", "stepz=1"]) == 2
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.md").touch()
    assert cli.main(["doctor", str(source), "--run-dir", str(tmp_path / "full")]) == 2
    assert "notes.md" in capsys.readouterr().err


def test_a_policy_before_its_warm_start_is_named(source, capsys):
    warm = 'warm_start={"method": "sft", "steps": 1}'
    assert cli.main(["doctor", str(source), "--set", warm]) == 0
    assert "the policy before its warm start" in capsys.readouterr().out
