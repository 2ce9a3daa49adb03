"""Sums of two-digit numbers, with a few worked examples in the prompt."""

import itertools
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from grpo_jax.errors import UserError
from grpo_jax.rewards.mathematics import exact_integer
from grpo_jax.tasks import Example, Task

INSTRUCTION = "Add the two numbers. Reply with the sum inside <answer> </answer>."
ADDENDS = range(10, 100)


def sums(num_train: int = 3000, num_held_out: int = 600, seed: int = 0, shots: int = 3) -> Task:
    """Returns the sums of two numbers from 10 to 99 as a chat task with the column `answer`, an int.

    Each pair of addends is used once, so no held-out pair occurs in training or in a worked example, in either order.
    The held-out sums depend only on `seed` and `num_held_out`. Every prompt begins with the instruction and the `shots`
    worked examples, as turns of the chat, so that prompts can share them. The question comes last.

    With three shots a prompt has 130 tokens of SmolLM2. The first 117 are the same in every prompt.

    Raises:
      UserError: if there are not enough pairs.
    """
    pairs = list(itertools.combinations_with_replacement(ADDENDS, 2))
    wanted = num_train + num_held_out + shots
    if wanted > len(pairs):
        raise UserError(
            f"num_train + num_held_out + shots = {wanted} sums were asked for, but there are {len(pairs)} pairs of "
            f"numbers from {ADDENDS[0]} to {ADDENDS[-1]}."
        )
    rng = random.Random(seed)
    rng.shuffle(pairs)
    questions = (tuple(rng.sample(pair, 2)) for pair in pairs)  # each pair in one order or the other
    held_out, worked, train = (list(itertools.islice(questions, n)) for n in (num_held_out, shots, num_train))
    prefix = [{"role": "system", "content": INSTRUCTION}, *_worked(worked)]
    return Task(
        name="sums",
        train=[_example(prefix, a, b) for a, b in train],
        held_out=[_example(prefix, a, b) for a, b in held_out],
        success=_is_exact,
        demonstrate=_demonstrate,
    )


def _worked(pairs: Iterable[tuple[int, ...]]) -> list[dict[str, str]]:
    return [
        message
        for a, b in pairs
        for message in ({"role": "user", "content": _question(a, b)}, {"role": "assistant", "content": _tagged(a + b)})
    ]


def _example(prefix: Sequence[Mapping[str, str]], a: int, b: int) -> Example:
    return {"prompt": [*prefix, {"role": "user", "content": _question(a, b)}], "answer": a + b}


def _question(a: int, b: int) -> str:
    return f"Calculate {a} + {b}."


def _tagged(answer: int) -> str:
    # The spaces matter: SmolLM2 knows sums as " = 57". The correct digits are ten times as probable after a space as
    # after ">".
    return f"<answer> {answer} </answer>"


def _is_exact(**columns: Any) -> list[bool]:
    return [score == 1.0 for score in exact_integer(**columns)]


def _demonstrate(example: Example, rng: random.Random) -> list[str]:
    return [_tagged(example["answer"])]
