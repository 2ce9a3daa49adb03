"""Reward functions: they compute scores from text. They have TRL's signature and are called with keywords only:

    reward(*, prompts, completions, completion_ids, **columns) -> one float or None per completion

Every argument is a list with one entry per completion. `columns` are the other keys of the task's examples. None means
"does not apply". A completion is a string. For a chat prompt or an episode of several turns it is a list of messages:
those of the assistant and, between them, those of the environment with the role `user`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

ARGUMENTS = ("prompts", "completions", "completion_ids")
"""The arguments that every reward function gets, so that no column may have their names."""

RewardFunction = Callable[..., Sequence[float | None]]

Completion = str | Sequence[Mapping[str, str]]
"""A text, or messages {"role", "content"}."""


def turns(completion: Completion) -> list[str]:
    """Returns the texts of the assistant's turns, in order. A string is one turn."""
    if isinstance(completion, str):
        return [completion]
    return [message["content"] for message in completion if message["role"] == "assistant"]


def text(completion: Completion) -> str:
    """Returns the text of the assistant's last turn, or an empty string if there is none."""
    return (turns(completion) or [""])[-1]


def share(held: Iterable[bool]) -> float | None:
    """Returns the fraction of the values that are true, or None ("does not apply") if there are no values."""
    values = list(held)
    return sum(values) / len(values) if values else None
