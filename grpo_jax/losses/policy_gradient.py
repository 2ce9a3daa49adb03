"""The policy-gradient losses, in TRL's names: GRPO and its descendants, and REINFORCE.

    loss = mean over tokens of (-objective + beta * KL) - entropy_coef * entropy

A `loss_type` is an objective per token (see `grpo_jax.losses.surrogates`) and a way to average (`reduce_tokens`):

    grpo        clipped surrogate       mean over sequences of token means       https://arxiv.org/abs/2402.03300
    dapo, bnpo  clipped surrogate       mean over tokens                         https://arxiv.org/abs/2503.14476
    dr_grpo     clipped surrogate       sum over tokens / constant length        https://arxiv.org/abs/2503.20783
    luspo       clipped surrogate       sum over tokens, mean over sequences     https://arxiv.org/abs/2602.05261
    cispo       clipped weight * log p  mean over tokens                         https://arxiv.org/abs/2506.13585
    sapo        soft gate               mean over sequences of token means       https://arxiv.org/abs/2511.20347
    vespo       gamma weight * log p    mean over tokens                         https://arxiv.org/abs/2602.10693
    reinforce   A * log p               sum over tokens, mean over sequences     Williams 1992

GSPO (https://arxiv.org/abs/2507.18071) is `grpo`, and LUSPO as published is `luspo`, with
`importance_sampling_level="sequence"`. RLOO is `reinforce` with the leave-one-out baseline of `AdvantageConfig`.

On one batch in one piece every loss agrees with TRL's (1.16) of the same name, which has no `reinforce`. Departures:

- Cutting the batch into micro-batches or over devices changes nothing here, since every denominator counts the whole
  batch. TRL's `bnpo`, its entropy bonus and its metrics weigh each micro-batch alike, however few tokens it holds, and
  its threshold of `top_entropy_quantile` is each micro-batch's own. Here `bnpo` and `dapo` are one loss.
- The KL is GRPO's own (eq. 4 of its paper). TRL multiplies it by the importance ratio (DeepSeek-V3.2,
  https://arxiv.org/abs/2512.02556), which changes its gradient even on policy: `use_bias_correction_kl=True`.
- Metrics are means over tokens, also of ratios per sequence, which TRL averages over sequences.
"""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from grpo_jax.errors import UserError
from grpo_jax.experiment import LossConfig
from grpo_jax.losses.inputs import LossInputs, finite_where_masked, own_loss
from grpo_jax.losses.surrogates import (
    clipped_regions,
    clipped_surrogate,
    clipped_weight_objective,
    gamma_weight,
    importance_ratio,
    kl_estimate,
    soft_gate_objective,
)


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
    correction: chex.Array | None = None,
    high_entropy: chex.Array | None = None,
    num_tokens: chex.Numeric | None = None,
    num_sequences: chex.Numeric | None = None,
    num_high_entropy: chex.Numeric | None = None,
) -> tuple[chex.Array, dict[str, chex.Array]]:
    """Calculates these sequences' contribution to the policy-gradient loss of the whole batch, from single arrays.

    The arguments are the fields of `LossInputs`, but that advantages may also have the shape `[B]`, one for each
    sequence, and that what the whole batch counts may be None: it is counted here then, and over `axis_name`. See
    `policy_gradient_loss`, which returns the same.
    """
    optional = (ref_logprobs, entropy, correction, high_entropy)
    given = [logprobs, old_logprobs, mask, *(x for x in optional if x is not None)]
    chex.assert_rank(given, 2, custom_message="log-probabilities, mask and entropy must have shape [batch, tokens]")
    chex.assert_equal_shape(given)
    chex.assert_rank(advantages, {1, 2}, custom_message="advantages must have shape [batch] or [batch, tokens]")
    chex.assert_equal_shape_prefix([logprobs, advantages], jnp.ndim(advantages))
    mask = jnp.asarray(mask, bool)
    advantages = jnp.asarray(advantages)
    inputs = LossInputs(
        logprobs=logprobs,
        old_logprobs=old_logprobs,
        advantages=jnp.broadcast_to(advantages if advantages.ndim == 2 else advantages[:, None], mask.shape),
        mask=mask,
        entropy=entropy,
        ref_logprobs=ref_logprobs,
        correction=correction,
        high_entropy=high_entropy,
        num_tokens=_count(mask.sum(), axis_name) if num_tokens is None else num_tokens,
        num_sequences=_count(mask.shape[0], axis_name) if num_sequences is None else num_sequences,
        num_high_entropy=num_high_entropy,
        axis_name=axis_name,
    )
    return policy_gradient_loss(inputs, config)


