"""Which method: every situation against the chart, and that what is advised can be run."""

import itertools
from pathlib import Path

import pytest

from grpo_jax.cli import main
from grpo_jax.cli.which_method import CHART, ENOUGH_COMPARISONS, QUESTIONS, Situation, line_for
from grpo_jax.experiment import METHODS, load

ROOT = Path(__file__).parents[2]
EXPECTED = [
    # What must hold, and the methods then; the first row that holds decides.
    ({"checked", "sometimes right"}, ("grpo",)),
    ({"checked", "demonstrations"}, ("sft", "grpo")),
    ({"checked"}, ()),
    ({"enough comparisons"}, ("reward_model", "ppo")),
    ({"comparisons"}, ("dpo",)),
    ({"demonstrations"}, ("sft",)),
    (set(), ()),
]
SITUATIONS = [
    Situation(verifiable, labels, num_labels, reasoning, solves_some)
    for verifiable, labels, num_labels, reasoning, solves_some in itertools.product(
        (True, False),
        QUESTIONS["labels"][1],
        (0, 1, ENOUGH_COMPARISONS - 1, ENOUGH_COMPARISONS),
        (True, False),
        (True, False),
    )
]


def facts(situation: Situation) -> set[str]:
    """What is true of a situation. The number is that of the comparisons where both kinds of labels are there."""
    known = set()
    if situation.verifiable:
        known.add("checked")
    if situation.solves_some:
        known.add("sometimes right")
    if situation.labels in ("comparisons", "both") and situation.num_labels > 0:
        known.add("comparisons")
        if situation.num_labels >= 5_000:
            known.add("enough comparisons")
    if situation.labels == "both" or (situation.labels == "demonstrations" and situation.num_labels > 0):
        known.add("demonstrations")
    return known


def test_every_situation_gets_the_methods_of_the_chart():
    for situation in SITUATIONS:
        expected = next(methods for needed, methods in EXPECTED if needed <= facts(situation))
        assert line_for(situation).methods == expected, situation


def test_every_line_of_the_chart_decides_some_situation():
    assert {line_for(situation) for situation in SITUATIONS} == set(CHART)


def test_the_guide_prints_the_chart():
    rows = [line.strip("| ").split(" | ") for line in (ROOT / "docs" / "which_method.md").read_text().splitlines()
            if line.startswith("| ")]  # fmt: skip
    expected = [[line.condition, ", then ".join(line.methods) or "none yet"] for line in CHART]
    assert rows == [["condition", "method"], *expected]


@pytest.mark.parametrize("line", CHART, ids=lambda line: line.condition)
def test_the_methods_exist_and_the_experiment_loads(line):
    assert set(line.methods) <= set(METHODS) and line.why
    assert bool(line.methods) == bool(line.experiment)
    if line.experiment:
        overrides = [f"method={line.methods[0]}"] if "methods/" in line.experiment else []
        assert load(ROOT / line.experiment, overrides).steps > 0


def test_the_command_answers_and_asks_for_what_it_lacks(capsys):
    options = ["--verifiable", "no", "--labels", "comparisons", "--num-labels", "300", "--reasoning", "no"]
    assert main(["advise", *options, "--solves-some", "yes"]) == 0
    said = capsys.readouterr().out
    assert "method   dpo" in said and "--set method=dpo" in said and "300 comparisons are too few" in said
    assert main(["advise", *options]) == 2  # no terminal here to ask on
    assert "--solves-some yes|no" in capsys.readouterr().err


def test_the_number_of_labels_is_not_asked_where_there_are_none(capsys):
    options = ["--verifiable", "yes", "--labels", "none", "--reasoning", "yes", "--solves-some", "yes"]
    assert main(["advise", *options]) == 0
    said = capsys.readouterr().out
    assert "method   grpo" in said and "discovers how to reason" in said
    assert "train experiments/quickstart.py\n" in said


def test_a_situation_that_no_method_fits_yet_has_no_experiment_to_start_from(capsys):
    options = ["--verifiable", "yes", "--labels", "comparisons", "--num-labels", "9000", "--reasoning", "no"]
    assert main(["advise", *options, "--solves-some", "no"]) == 0
    said = capsys.readouterr().out
    assert "method   none yet" in said and "start  " not in said
