"""Loss to gradient to Optax step, as one pure function that runs under `jax.pmap`, whatever the method.

Each device computes the loss and gradient of the groups it owns (`grpo_jax.algorithms.objectives`); gradients and metrics meet in
a `psum`.
Denominators are those of the whole batch, over micro-batches and devices, so neither changes anything but rounding. A
step is skipped (and counted) when its gradient is not finite or the log-probability contract does not hold.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from grpo_jax.algorithms.objectives import Batch, forward_of, make_objective, micro_batches
from grpo_jax.experiment import Experiment, OptimizerConfig
from grpo_jax.losses.surrogates import sampler_correction
from grpo_jax.policy.lora import Model
from grpo_jax.policy.transformer import Params

Array = jax.Array


class State(NamedTuple):
    """What an update replaces: the trained parameters, Optax's state, and how many updates were skipped."""

    trainable: Params
    optimizer: Any
    skipped: Array


def make_optimizer(config: OptimizerConfig, steps: int) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """AdamW (Loshchilov & Hutter 2019, 1711.05101) after global-norm clipping, and its learning rate by update.

    `steps` is the number of updates over which `linear` and `cosine` fall to 0, the warm-up included.
    """
    rate = config.learning_rate
    after = max(steps - config.warmup_steps, 1)
    decay = {
        "constant": optax.constant_schedule(rate),
        "linear": optax.linear_schedule(rate, 0.0, after),
        "cosine": optax.cosine_decay_schedule(rate, after),
    }[config.schedule]
    # The first update already moves: a warm-up of W updates runs rate / W, 2 rate / W, …, rate.
    warmup = optax.linear_schedule(rate / max(config.warmup_steps, 1), rate, max(config.warmup_steps - 1, 1))
    schedule = optax.join_schedules([warmup, decay], [config.warmup_steps]) if config.warmup_steps else decay
    adamw = optax.adamw(
        schedule, b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay, mask=decays
    )
    clip = [] if config.max_grad_norm is None else [optax.clip_by_global_norm(config.max_grad_norm)]
    return optax.chain(*clip, adamw), schedule


def decays(params: Params) -> dict[str, bool]:
    """Which parameters weight decay acts on: matrices, but neither norms nor biases."""
    return {k: not k.endswith((".bias", ".scale")) for k in params}


def make_rescore(
    model: Model, experiment: Experiment, *, common: int, axis_name: str | None
) -> Callable[[Params, Params, Batch], tuple[Batch, dict[str, Array]]]:
    """Builds `rescore(trainable, frozen, batch) -> (batch, metrics)`, for a sampler that differs from the trainer.

    The old log-probabilities become those that the trainer finds itself, under the policy that sampled, so that the
    ratio of the first update is 1; what the sampler reported goes into `correction` instead. The metrics are those of
    the whole batch: the gap between the two, and `sampling/importance_sampling_ratio/{min,mean,max}`.
    """
    logprobs_of = forward_of(model, experiment, common).logprobs

    def rescore(trainable: Params, frozen: Params, batch: Batch) -> tuple[Batch, dict[str, Array]]:
        pieces = micro_batches(batch, experiment.gradient_accumulation_steps)
        logprobs = jax.lax.map(lambda piece: logprobs_of(trainable, frozen, piece)[0], pieces)
        logprobs = logprobs.reshape(batch.mask.shape)
        mask = batch.mask & batch.kept[..., None]
        weights = sampler_correction(logprobs, batch.logprobs, mask, experiment.loss)
        gaps = jnp.where(mask, jnp.abs(logprobs - batch.logprobs), 0.0)

        def across(collective: Callable[[Array, str], Array], x: Array) -> Array:
            return x if axis_name is None else collective(x, axis_name)

        tokens = jnp.maximum(across(jax.lax.psum, mask.sum()), 1)
        ratio = "sampling/importance_sampling_ratio"
        metrics = {
            "sampling/logprob_difference/mean": across(jax.lax.psum, gaps.sum()) / tokens,
            "sampling/logprob_difference/max": across(jax.lax.pmax, gaps.max()),
            f"{ratio}/mean": across(jax.lax.psum, jnp.where(mask, weights, 0.0).sum()) / tokens,
            f"{ratio}/min": across(jax.lax.pmin, jnp.min(weights, where=mask, initial=jnp.inf)),
            f"{ratio}/max": across(jax.lax.pmax, jnp.max(weights, where=mask, initial=0.0)),
        }
        return batch._replace(logprobs=logprobs, correction=weights), metrics

    return rescore


