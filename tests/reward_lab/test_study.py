"""The study as a whole: what `grpo-jax rewards` prints and saves."""

import io
import json
from dataclasses import replace

import matplotlib.image
import pytest
from rich.console import Console

from grpo_jax import cli
from grpo_jax.experiment import AdvantageConfig, Experiment, RewardConfig, SamplingConfig
from grpo_jax.policy.tokenizer import CharacterTokenizer
from grpo_jax.reward_lab import study as reward_study
from grpo_jax.reward_lab.groups import Groups, read_groups
from grpo_jax.rewards.wordle import binary, partial_credit
from grpo_jax.tasks.wordle import single_guess

TOKENIZER = CharacterTokenizer("ABCDEFGHIJKLMNOPQRSTUVWXYZ[]/")
HOSTILE = "[bold]\x1b[31m"


def make_experiment(**reward) -> Experiment:
    return Experiment(
        task=single_guess("POUND"),
        rewards={"credit": partial_credit, "exact": binary},
        sampling=SamplingConfig(max_tokens=6),
        reward=RewardConfig(**reward),
        advantages=AdvantageConfig(scale="none" if "combine" in reward else "group"),
    )


def make_groups(*texts: str) -> Groups:
    n = len(texts)
    arguments = {"prompts": [""] * n, "completions": list(texts), "completion_ids": [[3]] * n, "secret": ["POUND"] * n}
    return Groups("by hand", arguments, 2, [0] * (n // 2))


def shown(found: reward_study.Study) -> str:
    console = Console(file=io.StringIO(), width=200)
    reward_study.show(found, console, num_groups=1)
    return console.file.getvalue()


def test_a_study_prints_its_groups_signal_agreement_components_and_attacks(tmp_path):
    groups = make_groups("CRANE", "MOUND", "POUND", "POUND")
    found = reward_study.study([groups], make_experiment(), TOKENIZER, {}, budget=600)
    text = shown(found)
    for part in ("by hand: group 1 of 2", "credit and exact", "components", "attacks on total", "best constant found"):
        assert part in text
    assert "warning: credit pays answers that ignore the prompt and are wrong" in text
    assert "warning: exact" not in text

    paths = reward_study.save(found, tmp_path)
    assert [path.name for path in paths] == ["rewards.json", "groups.jsonl", "rewards.png"]
    assert matplotlib.image.imread(paths[2]).shape[2] == 4
    figures = json.loads(paths[0].read_text())
    assert figures["readings"][0]["signals"]["exact"]["no_signal"] == 1.0
    assert {"credit", "exact", "total"} == set(figures["attacks"])
    again = read_groups(paths[1], make_experiment(), TOKENIZER)
    assert (again.group_size, again.arguments["completions"]) == (2, groups.arguments["completions"])


def test_attacks_are_chosen_on_training_examples_and_judged_on_held_out_ones():
    task = replace(single_guess("POUND"), held_out=[{"prompt": "", "secret": "CRANE"}])
    experiment = replace(make_experiment(), task=task)
    found = reward_study.study([make_groups("MOUND", "POUND")], experiment, TOKENIZER, {}, budget=50)
    [blind] = [attack for attack in found.attacks["credit"] if attack.family == "honest, but blind"]
    # Of what earns for POUND without being it, MOUND is best, .8; for CRANE its N alone is in its place.
    assert (blind.text, blind.value) == ("MOUND", 0.2)


def test_with_no_budget_nothing_is_attacked(tmp_path):
    found = reward_study.study([make_groups("CRANE", "POUND")], make_experiment(), TOKENIZER, {}, budget=0)
    assert found.attacks == {} and "attacks" not in shown(found)
    reward_study.save(found, tmp_path)


def test_a_total_that_is_standardised_in_its_group_is_not_attacked():
    experiment = make_experiment(combine="normalize_then_sum")
    found = reward_study.study([make_groups("CRANE", "POUND")], experiment, TOKENIZER, {}, budget=50)
    assert set(found.attacks) == {"credit", "exact"}


def test_completions_are_printed_with_control_characters_escaped():
    found = reward_study.study([make_groups(HOSTILE, "POUND")], make_experiment(), TOKENIZER, {}, budget=0)
    assert "[bold]\\x1b[31m" in shown(found) and "\x1b[31m" not in shown(found)


FILE = """
from grpo_jax.experiment import *
from grpo_jax.rewards.wordle import partial_credit
from grpo_jax.tasks.wordle import single_guess

config = Experiment(
    task=single_guess("POUND"), rewards={"partial_credit": partial_credit}, group_size=4, steps=1, prompts_per_step=1,
    policy=PolicyConfig(scratch=ScratchConfig("ABCDEFGHIJKLMNOPQRSTUVWXYZ", hidden_size=8, num_layers=1, num_heads=1)),
    sampling=SamplingConfig(max_tokens=6),
    warm_start={"method": "sft", "steps": 1, "devices": 1},
)
"""


def test_the_command_samples_from_the_starting_policy_and_writes_what_explains_it(tmp_path, capsys):
    (tmp_path / "toy.py").write_text(FILE)
    out = tmp_path / "out"
    arguments = ["rewards", str(tmp_path / "toy.py"), "--run-dir", str(out), "--temperatures", "1", "0.5"]
    arguments += ["--num-groups", "2", "--attack-budget", "200", "--rewards", "grpo_jax.rewards.wordle:binary"]
    assert cli.main(arguments) == 0
    text = capsys.readouterr().out
    assert "temperature 0.5: group 1 of 2" in text and "attacks on binary" in text
    assert {"rewards.json", "groups.jsonl", "rewards.png", "config.json", "warm_start"} <= {
        p.name for p in out.iterdir()
    }
    assert json.loads((out / "run.json").read_text())["status"] == "finished"


@pytest.mark.parametrize("mistake", [["--num-prompts", "0"], ["--completions", "nowhere.jsonl"], ["--rewards", "x"]])
def test_a_mistake_is_one_sentence(tmp_path, capsys, mistake):
    (tmp_path / "toy.py").write_text(FILE)
    assert cli.main(["rewards", str(tmp_path / "toy.py"), "--run-dir", str(tmp_path / "out"), *mistake]) == 2
    assert capsys.readouterr().err.startswith("error: ")
