"""How a token is chosen from logits: by inverse CDF from one uniform number, greedily at temperature 0.

Noise is named, not drawn: the uniform number behind a token is folded from (seed, step, prompt id, sample, position).
So a completion is the same whatever batch, padding or number of devices surrounds it, and whether or not the run was
resumed. One uniform number and an inverse CDF choose a token; Gumbel noise for a whole vocabulary would cost far more.

Top-k and top-p narrow what is drawn, not what is reported: see `grpo_jax.sampler.decode`.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.sharding import Array


class Noise(NamedTuple):
    """What names the noise of a batch: int32 scalars `seed` and `step`, `prompt_ids` [P] and `samples` [P, G]."""

    seed: Array | np.int32
    step: Array | np.int32
    prompt_ids: Array
    samples: Array


@dataclass(frozen=True)
class Settings:
    """What the compiled sampler is specialised to. Temperature and top-p are not: they are passed in as numbers.

    Attributes:
      max_tokens: T, the longest generation of one turn.
      stop_ids: the tokens that end a turn.
      pad_id: what stands in `Generation.tokens` where there is no token.
      top_k: how many of the likeliest tokens may be drawn; 0 for all.
      truncate: whether top-k or top-p narrow what is drawn. Where they do not, they cost nothing.
      cache_size: places in the KV cache of the first turn; None for `max_tokens - 1`, which a single turn needs.
      shared_prefix_length: how many leading tokens all prompts share (see `policy.transformer.prefill`).
    """

    max_tokens: int
    stop_ids: tuple[int, ...]
    pad_id: int
    top_k: int = 0
    truncate: bool = False
    cache_size: int | None = None
    shared_prefix_length: int = 0


def row_keys(noise: Noise) -> Array:
    """One key per row [P, G], folded from the seed, the step, the prompt id and the sample index."""
    key = jax.random.fold_in(jax.random.key(noise.seed), noise.step)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, noise.prompt_ids)
    return jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(keys, noise.samples)


def choose_token(logits: Array, u: Array, temperature: Array, top_p: Array, settings: Settings) -> tuple[Array, Array]:
    """Chooses a token for each row by inverse CDF (greedily at temperature 0).

    Args:
      logits: [..., V] float32.
      u: [...] uniform numbers in [0, 1).

    Returns:
      Tokens [...] int32, and their log-probabilities under the full distribution at the temperature.
    """
    scaled = logits / jnp.where(temperature == 0, 1.0, temperature)
    normaliser = jax.nn.logsumexp(scaled, axis=-1)
    kept = truncated(scaled, settings.top_k, top_p) if settings.truncate else scaled
    token = jnp.where(temperature == 0, jnp.argmax(logits, axis=-1), inverse_cdf(kept, u)).astype(jnp.int32)
    return token, jnp.take_along_axis(scaled, token[..., None], axis=-1)[..., 0] - normaliser


def truncated(logits: Array, top_k: int, top_p: Array) -> Array:
    """Sets to -inf all but the `top_k` largest (0: all) and then all but the fewest whose mass reaches `top_p`.

    Of equal logits at the edge all are kept.
    """
    if top_k:
        logits = jnp.where(_largest(logits, jnp.ones_like(logits), top_k), logits, -jnp.inf)
    weights = jnp.exp(logits - logits.max(-1, keepdims=True))
    kept = _largest(logits, weights, top_p * weights.sum(-1, keepdims=True))
    return jnp.where(kept | (top_p >= 1), logits, -jnp.inf)  # at 1, rounding must not cut


def _largest(logits: Array, weights: Array, wanted: Array | int) -> Array:
    """Whether each logit [..., V] is among the fewest of the largest whose weights together reach `wanted` [..., 1].

    Bisection over the 2^32 ordinals of float32: on a CPU, to sort a vocabulary takes some ten times as long.
    """
    ordinals = _ordinal(logits)

    def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = low + (high - low + 1) // 2
        enough = jnp.sum(jnp.where(ordinals >= middle, weights, 0), -1, keepdims=True) >= wanted
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle - 1)

    high = ordinals.max(-1, keepdims=True)
    return ordinals >= jax.lax.fori_loop(0, 32, halve, (jnp.zeros_like(high), high))[0]


def _ordinal(x: Array) -> Array:
    """Maps float32 to uint32 in the same order."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return bits ^ jnp.where(bits >> 31, jnp.uint32(0xFFFFFFFF), jnp.uint32(0x80000000))


def inverse_cdf(logits: Array, u: Array, block: int = 256) -> Array:
    """The first index at which the cumulative softmax of logits [..., V] exceeds u [...]; never one of probability 0.

    Two levels: sums of blocks choose a block and one cumulative sum inside it chooses the index, since a cumulative
    sum over a whole vocabulary is slow on every backend.
    """
    weights = jnp.exp(logits - logits.max(-1, keepdims=True))
    padding = [(0, 0)] * (weights.ndim - 1) + [(0, -weights.shape[-1] % block)]
    blocks = jnp.pad(weights, padding).reshape(*weights.shape[:-1], -1, block)
    sums = blocks.sum(-1)
    cumulative = jnp.cumsum(sums, axis=-1)
    target = u[..., None] * cumulative[..., -1:]
    chosen = _first_above(cumulative, target, sums)
    before = jnp.take_along_axis(cumulative - sums, chosen, axis=-1)
    inside = jnp.take_along_axis(blocks, chosen[..., None], axis=-2)[..., 0, :]
    return (chosen * block + _first_above(jnp.cumsum(inside, axis=-1), target - before, inside))[..., 0]


def _first_above(cumulative: Array, target: Array, weights: Array) -> Array:
    """The first index [..., 1] with a positive weight and cumulative > target, or the last with a positive weight.

    Rounding makes both parts necessary: a target can reach the total, and a parallel cumulative sum can rise (or fall)
    by a rounding error where the weight is 0.
    """
    index = jnp.arange(weights.shape[-1])
    last = jnp.max(jnp.where(weights > 0, index, 0), axis=-1, keepdims=True)
    above = (cumulative > target) & (weights > 0)
    return jnp.min(jnp.where(above, index, last), axis=-1, keepdims=True)