def make_update(
    model: Model, experiment: Experiment, optimizer: optax.GradientTransformation, *, common: int, axis_name: str | None
) -> Callable[[State, Params, Params | None, Batch, Array], tuple[State, dict[str, Array]]]:
    """Builds `update(state, frozen, reference, batch, first) -> (state, metrics)` for one device's share of a batch.

    `reference` holds the trainable parameters of the reference policy (None where there is none). `first` says that
    the policy is still the one that sampled, so that the log-probability contract must hold. The metrics are those of
    the whole batch, the same on every device; a batch that the policy sampled itself also has its rows' `advantages`
    and each token's `logprob_gaps`.
    """
    objective = make_objective(model, experiment, common=common, axis_name=axis_name)
    bound = experiment.sampling.logprob_bound(model.dtype)
    micro = experiment.gradient_accumulation_steps

    def total(x: Array) -> Array:
        return x if axis_name is None else jax.lax.psum(x, axis_name)

    def update(
        state: State, frozen: Params, reference: Params | None, batch: Batch, first: Array
    ) -> tuple[State, dict[str, Array]]:
        batch = batch._replace(mask=batch.mask & batch.kept[..., None])
        batch, totals = objective.prepare(state.trainable, frozen, batch)

        def contribution(piece: Batch) -> tuple[tuple[Params, dict[str, Array]], Array]:
            gradient = jax.value_and_grad(objective.loss, has_aux=True)
            (loss, (metrics, logprobs)), grads = gradient(state.trainable, frozen, reference, piece, totals)
            gap = jnp.where(piece.mask, jnp.abs(logprobs - piece.logprobs), 0.0)
            return (grads, {"loss": loss, **metrics}), gap

        def accumulate(sums: Any, piece: Batch) -> tuple[Any, Array]:
            new, gap = contribution(piece)
            return jax.tree.map(jnp.add, sums, new), gap

        slices = micro_batches(batch, micro)
        shapes = jax.eval_shape(contribution, jax.tree.map(lambda x: x[0], slices))[0]
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        (grads, metrics), gaps = jax.lax.scan(accumulate, zeros, slices)
        grads, metrics = total((grads, metrics))

        gaps = gaps.reshape(batch.mask.shape)
        worst = jnp.max(gaps) if axis_name is None else jax.lax.pmax(jnp.max(gaps), axis_name)
        norm = optax.global_norm(grads)
        sound = jnp.isfinite(norm)
        if objective.on_policy:
            sound &= ~first | (worst <= bound)
        changes, new_optimizer = optimizer.update(grads, state.optimizer, state.trainable)
        new = (optax.apply_updates(state.trainable, changes), new_optimizer)
        kept = jax.tree.map(lambda a, b: jnp.where(sound, a, b), new, (state.trainable, state.optimizer))
        state = State(*kept, state.skipped + ~sound)
        num_tokens = total(batch.mask.sum())
        metrics |= {"grad_norm": norm, "num_tokens": num_tokens, "skipped_updates": state.skipped}
        if not objective.on_policy:
            return state, metrics
        mean = total(gaps.sum()) / jnp.maximum(num_tokens, 1)
        metrics |= {"sampling/logprob_difference/mean": mean, "sampling/logprob_difference/max": worst}
        return state, {"advantages": batch.advantages, "logprob_gaps": gaps, **metrics}

    return update
