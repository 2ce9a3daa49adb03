"""Parameters and tokens to per-token log-probabilities and entropies, never holding [B, T, V].

The prompt is computed once per group, and gradients flow through it. The vocabulary is met a chunk of tokens at a time,
and met again in the backward pass, so memory is chunk x V whatever the batch.
"""

import chex
import jax
import jax.numpy as jnp

from grpo_jax.policy.transformer import Transformer, forward, prefill

Array = jax.Array


def completion_logprobs(
    model: Transformer,
    prompts: Array,
    lengths: Array,
    tokens: Array,
    valid: Array,
    *,
    temperature: float | Array = 1.0,
    common: int = 0,
    chunk: int = 256,
    remat: bool = False,
) -> tuple[Array, Array]:
    """Log-probabilities and entropies of completions at a temperature (0 means 1, as in the sampler).

    Args:
      prompts, lengths: right-padded ids [P, S] and lengths [P].
      tokens, valid: completions [P, G, T], and which of their places hold a token (a prefix of each row).
      common: how many leading tokens all prompts share.
      chunk: how many tokens meet the vocabulary at once.
      remat: recompute layers in the backward pass.

    Returns:
      Two float32 arrays [P, G, T]: log-probability of each token given what precedes it, and the entropy in nats of
      the distribution it was drawn from. Places that are not valid hold finite numbers without meaning.
    """
    chex.assert_rank([prompts, lengths, tokens], [2, 1, 3])
    chex.assert_equal_shape([tokens, valid])
    prefix, last = prefill(model, prompts, lengths, common=common, remat=remat)
    positions = lengths[:, None, None] + jnp.arange(tokens.shape[2])
    positions = jnp.broadcast_to(positions, tokens.shape)
    # The last token of a row predicts nothing that is asked for, so it is not run.
    inputs = (tokens[..., :-1], positions[..., :-1], valid[..., :-1])
    first = jnp.broadcast_to(last[:, None, None], (*tokens.shape[:2], 1, last.shape[-1]))
    if tokens.shape[2] > 1:
        hidden, _ = forward(model, *inputs, prefix=prefix, remat=remat)
        first = jnp.concatenate([first, hidden], axis=2)
    return token_logprobs(model, first, tokens, temperature=temperature, chunk=chunk)


def token_logprobs(
    model: Transformer, hidden: Array, tokens: Array, *, temperature: float | Array = 1.0, chunk: int = 256
) -> tuple[Array, Array]:
    """Log-probability of tokens [...] under the hidden states [..., D] that predict them, and the entropies."""
    size = tokens.size
    chunk = min(chunk, size)
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
