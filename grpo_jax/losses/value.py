"""The parts of PPO besides the policy gradient: the KL penalty in the reward, advantages from a critic, its loss.

This is the RLHF method of Ziegler et al. 2019 (https://arxiv.org/abs/1909.08593) and Ouyang et al. 2022
(https://arxiv.org/abs/2203.02155). A completion is an episode with one action per token. The reward of the completion
comes with its last token, and every token has a penalty for its distance from the reference policy.
"""

import chex
import jax
import jax.numpy as jnp


def token_rewards(
    rewards: chex.Array, logprobs: chex.Array, ref_logprobs: chex.Array, mask: chex.Array, kl_coef: float
) -> chex.Array:
    """Calculates a reward per token: -kl_coef * (log p - log p_ref), plus the reward of the sequence at its last token.

    Args:
      rewards: one reward for each sequence, shape `[B]`.
      logprobs: log-probabilities under the policy that sampled, shape `[B, T]`.
      ref_logprobs: the same under the reference policy, shape `[B, T]`.
      mask: True for the tokens that the policy sampled, shape `[B, T]`.
      kl_coef: weight of the KL. (The estimate is k1; its sum over a completion is the completion's log-ratio.)

    Returns:
      Shape `[B, T]`, 0 where `mask` is False.
    """
    chex.assert_rank([rewards, logprobs, ref_logprobs, mask], [1, 2, 2, 2])
    penalty = jnp.where(mask, kl_coef * (jnp.asarray(logprobs, jnp.float32) - ref_logprobs), 0.0)
    later = jnp.cumsum(mask[:, ::-1], axis=1)[:, ::-1] - mask  # number of sampled tokens after this one
    return jnp.where(mask & (later == 0), jnp.asarray(rewards, jnp.float32)[:, None], 0.0) - penalty


def gae(
    rewards: chex.Array, values: chex.Array, mask: chex.Array, gamma: float, lam: float
) -> tuple[chex.Array, chex.Array]:
    """Calculates generalised advantage estimates (Schulman et al. 2015, https://arxiv.org/abs/1506.02438, eq. 16).

        delta_t = r_t + gamma * V_(t+1) - V_t        A_t = delta_t + gamma * lam * A_(t+1)

    The episode ends after its last sampled token; V and A are 0 there. Tokens that the policy did not sample (those of
    an environment, padding) are not steps: the step after a token is the next sampled token.

    Args:
      rewards: the reward of each token, shape `[B, T]`.
      values: the critic's value of the state in which each token was sampled, shape `[B, T]`.
      mask: True for the tokens that the policy sampled, shape `[B, T]`.
      gamma: the discount factor.
      lam: the weight of later deltas: with 0 the estimate relies on the critic, with 1 on the rewards.

    Returns:
      Advantages A, and returns A + V, which are the critic's targets. Both have the shape `[B, T]` and are 0 where
      `mask` is False. No gradients flow through them.
    """
    chex.assert_rank([rewards, values, mask], 2)
    chex.assert_equal_shape([rewards, values, mask])
    rewards, values = (jnp.where(mask, jnp.asarray(x, jnp.float32), 0.0) for x in (rewards, values))

    def back(
        after: tuple[chex.Array, chex.Array], now: tuple[chex.Array, chex.Array, chex.Array]
    ) -> tuple[tuple[chex.Array, chex.Array], chex.Array]:
        value_after, advantage_after = after
        reward, value, sampled = now
        advantage = reward + gamma * value_after - value + gamma * lam * advantage_after
        carried = jnp.where(sampled, value, value_after), jnp.where(sampled, advantage, advantage_after)
        return carried, jnp.where(sampled, advantage, 0.0)

    nothing = jnp.zeros(rewards.shape[0])
    steps = (rewards.T, values.T, jnp.asarray(mask, bool).T)
    _, advantages = jax.lax.scan(back, (nothing, nothing), steps, reverse=True)
    return jax.lax.stop_gradient((advantages.T, advantages.T + values))


def value_loss(
    values: chex.Array,
    old_values: chex.Array,
    returns: chex.Array,
    mask: chex.Array,
    cliprange_value: float | None,
    *,
    num_tokens: chex.Numeric | None = None,
    axis_name: str | None = None,
) -> tuple[chex.Array, dict[str, chex.Array]]:
    """Calculates the contribution of these tokens to the critic's loss, half the mean squared error with clipping.

    The error of a token is the larger of two: that of the value, and that of the value clipped to within
    `cliprange_value` of the old value. So a value gains nothing from a larger change in one step. The code of PPO does
    the same (https://arxiv.org/abs/1707.06347; Ziegler et al. 2019).

    Args:
      values: the critic's current values, shape `[B, T]`. Gradients flow only through these.
      old_values: the critic's values before the first update on this batch, shape `[B, T]`.
      returns: the critic's targets, shape `[B, T]`.
      mask: True for the tokens that count, shape `[B, T]`.
      cliprange_value: the largest change of a value; None for no clipping.
      num_tokens: number of tokens of the whole batch that count, over all devices and micro-batches. None to count them
        here, and over `axis_name`.
      axis_name: the mapped axis over which the batch is distributed.

    Returns:
      The loss, and the metrics `value_loss` and `value_clip_ratio` (the fraction of tokens whose clipped error was the
      larger one), all to be *summed* over devices and micro-batches.
    """
    chex.assert_rank([values, old_values, returns, mask], 2)
    chex.assert_equal_shape([values, old_values, returns, mask])
    mask = jnp.asarray(mask, bool)
    values = jnp.where(mask, jnp.asarray(values, jnp.float32), 0.0)
    old_values, returns = (jax.lax.stop_gradient(jnp.where(mask, x, 0.0)) for x in (old_values, returns))
    if num_tokens is None:
        num_tokens = mask.sum() if axis_name is None else jax.lax.psum(mask.sum(), axis_name)

    errors = clipped_errors = (values - returns) ** 2
    if cliprange_value is not None:
        held = jnp.clip(values, old_values - cliprange_value, old_values + cliprange_value)
        clipped_errors = (held - returns) ** 2
    count = jnp.maximum(num_tokens, 1)
    value = 0.5 * jnp.maximum(errors, clipped_errors).sum() / count
    metrics = {"value_loss": value, "value_clip_ratio": (mask & (clipped_errors > errors)).sum() / count}
    return value, jax.lax.stop_gradient(metrics)