def apply_loss(loss: LossConfig | Callable[..., Any], inputs: LossInputs) -> tuple[chex.Array, dict[str, chex.Array]]:
    """The contribution of some sequences to a batch's loss, by a config or by a function of the user's own."""
    return policy_gradient_loss(inputs, loss) if isinstance(loss, LossConfig) else own_loss(loss, inputs)


def policy_gradient_loss(inputs: LossInputs, config: LossConfig) -> tuple[chex.Array, dict[str, chex.Array]]:
    """Calculates these sequences' contribution to the policy-gradient loss of the whole batch.

    A token where `mask` is False touches neither the value nor the gradient, whatever its inputs hold, NaN and infinity
    included. A sequence without a single True token contributes 0.

    With `config.top_entropy_quantile` below 1 the objective (not the KL) is that of the most uncertain tokens alone,
    still divided by the count of all (https://arxiv.org/abs/2506.01939), and the entropy bonus is their mean.

    Args:
      inputs: the arrays. `ref_logprobs` is needed if `config.beta` is not 0; `entropy` if `config.entropy_coef` is not
        0 or `config.top_entropy_quantile` is below 1. `correction` is from
        `grpo_jax.losses.surrogates.sampler_correction`, and `high_entropy` from `highest_entropy_tokens`; None finds
        the top quantile of these sequences, and over `axis_name`, so a batch in micro-batches needs it given.
      config: which loss, and its coefficients.

    Returns:
      The loss, a scalar to be *summed* over micro-batches and devices; and the metrics, which sum likewise to means
      over the batch's active tokens: `loss`, `importance_ratio`, the shares of tokens whose ratio is bounded
      (`clip_ratio/*_mean`, `cispo_clip_ratio`), `vespo/phi_seq_mean`, and, where their inputs are given, `kl` and
      `entropy`.

    Raises:
      UserError: `config` asks for a KL or an entropy whose input is missing.
    """
    _require_inputs(config, inputs.ref_logprobs, inputs.entropy)
    inputs = finite_where_masked(inputs)
    mask, entropy = inputs.mask, inputs.entropy

    def token_mean(x: chex.Array) -> chex.Array:
        return jnp.where(mask, x, 0.0).sum() / jnp.maximum(inputs.num_tokens, 1)

    ratio = importance_ratio(inputs.logprobs, inputs.old_logprobs, mask, config.importance_sampling_level)
    objective, shares = _objective(inputs, ratio, config)
    metrics = {name: token_mean(share) for name, share in {"importance_ratio": ratio, **shares}.items()}

    high_entropy, num_high_entropy = inputs.high_entropy, inputs.num_high_entropy
    if config.top_entropy_quantile == 1:
        high_entropy, num_high_entropy = mask, inputs.num_tokens
    elif high_entropy is None:
        high_entropy = highest_entropy_tokens(entropy, mask, config.top_entropy_quantile, axis_name=inputs.axis_name)
    if num_high_entropy is None:
        num_high_entropy = _count((mask & high_entropy).sum(), inputs.axis_name)
    per_token = -jnp.where(high_entropy, objective, 0.0)

    if inputs.ref_logprobs is not None:
        kl = kl_estimate(inputs.logprobs, inputs.ref_logprobs, config.kl_estimator)
        if config.use_bias_correction_kl:
            kl *= ratio
        per_token += config.beta * kl
        metrics["kl"] = token_mean(kl)
    value = reduce_tokens(per_token, mask, config, inputs.num_tokens, inputs.num_sequences)
    if entropy is not None:
        metrics["entropy"] = token_mean(entropy)
        bonus = jnp.where(mask & high_entropy, entropy, 0.0).sum() / jnp.maximum(num_high_entropy, 1)
        value -= config.entropy_coef * bonus
    metrics["loss"] = value
    return value, jax.lax.stop_gradient(metrics)


