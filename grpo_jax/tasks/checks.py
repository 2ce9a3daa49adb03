"""What can be wrong with a task's examples, found when an experiment is made of it and not in training."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from grpo_jax.errors import UserError, failure_of, shown
from grpo_jax.experiment.checked import admits
from grpo_jax.rewards.protocol import ARGUMENTS

ROLES = ("system", "developer", "user", "assistant", "tool")
SPLITS = ("train", "held_out")


def require_types(task: Any) -> None:
    """Raises `UserError` for a task with a field of another type."""
    name = f"task {shown(task.name)}"
    for field, wanted, words in (("name", str, "a text"), ("references", Mapping[str, float], "numbers by name")):
        if not admits(wanted, getattr(task, field)):
            raise UserError(f"{name} has {field} = {shown(getattr(task, field))}: it must be {words}.")
    for split in SPLITS:
        examples = getattr(task, split)
        if not (hasattr(examples, "__len__") and hasattr(examples, "__getitem__")):
            raise UserError(f"{name} has {split} = {shown(examples)}: it must be a sequence of examples.")


def check(task: Any) -> None:
    """Raises `UserError` for a task without examples, or with an example that cannot be used."""
    name = f"task {shown(task.name)}"
    for split in SPLITS:
        examples = getattr(task, split)
        if not len(examples):
            raise UserError(f"{name} has no {split} examples: it needs at least one.")
        for index, example in enumerate(examples):
            for problem in _problems(example, examples[0]):
                raise UserError(f"{name}, {split} example {index}: {problem}.")
    if isinstance(task.max_turns, bool) or not isinstance(task.max_turns, int) or task.max_turns < 1:
        raise UserError(f"{name} has max_turns = {shown(task.max_turns)}: it must be a number, 1 or above.")


def warnings(task: Any) -> list[str]:
    """A sentence on held-out examples that are train examples too; an empty list if there are none.

    A task that puts the very same objects into both splits means it: it is evaluated on what it was trained on. So only
    examples that are equal and were made twice count.
    """
    deliberate = set(map(id, task.train))
    found = [(index, at) for index, at in shared_examples(task) if id(task.held_out[index]) not in deliberate]
    if not found:
        return []
    held_out, trained = found[0]
    many = f"{len(found)} of the {len(task.held_out)} held_out examples of task {shown(task.name)}"
    return [
        f"{many} are train examples too (held_out {held_out} is train {trained}), so that success on them may be "
        "memory: leave them out of one of the splits."
    ]


def shared_examples(task: Any) -> list[tuple[int, int]]:
    """The places of held-out examples that equal a train example, each with the first place of that one."""
    train = {content(example): index for index, example in reversed(list(enumerate(task.train)))}
    texts = map(content, task.held_out)
    return [(index, train[text]) for index, text in enumerate(texts) if text in train]


def content(value: Any) -> str:
    """A text that is equal for equal examples."""
    return json.dumps(value, sort_keys=True, default=_content_of_other)


def _content_of_other(value: Any) -> Any:
    return [str(value.dtype), value.tolist()] if isinstance(value, np.ndarray) else repr(value)


def _problems(example: Any, first: Any) -> Iterator[str]:
    """What is wrong with an example, beside the first one of its split."""
    if not isinstance(example, Mapping):
        yield f"it is {_short(example)}, and must be a dict with the key 'prompt'"
        return
    if "prompt" not in example:
        yield f"it has no 'prompt', but the keys {_listed(example)}"
        return
    yield from _problems_of_prompt(example["prompt"])
    for key in example:
        if not isinstance(key, str):
            yield f"the column {shown(key)} must have a string as its name"
        elif key in ARGUMENTS:
            yield f"a column cannot have the name {key!r}, which is an argument of every reward function"
    try:
        content(example)
    except Exception as error:  # of JSON, or of the repr of a value
        yield f"it cannot be written as JSON: {failure_of(error)}"
        return
    for key, value in example.items():
        if _has_nan(value):
            yield f"the column {shown(key)} holds NaN: use None for a value that is not known, or leave the example out"
    if example.keys() != first.keys():
        differences = {"lacks": first.keys() - example.keys(), "has also": example.keys() - first.keys()}
        parts = [f"{verb} {_listed(names)}" for verb, names in differences.items() if names]
        yield f"all examples of a split must have the same columns, but this one {' and '.join(parts)} (see example 0)"


def _problems_of_prompt(prompt: Any) -> Iterator[str]:
    if isinstance(prompt, str):
        if _has_surrogates(prompt):
            yield f"its prompt {_short(prompt)} has half of a surrogate pair, which no tokenizer reads"
        return
    if not isinstance(prompt, Sequence):
        yield f"its prompt is {_short(prompt)}, and must be a string or a list of messages"
        return
    if not prompt:
        yield "its prompt has no messages"
    for number, message in enumerate(prompt):
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            yield f"message {number} of its prompt is {_short(message)}, and must have a 'role' and a 'content'"
        elif message["role"] not in ROLES:
            known = _listed(ROLES, "or")
            yield f"message {number} of its prompt has the role {_short(message['role'])}, and must have {known}"
        elif not isinstance(message["content"], str):
            yield f"the content of message {number} of its prompt is {_short(message['content'])}, and must be a string"
        elif _has_surrogates(message["content"]):
            yield f"message {number} of its prompt has half of a surrogate pair, which no tokenizer reads"


def _has_surrogates(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _has_nan(value: Any) -> bool:
    if isinstance(value, (float, np.floating)):
        return math.isnan(value)
    if isinstance(value, np.ndarray):
        return np.issubdtype(value.dtype, np.floating) and bool(np.isnan(value).any())
    if isinstance(value, Mapping):
        return any(map(_has_nan, value.values()))
    return isinstance(value, (list, tuple)) and any(map(_has_nan, value))


def _short(value: Any) -> str:
    return shown(value, 60)


def _listed(names: Any, last: str = "and") -> str:
    *others, final = [shown(name, 60) for name in names]
    return f"{', '.join(others)} {last} {final}" if others else final
