"""The parts of policy-gradient losses: importance ratios, objectives that use them, and KL estimates.

There is one small function of arrays `[B, T]` for each idea. Each objective has one value per token and is *maximised*.
`grpo_jax.losses.policy_gradient` averages the values. Masked values must be finite numbers here.
"""

from typing import Literal

import chex
import jax
import jax.numpy as jnp

from grpo_jax.errors import UserError
from grpo_jax.experiment import LossConfig

_SMALLEST_LOG_WEIGHT, _LARGEST_LOG_WEIGHT = -18.420681, 20.0  # log 1e-8 and log e^20, as in VESPO's own code


def importance_ratio(
    logprobs: chex.Array, old_logprobs: chex.Array, mask: chex.Array, level: Literal["token", "sequence"]
) -> chex.Array:
    """Calculates p / p_old: the probability of each token under the policy divided by that under the sampling policy.

    Gradients flow through `logprobs`. Only `old_logprobs` are constants.

    `sequence` is GSPO's ratio (Zheng et al. 2025, https://arxiv.org/abs/2507.18071): the geometric mean over the tokens
    of the sequence, that is, the ratio of the likelihoods of the sequence to the power 1 / length.

    Args:
      logprobs: log-probabilities under the policy, shape `[B, T]`.
      old_logprobs: log-probabilities under the policy that sampled, shape `[B, T]`. No gradient flows through them.
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
    """Returns where clipping acts: (ratio too low and A < 0, ratio too high and A > 0), of the shape of `ratio`."""
    low = (ratio < 1 - epsilon_low) & (advantages < 0)
    high = (ratio > 1 + epsilon_high) & (advantages > 0)
    return low, high


def clipped_surrogate(
    ratio: chex.Array, advantages: chex.Array, epsilon_low: float, epsilon_high: float, delta: float | None = None
) -> chex.Array:
    """PPO's min(ratio * A, clip(ratio, 1 - epsilon_low, 1 + epsilon_high) * A).

    Schulman et al. 2017, https://arxiv.org/abs/1707.06347, eq. 7; two epsilons as in DAPO,
    https://arxiv.org/abs/2503.14476, eq. 10. In PPO the ratio of a token with A < 0 has no upper bound, so
    one token can dominate a batch. `delta` bounds it: min(min(ratio, delta) * A, clip(ratio) * A) (two-sided clipping,
    INTELLECT-2, https://arxiv.org/abs/2505.07291). The code uses `jnp.where` because exactly on a bound, `jnp.minimum`
    and `jnp.clip` would each pass on only half of the gradient. Here the whole gradient flows, as in PyTorch.

    Args:
      ratio: importance ratios, any shape.
      advantages: constants of the same shape.
      epsilon_low: the ratio of a token with A < 0 is clipped below 1 - epsilon_low.
      epsilon_high: the ratio of a token with A > 0 is clipped above 1 + epsilon_high.
      delta: upper bound of the ratio of a token with A < 0, usually much larger than 1 + epsilon_high; None for none.

    Returns:
      The surrogate of each token, of the same shape; its gradient is 0 where the ratio is clipped.
    """
    bad, high, delta = advantages < 0, 1 + epsilon_high, jnp.inf if delta is None else delta
    lowest = jnp.where(bad, 1 - epsilon_low, -jnp.inf)
    highest = jnp.where(bad, max(delta, high), min(delta, high))
    return advantages * jnp.where(ratio < lowest, lowest, jnp.where(ratio > highest, highest, ratio))


def clipped_weight_objective(
    logprobs: chex.Array, ratio: chex.Array, advantages: chex.Array, largest: float
) -> chex.Array:
    """Calculates CISPO's sg(min(ratio, largest)) * A * log p: the weight is bounded, but every token has a gradient.

    (sg is `stop_gradient`.) MiniMax-M1, https://arxiv.org/abs/2506.13585, without a lower bound, as in its experiments.
    `largest` is the bound itself, as in ScaleRL (https://arxiv.org/abs/2510.13786, which recommends 5) and in TRL, not
    an epsilon above 1.
    """
    return jax.lax.stop_gradient(jnp.minimum(ratio, largest)) * advantages * logprobs


def soft_gate_objective(
    ratio: chex.Array, advantages: chex.Array, temperature_pos: float, temperature_neg: float
) -> chex.Array:
    """Calculates SAPO's A * sigmoid(tau * (ratio - 1)) * 4 / tau, whose gradient decreases on both sides of ratio 1.

    At ratio 1 the slope is A, as in PPO. A larger tau makes it decrease faster. tau is `temperature_pos` where A > 0,
    else `temperature_neg`. Gao et al. 2025, https://arxiv.org/abs/2511.20347.
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
    """Calculates VESPO's phi(w) = w^k * exp(lambda * (1 - w)) of each *sequence's* importance weight w.

    The weight is the product of the tokens' ratios, without GSPO's root. phi(1) = 1, and phi is small for sequences
    whose probability has become much larger or much smaller. Shen et al. 2026, https://arxiv.org/abs/2602.10693.

    Args:
      log_ratio: log importance ratios of the tokens, shape `[B, T]`.
      advantages: their sign selects k and lambda, shape `[B, 1]` or `[B, T]`.
      mask: True for the tokens that count, shape `[B, T]`.
      config: `vespo_k_pos`, `vespo_lambda_pos`, `vespo_k_neg`, `vespo_lambda_neg`.
      correction: the weights of the tokens if the sampler is not the old policy, shape `[B, T]`; factors of w.

    Returns:
      phi, of the shape of `advantages`. No gradient flows through it.
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
    """Calculates importance weights for completions of a sampler that differs slightly from the trained policy.

    A sampler with another precision, or another engine, makes on-policy training off-policy. The weight is
    p / p_sampler, of each token (`token_*`) or of the whole sequence (`sequence_*`). It is bounded: `*_truncate` clips
    it to [clip_min, clip_max] (Yao et al. 2025, https://fengyao.notion.site/off-policy-rl); `*_mask` sets weights
    outside this range to 0 (Liu et al. 2025, https://richardli.xyz/rl-collapse). TRL calls these options
    `vllm_importance_sampling_*`.

    Args:
      logprobs: log-probabilities that the trainer computes under the policy that sampled, shape `[B, T]`.
      sampler_logprobs: log-probabilities that the sampler reported, shape `[B, T]`.
      mask: True for the tokens that count, shape `[B, T]`.
      config: `importance_sampling_mode`, `importance_sampling_clip_min` and `importance_sampling_clip_max`.

    Returns:
      Weights, shape `[B, T]`, through which no gradient flows. With `token_*` a masked token has the weight of ratio 1;
      with `sequence_*` all tokens of a row have the same weight.
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

    With d = log reference - log policy, the estimators are (Schulman 2020, http://joschu.net/blog/kl-approx.html):

        k1 = -d                 unbiased, noisy
        k2 = d^2 / 2            never negative, biased
        k3 = exp(d) - d - 1     never negative, unbiased; GRPO uses it

    This describes their values. In a loss, their gradients matter (Tang & Munos 2025, https://arxiv.org/abs/2506.09477).
    On average, the gradient of k1 is 0, so it only adds noise; that of k2 is the gradient of this KL; that of k3 is the
    gradient of KL(reference || policy). Multiplied by the importance ratio (`LossConfig.use_bias_correction_kl`), the
    gradients of k1 and k3 become the gradient of this KL.

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
