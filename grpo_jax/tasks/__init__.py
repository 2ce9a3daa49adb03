"""What is asked: prompts in disjoint splits, what counts as success, and the environment that answers. Text only."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Example = Mapping[str, Any]
"""One prompt, under the key "prompt": a string, or a list of chat messages {"role", "content"}. Every further key is a
column that reward functions receive, e.g. the secret word."""


@dataclass(frozen=True)
class Task:
    """A task that a policy is trained and evaluated on.

    Attributes:
      name: how it is called in logs and tables.
      train: the examples that are trained on.
      held_out: the examples that are only evaluated on; disjoint from `train` unless the task says otherwise.
      success: what evaluation counts, called as a reward function is; one bool per completion.
      demonstrate: an assistant's turns for an example, one string each, for supervised fine-tuning.
      reply: for several turns: the environment's next message after the assistant's turns so far, or None when the
        episode is over. A pure function. None for a task of a single turn.
      max_turns: the most turns that the assistant has.
      references: success rates to compare with, e.g. of a player that guesses blindly and of one that plays well.
    """

    name: str
    train: Sequence[Example]
    held_out: Sequence[Example]
    success: Callable[..., list[bool]]
    demonstrate: Callable[[Example, random.Random], list[str]] | None = None
    reply: Callable[[Example, Sequence[str]], str | None] | None = None
    max_turns: int = 1
    references: Mapping[str, float] = field(default_factory=dict)
