"""Rewards for Wordle, for a single guess and for the whole game. The secret is the column `secret`.

`guess_of` alone decides which part of a turn is the guess. The score of a game is that of its last guess, unless the
docstring of a reward says otherwise: a game ends when it is won, so the last guess is the secret if and only if the
game was won.
"""

import math
from collections.abc import Sequence

from grpo_jax.errors import UserError
from grpo_jax.rewards import Completion, share, text, turns
from grpo_jax.rewards.format import answer_of
from grpo_jax.rewards.wordle_rules import (
    answers,
    consistent,
    consistent_indices,
    encode,
    feedback,
    history_of,
    is_word,
    normalize,
)


def guess_of(turn: str) -> str:
    """Returns the guess in an assistant's turn: what stands in its last `<answer>…</answer>`, or else the whole turn.

    Case is folded to upper and surrounding white space stripped; nothing else is repaired.
    """
    answer = answer_of(turn)
    return normalize(turn if answer is None else answer)


def binary(*, completions: Sequence[Completion], secret: Sequence[str], **_: object) -> list[float]:
    """1.0 where the guess is the secret, 0.0 otherwise. For a game: whether it was won."""
    return [float(guess == s) for guess, s in _last_guesses(completions, secret)]


def partial_credit(*, completions: Sequence[Completion], secret: Sequence[str], **_: object) -> list[float]:
    """The article's reward: 0.2 for a letter in its place, 0.1 for a letter that the secret has elsewhere.

    0.0 where the length differs from the secret's. "Elsewhere" is tested against the set of the secret's letters, so a
    letter guessed twice is paid twice; `partial_credit_strict` counts as the game does.
    """
    return [_tenths(_marks_against_set(guess, s)) for guess, s in _last_guesses(completions, secret)]


def partial_credit_strict(*, completions: Sequence[Completion], secret: Sequence[str], **_: object) -> list[float]:
    """As `partial_credit`, with the game's own marks: 0.2 for each G and 0.1 for each Y of `feedback`."""
    return [
        _tenths(feedback(guess, s) if len(guess) == len(s) else "") for guess, s in _last_guesses(completions, secret)
    ]


def valid_word(*, completions: Sequence[Completion], **_: object) -> list[float | None]:
    """The share of the guesses that the game accepts (its 12,972 words): 1.0 or 0.0 for a single guess."""
    return [share(map(is_word, _guesses(completion))) for completion in completions]


def uses_feedback(*, completions: Sequence[Completion], secret: Sequence[str], **_: object) -> list[float | None]:
    """The share of the guesses after the first that could be the secret, given all the feedback before them.

    A guess that is no word of the game could not be. None ("does not apply") where there is no second guess.
    """
    return [share(_consistencies(_guesses(completion), s)) for completion, s in zip(completions, secret, strict=True)]


def information_gain(*, completions: Sequence[Completion], secret: Sequence[str], **_: object) -> list[float]:
    """The share of the uncertainty about the secret that the guesses removed, in [0, 1].

    log2(n / m) / log2(n), with the n = 2,315 answers and the m of them that are consistent with the feedback to every
    guess: the information that the guesses had in fact, in bits, not in expectation over secrets. Over a game the bits
    of its guesses add up to this, and a game that is won has 1.0. A guess that the game does not accept has none.
    Raises `UserError` for a secret that is not an answer.
    """
    return [_information(_guesses(completion), s) for completion, s in zip(completions, secret, strict=True)]


def _guesses(completion: Completion) -> list[str]:
    return [guess_of(turn) for turn in turns(completion)]


def _last_guesses(completions: Sequence[Completion], secret: Sequence[str]) -> list[tuple[str, str]]:
    return [(guess_of(text(c)), normalize(s)) for c, s in zip(completions, secret, strict=True)]


def _marks_against_set(guess: str, secret: str) -> str:
    """The article's marks, which forget how often the secret has a letter; none where the lengths differ."""
    if len(guess) != len(secret):
        return ""
    return "".join("G" if g == s else "Y" if g in secret else "X" for g, s in zip(guess, secret, strict=True))


def _tenths(marks: str) -> float:
    """0.2 for each G and 0.1 for each Y, divided once, so that equal rewards are equal to the last bit."""
    return (2 * marks.count("G") + marks.count("Y")) / 10


def _consistencies(guesses: Sequence[str], secret: str) -> list[bool]:
    return [
        is_word(guess) and consistent(guess, history_of(guesses[:turn], secret))
        for turn, guess in enumerate(guesses)
        if turn > 0
    ]


def _information(guesses: Sequence[str], secret: str) -> float:
    if normalize(secret) not in answers():
        raise UserError(f"information_gain needs a secret from the game's {len(answers())} answers, not {secret!r}.")
    left = len(consistent_indices(encode(answers()), history_of(guesses, secret)))
    return 1 - math.log2(left) / math.log2(len(answers()))
