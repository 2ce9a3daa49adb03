"""Log-probabilities and entropies of tokens under the policy's parameters, without ever holding [B, T, V].

The prompt is computed once per group, and gradients flow through it. The logits are computed for one chunk of tokens at
a time, and recomputed in the backward pass. Memory is therefore chunk x V, whatever the size of the batch.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from grpo_jax.policy.transformer import TokenRows, Transformer, forward, prefill
from grpo_jax.sharding import Array

MAX_LOGITS = 2**22
"""How many logits a chunk has by default (16 MiB of float32). With a small vocabulary one chunk holds all tokens."""


class Completions(NamedTuple):
    """Groups of completions and their prompts.

    prompts: right-padded token ids, [P, S].
    lengths: number of tokens of each prompt, [P].
    tokens: token ids of the completions, [P, G, T].
    valid: which places of the completions hold a token (a prefix of each row), [P, G, T] bool.
    """

    prompts: Array
    lengths: Array
    tokens: Array
    valid: Array


def completion_logprobs(
    model: Transformer,
    completions: Completions,
    *,
    temperature: float | Array = 1.0,
    shared_prefix_length: int = 0,
    chunk: int | None = None,
    remat: bool = False,
) -> tuple[Array, Array]:
    """Computes the log-probabilities and entropies of completions at a temperature.

    Args:
      completions: the completions and their prompts.
      temperature: the temperature that divides the logits. 0 means 1, as in the sampler.
      shared_prefix_length: how many leading tokens all prompts share.
      chunk: for how many tokens the logits are computed at once. The default is as many as `MAX_LOGITS` allows, and at
        least 256.
      remat: recompute the layers in the backward pass.

    Returns:
      Two float32 arrays [P, G, T]: the log-probability of each token given the tokens before it, and the entropy in
      nats of the distribution that the token was drawn from. Where `valid` is false the numbers are finite but
      meaningless.
    """
    hidden = completion_hidden(model, completions, shared_prefix_length=shared_prefix_length, remat=remat)
    return token_logprobs(model, hidden, completions.tokens, temperature=temperature, chunk=chunk)


def completion_hidden(
    model: Transformer,
    completions: Completions,
    *,
    shared_prefix_length: int = 0,
    remat: bool = False,
    after_last: bool = False,
) -> Array:
    """Computes the hidden states [P, G, T, D] that predict the completions' tokens.

    The arguments are those of `completion_logprobs`. With `after_last` the shape is [P, G, T + 1, D]: entry t is the
    state after t tokens, so the last token is run through the model as well.
    """
    prompts, lengths, tokens, valid = completions
    chex.assert_rank([prompts, lengths, tokens], [2, 1, 3])
    chex.assert_equal_shape([tokens, valid])
    prefix, last = prefill(model, prompts, lengths, shared_prefix_length=shared_prefix_length, remat=remat)
    positions = lengths[:, None, None] + jnp.arange(tokens.shape[2])
    positions = jnp.broadcast_to(positions, tokens.shape)
    first = jnp.broadcast_to(last[:, None, None], (*tokens.shape[:2], 1, last.shape[-1]))
    num_run = tokens.shape[2] if after_last else tokens.shape[2] - 1  # the state after the last token predicts no token
    if num_run == 0:
        return first
    rows = TokenRows(*(x[..., :num_run] for x in (tokens, positions, valid)))
    hidden, _ = forward(model, rows, prefix=prefix, remat=remat)
    return jnp.concatenate([first, hidden], axis=2)


def packed_logprobs(
    model: Transformer,
    tokens: Array,
    segments: Array,
    *,
    temperature: float | Array = 1.0,
    chunk: int | None = None,
    remat: bool = False,
) -> tuple[Array, Array]:
    """Computes log-probabilities and entropies of packed rows: several whole examples side by side in each row.

    The examples of a row do not attend to each other.

    Args:
      tokens: token ids, [P, G, T].
      segments: which example of its row each token belongs to, [P, G, T] int32. Examples are numbered from 1, and each
        is in one piece. 0 is padding.
      temperature, chunk, remat: as in `completion_logprobs`.

    Returns:
      Two float32 arrays [P, G, T]: the log-probability of each token given the tokens before it in its example, and the
      entropy. Both are 0 for the first token of an example, because nothing predicts it.
    """
    chex.assert_rank([tokens, segments], 3)
    chex.assert_equal_shape([tokens, segments])
    places = jnp.broadcast_to(jnp.arange(tokens.shape[2]), tokens.shape)
    begins = jnp.concatenate([jnp.ones_like(segments[..., :1], bool), segments[..., 1:] != segments[..., :-1]], axis=-1)
    positions = places - jax.lax.cummax(jnp.where(begins, places, 0), axis=2)
    hidden, _ = forward(model, TokenRows(tokens, positions, segments > 0, segments), remat=remat)
    found = token_logprobs(model, hidden[..., :-1, :], tokens[..., 1:], temperature=temperature, chunk=chunk)
    logprobs, entropy = (jnp.where(begins, 0.0, jnp.pad(x, [(0, 0), (0, 0), (1, 0)])) for x in found)
    return logprobs, entropy


def token_logprobs(
    model: Transformer, hidden: Array, tokens: Array, *, temperature: float | Array = 1.0, chunk: int | None = None
) -> tuple[Array, Array]:
    """Computes log-probabilities and entropies of tokens from the hidden states that predict them.

    Args:
      hidden: hidden states after the final norm, [..., D].
      tokens: token ids, [...].
      temperature, chunk: as in `completion_logprobs`.

    Returns:
      Two float32 arrays [...]: the log-probability of each token, and the entropy in nats.
    """
    size = tokens.size
    chunk = min(chunk or max(256, MAX_LOGITS // model.config.vocab_size), size)
    temperature = jnp.where(jnp.asarray(temperature) == 0, 1.0, temperature)

    def one_chunk(inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        hidden, tokens = inputs
        logits = model.logits(hidden) / temperature
        normaliser = jax.nn.logsumexp(logits, axis=-1)
        chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0] - normaliser
        entropy = normaliser - jnp.sum(jax.nn.softmax(logits, axis=-1) * logits, axis=-1)
        return chosen, entropy

    def to_chunks(x: Array) -> Array:
        x = x.reshape(size, *x.shape[tokens.ndim :])
        x = jnp.pad(x, [(0, -size % chunk)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(-1, chunk, *x.shape[1:])

    chosen, entropy = jax.lax.map(jax.checkpoint(one_chunk), (to_chunks(hidden), to_chunks(tokens)))
    return tuple(x.reshape(-1)[:size].reshape(tokens.shape) for x in (chosen, entropy))
