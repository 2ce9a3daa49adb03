"""The texts of a completion that reward functions use."""

import pytest

from grpo_jax.rewards import share, text, turns

GAME = [
    {"role": "assistant", "content": "CRANE"},
    {"role": "user", "content": "xygxx"},
    {"role": "assistant", "content": "POUND"},
]


def test_a_string_is_one_turn() -> None:
    assert turns("POUND") == ["POUND"]
    assert text("POUND") == "POUND"


def test_the_environments_messages_are_not_the_assistants() -> None:
    assert turns(GAME) == ["CRANE", "POUND"]
    assert text(GAME) == "POUND"
    assert text(GAME[:2]) == "CRANE"


def test_an_assistant_that_never_spoke_said_nothing() -> None:
    assert turns([]) == []
    assert text([]) == ""


@pytest.mark.parametrize(("held", "expected"), [([], None), ([False], 0.0), ([True, False, False, True], 0.5)])
def test_a_share_of_nothing_does_not_apply(held: list[bool], expected: float | None) -> None:
    assert share(held) == expected
