"""The GRPO loss and its relatives: clipped policy gradients with per-token importance ratios.

On one batch in one piece every loss agrees with TRL's of the same name. They depart from it in what happens when the
batch is cut into micro-batches or over devices: here every denominator counts the whole batch, so that cutting changes
nothing. TRL's `bnpo`, its entropy bonus and its metrics weigh each micro-batch alike, however few tokens it holds. Here
`bnpo` and `dapo` are therefore one loss under two names.
"""

from typing import Literal

import chex
import jax
import jax.numpy as jnp

from grpo_jax.errors import UserError
from grpo_jax.experiment import LossConfig


def loss(
    logprobs: chex.Array,
    old_logprobs: chex.Array,
    advantages: chex.Array,
    mask: chex.Array,
    config: LossConfig,
    *,
    ref_logprobs: chex.Array | None = None,
    entropy: chex.Array | None = None,
    axis_name: str | None = None,
    num_tokens: chex.Numeric | None = None,
    num_sequences: chex.Numeric | None = None,
) -> tuple[chex.Array, dict[str, chex.Array]]:
    """Calculates these sequences' contribution to the policy-gradient loss of the whole batch.

    Per token -min(ratio * A, clip(ratio) * A) + beta * KL, reduced as `config.loss_type` says (see `reduce_tokens`),
    less `entropy_coefficient` times the batch's mean entropy per token (as in TRL, whatever the loss type).

    A token where `mask` is False touches neither the value nor the gradient, whatever its inputs hold, NaN and infinity
    included. A sequence without a single True token contributes 0 and, as in TRL, still counts as a sequence.

    Args:
      logprobs: log-probabilities of the sampled tokens under the policy that is trained, shape `[B, T]`. Gradients flow
        through these and through `entropy` alone.
      old_logprobs: the same under the policy that sampled them, shape `[B, T]`.
      advantages: one for each sequence, shape `[B]`, or for each token, `[B, T]`.
      mask: True for the tokens that are trained on, shape `[B, T]`.
      config: which loss, and its coefficients.
      ref_logprobs: log-probabilities under the reference policy, shape `[B, T]`; needed if `config.beta` is not 0.
      entropy: entropy of the policy at each token in nats, shape `[B, T]`; needed if `config.entropy_coefficient` is
        not 0.
      axis_name: the mapped axis over which the batch extends.
      num_tokens: how many tokens the whole batch trains on, over micro-batches and devices. None to count them here,
        and over `axis_name`.
      num_sequences: how many sequences the whole batch holds, likewise.

    Returns:
      The loss, a scalar to be *summed* over micro-batches and devices; and the metrics, which sum likewise to means
      over the batch's active tokens: `loss`, `importance_ratio`, the shares of clipped tokens `clip_ratio/low_mean`,
      `clip_ratio/high_mean` and `clip_ratio/region_mean`, and, where their inputs are given, `kl` and `entropy`.

    Raises:
      UserError: `config` asks for a KL or an entropy whose input is missing.
    """
    given = [x for x in (logprobs, old_logprobs, mask, ref_logprobs, entropy) if x is not None]
    chex.assert_rank(given, 2, custom_message="log-probabilities, mask and entropy must have shape [batch, tokens]")
    chex.assert_equal_shape(given)
    chex.assert_rank(advantages, {1, 2}, custom_message="advantages must have shape [batch] or [batch, tokens]")
    chex.assert_equal_shape_prefix([logprobs, advantages], jnp.ndim(advantages))
    if config.beta and ref_logprobs is None:
        raise UserError(f"LossConfig.beta = {config.beta} needs ref_logprobs: the KL is to a reference policy.")
    if config.entropy_coefficient and entropy is None:
        raise UserError(f"LossConfig.entropy_coefficient = {config.entropy_coefficient} needs the tokens' entropy.")

    # Masked inputs are replaced before anything is calculated from them, not after: the gradient of
    # where(mask, f(x), 0) is still NaN where f is infinite.
    mask = jnp.asarray(mask, bool)
    logprobs = _select(mask, logprobs)
    old_logprobs = _select(mask, old_logprobs)
    advantages = jax.lax.stop_gradient(_select(mask, advantages if jnp.ndim(advantages) == 2 else advantages[:, None]))

    if num_tokens is None:
        num_tokens = _count(mask.sum(), axis_name)
    if num_sequences is None:
        num_sequences = _count(mask.shape[0], axis_name)

    def token_mean(x: chex.Array) -> chex.Array:
        return jnp.where(mask, x, 0.0).sum() / jnp.maximum(num_tokens, 1)

    epsilon_high = config.epsilon if config.epsilon_high is None else config.epsilon_high
    ratio = importance_ratio(logprobs, old_logprobs)
    low, high = clipped_regions(ratio, advantages, config.epsilon, epsilon_high)
    per_token = -clipped_surrogate(ratio, advantages, config.epsilon, epsilon_high)
    metrics = {
        "importance_ratio": token_mean(ratio),
        "clip_ratio/low_mean": token_mean(low),
        "clip_ratio/high_mean": token_mean(high),
        "clip_ratio/region_mean": token_mean(low | high),
    }
    if ref_logprobs is not None:
        kl = kl_estimate(logprobs, _select(mask, ref_logprobs), config.kl_estimator)
        per_token += config.beta * kl
        metrics["kl"] = token_mean(kl)
    value = reduce_tokens(per_token, mask, config, num_tokens, num_sequences)
    if entropy is not None:
        metrics["entropy"] = token_mean(_select(mask, entropy))
        value -= config.entropy_coefficient * metrics["entropy"]
    metrics["loss"] = value
    return value, jax.lax.stop_gradient(metrics)


