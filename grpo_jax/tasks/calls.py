"""Calls the functions of a task, which are a user's code: under a time limit, and with what they return checked.

A success that is not known is neither a success nor a failure: it ends the run, as a reward that fails does.
"""

import random
import reprlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from grpo_jax.errors import RunError
from grpo_jax.experiment import RewardConfig
from grpo_jax.rewards import text
from grpo_jax.rewards.limits import Failure, attempt
from grpo_jax.tasks.task import Example, Task

TIME_LIMIT = RewardConfig().time_limit  # seconds


def success_of(task: Task, arguments: Mapping[str, Sequence[Any]], time_limit: float = TIME_LIMIT) -> list[bool]:
    """Which of N completions succeed -> [N], as `task.success` says.

    Args:
      arguments: the keyword arguments, N entries each, as a reward gets them.
      time_limit: of the call, in seconds.

    Raises:
      RunError: if the function raises an exception, runs past the limit, or does not return one truth value (True,
        False, 1 or 0; of Python or of NumPy) for each completion.
    """
    completions = arguments["completions"]
    values = attempt(lambda: list(task.success(**arguments)), time_limit, __file__)
    must = "it must return one truth value (True, False, 1 or 0) for each completion"
    if isinstance(values, Failure):
        raise RunError(f"{_name(task, 'success')} {values.reason}; {must}.") from values.cause
    if len(values) != len(completions):
        raise RunError(
            f"{_name(task, 'success')} returned {len(values)} values for {len(completions)} completions; {must}."
        )
    bad = [index for index, value in enumerate(values) if not _is_truth_value(value)]
    if bad:
        more = f", and no truth value for {len(bad) - 1} more" if len(bad) > 1 else ""
        raise RunError(
            f"{_name(task, 'success')} returned {reprlib.repr(values[bad[0]])} for completion {bad[0]}, "
            f"{reprlib.repr(text(completions[bad[0]]))}{more}; {must}."
        )
    return [bool(value) for value in values]


def reply_of(task: Task, example: Example, turns: Sequence[str], time_limit: float | None = TIME_LIMIT) -> str | None:
    """The environment's message after these turns of the assistant; None if the episode is over.

    Args:
      time_limit: of the call, in seconds; None for a person who answers.

    Raises:
      RunError: if `task.reply` raises an exception, runs past the limit, or returns neither a string nor None.
    """
    if task.reply is None:
        return None
    if time_limit is None:
        return task.reply(example, turns)
    value = _call(task, "reply", task.reply, (example, turns), time_limit)
    if value is None or isinstance(value, str):
        return value
    raise RunError(
        f"{_name(task, 'reply')} returned {reprlib.repr(value)} after the turns {reprlib.repr(list(turns))}; it must "
        "return the environment's message, a string, or None where the episode is over."
    )


def demonstration_of(
    task: Task, example: Example, generator: random.Random, time_limit: float = TIME_LIMIT
) -> list[str]:
    """The assistant's turns in a demonstration of an example, at least one.

    Raises:
      RunError: if `task.demonstrate` raises an exception, runs past the limit, or returns no list of strings.
    """
    assert task.demonstrate is not None
    turns = _call(task, "demonstrate", task.demonstrate, (example, generator), time_limit)
    if isinstance(turns, (list, tuple)) and turns and all(isinstance(turn, str) for turn in turns):
        return list(turns)
    raise RunError(
        f"{_name(task, 'demonstrate')} returned {reprlib.repr(turns)} for the prompt "
        f"{reprlib.repr(example['prompt'])}; it must return the assistant's turns, a list of at least one string."
    )


def _call(task: Task, name: str, function: Callable[..., Any], arguments: Sequence[Any], time_limit: float) -> Any:
    value = attempt(lambda: function(*arguments), time_limit, __file__)
    if isinstance(value, Failure):
        prompt = reprlib.repr(arguments[0]["prompt"])
        raise RunError(f"{_name(task, name)} {value.reason}, for the prompt {prompt}.") from value.cause
    return value


def _name(task: Task, function: str) -> str:
    return f"the function {function!r} of task {task.name!r}"


def _is_truth_value(value: Any) -> bool:
    """Whether a value is True, False, 1 or 0: of Python, of NumPy, or an array of one number."""
    try:
        number = np.asarray(value)
    except Exception:  # what an object does that is made an array of is its own affair
        return False
    return number.shape == () and number.dtype.kind in "biuf" and number.item() in (0, 1)
