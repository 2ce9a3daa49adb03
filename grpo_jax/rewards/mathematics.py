"""Rewards for integer answers. The correct answer is in the column `answer`."""

import re
from collections.abc import Sequence

from grpo_jax.rewards import Completion, text
from grpo_jax.rewards.format import answer_of, is_answer

FORMAT_CREDIT = 0.1
_INTEGER = re.compile(
    r"\s*([+-]?[0-9]{1,18})\s*"
)  # at most 18 digits, so that an endless row of digits is not read as an integer


def integer_of(completion: str) -> int | None:
    """Returns the integer in the last `<answer>…</answer>`: decimal digits and an optional sign, or None."""
    found = _INTEGER.fullmatch(answer_of(completion) or "")
    return int(found[1]) if found else None


def exact_integer(*, completions: Sequence[Completion], answer: Sequence[int], **_: object) -> list[float]:
    """1.0 where the last answer's tags hold exactly the integer `answer`, 0.0 otherwise. Text around them is free."""
    return [float(integer_of(text(c)) == wanted) for c, wanted in zip(completions, answer, strict=True)]


def integer_answer(*, completions: Sequence[Completion], answer: Sequence[int], **_: object) -> list[float]:
    """1.0 for the exact integer, else 0.1 for a completion that is nothing but tags around an integer, else 0.0.

    The format's credit demands an integer, because one that a literal echo of the instruction can earn trains exactly
    that echo.
    """
    exact = exact_integer(completions=completions, answer=answer)
    return [score or FORMAT_CREDIT * _is_integer_answer(text(c)) for c, score in zip(completions, exact, strict=True)]


def _is_integer_answer(completion: str) -> bool:
    return is_answer(completion) and integer_of(completion) is not None
