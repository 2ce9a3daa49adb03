"""Which method: the chart's branches, and that what is advised can be run."""

import itertools
from pathlib import Path

import pytest

from grpo_jax.cli import main
from grpo_jax.cli.which_method import ENOUGH_COMPARISONS, QUESTIONS, Situation, advise
from grpo_jax.experiment import METHODS, load

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("situation", "methods"),
    [
        (Situation(True), ("grpo",)),
        (Situation(True, "both", 10**6, reasoning=True), ("grpo",)),
        (Situation(True, "demonstrations", 100, solves_some=False), ("sft", "grpo")),
        (Situation(True, solves_some=False), ()),
        (Situation(False, "comparisons", ENOUGH_COMPARISONS), ("reward_model", "ppo")),
        (Situation(False, "both", ENOUGH_COMPARISONS - 1), ("dpo",)),
        (Situation(False, "demonstrations", 100), ("sft",)),
        (Situation(False), ()),
    ],
)
def test_each_branch_of_the_chart(situation, methods):
    assert advise(situation).methods == methods


def test_every_situation_gets_methods_that_exist_and_a_file_that_loads():
    for verifiable, labels, num, reasoning, some in itertools.product(
        (True, False), QUESTIONS["labels"][1], (0, 10**6), (True, False), (True, False)
    ):
        advice = advise(Situation(verifiable, labels, num, reasoning, some))
        assert set(advice.methods) <= set(METHODS) and advice.why
        assert bool(advice.methods) == bool(advice.experiment)
        if advice.experiment:
            overrides = [f"method={advice.methods[0]}"] if "methods/" in advice.experiment else []
            assert load(ROOT / advice.experiment, overrides).steps > 0


def test_the_command_answers_and_asks_for_what_it_lacks(capsys):
    options = ["--verifiable", "no", "--labels", "comparisons", "--num-labels", "300", "--reasoning", "no"]
    assert main(["advise", *options, "--solves-some", "yes"]) == 0
    said = capsys.readouterr().out
    assert "method   dpo" in said and "--set method=dpo" in said
    assert main(["advise", *options]) == 2  # no terminal here to ask on
    assert "--solves-some yes|no" in capsys.readouterr().err