def importance_ratio(logprobs: chex.Array, old_logprobs: chex.Array) -> chex.Array:
    """How much likelier each token is under the policy than under the one that sampled it, a constant."""
    return jnp.exp(logprobs - jax.lax.stop_gradient(old_logprobs))


def clipped_regions(
    ratio: chex.Array, advantages: chex.Array, epsilon_low: float, epsilon_high: float
) -> tuple[chex.Array, chex.Array]:
    """Where clipping acts: a bad token already made unlikelier by enough, and a good one already made likelier."""
    low = (ratio < 1 - epsilon_low) & (advantages < 0)
    high = (ratio > 1 + epsilon_high) & (advantages > 0)
    return low, high


def clipped_surrogate(ratio: chex.Array, advantages: chex.Array, epsilon_low: float, epsilon_high: float) -> chex.Array:
    """PPO's min(ratio * A, clip(ratio, 1 - epsilon_low, 1 + epsilon_high) * A), to be maximised.

    Schulman et al. 2017, https://arxiv.org/abs/1707.06347, eq. 7; two epsilons as in DAPO,
    https://arxiv.org/abs/2503.14476, eq. 10. Written as a choice, so that on the very edge of the region, where
    `jnp.minimum` and `jnp.clip` would each pass on half a gradient, all of it flows, as in PyTorch.

    Args:
      ratio: importance ratios, any shape.
      advantages: constants of the same shape.
      epsilon_low: how far below 1 the ratio of a token with A < 0 still matters.
      epsilon_high: how far above 1 the ratio of a token with A > 0 still matters.

    Returns:
      The surrogate of each token, of the same shape; its gradient is 0 in the clipped regions.
    """
    low, high = clipped_regions(ratio, advantages, epsilon_low, epsilon_high)
    return advantages * jnp.where(low, 1 - epsilon_low, jnp.where(high, 1 + epsilon_high, ratio))


def kl_estimate(logprobs: chex.Array, ref_logprobs: chex.Array, kind: Literal["k1", "k2", "k3"]) -> chex.Array:
    """Estimates KL(policy || reference) at each token, from the token that the policy sampled.

    With d = log reference - log policy: k1 = -d, unbiased and noisy; k2 = d^2 / 2, never negative, biased; k3 =
    exp(d) - d - 1, never negative and unbiased (Schulman 2020, http://joschu.net/blog/kl-approx.html; GRPO's choice).
    That is about their values. In a loss their gradients count: on average k1's is 0, so that it only adds noise, k2's
    is that of this KL, and k3's that of KL(reference || policy) (Tang & Munos 2025, https://arxiv.org/abs/2506.09477).

    Args:
      logprobs: log-probabilities under the policy, any shape.
      ref_logprobs: log-probabilities under the reference policy, the same shape; a constant.
      kind: the estimator.

    Returns:
      The estimate in nats, of the same shape.
    """
    difference = jax.lax.stop_gradient(ref_logprobs) - logprobs
    match kind:
        case "k1":
            return -difference
        case "k2":
            return difference**2 / 2
        case "k3":
            return jnp.expm1(difference) - difference
        case _:
            raise UserError(f"kl_estimator = {kind!r} is unknown: it must be 'k1', 'k2' or 'k3'.")


def reduce_tokens(
    per_token: chex.Array,
    mask: chex.Array,
    config: LossConfig,
    num_tokens: chex.Numeric,
    num_sequences: chex.Numeric,
) -> chex.Array:
    """Reduces a loss per token to these sequences' contribution to the whole batch's.

    `grpo`: the mean over sequences of their token means (https://arxiv.org/abs/2402.03300), which weighs a token of a
    short completion more; `dapo` (https://arxiv.org/abs/2503.14476) and `bnpo`: the mean over all tokens; `dr_grpo`
    (https://arxiv.org/abs/2503.20783): the sum over a constant, so that every token weighs the same.

    Args:
      per_token: loss of each token, shape `[B, T]`.
      mask: True for the tokens that count, shape `[B, T]`.
      config: `loss_type`, and `max_completion_length` for `dr_grpo`.
      num_tokens: active tokens of the whole batch.
      num_sequences: sequences of the whole batch.

    Returns:
      A scalar.
    """
    sums = jnp.where(mask, per_token, 0.0).sum(axis=1)
    match config.loss_type:
        case "grpo":
            return (sums / jnp.maximum(mask.sum(axis=1), 1)).sum() / num_sequences
        case "dr_grpo":
            return sums.sum() / (num_sequences * config.max_completion_length)
        case _:  # dapo and bnpo
            return sums.sum() / jnp.maximum(num_tokens, 1)


def _select(mask: chex.Array, x: chex.Array) -> chex.Array:
    return jnp.where(mask, jnp.asarray(x, jnp.float32), 0.0)


def _count(n: chex.Numeric, axis_name: str | None) -> chex.Numeric:
    return n if axis_name is None else jax.lax.psum(n, axis_name)
