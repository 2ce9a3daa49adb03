"""Loss to gradient to Optax step, as one pure function that runs under `jax.pmap`.

Each device computes the advantages, loss and gradient of the groups it owns; gradients and metrics meet in a `psum`.
Denominators are those of the whole batch, over micro-batches and devices, so neither changes anything but rounding. A
step is skipped (and counted) when its gradient is not finite or the log-probability contract does not hold.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from grpo_jax.advantages import group_advantages
from grpo_jax.experiment import Experiment, OptimizerConfig
from grpo_jax.logprobs import completion_logprobs
from grpo_jax.losses import policy_gradient, supervised
from grpo_jax.losses.surrogates import sampler_correction
from grpo_jax.policy.trainable import Model
from grpo_jax.policy.transformer import Params

Array = jax.Array


class Batch(NamedTuple):
    """One step's data: see `grpo_jax.rollout.Rollout`. kept [P, G] bool is False where a reward was dropped.

    `correction` [P, G, T] weighs tokens for a sampler that differs from the trainer (`make_rescore`); `high_entropy`
    [P, G, T] says which tokens are in the whole batch's top quantile, where that had to be found beforehand.
    """

    prompts: Array
    lengths: Array
    tokens: Array
    valid: Array
    mask: Array
    logprobs: Array
    rewards: Array
    kept: Array
    correction: Array | None = None
    high_entropy: Array | None = None


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


def _make_logprobs(
    model: Model, experiment: Experiment, common: int
) -> Callable[[Params, Params, Batch], tuple[Array, Array]]:
    """Builds the function of (trainable, frozen, batch) that finds log-probabilities and entropies [P, G, T]."""
    temperature = experiment.sampling.temperature if experiment.method == "grpo" else 1.0

    def logprobs_of(trainable: Params, frozen: Params, batch: Batch) -> tuple[Array, Array]:
        return completion_logprobs(
            model.bind(trainable, frozen),
            batch.prompts,
            batch.lengths,
            batch.tokens,
            batch.valid,
            temperature=temperature,
            common=common,
            remat=experiment.gradient_checkpointing,
        )

    return logprobs_of


def _micro_batches(tree: Any, count: int) -> Any:
    return jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), tree)


def make_rescore(
    model: Model, experiment: Experiment, *, common: int, axis_name: str | None
) -> Callable[[Params, Params, Batch], tuple[Batch, dict[str, Array]]]:
    """Builds `rescore(trainable, frozen, batch) -> (batch, metrics)`, for a sampler that differs from the trainer.

    The old log-probabilities become those that the trainer finds itself, under the policy that sampled, so that the
    ratio of the first update is 1; what the sampler reported goes into `correction` instead. The metrics are those of
    the whole batch: the gap between the two, and `sampling/importance_sampling_ratio/{min,mean,max}`.
    """
    logprobs_of = _make_logprobs(model, experiment, common)

    def rescore(trainable: Params, frozen: Params, batch: Batch) -> tuple[Batch, dict[str, Array]]:
        pieces = _micro_batches(batch, experiment.gradient_accumulation_steps)
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

    `reference` holds the trainable parameters of the KL's reference policy (None where beta is 0). `first` says that
    the policy is still the one that sampled, so that the log-probability contract must hold. The metrics are those of
    the whole batch, the same on every device.
    """
    config = experiment.loss
    bound = experiment.sampling.logprob_bound(model.dtype)
    micro = experiment.gradient_accumulation_steps
    logprobs_of = _make_logprobs(model, experiment, common)

    def total(x: Array) -> Array:
        return x if axis_name is None else jax.lax.psum(x, axis_name)

    def loss_of(
        trainable: Params, frozen: Params, reference: Params | None, batch: Batch, advantages: Array, totals: tuple
    ) -> tuple[Array, tuple[dict[str, Array], Array]]:
        def rows(x: Array | None) -> Array | None:
            return None if x is None else x.reshape(-1, x.shape[-1])

        logprobs, entropy = logprobs_of(trainable, frozen, batch)
        num_tokens, num_sequences, num_high_entropy = totals
        if experiment.method == "sft":
            loss, metrics = supervised.loss(rows(logprobs), rows(batch.mask), num_tokens=num_tokens)
        else:
            loss, metrics = policy_gradient.loss(
                rows(logprobs),
                rows(batch.logprobs),
                advantages.reshape(-1),
                rows(batch.mask),
                config,
                ref_logprobs=None if reference is None else rows(logprobs_of(reference, frozen, batch)[0]),
                entropy=rows(entropy),
                axis_name=axis_name,
                correction=rows(batch.correction),
                high_entropy=rows(batch.high_entropy),
                num_tokens=num_tokens,
                num_sequences=num_sequences,
                num_high_entropy=num_high_entropy,
            )
        return loss, (metrics, jnp.where(batch.mask, jnp.abs(logprobs - batch.logprobs), 0.0))

    def update(
        state: State, frozen: Params, reference: Params | None, batch: Batch, first: Array
    ) -> tuple[State, dict[str, Array]]:
        advantages = group_advantages(
            batch.rewards,
            scale=experiment.advantages.scale,
            baseline=experiment.advantages.baseline,
            ddof=experiment.advantages.ddof,
            mask=batch.kept,
            axis_name=axis_name,
        )
        batch = batch._replace(mask=batch.mask & batch.kept[..., None])
        num_high_entropy = None
        if config.top_entropy_quantile < 1 and micro > 1 and experiment.method != "sft":
            # The quantile is the whole batch's, so its entropies must be known before the first micro-batch is
            # differentiated, which costs another forward pass.
            pieces = _micro_batches(batch, micro)
            entropy = jax.lax.map(lambda piece: logprobs_of(state.trainable, frozen, piece)[1], pieces)
            chosen = policy_gradient.highest_entropy_tokens(
                entropy.reshape(batch.mask.shape), batch.mask, config.top_entropy_quantile, axis_name=axis_name
            )
            batch, num_high_entropy = batch._replace(high_entropy=chosen), total(chosen.sum())
        totals = (total(batch.mask.sum()), total(batch.mask.any(-1).sum()), num_high_entropy)
        slices = _micro_batches((batch, advantages), micro)

        def contribution(piece: tuple[Batch, Array]) -> tuple[tuple[Params, dict[str, Array]], Array]:
            gradient = jax.value_and_grad(loss_of, has_aux=True)
            (loss, (metrics, gap)), grads = gradient(state.trainable, frozen, reference, *piece, totals)
            return (grads, {"loss": loss, **metrics}), gap

        def accumulate(sums: Any, piece: tuple[Batch, Array]) -> tuple[Any, Array]:
            new, gap = contribution(piece)
            return jax.tree.map(jnp.add, sums, new), gap

        shapes = jax.eval_shape(contribution, jax.tree.map(lambda x: x[0], slices))[0]
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        (grads, metrics), gaps = jax.lax.scan(accumulate, zeros, slices)
        grads, metrics = total((grads, metrics))

        gaps = gaps.reshape(batch.mask.shape)
        worst = jnp.max(gaps) if axis_name is None else jax.lax.pmax(jnp.max(gaps), axis_name)
        norm = optax.global_norm(grads)
        sound = jnp.isfinite(norm) & (~first | (worst <= bound) | (experiment.method == "sft"))
        changes, new_optimizer = optimizer.update(grads, state.optimizer, state.trainable)
        new = (optax.apply_updates(state.trainable, changes), new_optimizer)
        kept = jax.tree.map(lambda a, b: jnp.where(sound, a, b), new, (state.trainable, state.optimizer))
        state = State(*kept, state.skipped + ~sound)
        metrics |= {"grad_norm": norm, "num_tokens": totals[0], "skipped_updates": state.skipped}
        if experiment.method != "sft":
            mean = total(gaps.sum()) / jnp.maximum(totals[0], 1)
            metrics |= {"sampling/logprob_difference/mean": mean, "sampling/logprob_difference/max": worst}
        return state, {"advantages": advantages, "logprob_gaps": gaps, **metrics}

    return update