def _objective(inputs: LossInputs, ratio: chex.Array, config: LossConfig) -> tuple[chex.Array, dict[str, chex.Array]]:
    """What is maximised at each token `[B, T]`, and, by the name of their metric, where and how much it is bounded."""
    logprobs, advantages = inputs.logprobs, inputs.advantages
    epsilon_high = config.epsilon if config.epsilon_high is None else config.epsilon_high
    weight = 1.0 if inputs.correction is None else inputs.correction
    match config.loss_type:
        case "cispo":
            shares = {"cispo_clip_ratio": (ratio > epsilon_high) & (advantages > 0)}
            return weight * clipped_weight_objective(logprobs, ratio, advantages, epsilon_high), shares
        case "sapo":
            return weight * soft_gate_objective(
                ratio, advantages, config.sapo_temperature_pos, config.sapo_temperature_neg
            ), {}
        case "vespo":  # the correction is a factor of w, and so within phi
            log_ratio = logprobs - inputs.old_logprobs
            phi = gamma_weight(log_ratio, advantages, inputs.mask, config, inputs.correction)
            return phi * advantages * logprobs, {"vespo/phi_seq_mean": phi}
        case "reinforce":
            return weight * advantages * logprobs, {}
        case _:
            low, high = clipped_regions(ratio, advantages, config.epsilon, epsilon_high)
            shares = {
                "clip_ratio/low_mean": low,
                "clip_ratio/high_mean": high,
                "clip_ratio/region_mean": low | high,
            }
            if config.delta is not None:
                shares["clip_ratio/delta_mean"] = (ratio > config.delta) & (advantages < 0)
            return weight * clipped_surrogate(ratio, advantages, config.epsilon, epsilon_high, config.delta), shares


def reduce_tokens(
    per_token: chex.Array,
    mask: chex.Array,
    config: LossConfig,
    num_tokens: chex.Numeric,
    num_sequences: chex.Numeric,
) -> chex.Array:
    """Reduces a loss per token to these sequences' contribution to the whole batch's.

    The mean over sequences of their token means (`grpo`, `sapo`) weighs a token of a short completion more; the mean
    over all tokens (`dapo`, `bnpo`, `cispo`, `vespo`) weighs tokens alike within a batch, and batches of long
    completions less. The sum over tokens is the gradient of the expected reward without either: over a constant in
    `dr_grpo`, as the mean over sequences in `luspo` and `reinforce`.

    Args:
      per_token: loss of each token, shape `[B, T]`.
      mask: True for the tokens that count, shape `[B, T]`.
      config: `loss_type`, and `dr_grpo_length` for `dr_grpo`.
      num_tokens: active tokens of the whole batch.
      num_sequences: sequences of the whole batch.

    Returns:
      A scalar.
    """
    sums = jnp.where(mask, per_token, 0.0).sum(axis=1)
    match config.loss_type:
        case "grpo" | "sapo":
            return (sums / jnp.maximum(mask.sum(axis=1), 1)).sum() / num_sequences
        case "dr_grpo":
            return sums.sum() / (num_sequences * config.dr_grpo_length)
        case "luspo" | "reinforce":
            return sums.sum() / num_sequences
        case _:  # dapo, bnpo, cispo, vespo
            return sums.sum() / jnp.maximum(num_tokens, 1)


def highest_entropy_tokens(
    entropy: chex.Array, mask: chex.Array, quantile: float, *, axis_name: str | None = None
) -> chex.Array:
    """Finds the tokens whose entropy is in the top `quantile` of the batch's active tokens.

    That is at or above the (1 - quantile)-quantile, interpolated linearly (Wang et al. 2025, "Beyond the 80/20 rule",
    https://arxiv.org/abs/2506.01939). A quantile belongs to the whole batch: micro-batches need it found beforehand.

    Args:
      entropy: entropy of the policy at each token in nats; a constant. Any shape.
      mask: True for the tokens that count, of the same shape.
      quantile: the share to keep, in [0, 1]; at 0 the highest alone.
      axis_name: the mapped axis over which the batch extends.

    Returns:
      Booleans of the same shape, False where `mask` is False.
    """
    entropy = jnp.where(mask, jax.lax.stop_gradient(jnp.asarray(entropy, jnp.float32)), jnp.nan)
    everything = entropy if axis_name is None else jax.lax.all_gather(entropy, axis_name)
    return mask & (entropy >= jnp.nanquantile(everything, 1 - quantile))


def _require_inputs(config: LossConfig, ref_logprobs: chex.Array | None, entropy: chex.Array | None) -> None:
    if config.beta and ref_logprobs is None:
        raise UserError(f"LossConfig.beta = {config.beta} needs ref_logprobs: the KL is to a reference policy.")
    if config.entropy_coef and entropy is None:
        raise UserError(f"LossConfig.entropy_coef = {config.entropy_coef} needs the tokens' entropy.")
    if config.top_entropy_quantile < 1 and entropy is None:
        raise UserError(f"LossConfig.top_entropy_quantile = {config.top_entropy_quantile} needs the tokens' entropy.")


def _count(n: chex.Numeric, axis_name: str | None) -> chex.Numeric:
    return n if axis_name is None else jax.lax.psum(n, axis_name)
