"""Parameters, prompts and a seed to completions and their log-probabilities: jitted, batched, with a static KV cache.

Noise is named, not drawn: the uniform number behind a token is folded from (seed, step, prompt id, sample, position).
So a completion is the same whatever batch, bucket or number of devices surrounds it, and whether or not the run was
resumed. One uniform number and an inverse CDF choose a token; a vocabulary of Gumbel noise would cost far more.

The log-probability contract: what is reported for a token is its log-probability under the full distribution at the
configured temperature, which `grpo_jax.logprobs` recomputes. Greedy decoding (temperature 0) reports temperature 1.
Top-k and top-p are no part of it on either side: they narrow what is drawn, not what is reported, so the gap stays a
measure of numerical error. Training on truncated samples is then slightly off-policy: it never sees a token outside.

Shapes: P prompts, G rows of each, S prompt tokens, T new tokens of a turn, C cache slots, V vocabulary, D hidden size.
"""

from dataclasses import dataclass
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from grpo_jax.policy.layers import Layer
from grpo_jax.policy.transformer import KeyValues, Transformer, forward, prefill, unstack

Array = jax.Array


class Noise(NamedTuple):
    """What names the noise of the rows: int32 scalars `seed` and `step`, `prompt_ids` [P] and `samples` [P, G]."""

    seed: Array
    step: Array
    prompt_ids: Array
    samples: Array


class Rows(NamedTuple):
    """Rows under way between two turns of an episode.

    prefix: rows [P]. cache: rows [P, G], C slots, unrolled. slot: the next free slot, shared by all rows. position
    [P, G]: that of `token` [P, G], the last one sampled, which no forward has seen yet.
    """

    prefix: KeyValues
    cache: KeyValues
    slot: Array
    position: Array
    token: Array


class Turn(NamedTuple):
    """One turn's tokens [P, G, T] int32, mask [P, G, T] bool (up to and with the stop token), logprobs and `stopped`.

    logprobs [P, G, T] float32 are 0 where the mask is off; stopped [P, G] is False where `T` cut a row short.
    """

    tokens: Array
    mask: Array
    logprobs: Array
    stopped: Array


@dataclass(frozen=True)
class Settings:
    """What the compiled sampler is specialised to. Temperature and top-p are not: they are passed in as numbers."""

    max_tokens: int
    stop_ids: tuple[int, ...]
    pad_id: int
    top_k: int = 0
    truncate: bool = False  # whether top-k or top-p act at all: sorting a vocabulary per token is not free


def first_turn(
    model: Transformer,
    prompts: Array,
    lengths: Array,
    noise: Noise,
    temperature: Array,
    top_p: Array,
    *,
    settings: Settings,
    slots: int,
    common: int = 0,
) -> tuple[Turn, Rows]:
    """Samples the first turn of every row.

    Args:
      prompts, lengths: right-padded ids [P, S] and lengths [P].
      slots: cache slots C per row, at least `settings.max_tokens - 1` (more if turns will follow).
      common: how many leading tokens all prompts share (see `policy.transformer.prefill`).
    """
    chex.assert_rank([prompts, lengths, noise.samples], [2, 1, 2])
    prefix, hidden = prefill(model, prompts, lengths, common=common)
    prefix = prefix._replace(k=tuple(prefix.k), v=tuple(prefix.v))
    rows = noise.samples.shape
    c = model.config
    slots = max(slots, 1)  # with turns of one token there is nothing to cache, but a cache of no slots cannot be traced
    empty = [jnp.zeros((*rows, c.num_kv_heads, slots, c.head_dim), prefix.v[0].dtype) for _ in range(2 * c.num_layers)]
    cache = KeyValues(
        tuple(empty[::2]), tuple(empty[1::2]), jnp.zeros((*rows, slots), jnp.int32), jnp.zeros((*rows, slots), bool)
    )
    hidden = jnp.broadcast_to(hidden[:, None], (*rows, hidden.shape[-1]))
    position = jnp.broadcast_to(lengths[:, None], rows)
    begun = Rows(prefix, cache, jnp.int32(0), position, jnp.zeros(rows, jnp.int32))
    active = jnp.ones(rows, bool)
    return _sample(model, unstack(model), begun, hidden, lengths, active, noise, temperature, top_p, settings)


