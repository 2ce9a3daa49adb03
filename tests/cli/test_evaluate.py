"""What an evaluation is told, and what a comparison of two says of its pairs."""

from types import SimpleNamespace

import pytest

from grpo_jax.cli.evaluate import Options, _comparison, _difference, _population


def test_options_of_an_evaluation_are_overrides_after_those_of_set():
    options = Options((("a=1", "b=2"), ("c=3",)), num_prompts=5, num_samples=2, temperature=0.0)
    named = ["evaluation.num_prompts=5", "evaluation.num_samples=2", "evaluation.temperature=0.0"]
    assert options.overrides() == ["a=1", "b=2", "c=3", *named] and Options().overrides() == []


def outcome(*success: bool, samples: int = 1, temperature: float = 0.0) -> SimpleNamespace:
    records = [{"success": each} for each in success]
    return SimpleNamespace(
        records=records, num_samples=samples, temperature=temperature, num_prompts=len(records) // samples
    )


def test_greedy_samples_of_a_prompt_are_one_outcome_and_others_a_mean():
    ours, theirs = [True, True, False, False] * 6, [False, False, False, True] * 6
    greedy = _difference(outcome(*ours, samples=2), outcome(*theirs, samples=2))
    assert (greedy.value, greedy.num_pairs, greedy.num_higher) == (0.5, 12, 6)
    sampled = _difference(outcome(*ours, samples=2, temperature=1), outcome(*theirs, samples=2, temperature=1))
    assert (sampled.value, sampled.num_pairs, sampled.num_lower) == (pytest.approx(0.25), 12, 6)


@pytest.mark.parametrize(
    ("prompts", "temperature", "population"),
    [
        (10, 1.0, ("prompts", "over prompts like these")),
        (9, 1.0, ("samples", "over samples of these 9 prompts, not over other prompts")),
        (1, 1.0, ("samples", "over samples of this prompt, not over other prompts")),
        (1, 0.0, ("prompts", "over prompts like these")),
    ],
)
def test_what_a_comparison_is_about(prompts, temperature, population):
    assert _population(SimpleNamespace(num_prompts=prompts, temperature=temperature)) == population


def test_a_comparison_names_its_test_its_limits_and_the_other_policy():
    ours, theirs = [True] * 24, [False] * 24
    clear = outcome(*ours, samples=2, temperature=1), outcome(*theirs, samples=2, temperature=1)
    said = _comparison(*clear, "other")
    assert said.startswith("difference in success +100.0 points [+") and ", +100.0], sign-flip p < .001: " in said
    assert said.endswith("better than other (over prompts like these)")
    assert "McNemar p < .001" in _comparison(outcome(*ours, temperature=1), outcome(*theirs, temperature=1), "x")
    few = outcome(True, False, samples=2, temperature=1), outcome(False, False, samples=2, temperature=1)
    said = _comparison(*few, "x")
    assert ", McNemar p = 1: 2 samples cannot show a difference" in said
