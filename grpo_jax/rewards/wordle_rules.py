"""The rules of Wordle: the word lists, the feedback, and which words are still possible.

The rules are in this package because the rewards use them too; `grpo_jax.tasks.wordle` re-exports them. Words are in
upper case. Functions that take a word convert it to upper case and strip the white space around it (`normalize`).
"""

import functools
import importlib.resources
from collections.abc import Sequence

import numpy as np

from grpo_jax.errors import UserError

WORD_LENGTH = 5
MAX_GUESSES = 6

History = Sequence[tuple[str, str]]  # the guesses so far, each with its feedback


def normalize(word: str) -> str:
    """Returns the word in upper case without the white space around it."""
    return word.strip().upper()


@functools.cache
def answers() -> tuple[str, ...]:
    """The 2,315 words that the original game could choose as its secret, sorted."""
    return _read("answers.txt")


@functools.cache
def allowed() -> tuple[str, ...]:
    """The 10,657 further words that it accepted as a guess, sorted; no answer is among them."""
    return _read("allowed.txt")


@functools.cache
def words() -> tuple[str, ...]:
    """All 12,972 words that may be guessed, sorted."""
    return tuple(sorted(answers() + allowed()))


def is_word(guess: str) -> bool:
    """Whether the game accepts the guess."""
    return normalize(guess) in _word_set()


def feedback(guess: str, secret: str) -> str:
    """Returns one mark per letter: G in its place, Y elsewhere in the secret, X neither.

    A letter of the secret is matched at most once: the ones in their place first, then from left to right. So of three
    E's guessed where the secret has one, one is marked and two are X. Raises `UserError` where the lengths differ.
    """
    guess, secret = normalize(guess), normalize(secret)
    if len(guess) != len(secret):
        raise UserError(f"the guess {guess!r} has {len(guess)} letters, the secret has {len(secret)}: they must agree.")
    unmatched = [s for g, s in zip(guess, secret, strict=True) if g != s]
    marks = []
    for g, s in zip(guess, secret, strict=True):
        if g == s:
            marks.append("G")
        elif g in unmatched:
            unmatched.remove(g)
            marks.append("Y")
        else:
            marks.append("X")
    return "".join(marks)


def history_of(guesses: Sequence[str], secret: str) -> list[tuple[str, str]]:
    """Returns the guesses that the game accepts, each with its feedback. The others say nothing about the secret."""
    return [(normalize(guess), feedback(guess, secret)) for guess in guesses if is_word(guess)]


def consistent(word: str, history: History) -> bool:
    """Whether `word` could be the secret: every guess of the history would have had the feedback that it had."""
    word = normalize(word)
    return all(len(word) == len(guess) and feedback(guess, word) == marks for guess, marks in history)


def encode(listed: Sequence[str]) -> np.ndarray:
    """Returns N five-letter words as ASCII codes, uint8 [5, N] (three times faster to filter than [N, 5])."""
    return np.frombuffer("".join(listed).encode("ascii"), np.uint8).reshape(-1, WORD_LENGTH).T.copy()


def consistent_indices(codes: np.ndarray, history: History) -> np.ndarray:
    """Returns which of the encoded words [5, N] are consistent with the history, as ascending indices."""
    indices = np.arange(codes.shape[1])
    for guess, marks in history:
        agrees = _feedback_of_all(encode([guess]), codes[:, indices]) == encode([marks])
        indices = indices[agrees.all(axis=0)]
    return indices


def _feedback_of_all(guess: np.ndarray, secrets: np.ndarray) -> np.ndarray:
    """`feedback` of one guess [5, 1] against many secrets [5, N] -> the marks' ASCII codes [5, N].

    A letter out of place is a Y while fewer of its kind were left of it, out of place, than the secret has unmatched.
    """
    misplaced = guess != secrets
    unmatched = ((guess[:, None] == secrets) & misplaced).sum(axis=1, dtype=np.uint8)  # [letter, place, N] over places
    left_twins = np.tril(guess == guess.T, k=-1).astype(np.uint8)  # [letter, letter to its left]
    used = left_twins @ misplaced.astype(np.uint8)
    return np.where(misplaced, np.where(used < unmatched, ord("Y"), ord("X")), ord("G"))


@functools.cache
def _word_set() -> frozenset[str]:
    return frozenset(words())


def _read(name: str) -> tuple[str, ...]:
    return tuple((importlib.resources.files("grpo_jax") / "data" / "wordle" / name).read_text("ascii").split())
