"""Rewards for integer answers."""

import pytest

from grpo_jax.rewards.mathematics import exact_integer, integer_answer, integer_of


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("<answer>46</answer>", 46),
        ("<answer> -7\n</answer>", -7),
        ("<answer>+046</answer>", 46),
        ("12 + 34 = <answer>46</answer>", 46),
        ("<answer>45</answer> no: <answer>46</answer>", 46),
        ("<answer>46.0</answer>", None),
        ("<answer>4 6</answer>", None),
        ("<answer>forty-six</answer>", None),
        ("<answer>٤٦</answer>", None),  # digits, but not ASCII digits
        ("<answer>" + "9" * 5000 + "</answer>", None),  # longer than Python's own limit, which would raise
        ("46", None),
    ],
)
def test_integer_of(completion: str, expected: int | None) -> None:
    assert integer_of(completion) == expected


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("<answer>46</answer>", 1.0),
        ("The sum is <answer>46</answer>", 1.0),  # text around the tags does not matter
        ("\n<answer>47</answer> ", 0.1),
        ("The sum is <answer>47</answer>", 0.0),
        ("<answer>4</answer><answer>7</answer>", 0.0),
        ("<answer></answer>", 0.0),  # a copy of the instruction
        ("<answer>sum</answer>", 0.0),
        ("46", 0.0),
        ("", 0.0),
    ],
)
def test_exact_earns_one_and_the_format_alone_a_tenth(completion: str, expected: float) -> None:
    assert integer_answer(completions=[completion], answer=[46]) == [expected]
    assert exact_integer(completions=[completion], answer=[46]) == [float(expected == 1.0)]


def test_a_chat_completion_is_read_by_its_last_message() -> None:
    chat = [{"role": "assistant", "content": "<answer>46</answer>"}]
    assert integer_answer(prompts=[[]], completions=[chat], completion_ids=[[1]], answer=[46]) == [1.0]
