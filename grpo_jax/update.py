"""Loss to gradient to Optax step: one pure function of one device's share of a batch, whatever the method.

Each device computes the loss and gradient of its share of a (mini-)batch (`grpo_jax.algorithms`); gradients and metrics
are summed over all of them. Denominators are those of the whole (mini-)batch, over devices and micro-batches, so
neither changes anything but rounding. An update is skipped (and counted) when its gradient is not finite, the
log-probability contract does not hold, or it is a spike (`grpo_jax.guards`). Where no token is left to train on, there
is no update either: the optimizer's momentum would move the parameters all the same.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from grpo_jax.algorithms import Batch, Setup, algorithm_of
from grpo_jax.algorithms.batch import micro_batches
from grpo_jax.errors import RunError
from grpo_jax.experiment import OptimizerConfig
from grpo_jax.policy.tokenizer import Tokenizer
from grpo_jax.policy.transformer import Params
from grpo_jax.rollout import Rollout
from grpo_jax.sharding import Array


class State(NamedTuple):
    """What an update replaces: the trained parameters, Optax's state, and how many updates were skipped."""

    trainable: Params
    optimizer: Any
    skipped: Array


class UpdateOutput(NamedTuple):
    """What an update says of the (mini-)batch that it was made on.

    Attributes:
      metrics: its scalars over all devices, the same on every device.
      logprob_gaps: |log-probability - the batch's| of this device's tokens [P, G, T], 0 where the mask is False; None
        for a batch that the policy did not sample itself.
    """

    metrics: dict[str, Array]
    logprob_gaps: Array | None = None


Update = Callable[..., tuple[State, UpdateOutput]]  # see `make_update`


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


def make_update(setup: Setup, optimizer: optax.GradientTransformation) -> Update:
    """Builds `update(state, frozen, reference, batch, first, limit) -> (state, output)`, for one device's share.

    `reference` holds the trainable parameters of the reference policy (None where there is none). `first` says that
    the policy is still the one that sampled, so that the log-probability contract must hold. Above `limit` the gradient
    norm or the loss is a spike (see `GuardConfig`); without one there is no such rule, and no metric `spiked_updates`.
    """
    experiment, total = setup.experiment, setup.total
    algorithm = algorithm_of(experiment)
    objective = algorithm.make_objective(setup)
    bound = experiment.sampling.logprob_bound(setup.model.dtype)
    micro, guards = experiment.gradient_accumulation_steps, experiment.guards

    def update(
        state: State, frozen: Params, reference: Params | None, batch: Batch, first: Array, limit: Array | None = None
    ) -> tuple[State, UpdateOutput]:
        batch = batch._replace(mask=batch.mask & batch.sample_mask[..., None])
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
        worst = setup.across(jax.lax.pmax, jnp.max(gaps))
        norm = optax.global_norm(grads)
        sound = jnp.isfinite(norm)
        if algorithm.on_policy:
            sound &= ~first | (worst <= bound)
        counts = {}
        if limit is not None:
            value = norm if guards.spike_metric == "grad_norm" else metrics["loss"]
            spiked = sound & (value > limit)
            counts["spiked_updates"] = spiked.astype(jnp.int32)
            if guards.on_spike != "warn":
                sound &= ~spiked
        num_tokens = total(batch.mask.sum())
        empty = num_tokens == 0
        changes, new_optimizer = optimizer.update(grads, state.optimizer, state.trainable)
        new = (optax.apply_updates(state.trainable, changes), new_optimizer)
        trainable, kept = jax.tree.map(
            lambda a, b: jnp.where(sound & ~empty, a, b), new, (state.trainable, state.optimizer)
        )
        state = State(trainable, kept, state.skipped + (~sound & ~empty))
        metrics |= {
            "grad_norm": norm,
            "num_tokens": num_tokens,
            "skipped_updates": state.skipped,
            "empty_updates": empty.astype(jnp.int32),
            **counts,
        }
        if not algorithm.on_policy:
            return state, UpdateOutput(metrics)
        mean = total(gaps.sum()) / jnp.maximum(num_tokens, 1)
        metrics |= {"sampling/logprob_difference/mean": mean, "sampling/logprob_difference/max": worst}
        return state, UpdateOutput(metrics, gaps)

    return update


