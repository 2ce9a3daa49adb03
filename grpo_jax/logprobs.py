"""Parameters and tokens to per-token log-probabilities and entropies, never holding [B, T, V].

The prompt is computed once per group, and gradients flow through it. The vocabulary is met a chunk of tokens at a time,
and met again in the backward pass, so memory is chunk x V whatever the batch.
"""

import chex
import jax
import jax.numpy as jnp

from grpo_jax.policy.transformer import Transformer, forward, prefill

Array = jax.Array

MAX_LOGITS = 2**22  # in float32, 16 MiB: a small vocabulary is met by all tokens at once


def completion_logprobs(
    model: Transformer,
    prompts: Array,
    lengths: Array,
    tokens: Array,
    valid: Array,
    *,
    temperature: float | Array = 1.0,
    common: int = 0,
    chunk: int | None = None,
    remat: bool = False,
) -> tuple[Array, Array]:
    """Log-probabilities and entropies of completions at a temperature (0 means 1, as in the sampler).

    Args:
      prompts, lengths: right-padded ids [P, S] and lengths [P].
      tokens, valid: completions [P, G, T], and which of their places hold a token (a prefix of each row).
      common: how many leading tokens all prompts share.
      chunk: how many tokens meet the vocabulary at once; by default as many as `MAX_LOGITS` allows, and 256 at least.
      remat: recompute layers in the backward pass.

    Returns:
      Two float32 arrays [P, G, T]: log-probability of each token given what precedes it, and the entropy in nats of
      the distribution it was drawn from. Places that are not valid hold finite numbers without meaning.
    """
    hidden = completion_hidden(model, prompts, lengths, tokens, valid, common=common, remat=remat)
    return token_logprobs(model, hidden, tokens, temperature=temperature, chunk=chunk)


def completion_hidden(
    model: Transformer,
    prompts: Array,
    lengths: Array,
    tokens: Array,
    valid: Array,
    *,
    common: int = 0,
    remat: bool = False,
    after_last: bool = False,
) -> Array:
    """The hidden states [P, G, T, D] that predict the completions' tokens, arguments as in `completion_logprobs`.

    With `after_last` they are [P, G, T + 1, D]: entry t is the state after t tokens, so the last token is run as well.
    """
    chex.assert_rank([prompts, lengths, tokens], [2, 1, 3])
    chex.assert_equal_shape([tokens, valid])
    prefix, last = prefill(model, prompts, lengths, common=common, remat=remat)
    positions = lengths[:, None, None] + jnp.arange(tokens.shape[2])
    positions = jnp.broadcast_to(positions, tokens.shape)
    first = jnp.broadcast_to(last[:, None, None], (*tokens.shape[:2], 1, last.shape[-1]))
    run = tokens.shape[2] if after_last else tokens.shape[2] - 1  # the last token predicts nothing that is asked for
    if run == 0:
        return first
    hidden, _ = forward(model, *(x[..., :run] for x in (tokens, positions, valid)), prefix=prefix, remat=remat)
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
    """Log-probabilities and entropies of rows of several whole examples side by side, which do not see each other.

    Args:
      tokens: ids [P, G, T].
      segments: which example of its row a token belongs to, [P, G, T] int32, examples numbered from 1 and in one piece
        each; 0 for padding.

    Returns:
      Two float32 arrays [P, G, T]: of each token given what precedes it in its example; 0 for an example's first token,
      which nothing predicts.
    """
    chex.assert_rank([tokens, segments], 3)
    chex.assert_equal_shape([tokens, segments])
    places = jnp.broadcast_to(jnp.arange(tokens.shape[2]), tokens.shape)
    begins = jnp.concatenate([jnp.ones_like(segments[..., :1], bool), segments[..., 1:] != segments[..., :-1]], axis=-1)
    positions = places - jax.lax.cummax(jnp.where(begins, places, 0), axis=2)
    hidden, _ = forward(model, tokens, positions, segments > 0, segments=segments, remat=remat)
    found = token_logprobs(model, hidden[..., :-1, :], tokens[..., 1:], temperature=temperature, chunk=chunk)
    return tuple(jnp.where(begins, 0.0, jnp.pad(x, [(0, 0), (0, 0), (1, 0)])) for x in found)


def token_logprobs(
    model: Transformer, hidden: Array, tokens: Array, *, temperature: float | Array = 1.0, chunk: int | None = None
) -> tuple[Array, Array]:
    """Log-probability of tokens [...] under the hidden states [..., D] that predict them, and the entropies."""
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

    def pad(x: Array) -> Array:
        x = x.reshape(size, *x.shape[tokens.ndim :])
        x = jnp.pad(x, [(0, -size % chunk)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(-1, chunk, *x.shape[1:])

    chosen, entropy = jax.lax.map(jax.checkpoint(one_chunk), (pad(hidden), pad(tokens)))
    return tuple(x.reshape(-1)[:size].reshape(tokens.shape) for x in (chosen, entropy))
