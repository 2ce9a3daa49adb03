"""The parts that policy-gradient losses are put together from: importance ratios, what is made of them, and the KL.

One small function for each idea, of arrays `[B, T]`. Each objective is to be *maximised*, token by token; what averages
them, and over what, is in `grpo_jax.losses.policy_gradient`. Masked places must hold finite numbers here.
"""

from typing import Literal

import chex
import jax
import jax.numpy as jnp

from grpo_jax.errors import UserError
from grpo_jax.experiment import LossConfig

_SMALLEST_LOG_WEIGHT, _LARGEST_LOG_WEIGHT = -18.420681, 20.0  # log 1e-8 and e^20: the bounds of VESPO's own code


def importance_ratio(
    logprobs: chex.Array, old_logprobs: chex.Array, mask: chex.Array, level: Literal["token", "sequence"]
) -> chex.Array:
    """How much likelier each token is under the policy than under the one that sampled it, a constant.

    `sequence` is GSPO's ratio (Zheng et al. 2025, https://arxiv.org/abs/2507.18071): the geometric mean over the
    sequence's tokens, which is the ratio of the sequences' likelihoods to the power 1 / length.

    Args:
      logprobs: log-probabilities under the policy, shape `[B, T]`.
      old_logprobs: the same under the policy that sampled; a constant.
      mask: True for the tokens that count, shape `[B, T]`.
      level: one ratio per token, or one per sequence.

    Returns:
      Ratios, shape `[B, T]`; with `sequence` the same for all tokens of a row.
    """
    log_ratio = logprobs - jax.lax.stop_gradient(old_logprobs)
    if level == "sequence":
        total = jnp.where(mask, log_ratio, 0.0).sum(axis=1, keepdims=True)
        log_ratio = jnp.broadcast_to(total / jnp.maximum(mask.sum(axis=1, keepdims=True), 1), logprobs.shape)
    return jnp.exp(log_ratio)


def clipped_regions(
    ratio: chex.Array, advantages: chex.Array, epsilon_low: float, epsilon_high: float
) -> tuple[chex.Array, chex.Array]:
    """Where clipping acts: a bad token already made unlikelier by enough, and a good one already made likelier."""
    low = (ratio < 1 - epsilon_low) & (advantages < 0)
    high = (ratio > 1 + epsilon_high) & (advantages > 0)
    return low, high


def clipped_surrogate(
    ratio: chex.Array, advantages: chex.Array, epsilon_low: float, epsilon_high: float, delta: float | None = None
) -> chex.Array:
    """PPO's min(ratio * A, clip(ratio, 1 - epsilon_low, 1 + epsilon_high) * A).

    Schulman et al. 2017, https://arxiv.org/abs/1707.06347, eq. 7; two epsilons as in DAPO,
    https://arxiv.org/abs/2503.14476, eq. 10. PPO leaves the ratio of a bad token (A < 0) without an upper bound, so
    that one token can outweigh a batch; `delta` bounds it: min(min(ratio, delta) * A, clip(ratio) * A) (two-sided
    clipping, INTELLECT-2, https://arxiv.org/abs/2505.07291). Written as a choice, so that on the very edge of
    the region, where `jnp.minimum` and `jnp.clip` would each pass on half a gradient, all of it flows, as in PyTorch.

    Args:
      ratio: importance ratios, any shape.
      advantages: constants of the same shape.
      epsilon_low: how far below 1 the ratio of a token with A < 0 still matters.
      epsilon_high: how far above 1 the ratio of a token with A > 0 still matters.
      delta: how large the ratio of a token with A < 0 may count, usually well above 1 + epsilon_high; None for any.

    Returns:
      The surrogate of each token, of the same shape; its gradient is 0 where a bound holds.
    """
    bad, high, delta = advantages < 0, 1 + epsilon_high, jnp.inf if delta is None else delta
    lowest = jnp.where(bad, 1 - epsilon_low, -jnp.inf)
    highest = jnp.where(bad, max(delta, high), min(delta, high))
    return advantages * jnp.where(ratio < lowest, lowest, jnp.where(ratio > highest, highest, ratio))


def clipped_weight_objective(
    logprobs: chex.Array, ratio: chex.Array, advantages: chex.Array, largest: float
) -> chex.Array:
    """CISPO's sg(min(ratio, largest)) * A * log p: the weight is bounded, but every token keeps a gradient.

    MiniMax-M1, https://arxiv.org/abs/2506.13585, without a lower bound, as it was run; `largest` is the bound
    itself, as ScaleRL (https://arxiv.org/abs/2510.13786, recommends 5) and TRL have it, and not an epsilon above 1.
    """
    return jax.lax.stop_gradient(jnp.minimum(ratio, largest)) * advantages * logprobs


def soft_gate_objective(
    ratio: chex.Array, advantages: chex.Array, temperature_pos: float, temperature_neg: float
) -> chex.Array:
    """SAPO's A * sigmoid(tau * (ratio - 1)) * 4 / tau: a gate that closes gradually on both sides of ratio 1.

    Its slope at ratio 1 is A, PPO's. The larger tau, the narrower the gate; `temperature_pos` is tau where A > 0.
    Gao et al. 2025, https://arxiv.org/abs/2511.20347.
    """
    temperature = jnp.where(advantages > 0, temperature_pos, temperature_neg)
    return advantages * jax.nn.sigmoid(temperature * (ratio - 1)) * 4 / temperature


