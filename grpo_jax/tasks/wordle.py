"""Wordle: guessing one secret at once, the full game of six turns, and the reference players.

The rules stand in `grpo_jax.rewards.wordle_rules`, because rewards need them too, and what is read as a guess is
`grpo_jax.rewards.wordle.guess_of`. Two departures from the game on the web. A guess that it would refuse (no five
letters, or not among its 12,972 words) uses up its turn and is answered by a sign that says nothing of the secret:
otherwise an episode need not end. And there is a training split: the policy is evaluated on secrets it never played.
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
"""The plain style's reply to a refused guess."""

_GREY = {letter: chr(ord("ⓐ") + i) for i, letter in enumerate(string.ascii_uppercase)}

PLAIN_ALPHABET = string.ascii_uppercase + string.ascii_lowercase + "".join(_GREY.values()) + "-"
"""The characters of the plain style: guesses in capitals; in replies a letter in its place is a capital, one that
occurs elsewhere is small, and one that does not occur is circled. Dashes answer a refused guess."""

RULES = (
    f"Let us play Wordle. Find my secret English word of {WORD_LENGTH} letters in at most {MAX_GUESSES} guesses. "
    "I mark each letter: G is right and in its place, Y occurs elsewhere in the secret, X does not occur, or not once "
    "more. A guess that is no such word is lost. Think inside <think></think> if you like, then give one word inside "
    "<answer></answer>."
)

Player = Callable[[History, random.Random], str]
"""A way to play: the guesses so far, each with its feedback, and a source of randomness -> the next guess."""


def single_guess(secret: str = "POUND", prompt: str = "") -> Task:
    """Returns the article's case: one secret, one guess, no feedback; the column `secret`.

    This is memorisation, by design: the prompt says nothing of the secret, which only the rewards know, and the
    held-out example is the training example. What is learned is what the reward function could teach. A demonstration
    is a random word of the game other than the secret.
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

    The secrets are drawn from the 2,315 answers by `seed`. With num_held_out = 0 the policy is evaluated on the
    training secrets: whether it plays well with the words that it knows, and not whether it knows others. Style `plain`
    is for a policy from scratch over `PLAIN_ALPHABET`: an empty prompt, turns like `CRANE`, replies like `ⓒrANⓔ`. Style
    `chat` is for a language model: rules, tags and replies in words. A demonstration is a game of the random consistent
    player over the training secrets: the only words it knows, so on a held-out secret it loses. The references are what
    the blind and the random consistent player, who know the training secrets and no other word, win on those secrets.
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
    """Returns the floor: a player that guesses any of the candidates each turn and never reads the feedback."""
    return lambda history, rng: rng.choice(candidates)


def random_consistent(candidates: Sequence[str]) -> Player:
    """Returns the ceiling: a player that guesses any candidate that is consistent with all feedback so far.

    When none is left, because the secret is not among the candidates, any of them.
    """
    codes = encode(candidates)

    def guess(history: History, rng: random.Random) -> str:
        possible = consistent_indices(codes, history)
        return candidates[rng.choice(possible)] if len(possible) else rng.choice(candidates)

    return guess


def play(player: Player, secret: str, rng: random.Random) -> list[str]:
    """Returns the player's guesses: up to six, the last of them the secret if the game was won."""
    guesses: list[str] = []
    while not _is_over(guesses, secret):
        guesses.append(player(history_of(guesses, secret), rng))
    return guesses


def win_rate(player: Player, secrets: Sequence[str], num_games: int, seed: int = 0) -> float:
    """Returns the share of games won, over `num_games` secrets drawn with replacement."""
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
    # One character says both letter and mark, always as far behind the letter that it bears upon: what a policy of two
    # layers has to learn is then to copy and to suppress, where strings of marks alone took it thousands of updates.
    if marks is None:
        return REFUSED
    written = {"G": str, "Y": str.lower, "X": _GREY.__getitem__}
    return "".join(written[mark](letter) for letter, mark in zip(guess, marks, strict=True))


def _say_chat(guess: str, marks: str | None, guesses_left: int) -> str:
    heard = f"{guess}: {' '.join(marks)}." if marks else f"That is no English word of {WORD_LENGTH} letters."
    return f"{heard} {guesses_left} {'guesses' if guesses_left > 1 else 'guess'} left."


# style -> the prompt, how an assistant's turn is written, and how the environment answers it
_STYLES: dict[str, tuple[Any, str, Callable[[str, str | None, int], str]]] = {
    "plain": ("", "{}", _say_plain),
    "chat": ([{"role": "user", "content": RULES}], "<answer>{}</answer>", _say_chat),
}
