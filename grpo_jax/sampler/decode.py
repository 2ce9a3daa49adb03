"""The decoding loop: jitted, batched, with a static KV cache.

The log-probability contract: what is reported for a token is its log-probability under the full distribution at the
configured temperature, which `grpo_jax.logprobs` recomputes. Greedy decoding (temperature 0) reports temperature 1.
Top-k and top-p are no part of it on either side: they narrow what is drawn, not what is reported, so the gap stays a
measure of numerical error. Training on truncated samples is then slightly off-policy, because the policy gives some
probability to tokens that are never drawn.

Shapes: P prompts, G rows of each, S prompt tokens, T new tokens of a turn, F tokens of an observation, C places in the
cache, V vocabulary, D hidden size.
"""

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from grpo_jax.policy.layers import Layer
from grpo_jax.policy.transformer import KeyValues, TokenRows, Transformer, forward, prefill, unstack
from grpo_jax.sampler.choose import Noise, Settings, choose_token, row_keys
from grpo_jax.sharding import Array

Choose = Callable[[Array, Array], tuple[Array, Array]]  # hidden [P, G, D], position [P, G] -> token, log-probability


class DecodeState(NamedTuple):
    """The rows of a batch between two tokens, or between two turns of an episode.

    Attributes:
      prefix: keys and values of the prompts, rows [P].
      prompt_lengths: [P] int32.
      cache: keys and values of the rows, [P, G] with C places; its layers are unstacked.
      cache_length: int32 scalar, how many places of the cache are filled, the same for all rows.
      position: [P, G] int32, the position of `token`.
      token: [P, G] int32, the last token sampled, which no forward pass has seen yet.
    """

    prefix: KeyValues
    prompt_lengths: Array
    cache: KeyValues
    cache_length: Array
    position: Array
    token: Array


class Generation(NamedTuple):
    """One turn of every row.

    Attributes:
      tokens: [P, G, T] int32.
      mask: [P, G, T] bool, True up to and with the stop token.
      logprobs: [P, G, T] float32, 0 where `mask` is False.
      stopped: [P, G] bool, False where the limit of T tokens cut a row short.
    """

    tokens: Array
    mask: Array
    logprobs: Array
    stopped: Array


class Observation(NamedTuple):
    """What an environment answers: right-padded tokens [P, G, F], lengths [P, G], and which rows go on, active [P, G].

    Rows that are not active have length 0 and are not sampled any more.
    """

    tokens: Array
    lengths: Array
    active: Array


class LoopState(NamedTuple):
    """The carry of the decoding loop: how many tokens each row has been given, int32, the rows, and what they got."""

    t: Array
    rows: DecodeState
    generation: Generation


def generate(
    model: Transformer,
    prompts: Array,
    lengths: Array,
    noise: Noise,
    temperature: Array,
    top_p: Array,
    settings: Settings,
) -> tuple[Generation, DecodeState]:
    """Samples the first turn of every row.

    Args:
      prompts, lengths: right-padded ids [P, S] and lengths [P].
      noise: the names of the rows' noise.
      temperature, top_p: float32 scalars.
      settings: what is fixed when this is compiled.
    """
    chex.assert_rank([prompts, lengths, noise.samples], [2, 1, 2])
    prefix, hidden = prefill(model, prompts, lengths, shared_prefix_length=settings.shared_prefix_length)
    prefix = prefix._replace(k=tuple(prefix.k), v=tuple(prefix.v))
    rows = noise.samples.shape
    c = model.config
    # A turn of one token caches nothing, but a cache without places cannot be traced.
    size = max(settings.max_tokens - 1 if settings.cache_size is None else settings.cache_size, 1)
    empty = [jnp.zeros((*rows, c.num_kv_heads, size, c.head_dim), prefix.v[0].dtype) for _ in range(2 * c.num_layers)]
    cache = KeyValues(
        tuple(empty[::2]), tuple(empty[1::2]), jnp.zeros((*rows, size), jnp.int32), jnp.zeros((*rows, size), bool)
    )
    hidden = jnp.broadcast_to(hidden[:, None], (*rows, hidden.shape[-1]))
    position = jnp.broadcast_to(lengths[:, None], rows)
    state = DecodeState(prefix, lengths, cache, jnp.int32(0), position, jnp.zeros(rows, jnp.int32))
    choose = _chooser(model, lengths, noise, temperature, top_p, settings)
    return _decode(model, unstack(model), state, hidden, jnp.ones(rows, bool), choose, settings)