def gamma_weight(
    log_ratio: chex.Array,
    advantages: chex.Array,
    mask: chex.Array,
    config: LossConfig,
    correction: chex.Array | None = None,
) -> chex.Array:
    """VESPO's phi(w) = w^k * exp(lambda * (1 - w)) of each *sequence's* importance weight w; a constant.

    The weight is the full product of the tokens' ratios, without GSPO's root. phi(1) = 1, and sequences that have
    become much likelier or much unlikelier fade out. Shen et al. 2026, https://arxiv.org/abs/2602.10693.

    Args:
      log_ratio: log importance ratios of the tokens, shape `[B, T]`.
      advantages: their sign chooses k and lambda, shape `[B, 1]` or `[B, T]`.
      mask: True for the tokens that count, shape `[B, T]`.
      config: `vespo_k_pos`, `vespo_lambda_pos`, `vespo_k_neg`, `vespo_lambda_neg`.
      correction: the tokens' weights for a sampler that is not the old policy, shape `[B, T]`: factors of w.

    Returns:
      phi, of the shape of `advantages`.
    """
    log_weight = jnp.where(mask, jnp.clip(log_ratio, -_LARGEST_LOG_WEIGHT, _LARGEST_LOG_WEIGHT), 0.0)
    if correction is not None:
        log_correction = jnp.clip(jnp.log(correction), _SMALLEST_LOG_WEIGHT, _LARGEST_LOG_WEIGHT)
        log_weight += jnp.where(mask, log_correction, 0.0)
    log_weight = jnp.clip(log_weight.sum(axis=1, keepdims=True), _SMALLEST_LOG_WEIGHT, _LARGEST_LOG_WEIGHT)
    k = jnp.where(advantages >= 0, config.vespo_k_pos, config.vespo_k_neg)
    decay = jnp.where(advantages >= 0, config.vespo_lambda_pos, config.vespo_lambda_neg)
    return jax.lax.stop_gradient(jnp.exp(decay + k * log_weight - decay * jnp.exp(log_weight)))


def sampler_correction(
    logprobs: chex.Array, sampler_logprobs: chex.Array, mask: chex.Array, config: LossConfig
) -> chex.Array:
    """Importance weights for completions of a sampler that is not quite the policy that is trained.

    A sampler in another precision, or on another engine, makes on-policy training off-policy. The weight is p / p of
    the sampler, of each token or of the whole sequence (`token_*`, `sequence_*`), and bounded: `*_truncate` clips it to
    [clip_min, clip_max] (Yao et al. 2025, https://fengyao.notion.site/off-policy-rl), `*_mask` sets what lies outside
    to 0 (Liu et al. 2025, https://richardli.xyz/rl-collapse). TRL calls these options `vllm_importance_sampling_*`.

    Args:
      logprobs: log-probabilities that the trainer finds under the policy that sampled, shape `[B, T]`.
      sampler_logprobs: those that the sampler reported, shape `[B, T]`.
      mask: True for the tokens that count, shape `[B, T]`.
      config: `importance_sampling_mode`, `importance_sampling_clip_min` and `importance_sampling_clip_max`.

    Returns:
      Constants, shape `[B, T]`; 1 where `mask` is False, but for `sequence_*`, where a row has one weight throughout.
    """
    level, _, constraint = (config.importance_sampling_mode or "").partition("_")
    log_ratio = jnp.where(mask, jnp.asarray(logprobs, jnp.float32) - jnp.asarray(sampler_logprobs, jnp.float32), 0.0)
    if level == "sequence":
        log_ratio = jnp.broadcast_to(log_ratio.sum(axis=-1, keepdims=True), log_ratio.shape)
    ratio = jax.lax.stop_gradient(jnp.exp(log_ratio))
    lowest = 0.0 if config.importance_sampling_clip_min is None else config.importance_sampling_clip_min
    highest = jnp.inf if config.importance_sampling_clip_max is None else config.importance_sampling_clip_max
    match constraint:
        case "truncate":
            return jnp.clip(ratio, lowest, highest)
        case "mask":
            return jnp.where((ratio < lowest) | (ratio > highest), 0.0, ratio)
        case _:
            raise UserError("sampler_correction needs LossConfig.importance_sampling_mode, which is None.")


def kl_estimate(logprobs: chex.Array, ref_logprobs: chex.Array, kind: Literal["k1", "k2", "k3"]) -> chex.Array:
    """Estimates KL(policy || reference) at each token, from the token that the policy sampled.

    With d = log reference - log policy: k1 = -d, unbiased and noisy; k2 = d^2 / 2, never negative, biased; k3 =
    exp(d) - d - 1, never negative and unbiased (Schulman 2020, http://joschu.net/blog/kl-approx.html; GRPO's choice).
    That is about their values. In a loss their gradients count: on average k1's is 0, so that it only adds noise, k2's
    is that of this KL, and k3's that of KL(reference || policy) (Tang & Munos 2025, https://arxiv.org/abs/2506.09477).
    Multiplied by the importance ratio (`LossConfig.use_bias_correction_kl`), k1's and k3's become that of this KL.

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
