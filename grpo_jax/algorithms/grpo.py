"""GRPO: policy gradients from rewards relative to a group's (Shao et al. 2024, https://arxiv.org/abs/2402.03300).

All of `LossConfig`'s losses and `AdvantageConfig`'s advantages are here, and those of the user's own.
"""

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
from grpo_jax.algorithms.batches import completion_rows, reward_arrays
from grpo_jax.algorithms.dynamic_sampling import sample_rounds
from grpo_jax.algorithms.forward import Forward
from grpo_jax.algorithms.on_policy import rewarded_batch
from grpo_jax.evaluation import NOISE_STEP
from grpo_jax.experiment import Experiment, LossConfig, requirements
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
        loss = experiment.loss
        return loss.beta > 0 if isinstance(loss, LossConfig) else reads_reference(loss)

    def make_batch(self, context: StepContext, step: int) -> TrainBatch:
        return rewarded_batch(sample_rounds(context, step), context.experiment)

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
        mask = rollout.mask[:1]
        found = np.asarray(compute_advantages(config.advantages, rewards[:1], sample_mask[:1], token_mask=mask))
        if found.ndim == 3:
            found = found.sum(-1) / np.maximum(mask.sum(-1), 1)
        of_first = completion_rows(rollout, scores)[: config.group_size]
        return [{**row, "advantage": float(a)} for row, a in zip(of_first, found[0], strict=True)]


def count_totals(setup: Setup, mask: Array) -> Totals:
    """What the whole batch counts, over micro-batches and devices, of a device's mask [P, G, T]."""
    return {
        "num_tokens": setup.total(mask.sum()),
        "num_sequences": setup.total(mask.any(-1).sum()),
        "num_groups": setup.total(mask.any((-2, -1)).sum()),
    }


def _make_prepare(setup: Setup, forward: Forward) -> Prepare:
    experiment, axis_name = setup.experiment, setup.axis_name
    micro, quantile = experiment.gradient_accumulation_steps, experiment.loss_config.top_entropy_quantile

    def prepare(trainable: Params, frozen: Params, batch: Batch) -> tuple[Batch, Totals]:
        advantages = compute_advantages(
            experiment.advantages, batch.rewards, batch.sample_mask, token_mask=batch.mask, axis_name=axis_name
        )
        batch, totals = batch._replace(advantages=advantages), count_totals(setup, batch.mask)
        if quantile < 1 and micro > 1:
            # The quantile is the whole batch's, so its entropies must be known before the first micro-batch is
            # differentiated, which costs another forward pass.
            pieces = micro_batches(batch, micro)
            entropy = jax.lax.map(lambda piece: forward.logprobs(trainable, frozen, piece)[1], pieces)
            chosen = highest_entropy_tokens(
                entropy.reshape(batch.mask.shape), batch.mask, quantile, axis_name=axis_name
            )
            return batch._replace(high_entropy=chosen), {**totals, "num_high_entropy": setup.total(chosen.sum())}
        return batch, totals

    return prepare


def _make_loss(setup: Setup, forward: Forward) -> LossFunction:
    def loss(
        trainable: Params, frozen: Params, reference: Params | None, batch: Batch, totals: Totals
    ) -> tuple[Array, tuple[Metrics, Array]]:
        logprobs, entropy = forward.logprobs(trainable, frozen, batch)
        ref_logprobs = None if reference is None else forward.logprobs(reference, frozen, batch)[0]
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