def continue_generation(
    model: Transformer,
    state: DecodeState,
    observation: Observation,
    noise: Noise,
    temperature: Array,
    top_p: Array,
    settings: Settings,
) -> tuple[Generation, DecodeState]:
    """Feeds the environment's observation to the active rows and samples their next turn.

    The last token of the turn before goes into the cache with the observation, so a further turn needs `F + T` more
    places in the cache.
    """
    chex.assert_rank([observation.tokens, observation.lengths, observation.active], [3, 2, 2])
    active = observation.active
    tokens = jnp.concatenate([state.token[..., None], observation.tokens], axis=-1)
    offsets = jnp.arange(tokens.shape[-1])
    valid = (offsets <= observation.lengths[..., None]) & active[..., None]
    positions = state.position[..., None] + offsets
    layers = unstack(model)
    hidden, cache = forward(
        model,
        TokenRows(tokens, positions, valid),
        prefix=state.prefix,
        cache=state.cache,
        cache_length=state.cache_length,
        layers=layers,
    )
    hidden = jnp.take_along_axis(hidden, observation.lengths[..., None, None], axis=2)[:, :, 0]
    state = state._replace(
        cache=cache,
        cache_length=state.cache_length + tokens.shape[-1],
        position=state.position + observation.lengths + 1,
    )
    choose = _chooser(model, state.prompt_lengths, noise, temperature, top_p, settings)
    return _decode(model, layers, state, hidden, active, choose, settings)


def _chooser(
    model: Transformer, prompt_lengths: Array, noise: Noise, temperature: Array, top_p: Array, settings: Settings
) -> Choose:
    """The function that chooses each row's token from its hidden state."""
    keys = row_keys(noise)

    def choose(hidden: Array, position: Array) -> tuple[Array, Array]:
        # Noise is named by the place after the prompt, so it does not depend on how prompts are padded.
        u = jax.vmap(jax.vmap(lambda key, at: jax.random.uniform(jax.random.fold_in(key, at))))(
            keys, position - prompt_lengths[:, None]
        )
        return choose_token(model.logits(hidden), u, temperature, top_p, settings)

    return choose


def _decode(
    model: Transformer,
    layers: list[Layer],
    state: DecodeState,
    hidden: Array,
    active: Array,
    choose: Choose,
    settings: Settings,
) -> tuple[Generation, DecodeState]:
    """Samples a turn whose first token is predicted by `hidden` [P, G, D] and has position `state.position` [P, G].

    The loop ends when the last active row has stopped, or after `settings.max_tokens` tokens.
    """
    shape = (*active.shape, settings.max_tokens)
    stop_ids = jnp.asarray(settings.stop_ids, jnp.int32)

    def write(generation: Generation, t: Array, token: Array, logprob: Array, live: Array) -> Generation:
        tokens, mask, logprobs, stopped = (jnp.asarray(x) for x in generation)
        return Generation(
            tokens.at[..., t].set(jnp.where(live, token, settings.pad_id)),
            mask.at[..., t].set(live),
            logprobs.at[..., t].set(jnp.where(live, logprob, 0.0)),
            stopped | (live & (token[..., None] == stop_ids).any(-1)),
        )

    def body(carry: LoopState) -> LoopState:
        t, rows, generation = carry
        live = active & ~generation.stopped
        hidden, cache = forward(
            model,
            TokenRows(rows.token[..., None], rows.position[..., None], live[..., None]),
            prefix=rows.prefix,
            cache=rows.cache,
            cache_length=rows.cache_length,
            layers=layers,
        )
        position = rows.position + live
        token, logprob = choose(hidden[:, :, 0], position)
        rows = rows._replace(
            cache=cache,
            cache_length=rows.cache_length + 1,
            position=position,
            token=jnp.where(live, token, rows.token),
        )
        return LoopState(t + 1, rows, write(generation, t, token, logprob, live))

    def unfinished(carry: LoopState) -> Array:
        return (carry.t < settings.max_tokens) & (active & ~carry.generation.stopped).any()

    generation = Generation(
        jnp.full(shape, settings.pad_id, jnp.int32),
        jnp.zeros(shape, bool),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros(active.shape, bool),
    )
    token, logprob = choose(hidden, state.position)
    generation = write(generation, jnp.int32(0), token, logprob, active)
    state = state._replace(token=jnp.where(active, token, state.token))
    _, state, generation = jax.lax.while_loop(unfinished, body, LoopState(jnp.int32(1), state, generation))
    return generation, state
