"""GRPO: policy gradients from rewards relative to a group's (Shao et al. 2024, https://arxiv.org/abs/2402.03300).

All of `LossConfig`'s losses and `AdvantageConfig`'s advantages are here, and those of the user's own.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.advantages import compute_advantages
from grpo_jax.algorithms.base import (
    Algorithm,
    BeforeUpdates,
    Metrics,
    Objective,
    Prepare,
    Setup,
    StepContext,
    Totals,
    TrainBatch,
)
from grpo_jax.algorithms.base import Loss as LossFunction
from grpo_jax.algorithms.batch import Batch, micro_batches, rows
from grpo_jax.algorithms.batches import batch_of, completion_rows, reward_arrays
from grpo_jax.algorithms.dynamic_sampling import sample_rounds
from grpo_jax.algorithms.forward import Forward
from grpo_jax.algorithms.on_policy import rewarded_batch
from grpo_jax.evaluation import NOISE_STEP
from grpo_jax.experiment import AdvantageConfig, Experiment, LossConfig, requirements
from grpo_jax.losses.inputs import LossInputs, reads_reference
from grpo_jax.losses.policy_gradient import apply_loss, highest_entropy_tokens
from grpo_jax.losses.surrogates import sampler_correction
from grpo_jax.policy.transformer import Params
from grpo_jax.rollout import score_rollout
from grpo_jax.sharding import Array


class GRPO(requirements.GRPO, Algorithm):
    """Groups of the policy's own completions, scored; advantages relative to the group; a clipped policy gradient."""

    on_policy: ClassVar[bool] = True

    def needs_reference(self, experiment: Experiment) -> bool:
        return loss_reads_reference(experiment.loss) or kl_coef(experiment) > 0

    def make_batch(self, context: StepContext, step: int) -> TrainBatch:
        train_batch = rewarded_batch(sample_rounds(context, step), context.experiment)
        return with_advantages(train_batch, context.experiment, context.reference_kl)

    def make_objective(self, setup: Setup) -> Objective:
        forward = setup.forward(temperature=setup.experiment.sampling.temperature)
        recompute = None
        if setup.experiment.loss_config.importance_sampling_mode is not None:
            recompute = make_recompute_logprobs(setup, forward)
        return Objective(_make_prepare(setup, forward), _make_loss(setup, forward), recompute)

    def sample_group(self, context: StepContext) -> list[dict[str, Any]]:
        config = context.experiment
        # As many prompts as a training step has, though one is shown, so that nothing is compiled for this alone.
        indices = [i % len(config.task.held_out) for i in range(config.prompts_per_step)]
        rollout = context.sample(NOISE_STEP, indices, range(len(indices)), split="held_out")
        scores = score_rollout(rollout, config)
        rewards, sample_mask = reward_arrays(scores, rollout.mask.shape[:2])
        batch = batch_of(rollout, rewards, sample_mask)
        shown = TrainBatch(batch, rollout, tokens=0, new_tokens=0, rows=completion_rows(rollout, scores))
        return with_advantages(shown, config, context.reference_kl).rows[: config.group_size]


def loss_reads_reference(loss: LossConfig | Callable[..., Any]) -> bool:
    """Whether the loss itself needs the reference policy."""
    return loss.beta > 0 if isinstance(loss, LossConfig) else reads_reference(loss)


def kl_coef(experiment: Experiment) -> float:
    """How much the KL to the reference policy counts in the reward."""
    return experiment.advantages.kl_coef if isinstance(experiment.advantages, AdvantageConfig) else 0.0


def with_advantages(
    train_batch: TrainBatch,
    experiment: Experiment,
    reference_kl: Callable[[Batch], np.ndarray] | None = None,
) -> TrainBatch:
    """A batch with the advantages of all its completions, as `experiment.advantages` says.

    The KL that goes into the reward has the metrics that PPO's has: `kl`, its mean over tokens, and `objective/kl`, the
    mean over completions of its sum.

    Args:
      reference_kl: see `StepContext`; needed for `kl_coef`.
    """
    batch, kl, metrics = train_batch.batch, None, dict(train_batch.metrics)
    mask = batch.mask & batch.sample_mask[..., None]
    if kl_coef(experiment):
        assert reference_kl is not None, "`needs_reference` says that it is kept"
        kl = np.where(mask, reference_kl(batch), 0.0)
        metrics["kl"] = float(kl.sum() / max(int(mask.sum()), 1))
        metrics["objective/kl"] = float(kl.sum() / max(int(mask.any(-1).sum()), 1))
    found = _compute_advantages(batch.rewards, batch.sample_mask, mask, kl, how=experiment.advantages)
    return replace(train_batch, metrics=metrics).with_advantages(np.asarray(found))


@partial(jax.jit, static_argnames="how")
def _compute_advantages(rewards: Array, sample_mask: Array, token_mask: Array, kl: Array | None, *, how: Any) -> Array:
    return compute_advantages(how, rewards, sample_mask, token_mask=token_mask, kl=kl)


def count_totals(setup: Setup, mask: Array) -> Totals:
    """What the whole batch counts, over micro-batches and devices, of a device's mask [P, G, T]."""
    return {
        "num_tokens": setup.total(mask.sum()),
        "num_sequences": setup.total(mask.any(-1).sum()),
        "num_groups": setup.total(mask.any((-2, -1)).sum()),
    }