def require_logprobs(gaps: Array, rollout: Rollout, tokenizer: Tokenizer, bound: float, step: int) -> None:
    """Raises `RunError` naming the first token whose log-probability the update missed by more than the bound.

    Args:
      gaps: [P, G, T], in nats.
      rollout: the episodes that the tokens are from.
      bound: in nats (`SamplingConfig.logprob_bound`).
    """
    broken = np.argwhere(~(gaps <= bound))
    if len(broken):
        p, g, t = broken[0]
        token = tokenizer.decode([int(rollout.tokens[p, g, t])])
        raise RunError(
            f"step {step}: token {t} ({token!r}) of sample {g} of prompt {rollout.prompt_ids[p]} was sampled with "
            f"log-probability {rollout.logprobs[p, g, t]:.4f}, which the update missed by {gaps[p, g, t]:.4f}, more "
            f"than sampling.max_logprob_difference = {bound:g}: the sampler and the trainer disagree about the policy, "
            "and the update was not made."
        )


class UpdateWatch:
    """Sees which updates of a run were not made, says so, and ends the run where none can be made any more.

    Attributes:
      skipped: how many updates have been skipped so far, as `State` counts them.
      in_a_row: how many of the last ones.
    """

    def __init__(self, limit: int) -> None:
        """`limit` is `optimizer.max_skipped_updates`."""
        self.skipped = 0
        self._limit = limit
        self.in_a_row = 0
        self._told: set[str] = set()

    def see(self, step: int, outputs: Sequence[Mapping[str, Any]]) -> list[str]:
        """Takes the metrics of a step's updates, in their order; returns what to tell, each reason the first time.

        Raises:
          RunError: when as many updates in a row as the limit says were skipped.
        """
        notes = []
        for output in outputs:
            new = int(output["skipped_updates"]) - self.skipped
            self.skipped += new
            self.in_a_row = self.in_a_row + new if new else 0
            norm = float(output["grad_norm"])
            is_spike = bool(output.get("spiked_updates"))
            why = "its gradient is not finite" if not np.isfinite(norm) else "of its log-probabilities"
            why = "of a spike (guards.spike_factor)" if is_spike else why
            if new and not is_spike and "skipped" not in self._told:  # of a spike, the guard tells more
                self._told.add("skipped")
                notes.append(f"step {step}: an update was skipped, because {why} (gradient norm {norm:g})")
            if self.in_a_row >= self._limit:
                raise RunError(
                    f"step {step}: {self.in_a_row} updates in a row were skipped, the last one because {why} (norm "
                    f"{norm:g}): lower optimizer.learning_rate, or look for rewards and losses that "
                    "become very large. optimizer.max_skipped_updates says how many are allowed."
                )
            if output["empty_updates"] and "empty" not in self._told:
                self._told.add("empty")
                notes.append(f"step {step}: an update was not made, because there was no token left to train on")
        return notes


def metrics_of(outputs: Sequence[Mapping[str, Any]], num_minibatches: int) -> dict[str, float]:
    """What a step says of its updates, in their order: means over the mini-batches of the last pass over its batch.

    The last pass says how far the policy has moved; the gap to the sampler is that of the first update, which is made
    on the policy that sampled. Of what counts on (`skipped_updates`) it is the last value. Of all updates,
    `empty_updates` had no token to train on, and were not made, and `spiked_updates` were spikes.
    """
    last_pass = outputs[-num_minibatches:]
    means = {name: float(np.mean([float(output[name]) for output in last_pass])) for name in last_pass[-1]}
    of_first = {name: float(value) for name, value in outputs[0].items() if name.startswith("sampling/")}
    counted = {"empty_updates", "spiked_updates"} & means.keys()
    sums = {name: float(sum(int(output[name]) for output in outputs)) for name in sorted(counted)}
    return {**means, **of_first, "skipped_updates": float(last_pass[-1]["skipped_updates"]), **sums}
