"""Supervised fine-tuning: the mean negative log-likelihood of the demonstrated tokens."""

import chex
import jax
import jax.numpy as jnp


def loss(
    logprobs: chex.Array,
    mask: chex.Array,
    *,
    num_tokens: chex.Numeric | None = None,
    axis_name: str | None = None,
) -> tuple[chex.Array, dict[str, chex.Array]]:
    """Calculates the contribution of these sequences to the mean negative log-likelihood of the whole batch's tokens.

    Args:
      logprobs: log-probabilities of the demonstrated tokens under the policy, shape `[B, T]`. Where `mask` is False,
        any value is allowed, even NaN: it affects neither the loss nor the gradient.
      mask: True for the tokens to learn, shape `[B, T]`.
      num_tokens: number of tokens to learn in the whole batch, over all devices and micro-batches. None to count them
        here, and over `axis_name`.
      axis_name: the mapped axis over which the batch is distributed.

    Returns:
      The loss, a scalar to be *summed* over micro-batches and devices; and the metrics `loss` and `num_tokens` (number
      of learned tokens), to be summed in the same way.
    """
    chex.assert_rank([logprobs, mask], 2)
    chex.assert_equal_shape([logprobs, mask])

    mask = jnp.asarray(mask, bool)
    active = mask.sum()
    if num_tokens is None:
        num_tokens = active if axis_name is None else jax.lax.psum(active, axis_name)
    value = -jnp.where(mask, jnp.asarray(logprobs, jnp.float32), 0.0).sum() / jnp.maximum(num_tokens, 1)
    return value, {"loss": value, "num_tokens": active}
