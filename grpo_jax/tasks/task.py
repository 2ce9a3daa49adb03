"""`Task`: what a policy is trained and evaluated on."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Example = Mapping[str, Any]
"""One prompt, under the key "prompt": a string, or a list of chat messages {"role", "content"}. Every other key is a
column that reward functions receive, e.g. the secret word."""


@dataclass(frozen=True)
class Task:
    """A task that a policy is trained and evaluated on.

    Attributes:
      name: the name in logs and tables.
      train: the examples for training.
      held_out: the examples for evaluation only; disjoint from `train` unless the task says otherwise.
      success: the success that evaluation counts. It is called like a reward function and returns one bool per
        completion.
      demonstrate: returns the assistant's turns for an example, one string each, for supervised fine-tuning. None if
        the task has no demonstrations.
      reply: for several turns: returns the environment's next message after the assistant's turns so far, or None if
        the episode is over. A pure function. None for a task of a single turn.
      max_turns: the maximum number of the assistant's turns.
      references: success rates for comparison, e.g. of a player that ignores the feedback and of one that plays well.
    """

    name: str
    train: Sequence[Example]
    held_out: Sequence[Example]
    success: Callable[..., list[bool]]
    demonstrate: Callable[[Example, random.Random], list[str]] | None = None
    reply: Callable[[Example, Sequence[str]], str | None] | None = None
    max_turns: int = 1
    references: Mapping[str, float] = field(default_factory=dict)


Task.__module__ = "grpo_jax.tasks"  # where it is public; the names of runs, made from it, depend on this
