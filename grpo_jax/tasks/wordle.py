"""Wordle: the task with one secret and one guess, the full game of six turns, and reference players.

The rules are in `grpo_jax.rewards.wordle_rules`, because rewards use them too. `grpo_jax.rewards.wordle.guess_of`
decides which part of a turn is the guess. There are two differences from the game on the web:

* A guess that the game does not accept (not five letters, or not among its 12,972 words) uses up a turn. The reply
  contains no information about the secret. Otherwise an episode might never end.
* There is a training split: the policy is evaluated on secrets that it did not play in training.
"""

import random
import string
from collections.abc import Callable, Sequence
from typing import Any, Literal

from grpo_jax.errors import UserError
from grpo_jax.rewards.wordle import binary, guess_of
from grpo_jax.rewards.wordle_rules import (
    MAX_GUESSES,
    WORD_LENGTH,
    History,
    allowed,
    answers,
    consistent,
    consistent_indices,
    encode,
    feedback,
    history_of,
    is_word,
    normalize,
    words,
)
from grpo_jax.tasks import Task

__all__ = [
    "PLAIN_ALPHABET",
    "Player",
    "allowed",
    "answers",
    "blind",
    "consistent",
    "feedback",
    "play",
    "random_consistent",
    "single_guess",
    "six_turns",
    "win_rate",
    "words",
]

REFUSED = "-" * WORD_LENGTH
"""The reply of the plain style to a guess that the game does not accept."""

_GREY = {letter: chr(ord("ⓐ") + i) for i, letter in enumerate(string.ascii_uppercase)}

PLAIN_ALPHABET = string.ascii_uppercase + string.ascii_lowercase + "".join(_GREY.values()) + "-"
"""The characters of the plain style. Guesses are in upper case. In replies a letter in its place is in upper case, a
letter that occurs elsewhere is in lower case, and a letter that does not occur is circled. A reply of dashes means that
the game does not accept the guess."""

RULES = (
    f"Let us play Wordle. Find my secret English word of {WORD_LENGTH} letters in at most {MAX_GUESSES} guesses. "
    "I mark each letter: G is right and in its place, Y occurs elsewhere in the secret, X does not occur, or not once "
    "more. A guess that is no such word is lost. Think inside <think></think> if you like, then give one word inside "
    "<answer></answer>."
)

Player = Callable[[History, random.Random], str]
"""A player: (the guesses so far, each with its feedback; a source of randomness) -> the next guess."""


def single_guess(secret: str = "POUND", prompt: str = "") -> Task:
    """Returns the article's task: one secret, one guess, no feedback. The column is `secret`.

    The task is memorisation, by design: the prompt contains no information about the secret, only the rewards do, and
    the held-out example is the training example. So the policy learns only what the reward function can teach. A
    demonstration is a random word of the game that is not the secret.

    Raises:
      UserError: if the secret is not a word of the game.
    """
    secret = normalize(secret)
    if not is_word(secret):
        raise UserError(f"the secret {secret!r} is not among Wordle's {len(words())} words.")
    example = {"prompt": prompt, "secret": secret}
    others = [word for word in words() if word != secret]
    return Task(
        name=f"wordle_{secret.lower()}",
        train=[example],
        held_out=[example],
        success=_is_won,
        demonstrate=lambda example, rng: [rng.choice(others)],
    )


