"""PPO as in RLHF: policy gradients from a critic's advantages, and a KL penalty in the reward.

(Ziegler et al. 2019, https://arxiv.org/abs/1909.08593; Ouyang et al. 2022, https://arxiv.org/abs/2203.02155.) The
critic is a scalar head on the policy's last hidden state. Rewards are functions, or a reward model
(`grpo_jax.reward_model.learned_reward`).
"""

from typing import ClassVar

import jax
import jax.numpy as jnp

from grpo_jax.advantages import whiten
from grpo_jax.algorithms.base import (
    Algorithm,
    BeforeUpdates,
    Metrics,
    Objective,
    Setup,
    StepContext,
    Totals,
    TrainBatch,
)
from grpo_jax.algorithms.batch import Batch, micro_batches, rows
from grpo_jax.algorithms.dynamic_sampling import sample_rounds
from grpo_jax.algorithms.forward import Forward
from grpo_jax.algorithms.grpo import count_totals, loss_inputs
from grpo_jax.algorithms.on_policy import rewarded_batch
from grpo_jax.experiment import Experiment, requirements
from grpo_jax.losses import value
from grpo_jax.losses.policy_gradient import apply_loss
from grpo_jax.policy.transformer import Params
from grpo_jax.sharding import Array


class PPO(requirements.PPO, Algorithm):
    """The policy's own completions, scored; a critic's advantages of each token; a clipped policy gradient."""

    on_policy: ClassVar[bool] = True
    has_head: ClassVar[bool] = True

    def needs_reference(self, experiment: Experiment) -> bool:
        return experiment.ppo.kl_coef > 0

    def make_batch(self, context: StepContext, step: int) -> TrainBatch:
        return rewarded_batch(sample_rounds(context, step), context.experiment)

    def make_objective(self, setup: Setup) -> Objective:
        experiment = setup.experiment
        forward = setup.forward(temperature=experiment.sampling.temperature)

        def prepare(trainable: Params, frozen: Params, batch: Batch) -> tuple[Batch, Totals]:
            return batch, count_totals(setup, batch.mask)

        def loss(
            trainable: Params, frozen: Params, reference: Params | None, batch: Batch, totals: Totals
        ) -> tuple[Array, tuple[Metrics, Array]]:
            logprobs, entropy, values = forward.logprobs_and_values(trainable, frozen, batch)
            inputs = loss_inputs(setup, batch, totals, logprobs=logprobs, entropy=entropy)
            policy_loss, metrics = apply_loss(experiment.loss, inputs)
            critic_loss, more = value.value_loss(
                rows(values),
                rows(batch.values),
                rows(batch.returns),
                rows(batch.mask),
                experiment.ppo.cliprange_value,
                num_tokens=totals["num_tokens"],
            )
            result = policy_loss + experiment.ppo.vf_coef * critic_loss
            return result, ({**metrics, **more, "policy_loss": metrics["loss"], "loss": result}, logprobs)

        return Objective(prepare, loss, make_estimate_advantages(setup, forward))


def make_estimate_advantages(setup: Setup, forward: Forward) -> BeforeUpdates:
    """Builds the critic's view of a batch, found once before its updates: advantages, values and returns.

    The metrics are those of the whole batch, in TRL's names where it has them: `kl` (per token), `objective/kl` and
    `objective/rlhf_reward` (per completion: summed over its tokens), and `value/explained_variance` of the returns.
    """
    experiment, config, axis_name = setup.experiment, setup.experiment.ppo, setup.axis_name

    def look(trainable: Params, frozen: Params, reference: Params | None, batch: Batch) -> tuple[Array, Array]:
        _, _, values = forward.logprobs_and_values(trainable, frozen, batch)
        return values, batch.logprobs if reference is None else forward.logprobs(reference, frozen, batch)[0]

    def estimate_advantages(
        trainable: Params, frozen: Params, reference: Params | None, batch: Batch
    ) -> tuple[Batch, Metrics]:
        pieces = micro_batches(batch, experiment.gradient_accumulation_steps)
        looked = jax.lax.map(lambda piece: look(trainable, frozen, reference, piece), pieces)
        values, ref_logprobs = (x.reshape(batch.mask.shape) for x in looked)
        mask = batch.mask & batch.sample_mask[..., None]
        flat = rows(mask)
        rewards = value.token_rewards(
            jnp.where(batch.sample_mask, batch.rewards, 0.0).reshape(-1), rows(batch.logprobs), rows(ref_logprobs),
            flat, config.kl_coef,
        )  # fmt: skip
        advantages, returns = value.gae(rewards, rows(values), flat, config.gamma, config.lam)
        if config.whiten_advantages:
            advantages = whiten(advantages, flat, axis_name=axis_name)
        tokens = jnp.maximum(setup.total(flat.sum()), 1)
        sequences = jnp.maximum(setup.total(flat.any(-1).sum()), 1)

        def variance(x: Array) -> Array:
            mean = setup.total(jnp.where(flat, x, 0.0).sum()) / tokens
            return setup.total(jnp.where(flat, (x - mean) ** 2, 0.0).sum()) / tokens

        kl = setup.total(jnp.where(flat, rows(batch.logprobs) - rows(ref_logprobs), 0.0).sum())
        metrics = {
            "objective/rlhf_reward": setup.total(rewards.sum()) / sequences,
            "value/explained_variance": 1 - variance(returns - rows(values)) / jnp.maximum(variance(returns), 1e-8),
        }
        if reference is not None:
            metrics |= {"kl": kl / tokens, "objective/kl": kl / sequences}
        found = (x.reshape(batch.mask.shape) for x in (advantages, rows(values), returns))
        return batch._replace(**dict(zip(("advantages", "values", "returns"), found, strict=True))), metrics

    return estimate_advantages
