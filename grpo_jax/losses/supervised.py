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
    """Calculates these sequences' contribution to the token-mean negative log-likelihood of the whole batch.

    Args:
      logprobs: log-probabilities of the demonstrated tokens under the policy, shape `[B, T]`. Where `mask` is False
        they may be anything, NaN included: they touch neither the value nor the gradient.
      mask: True for the tokens that are learned, shape `[B, T]`.
      num_tokens: how many tokens the whole batch learns, over micro-batches and devices. None to count them here, and
        over `axis_name`.
      axis_name: the mapped axis over which the batch extends.

    Returns:
      The loss, a scalar to be *summed* over micro-batches and devices; and the metrics `loss` and `num_tokens` (learned
      tokens), which sum likewise.
    """
    chex.assert_rank([logprobs, mask], 2)
    chex.assert_equal_shape([logprobs, mask])

    mask = jnp.asarray(mask, bool)
    active = mask.sum()
    if num_tokens is None:
        num_tokens = active if axis_name is None else jax.lax.psum(active, axis_name)
    value = -jnp.where(mask, jnp.asarray(logprobs, jnp.float32), 0.0).sum() / jnp.maximum(num_tokens, 1)
    return value, {"loss": value, "num_tokens": active}
