"""Tags: which text is the answer, and which completions are well-formed."""

import pytest

from grpo_jax.rewards.format import answer_of, answer_tags, think_and_answer


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("<answer>46</answer>", "46"),
        ("It is <answer> 46\n</answer>, surely.", " 46\n"),
        ("<answer>1</answer> no, <answer>2</answer>", "2"),  # the last one counts
        ("<answer>1<answer>2</answer>", "2"),  # the innermost pair
        ("<answer>1</answer></answer>", "1"),
        ("<answer></answer>", ""),
        ("<answer>46", None),
        ("46</answer>", None),
        ("<ANSWER>46</ANSWER>", None),
        ("46", None),
    ],
)
def test_answer_of(completion: str, expected: str | None) -> None:
    assert answer_of(completion) == expected


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("<answer>46</answer>", 1.0),
        (" \n<answer>\n46\n</answer>\n", 1.0),
        ("It is <answer>46</answer>", 0.0),
        ("<answer>46</answer>.", 0.0),
        ("<answer></answer>", 0.0),
        ("<answer> </answer>", 0.0),
        ("<answer>4</answer><answer>6</answer>", 0.0),
        ("<think>4</think><answer>46</answer>", 0.0),
        ("", 0.0),
    ],
)
def test_answer_tags(completion: str, expected: float) -> None:
    assert answer_tags(completions=[completion]) == [expected]


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("<think>O and U</think><answer>POUND</answer>", 1.0),
        ("\n<think>O\nand U</think>\n\n<answer>POUND</answer> ", 1.0),
        ("<think></think><answer>POUND</answer>", 0.0),
        ("<think>O</think><answer></answer>", 0.0),
        ("<answer>POUND</answer><think>O</think>", 0.0),
        ("<think>O <answer>POUND</answer></think>", 0.0),
        ("<think>O</think> so <answer>POUND</answer>", 0.0),
        ("<think>O</think><think>U</think><answer>POUND</answer>", 0.0),
        ("<Think>O</Think><answer>POUND</answer>", 0.0),
        ("<answer>POUND</answer>", 0.0),
    ],
)
def test_think_and_answer(completion: str, expected: float) -> None:
    assert think_and_answer(completions=[completion]) == [expected]


def test_over_several_turns_the_share_that_keeps_to_the_format_counts() -> None:
    contents = ["<answer>CRANE</answer>", "SLATE", "<answer>POUND</answer>", "HOUND"]
    game = [m for c in contents for m in ({"role": "assistant", "content": c}, {"role": "user", "content": "<answer>"})]
    assert answer_tags(completions=[game]) == [0.5]


def test_an_episode_without_a_turn_has_no_format() -> None:
    assert think_and_answer(completions=[[]]) == [None]