def six_turns(
    num_secrets: int = 200, num_held_out: int = 200, seed: int = 0, style: Literal["plain", "chat"] = "plain"
) -> Task:
    """Returns the full game, with disjoint secrets (the column `secret`) for training and evaluation.

    The secrets are drawn from the 2,315 answers with `seed`. With num_held_out = 0 the policy is evaluated on the
    training secrets. This measures whether it plays well with the words that it knows, not whether it knows others.

    Style `plain` is for a policy from scratch over `PLAIN_ALPHABET`: an empty prompt, turns like `CRANE`, replies like
    `ⓒrANⓔ`. Style `chat` is for a language model: rules, tags and replies in words.

    A demonstration is a game of the random consistent player, which knows only the training secrets, so it loses on a
    held-out secret. The references are the win rates of the blind and of the random consistent player on the training
    secrets; both know only these words.

    Raises:
      UserError: for numbers of secrets that are out of range, or an unknown style.
    """
    if num_secrets < 1 or num_held_out < 0 or num_secrets + num_held_out > len(answers()):
        raise UserError(
            f"num_secrets = {num_secrets} must be positive, num_held_out = {num_held_out} 0 or above, and both "
            f"together at most {len(answers())}, the number of Wordle's answers."
        )
    if style not in _STYLES:
        raise UserError(f"style = {style!r} is unknown: it must be one of {sorted(_STYLES)}.")
    prompt, turn, say = _STYLES[style]
    secrets = random.Random(seed).sample(answers(), num_secrets + num_held_out)
    examples = [{"prompt": prompt, "secret": secret} for secret in secrets]
    known = secrets[:num_secrets]
    player = random_consistent(known)
    players = {"blind": blind(known), "random consistent": player}
    return Task(
        name=f"wordle_six_turns_{style}",
        train=examples[:num_secrets],
        held_out=examples[num_secrets:] or examples,
        success=_is_won,
        demonstrate=lambda example, rng: [turn.format(guess) for guess in play(player, example["secret"], rng)],
        reply=lambda example, turns: _reply(turns, example["secret"], say),
        max_turns=MAX_GUESSES,
        references={name: win_rate(player, known, num_games=1000) for name, player in players.items()},
    )


def blind(candidates: Sequence[str]) -> Player:
    """Returns the lower reference: a player that guesses a random candidate in each turn and ignores the feedback."""
    return lambda history, rng: rng.choice(candidates)


def random_consistent(candidates: Sequence[str]) -> Player:
    """Returns the upper reference: a player that guesses a random candidate that agrees with all feedback so far.

    If no candidate agrees, because the secret is not one of them, it guesses any random candidate.
    """
    codes = encode(candidates)

    def guess(history: History, rng: random.Random) -> str:
        possible = consistent_indices(codes, history)
        return candidates[rng.choice(possible)] if len(possible) else rng.choice(candidates)

    return guess


def play(player: Player, secret: str, rng: random.Random) -> list[str]:
    """Returns the player's guesses: at most six. The last guess is the secret if the game was won."""
    guesses: list[str] = []
    while not _is_over(guesses, secret):
        guesses.append(player(history_of(guesses, secret), rng))
    return guesses


def win_rate(player: Player, secrets: Sequence[str], num_games: int, seed: int = 0) -> float:
    """Returns the fraction of games that the player wins, over `num_games` secrets drawn with replacement."""
    rng = random.Random(seed)
    games = ((secret, play(player, secret, rng)) for secret in rng.choices(secrets, k=num_games))
    return sum(guesses[-1] == secret for secret, guesses in games) / num_games


def _is_over(guesses: Sequence[str], secret: str) -> bool:
    return len(guesses) >= MAX_GUESSES or secret in guesses[-1:]


def _is_won(**columns: Any) -> list[bool]:
    return [score == 1.0 for score in binary(**columns)]


def _reply(turns: Sequence[str], secret: str, say: Callable[[str, str | None, int], str]) -> str | None:
    """The environment's answer to the last turn, in the words of `say`, or None when the game is over."""
    guesses = [guess_of(turn) for turn in turns]
    if _is_over(guesses, secret):
        return None
    guess = guesses[-1]
    return say(guess, feedback(guess, secret) if is_word(guess) else None, MAX_GUESSES - len(guesses))


def _say_plain(guess: str, marks: str | None, guesses_left: int) -> str:
    # One character encodes both letter and mark, at a fixed distance from the letter in the guess. Then a policy of two
    # layers only has to learn to copy and to suppress letters. With strings of marks it needed thousands of updates.
    if marks is None:
        return REFUSED
    written: dict[str, Callable[[str], str]] = {"G": str, "Y": str.lower, "X": _GREY.__getitem__}
    return "".join(written[mark](letter) for letter, mark in zip(guess, marks, strict=True))


def _say_chat(guess: str, marks: str | None, guesses_left: int) -> str:
    heard = f"{guess}: {' '.join(marks)}." if marks else f"That is no English word of {WORD_LENGTH} letters."
    return f"{heard} {guesses_left} {'guesses' if guesses_left > 1 else 'guess'} left."


# style -> the prompt, the format of an assistant's turn, and the function that writes the environment's reply
_STYLES: dict[str, tuple[Any, str, Callable[[str, str | None, int], str]]] = {
    "plain": ("", "{}", _say_plain),
    "chat": ([{"role": "user", "content": RULES}], "<answer>{}</answer>", _say_chat),
}
