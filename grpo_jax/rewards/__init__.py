"""Text to score. A reward function has TRL's signature and is called with keywords only:

    reward(*, prompts, completions, completion_ids, **columns) -> one float or None per completion

Every argument is a list with one entry per completion; `columns` are the further keys of the task's examples. None
means "does not apply". A completion is a string, or, for a chat prompt or an episode of several turns, a list of
messages in which the environment's `user` messages stand between the assistant's.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

RewardFunction = Callable[..., Sequence[float | None]]
Completion = str | Sequence[Mapping[str, str]]


def turns(completion: Completion) -> list[str]:
    """Returns the assistant's texts in order; a string is one turn."""
    if isinstance(completion, str):
        return [completion]
    return [message["content"] for message in completion if message["role"] == "assistant"]


def text(completion: Completion) -> str:
    """Returns the assistant's last text, or the empty string if it never spoke."""
    return (turns(completion) or [""])[-1]


def share(held: Iterable[bool]) -> float | None:
    """Returns the share of the values that are true, or None ("does not apply") if there are no values."""
    values = list(held)
    return sum(values) / len(values) if values else None
