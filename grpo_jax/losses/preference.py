"""Losses on preference pairs: DPO and its relatives, and the Bradley-Terry loss of a reward model.

Rows are in pairs, the chosen completion before the rejected one: row 2i is preferred to row 2i + 1.

    sigmoid  -log sigmoid(beta * margin)           DPO, https://arxiv.org/abs/2305.18290, eq. 7
    robust   the same, unbiased under label noise  https://arxiv.org/abs/2403.00409, eq. 12
    ipo      (mean margin - 1 / (2 beta))^2        https://arxiv.org/abs/2310.12036, eq. 17

The margin is log p/p_ref of the chosen completion minus log p/p_ref of the rejected one. Each is a sum over tokens. For
IPO each is a mean over tokens, as in TRL, whose authors learned this from the authors of the paper. (With sums, its
target 1 / (2 beta) would depend on the length.)

`label_smoothing` e with `sigmoid` is cDPO (Mitchell 2023, https://ericmitchell.ai/cdpo.pdf): the label is assumed to be
correct with probability 1 - e. The `sigmoid` loss of TRL 1.16 ignores `label_smoothing`; only its `robust` and `aot`
losses use it.
"""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from grpo_jax.errors import UserError
from grpo_jax.experiment import DPOConfig


def dpo_loss(
    logprobs: chex.Array,
    ref_logprobs: chex.Array,
    mask: chex.Array,
    config: DPOConfig,
    *,
    pairs: chex.Array | None = None,
    num_pairs: chex.Numeric | None = None,
    axis_name: str | None = None,
) -> tuple[chex.Array, dict[str, chex.Array]]:
    """Calculates the contribution of these pairs to the DPO, robust DPO or IPO loss: a mean over the batch's pairs.

    Args:
      logprobs: log-probabilities of the completions' tokens under the policy, shape `[B, T]`, rows 2i chosen and 2i + 1
        rejected. Gradients flow only through these.
      ref_logprobs: the same under the reference policy, shape `[B, T]`.
      mask: True for the tokens that count, shape `[B, T]`. Values at other tokens, even NaN, have no effect.
      config: `loss_type`, `beta` and `label_smoothing`.
      pairs: False for a pair that does not count, shape `[B / 2]`. None: all count.
      num_pairs: number of pairs of the whole batch that count, over all devices and micro-batches. None to count them
        here, and over `axis_name`.
      axis_name: the mapped axis over which the batch is distributed.

    Returns:
      The loss, a scalar to be *summed* over micro-batches and devices; and TRL's metrics, to be summed in the same way:
      `loss`, `rewards/chosen` and `rewards/rejected` (beta * log p/p_ref), `rewards/accuracies` (chosen above
      rejected), `rewards/margins`, `logps/chosen`, `logps/rejected`.
    """
    chex.assert_rank([logprobs, ref_logprobs, mask], 2)
    chex.assert_equal_shape([logprobs, ref_logprobs, mask])
    mask = jnp.asarray(mask, bool)
    logprobs = jnp.where(mask, jnp.asarray(logprobs, jnp.float32), 0.0)
    ref_logprobs = jax.lax.stop_gradient(jnp.where(mask, jnp.asarray(ref_logprobs, jnp.float32), 0.0))

    totals = logprobs.sum(axis=1)
    log_ratios = (logprobs - ref_logprobs).sum(axis=1)
    margins = _margins(log_ratios)
    match config.loss_type:
        case "sigmoid":
            noise = config.label_smoothing
            per_pair = -(1 - noise) * jax.nn.log_sigmoid(config.beta * margins)
            per_pair -= noise * jax.nn.log_sigmoid(-config.beta * margins)
        case "robust":
            noise = config.label_smoothing
            per_pair = -(1 - noise) * jax.nn.log_sigmoid(config.beta * margins)
            per_pair += noise * jax.nn.log_sigmoid(-config.beta * margins)
            per_pair /= 1 - 2 * noise
        case "ipo":
            means = log_ratios / jnp.maximum(mask.sum(axis=1), 1)
            per_pair = (_margins(means) - 1 / (2 * config.beta)) ** 2
        case _:
            raise UserError(f"DPOConfig.loss_type = {config.loss_type!r} is unknown.")

    mean = _pair_mean(pairs, num_pairs, axis_name, len(margins))
    value = mean(per_pair)
    metrics = {
        "loss": value,
        **_reward_metrics(config.beta * log_ratios, mean),
        "logps/chosen": mean(totals[0::2]),
        "logps/rejected": mean(totals[1::2]),
    }
    return value, jax.lax.stop_gradient(metrics)


def bradley_terry_loss(
    rewards: chex.Array,
    *,
    center_rewards_coefficient: float = 0.0,
    pairs: chex.Array | None = None,
    num_pairs: chex.Numeric | None = None,
    axis_name: str | None = None,
) -> tuple[chex.Array, dict[str, chex.Array]]:
    """Calculates the contribution of these pairs to a reward model's mean loss, -log sigmoid(chosen - rejected).

    (Bradley & Terry 1952; Ouyang et al. 2022, https://arxiv.org/abs/2203.02155, eq. 1.) The loss depends only on
    differences of rewards. The term `center_rewards_coefficient` * (chosen + rejected)^2 keeps the rewards around 0
    (Eisenstein et al. 2023, https://arxiv.org/abs/2312.09244, eq. 2).

    Args:
      rewards: the model's scores, shape `[B]`, entries 2i chosen and 2i + 1 rejected.
      pairs, num_pairs, axis_name: as in `dpo_loss`.

    Returns:
      The loss and the metrics `loss`, `rewards/chosen`, `rewards/rejected`, `rewards/accuracies`, `rewards/margins`,
      all to be *summed* over devices and micro-batches.
    """
    chex.assert_rank(rewards, 1)
    mean = _pair_mean(pairs, num_pairs, axis_name, len(rewards) // 2)
    rewards = jnp.asarray(rewards, jnp.float32)
    per_pair = -jax.nn.log_sigmoid(_margins(rewards))
    per_pair += center_rewards_coefficient * (rewards[0::2] + rewards[1::2]) ** 2
    value = mean(per_pair)
    return value, jax.lax.stop_gradient({"loss": value, **_reward_metrics(rewards, mean)})


def _margins(rows: chex.Array) -> chex.Array:
    return rows[0::2] - rows[1::2]


def _pair_mean(
    pairs: chex.Array | None, num_pairs: chex.Numeric | None, axis_name: str | None, size: int
) -> Callable[[chex.Array], chex.Array]:
    """Returns a function: one value per pair -> the contribution of these pairs to the mean over the whole batch."""
    pairs = jnp.ones(size, bool) if pairs is None else jnp.asarray(pairs, bool)
    if num_pairs is None:
        num_pairs = pairs.sum() if axis_name is None else jax.lax.psum(pairs.sum(), axis_name)
    return lambda values: jnp.where(pairs, values, 0.0).sum() / jnp.maximum(num_pairs, 1)


def _reward_metrics(rewards: chex.Array, mean: Callable[[chex.Array], chex.Array]) -> dict[str, chex.Array]:
    margins = _margins(rewards)
    return {
        "rewards/chosen": mean(rewards[0::2]),
        "rewards/rejected": mean(rewards[1::2]),
        "rewards/accuracies": mean(margins > 0),
        "rewards/margins": mean(margins),
    }
