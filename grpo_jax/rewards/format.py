"""The tags around an answer, and rewards for the correct use of the tags."""

import re
from collections.abc import Sequence

from grpo_jax.rewards import Completion, share, turns

_ANSWER = re.compile(r"<answer>((?:(?!</?answer>).)*)</answer>", re.DOTALL)
_TAG = re.compile(r"</?(?:think|answer)>")


def answer_of(completion: str) -> str | None:
    """Returns what stands in the last `<answer>…</answer>`, white space included, or None if there is no such pair."""
    return (_ANSWER.findall(completion) or [None])[-1]


def is_answer(completion: str) -> bool:
    """Whether the text, surrounding white space aside, is one `<answer>…</answer>` with something in it."""
    return _is_filled(completion, "<answer>", "</answer>")


def is_think_and_answer(completion: str) -> bool:
    """Whether it is one `<think>…</think>`, white space, one `<answer>…</answer>`, and neither of them empty."""
    return _is_filled(completion, "<think>", "</think>", "<answer>", "</answer>")


def answer_tags(*, completions: Sequence[Completion], **_: object) -> list[float | None]:
    """1.0 for `<answer>…</answer>` and nothing else, 0.0 otherwise; over several turns, the share that keeps to it."""
    return [share(map(is_answer, turns(completion))) for completion in completions]


def think_and_answer(*, completions: Sequence[Completion], **_: object) -> list[float | None]:
    """1.0 for `<think>…</think><answer>…</answer>` and nothing else, 0.0 otherwise; over several turns, the share.

    White space may stand around and between the two. A tag that is missing, repeated, nested, out of order or written
    in capitals earns nothing, and neither does an empty thought or an empty answer.
    """
    return [share(map(is_think_and_answer, turns(completion))) for completion in completions]


def _is_filled(completion: str, *tags: str) -> bool:
    """Whether `tags` are exactly the text's tags, with something in each pair and only white space outside them."""
    pieces = _TAG.split(completion)
    outside, inside = pieces[::2], pieces[1::2]
    return _TAG.findall(completion) == list(tags) and not any(map(str.strip, outside)) and all(map(str.strip, inside))
