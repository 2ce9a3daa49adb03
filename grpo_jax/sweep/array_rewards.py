"""Rewards as functions of token ids, for programs that never leave the device.

Only rewards whose whole argument is the letters of one guess have such a form. Each stands for a Python reward of
`grpo_jax.rewards.wordle` and pays exactly what that one pays; `grpo_jax.sweep.vectorized` compares the two at every
step.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.errors import UserError
from grpo_jax.experiment import Experiment
from grpo_jax.policy.tokenizer import CharacterTokenizer
from grpo_jax.rewards import wordle
from grpo_jax.rewards.wordle_rules import normalize
from grpo_jax.sharding import Array
from grpo_jax.tasks import Example

# A table, since XLA divides by a constant as it multiplies by its reciprocal, and .9 comes out a rounding error off.
TENTHS = np.arange(11, dtype=np.float32) / np.float32(10)
Marks = Callable[[Array, Array], Array]  # letters [L] and the secret's [L] -> a reward, where the lengths agree


def binary(guess: Array, secret: Array) -> Array:
    """`wordle.binary` of a guess of the secret's length."""
    return jnp.all(guess == secret).astype(jnp.float32)


def partial_credit(guess: Array, secret: Array) -> Array:
    """`wordle.partial_credit`: a letter out of place is sought in the set of the secret's letters."""
    green = guess == secret
    yellow = ~green & (guess[:, None] == secret).any(axis=1)
    return jnp.asarray(TENTHS)[2 * green.sum() + yellow.sum()]


def partial_credit_strict(guess: Array, secret: Array) -> Array:
    """`wordle.partial_credit_strict`: each letter of the secret is found once, the ones in their place first."""
    green = guess == secret
    letters = jnp.concatenate([guess, secret])
    # A letter has as many yellows as it occurs out of place on both sides.
    guessed, wanted = (((x == letters[:, None]) & ~green).sum(axis=1) for x in (guess, secret))
    first = (jnp.tril(letters[:, None] == letters, k=-1).sum(axis=1) == 0).astype(jnp.int32)
    yellow = (first * jnp.minimum(guessed, wanted)).sum()
    return jnp.asarray(TENTHS)[2 * green.sum() + yellow]


FORMS: Mapping[Callable[..., Any], Marks] = {
    wordle.binary: binary,
    wordle.partial_credit: partial_credit,
    wordle.partial_credit_strict: partial_credit_strict,
}


def require_form(config: Experiment) -> None:
    """Raises `UserError` unless every reward of an experiment has a form here, for its alphabet and its examples."""
    for name, reward in config.rewards.items():
        if reward not in FORMS:
            known = ", ".join(sorted(form.__name__ for form in FORMS))
            raise UserError(f"reward {name!r} has no JAX form, so this experiment cannot be vectorised: {known} have.")
    if not all(c.isascii() and c.isupper() for c in config.policy.scratch.alphabet):
        raise UserError("a reward of letters can be vectorised for an alphabet of capital letters alone.")
    if len({len(normalize(example["secret"])) for example in config.task.train}) != 1:
        raise UserError("a reward of letters can be vectorised only where all secrets have the same length.")


def secrets_of(examples: Sequence[Example], tokenizer: CharacterTokenizer) -> list[list[int]]:
    """The ids of the examples' secrets, [P, L]; a letter outside of the alphabet becomes 0, which no guess has."""
    return [
        [tokenizer.encode(c)[0] if c in tokenizer.alphabet else 0 for c in normalize(example["secret"])]
        for example in examples
    ]


def reward(config: Experiment, tokens: Array, mask: Array, secrets: Array) -> Array:
    """The weighted sum of an experiment's rewards, [P, G] float32.

    Args:
      tokens, mask: what was sampled, [P, G, T] ids and whether they count.
      secrets: [P, L] ids.
    """

    def of_one(ids: Array, counts: Array, secret: Array) -> Array:
        is_letter = counts & (ids >= len(CharacterTokenizer.SPECIALS))  # as `decode` leaves the special tokens out
        place = jnp.where(is_letter, jnp.cumsum(is_letter) - 1, len(secret))
        guess = jnp.zeros(len(secret), ids.dtype).at[place].set(ids, mode="drop")
        scores = [config.reward.weights.get(name, 1.0) * FORMS[r](guess, secret) for name, r in config.rewards.items()]
        return jnp.where(is_letter.sum() == len(secret), sum(scores), 0.0).astype(jnp.float32)

    rows = jax.vmap(of_one, in_axes=(0, 0, None))
    return jax.vmap(rows)(tokens, mask, secrets)