def next_turn(
    model: Transformer,
    rows: Rows,
    reply: Array,
    reply_lengths: Array,
    active: Array,
    lengths: Array,
    noise: Noise,
    temperature: Array,
    top_p: Array,
    *,
    settings: Settings,
) -> tuple[Turn, Rows]:
    """Feeds the environment's right-padded reply [P, G, F] to the rows that are `active` [P, G] and samples their turn.

    The last token of the turn before goes into the cache with the reply, so a turn needs `F + max_tokens` slots.
    """
    chex.assert_rank(reply, 3)
    tokens = jnp.concatenate([rows.token[..., None], reply], axis=-1)
    offsets = jnp.arange(tokens.shape[-1])
    valid = (offsets <= reply_lengths[..., None]) & active[..., None]
    positions = rows.position[..., None] + offsets
    layers = unstack(model)
    hidden, cache = forward(
        model, tokens, positions, valid, prefix=rows.prefix, cache=rows.cache, slot=rows.slot, layers=layers
    )
    hidden = jnp.take_along_axis(hidden, reply_lengths[..., None, None], axis=2)[:, :, 0]
    position = rows.position + reply_lengths + 1
    begun = Rows(rows.prefix, cache, rows.slot + tokens.shape[-1], position, rows.token)
    return _sample(model, layers, begun, hidden, lengths, active, noise, temperature, top_p, settings)


def _sample(
    model: Transformer,
    layers: list[Layer],
    rows: Rows,
    hidden: Array,
    lengths: Array,
    active: Array,
    noise: Noise,
    temperature: Array,
    top_p: Array,
    settings: Settings,
) -> tuple[Turn, Rows]:
    """Samples a turn whose first token is predicted by `hidden` [P, G, D] and has position `rows.position` [P, G]."""
    shape = (*active.shape, settings.max_tokens)
    keys = row_keys(noise)
    stop_ids = jnp.asarray(settings.stop_ids, jnp.int32)

    def pick(hidden: Array, position: Array) -> tuple[Array, Array]:
        # Noise is named by the place after the prompt, so it does not depend on how prompts are padded.
        u = jax.vmap(jax.vmap(lambda key, at: jax.random.uniform(jax.random.fold_in(key, at))))(
            keys, position - lengths[:, None]
        )
        return choose_token(model.logits(hidden), u, temperature, top_p, settings)

    def write(turn: Turn, t: Array, token: Array, logprob: Array, live: Array) -> Turn:
        stopped = turn.stopped | (live & (token[..., None] == stop_ids).any(-1))
        return Turn(
            turn.tokens.at[..., t].set(jnp.where(live, token, settings.pad_id)),
            turn.mask.at[..., t].set(live),
            turn.logprobs.at[..., t].set(jnp.where(live, logprob, 0.0)),
            stopped,
        )

    def body(carry: tuple) -> tuple:
        t, rows, turn = carry
        live = active & ~turn.stopped
        hidden, cache = forward(
            model,
            rows.token[..., None],
            rows.position[..., None],
            live[..., None],
            prefix=rows.prefix,
            cache=rows.cache,
            slot=rows.slot,
            layers=layers,
        )
        position = rows.position + live
        token, logprob = pick(hidden[:, :, 0], position)
        rows = Rows(rows.prefix, cache, rows.slot + 1, position, jnp.where(live, token, rows.token))
        return t + 1, rows, write(turn, t, token, logprob, live)

    def unfinished(carry: tuple) -> Array:
        t, _, turn = carry
        return (t < settings.max_tokens) & (active & ~turn.stopped).any()

    turn = Turn(
        jnp.full(shape, settings.pad_id, jnp.int32),
        jnp.zeros(shape, bool),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros(active.shape, bool),
    )
    token, logprob = pick(hidden, rows.position)
    turn = write(turn, jnp.int32(0), token, logprob, active)
    rows = rows._replace(token=jnp.where(active, token, rows.token))
    _, rows, turn = jax.lax.while_loop(unfinished, body, (jnp.int32(1), rows, turn))
    return turn, rows


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