def _make_prepare(setup: Setup, forward: Forward) -> Prepare:
    experiment = setup.experiment
    micro, quantile = experiment.gradient_accumulation_steps, experiment.loss_config.top_entropy_quantile

    def prepare(trainable: Params, frozen: Params, batch: Batch) -> tuple[Batch, Totals]:
        totals = count_totals(setup, batch.mask)
        if quantile < 1 and micro > 1:
            # The quantile is the whole update's, so its entropies must be known before the first micro-batch is
            # differentiated, which costs another forward pass.
            pieces = micro_batches(batch, micro)
            entropy = jax.lax.map(lambda piece: forward.logprobs(trainable, frozen, piece)[1], pieces)
            chosen = highest_entropy_tokens(
                entropy.reshape(batch.mask.shape), batch.mask, quantile, axis_name=setup.axis_name
            )
            return batch._replace(high_entropy=chosen), {**totals, "num_high_entropy": setup.total(chosen.sum())}
        return batch, totals

    return prepare


def _make_loss(setup: Setup, forward: Forward) -> LossFunction:
    needs_reference = loss_reads_reference(setup.experiment.loss)

    def loss(
        trainable: Params, frozen: Params, reference: Params | None, batch: Batch, totals: Totals
    ) -> tuple[Array, tuple[Metrics, Array]]:
        logprobs, entropy = forward.logprobs(trainable, frozen, batch)
        ref_logprobs = None
        if reference is not None and needs_reference:  # it may be kept for the reward alone
            ref_logprobs = forward.logprobs(reference, frozen, batch)[0]
        inputs = loss_inputs(setup, batch, totals, logprobs=logprobs, entropy=entropy, ref_logprobs=ref_logprobs)
        value, metrics = apply_loss(setup.experiment.loss, inputs)
        return value, (metrics, logprobs)

    return loss


def loss_inputs(
    setup: Setup, batch: Batch, totals: Totals, *, logprobs: Array, entropy: Array, ref_logprobs: Array | None = None
) -> LossInputs:
    """The arrays of a (micro-)batch as a policy-gradient loss takes them, [P * G, T]."""
    assert batch.advantages is not None
    advantages = batch.advantages if batch.advantages.ndim == 3 else batch.advantages[..., None]
    sampler_logprobs = batch.logprobs if batch.sampler_logprobs is None else batch.sampler_logprobs
    return LossInputs(
        logprobs=rows(logprobs),
        old_logprobs=rows(batch.logprobs),
        advantages=rows(jnp.broadcast_to(advantages, batch.mask.shape)),
        mask=rows(batch.mask),
        entropy=rows(entropy),
        ref_logprobs=rows(ref_logprobs),
        sampler_logprobs=rows(sampler_logprobs),
        correction=rows(batch.correction),
        high_entropy=rows(batch.high_entropy),
        group_size=batch.mask.shape[1],
        axis_name=setup.axis_name,
        **totals,
    )


def make_reference_kl(setup: Setup) -> Callable[[Params, Params, Params, Batch], Array]:
    """Builds `(trainable, reference, frozen, batch) -> log p - log p_reference [P, G, T]` of a device's share.

    The policy's log-probabilities are computed anew, as the reference's are: the sampler's differ from them by
    rounding, which is no KL. While the policy still is the reference, it is exactly 0.
    """
    forward = setup.forward(temperature=setup.experiment.sampling.temperature)

    def reference_kl(trainable: Params, reference: Params, frozen: Params, batch: Batch) -> Array:
        pieces = micro_batches(batch, setup.experiment.gradient_accumulation_steps)

        def logprobs(params: Params) -> Array:
            return jax.lax.map(lambda piece: forward.logprobs(params, frozen, piece)[0], pieces)

        return (logprobs(trainable) - logprobs(reference)).reshape(batch.mask.shape)

    return reference_kl


def make_recompute_logprobs(setup: Setup, forward: Forward) -> BeforeUpdates:
    """Builds the preparation of a batch whose sampler differs from the trainer.

    The old log-probabilities become those that the trainer finds itself, under the policy that sampled, so that the
    ratio of the first update is 1; what the sampler reported goes into `correction` instead. The metrics are those of
    the whole batch: the gap between the two, and `sampling/importance_sampling_ratio/{min,mean,max}`.
    """
    experiment = setup.experiment

    def recompute_logprobs(
        trainable: Params, frozen: Params, reference: Params | None, batch: Batch
    ) -> tuple[Batch, Metrics]:
        pieces = micro_batches(batch, experiment.gradient_accumulation_steps)
        logprobs = jax.lax.map(lambda piece: forward.logprobs(trainable, frozen, piece)[0], pieces)
        logprobs = logprobs.reshape(batch.mask.shape)
        mask = batch.mask & batch.sample_mask[..., None]
        weights = sampler_correction(logprobs, batch.logprobs, mask, experiment.loss_config)
        gaps = jnp.where(mask, jnp.abs(logprobs - batch.logprobs), 0.0)
        tokens = jnp.maximum(setup.total(mask.sum()), 1)
        ratio = "sampling/importance_sampling_ratio"
        metrics: Metrics = {
            "sampling/logprob_difference/mean": setup.total(gaps.sum()) / tokens,
            "sampling/logprob_difference/max": setup.across(jax.lax.pmax, gaps.max()),
            f"{ratio}/mean": setup.total(jnp.where(mask, weights, 0.0).sum()) / tokens,
            f"{ratio}/min": setup.across(jax.lax.pmin, jnp.min(weights, where=mask, initial=jnp.inf)),
            f"{ratio}/max": setup.across(jax.lax.pmax, jnp.max(weights, where=mask, initial=0.0)),
        }
        return batch._replace(logprobs=logprobs, sampler_logprobs=batch.logprobs, correction=weights), metrics

    return recompute_logprobs
