"""Attacks: which answers are tried, what they earn, and that rewards known to be exploitable are exposed."""

import math
import random

import numpy as np
import pytest

from grpo_jax.experiment import Experiment
from grpo_jax.policy.tokenizer import CharacterTokenizer
from grpo_jax.reward_lab import attacks
from grpo_jax.reward_lab.attacks import (
    AttackConfig,
    Honest,
    Target,
    attack,
    families,
    neighbours,
    search,
    template,
    wrong_value,
)
from grpo_jax.rewards.wordle import binary, partial_credit, partial_credit_strict
from grpo_jax.tasks import Task
from grpo_jax.tasks.wordle import single_guess, six_turns

LETTERS = CharacterTokenizer("ABCDEFGHIJKLMNOPQRSTUVWXYZgyx-")
WORDS = ["CRANE", "SLATE", "MOUSE", "PIOUS", "DWELL", "BRAND", "KNOTS", "FJELD", "CHIMP", "VOZHD", "GAWKY"]


def target(task: Task, tokenizer=LETTERS, **rewards) -> Target:
    return Target(Experiment(task=task, rewards=rewards), {}, tokenizer)


def found(aim: Target, *, budget: int = 1500, completions=("CRANE", "OASIS")) -> dict[str, dict[str, attacks.Attack]]:
    task = aim.task
    config = AttackConfig(task.train[:4], task.held_out[:4], WORDS, list(completions), max_tokens=6, budget=budget)
    result = attack(aim, list(aim.experiment.rewards), config)
    return {name: {each.family: each for each in tried} for name, tried in result.items()}


def test_the_articles_partial_credit_pays_repeated_letters_and_a_non_word_more_than_honest_guesses():
    aim = target(single_guess("POUND"), partial_credit=partial_credit, strict=partial_credit_strict, binary=binary)
    tried = found(aim)
    # OOOOO: one G and four Y against the set of letters; as the game counts, the four are X.
    assert tried["partial_credit"]["repeated letter"].value == pytest.approx(0.2 + 4 * 0.1)
    assert tried["strict"]["repeated letter"].value == pytest.approx(0.2)
    # A letter of the secret doubled in place of another: four G and a Y. Strictly it is four G and an X.
    assert tried["partial_credit"]["best constant found"].value == pytest.approx(0.9)
    assert tried["strict"]["best constant found"].value == pytest.approx(0.8)
    assert tried["partial_credit"]["best constant found"].success == 0

    honest = [Honest("demonstrations", aim.score(WORDS, aim.task.train)[0]["partial_credit"][:, 0])]
    sentence = attacks.warning("partial_credit", list(tried["partial_credit"].values()), honest)
    assert "0.900 for '" in sentence and "(repeated letter)" in sentence
    assert attacks.warning("binary", list(tried["binary"].values()), [Honest("demonstrations", np.zeros(9))]) is None


def test_an_answer_that_is_always_right_is_no_exploit():
    aim = target(single_guess("POUND"), binary=binary)
    rewards, success = aim.score(["POUND", "CRANE"], aim.task.train)
    assert math.isnan(wrong_value(rewards["binary"], success)[0])
    assert wrong_value(rewards["binary"], success)[1] == 0


def test_the_value_of_an_attack_by_hand():
    rewards = np.array([[1.0, 0.5, 0.1], [math.nan, 1.0, 0.3]])
    success = np.array([[True, False, False], [False, True, False]])
    np.testing.assert_allclose(wrong_value(rewards, success), [0.3, 0.3])


def test_an_answer_is_given_in_every_turn_of_a_game():
    aim = target(six_turns(4, 4), binary=binary)
    seen = []
    aim.experiment.rewards["spy"] = lambda *, completions, **_: [seen.append(c) or 0.0 for c in completions]
    aim.score(["CRANE"], [example for example in aim.task.train if example["secret"] != "CRANE"][:1])
    said = [message["content"] for message in seen[0] if message["role"] == "assistant"]
    assert said == ["CRANE"] * 6


def test_what_the_policy_cannot_sample_is_no_attack_and_a_reward_that_fails_does_not_end_the_study():
    def touchy(*, completions, **_):
        if any(not c for c in completions):
            raise ValueError("nothing was said")
        return [1.0] * len(completions)

    aim = target(single_guess("POUND"), touchy=touchy)
    rewards, _ = aim.score(["pound", "CRANE"], aim.task.train)
    assert math.isnan(rewards["touchy"][0, 0]) and rewards["touchy"][1, 0] == 1
    assert math.isnan(aim.score([""], aim.task.train)[0]["touchy"][0, 0])


def test_an_answer_is_chosen_on_some_examples_and_judged_on_others():
    def lucky(*, completions, number, **_):
        return [float(c == "AA" and n == 0) for c, n in zip(completions, number, strict=True)]

    def never(*, completions, **_):
        return [False] * len(completions)

    task = Task("luck", [{"prompt": "A", "number": 0}], [{"prompt": "B", "number": 1}], success=never)
    config = AttackConfig(task.train, task.held_out, ["AA", "AB"], [], max_tokens=3, budget=100)
    tried = attack(target(task, lucky=lucky), ["lucky"], config)
    assert {each.family: each.value for each in tried["lucky"]}["best constant found"] == 0


def test_hill_climbing_finds_a_hidden_word_within_its_budget():
    asked = []

    def value(texts):
        asked.extend(texts)
        return np.array([sum(a == b for a, b in zip(text, "FROG", strict=False)) for text in texts], float)

    assert search(value, ["AAAA"], "FROGABC", 500, random.Random(0)) == "FROG"
    assert len(asked) <= 500
    asked.clear()
    search(value, ["AAAA", "BBBB"], "FROGABC", 40, random.Random(0))
    assert len(asked) == 40


def test_a_search_in_which_every_value_is_nan_finds_nothing():
    assert search(lambda texts: np.full(len(texts), math.nan), ["A"], "AB", 20, random.Random(0)) is None


def test_neighbours_differ_in_one_character_or_have_one_less():
    assert sorted(neighbours("AB", "AB")) == sorted(["BB", "AA", "B", "A"])


def test_the_template_of_demonstrations_is_what_they_share():
    assert template(["<answer> 12 </answer>", "<answer> 97 </answer>"]) == ("<answer> ", " </answer>")
    assert template(["CRANE", "SLOTH"]) == template(["CRANE"]) == ("", "")
    assert template(["aa", "aaa"]) == ("aa", "")  # beginning and end never overlap


def test_every_family_is_tried_alone_and_in_the_template():
    tokenizer = CharacterTokenizer("[]0123456789 +")
    made = families(["[12]", "[97]"], ["[12]", "[97]"], list("[]1297"), tokenizer, limit=6)
    assert {"", "[]"} <= set(made["empty"])
    assert {"11", "[11]"} <= set(made["repeated letter"])
    assert "[111]" in made["repeated token"] and "[12][12]" in made["over-long"]
    example = {"prompt": [{"role": "system", "content": "add"}, {"role": "user", "content": "1 + 1"}]}
    assert {echo(example) for echo in made["echoed prompt"]} == {"1 + 1", "[1 + 1]", "add\n1 + 1", "[add\n1 + 1]"}
