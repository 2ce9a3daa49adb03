"""What each method optimises: a batch and parameters -> these groups' share of the whole batch's loss.

An `Objective` is two functions. `prepare` sees a device's whole share of a batch and finds what belongs to the whole
batch (advantages, the denominators of means); `loss` then sees one micro-batch. So a method is a way to make a batch
(`grpo_jax.algorithms`) and an objective; what is common to all of them is the update (`grpo_jax.update`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from grpo_jax.advantages import group_advantages, whiten
from grpo_jax.experiment import Experiment
from grpo_jax.logprobs import completion_hidden, packed_logprobs, token_logprobs
from grpo_jax.losses import policy_gradient, preference, supervised, value
from grpo_jax.policy.lora import Model
from grpo_jax.policy.transformer import Params

Array = jax.Array
Metrics = dict[str, Array]
Totals = dict[str, Array]


class Batch(NamedTuple):
    """One step's data: see `grpo_jax.rollout.Rollout`. kept [P, G] bool is False where a completion does not count.

    `grpo` and `ppo` learn from `rewards` [P, G]. `dpo` and `reward_model` compare rows 2i (chosen) and 2i + 1
    (rejected) of a group. What is optional is there for some methods alone, or found on the way:

    - `correction` [P, G, T] weighs tokens for a sampler that differs from the trainer (`update.make_rescore`).
    - `high_entropy` [P, G, T]: which tokens are in the whole batch's top quantile, where found beforehand.
    - `advantages`: [P, G], or [P, G, T] for PPO, which also has the critic's `values` when the batch was sampled and
      the `returns` that it is to predict, both [P, G, T].
    - `segments` [P, 1, T]: rows are whole examples side by side, numbered from 1 (0: padding); prompts are not read.
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
    advantages: Array | None = None
    values: Array | None = None
    returns: Array | None = None
    segments: Array | None = None


class Objective(NamedTuple):
    """A method's loss.

    prepare: (trainable, frozen, batch) -> (batch, totals). `totals` are counts of the whole batch.
    loss: (trainable, frozen, reference, batch, totals) -> (loss, (metrics, logprobs [P, G, T])) of a micro-batch, to be
      summed over micro-batches and devices.
    on_policy: whether the policy sampled the batch itself, so that the log-probability contract holds.
    """

    prepare: Callable[[Params, Params, Batch], tuple[Batch, Totals]]
    loss: Callable[[Params, Params, Params | None, Batch, Totals], tuple[Array, tuple[Metrics, Array]]]
    on_policy: bool = False


HEAD = ("value_head.kernel", "value_head.bias")


def new_head(size: int) -> Params:
    """A linear head [D] -> scalar that starts at 0: PPO's critic, or the reward of a reward model."""
    return {HEAD[0]: jnp.zeros(size), HEAD[1]: jnp.zeros(())}


def has_head(experiment: Experiment) -> bool:
    """Whether the method trains a scalar head on the policy's trunk."""
    return experiment.method in ("ppo", "reward_model")


def head_values(hidden: Array, params: Params) -> Array:
    """The head's float32 values [...] of hidden states [..., D]."""
    return hidden.astype(jnp.float32) @ params[HEAD[0]] + params[HEAD[1]]


def needs_start(experiment: Experiment) -> bool:
    """Whether the policy that training begins with is needed later on: as a reference, or to sample from it."""
    match experiment.method:
        case "grpo":
            return experiment.loss.beta > 0
        case "ppo":
            return experiment.ppo.kl_coef > 0
        case "rft":
            return experiment.rft.samples_from == "start"
        case "dpo" | "reward_model":
            return experiment.method == "dpo" or experiment.preferences.completions == "start"
        case _:
            return False


class Forward(NamedTuple):
    """The policy's forward on a batch, as objectives call it: (trainable, frozen, batch) -> arrays.

    logprobs: log-probabilities and entropies [P, G, T].
    logprobs_and_values: these, and the head's values [P, G, T] of the states in which the tokens were said.
    scores: the head's value [P, G] of each whole completion.
    """

    logprobs: Callable[[Params, Params, Batch], tuple[Array, Array]]
    logprobs_and_values: Callable[[Params, Params, Batch], tuple[Array, Array, Array]]
    scores: Callable[[Params, Params, Batch], Array]


def forward_of(model: Model, experiment: Experiment, common: int) -> Forward:
    """The forward that the experiment's method needs: at the temperature that was sampled at if that matters to it."""
    temperature = experiment.sampling.temperature if experiment.method in ("grpo", "ppo") else 1.0
    return make_forward(model, common, temperature=temperature, remat=experiment.gradient_checkpointing)


def make_forward(model: Model, common: int, *, temperature: float = 1.0, remat: bool = False) -> Forward:
    """Builds the forward of a batch whose prompts share `common` leading tokens."""

    def hidden_of(trainable: Params, frozen: Params, batch: Batch, *, after_last: bool = False) -> tuple[Any, Array]:
        bound = model.bind(trainable, frozen)
        given = (batch.prompts, batch.lengths, batch.tokens, batch.valid)
        return bound, completion_hidden(bound, *given, common=common, remat=remat, after_last=after_last)

    def logprobs(trainable: Params, frozen: Params, batch: Batch) -> tuple[Array, Array]:
        if batch.segments is not None:
            bound = model.bind(trainable, frozen)
            return packed_logprobs(bound, batch.tokens, batch.segments, temperature=temperature, remat=remat)
        bound, hidden = hidden_of(trainable, frozen, batch)
        return token_logprobs(bound, hidden, batch.tokens, temperature=temperature)

    def logprobs_and_values(trainable: Params, frozen: Params, batch: Batch) -> tuple[Array, Array, Array]:
        bound, hidden = hidden_of(trainable, frozen, batch)
        return *token_logprobs(bound, hidden, batch.tokens, temperature=temperature), head_values(hidden, trainable)

    def scores(trainable: Params, frozen: Params, batch: Batch) -> Array:
        _, hidden = hidden_of(trainable, frozen, batch, after_last=True)
        last = batch.valid.sum(axis=-1)[..., None]  # the state after this many tokens is that after the last of them
        return jnp.take_along_axis(head_values(hidden, trainable), last, axis=-1)[..., 0]

    return Forward(logprobs, logprobs_and_values, scores)


def micro_batches(tree: Any, count: int) -> Any:
    """Leaves [P, ...] to [count, P / count, ...]."""
    return jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), tree)


def rows(x: Array | None) -> Array | None:
    """[P, G, T] to [P * G, T]."""
    return None if x is None else x.reshape(-1, x.shape[-1])


def make_objective(model: Model, experiment: Experiment, *, common: int, axis_name: str | None) -> Objective:
    """The objective of the experiment's method. `axis_name`: the mapped axis over which a batch extends."""
    forward = forward_of(model, experiment, common)

    def total(x: Array) -> Array:
        return x if axis_name is None else jax.lax.psum(x, axis_name)

    match experiment.method:
        case "grpo":
            return _grpo(experiment, forward, total, axis_name)
        case "ppo":
            return _ppo(experiment, forward, total)
        case "sft" | "rft":
            return _supervised(forward, total)
        case "dpo":
            return _dpo(experiment, forward, total)
        case "reward_model":
            return _reward_model(experiment, forward, total)
    raise ValueError(experiment.method)


Total = Callable[[Array], Array]


def _grpo(experiment: Experiment, forward: Forward, total: Total, axis_name: str | None) -> Objective:
    config, micro = experiment.loss, experiment.gradient_accumulation_steps

    def prepare(trainable: Params, frozen: Params, batch: Batch) -> tuple[Batch, Totals]:
        advantages = group_advantages(
            batch.rewards,
            scale=experiment.advantages.scale,
            baseline=experiment.advantages.baseline,
            ddof=experiment.advantages.ddof,
            mask=batch.kept,
            axis_name=axis_name,
        )
        batch = batch._replace(advantages=advantages)
        totals = {"num_tokens": total(batch.mask.sum()), "num_sequences": total(batch.mask.any(-1).sum())}
        if config.top_entropy_quantile < 1 and micro > 1:
            # The quantile is the whole batch's, so its entropies must be known before the first micro-batch is
            # differentiated, which costs another forward pass.
            pieces = micro_batches(batch, micro)
            entropy = jax.lax.map(lambda piece: forward.logprobs(trainable, frozen, piece)[1], pieces)
            chosen = policy_gradient.highest_entropy_tokens(
                entropy.reshape(batch.mask.shape), batch.mask, config.top_entropy_quantile, axis_name=axis_name
            )
            return batch._replace(high_entropy=chosen), {**totals, "num_high_entropy": total(chosen.sum())}
        return batch, totals

    def loss(
        trainable: Params, frozen: Params, reference: Params | None, batch: Batch, totals: Totals
    ) -> tuple[Array, tuple[Metrics, Array]]:
        logprobs, entropy = forward.logprobs(trainable, frozen, batch)
        result, metrics = policy_gradient.loss(
            rows(logprobs),
            rows(batch.logprobs),
            batch.advantages.reshape(-1),
            rows(batch.mask),
            config,
            ref_logprobs=None if reference is None else rows(forward.logprobs(reference, frozen, batch)[0]),
            entropy=rows(entropy),
            axis_name=axis_name,
            correction=rows(batch.correction),
            high_entropy=rows(batch.high_entropy),
            **totals,
        )
        return result, (metrics, logprobs)

    return Objective(prepare, loss, on_policy=True)


def _ppo(experiment: Experiment, forward: Forward, total: Total) -> Objective:
    config = experiment.ppo

    def prepare(trainable: Params, frozen: Params, batch: Batch) -> tuple[Batch, Totals]:
        return batch, {"num_tokens": total(batch.mask.sum()), "num_sequences": total(batch.mask.any(-1).sum())}

    def loss(
        trainable: Params, frozen: Params, reference: Params | None, batch: Batch, totals: Totals
    ) -> tuple[Array, tuple[Metrics, Array]]:
        logprobs, entropy, values = forward.logprobs_and_values(trainable, frozen, batch)
        of_policy, metrics = policy_gradient.loss(
            rows(logprobs),
            rows(batch.logprobs),
            rows(batch.advantages),
            rows(batch.mask),
            experiment.loss,
            entropy=rows(entropy),
            **totals,
        )
        of_critic, more = value.value_loss(
            rows(values),
            rows(batch.values),
            rows(batch.returns),
            rows(batch.mask),
            config.cliprange_value,
            num_tokens=totals["num_tokens"],
        )
        result = of_policy + config.vf_coef * of_critic
        return result, ({**metrics, **more, "policy_loss": metrics["loss"], "loss": result}, logprobs)

    return Objective(prepare, loss, on_policy=True)


def make_appraise(
    model: Model, experiment: Experiment, *, common: int, axis_name: str | None
) -> Callable[[Params, Params, Params | None, Batch], tuple[Batch, Metrics]]:
    """Builds PPO's `appraise(trainable, frozen, reference, batch) -> (batch, metrics)`, once before a batch's updates.

    The critic and the reference see the batch, and its advantages, values and returns follow. The metrics are those of
    the whole batch, in TRL's names where it has them: `kl` (per token), `objective/kl` and `objective/rlhf_reward` (per
    completion: summed over its tokens), and `value/explained_variance` of the returns.
    """
    forward, config = forward_of(model, experiment, common), experiment.ppo

    def across(x: Array) -> Array:
        return x if axis_name is None else jax.lax.psum(x, axis_name)

    def look(trainable: Params, frozen: Params, reference: Params | None, batch: Batch) -> tuple[Array, Array]:
        _, _, values = forward.logprobs_and_values(trainable, frozen, batch)
        return values, batch.logprobs if reference is None else forward.logprobs(reference, frozen, batch)[0]

    def appraise(trainable: Params, frozen: Params, reference: Params | None, batch: Batch) -> tuple[Batch, Metrics]:
        pieces = micro_batches(batch, experiment.gradient_accumulation_steps)
        looked = jax.lax.map(lambda piece: look(trainable, frozen, reference, piece), pieces)
        values, ref_logprobs = (x.reshape(batch.mask.shape) for x in looked)
        mask = batch.mask & batch.kept[..., None]
        flat = rows(mask)
        rewards = value.token_rewards(
            jnp.where(batch.kept, batch.rewards, 0.0).reshape(-1), rows(batch.logprobs), rows(ref_logprobs), flat,
            config.kl_coef,
        )  # fmt: skip
        advantages, returns = value.gae(rewards, rows(values), flat, config.gamma, config.lam)
        if config.whiten_advantages:
            advantages = whiten(advantages, flat, axis_name=axis_name)
        tokens = jnp.maximum(across(flat.sum()), 1)
        sequences = jnp.maximum(across(flat.any(-1).sum()), 1)

        def variance(x: Array) -> Array:
            mean = across(jnp.where(flat, x, 0.0).sum()) / tokens
            return across(jnp.where(flat, (x - mean) ** 2, 0.0).sum()) / tokens

        kl = across(jnp.where(flat, rows(batch.logprobs) - rows(ref_logprobs), 0.0).sum())
        metrics = {
            "objective/rlhf_reward": across(rewards.sum()) / sequences,
            "value/explained_variance": 1 - variance(returns - rows(values)) / jnp.maximum(variance(returns), 1e-8),
        }
        if reference is not None:
            metrics |= {"kl": kl / tokens, "objective/kl": kl / sequences}
        found = (x.reshape(batch.mask.shape) for x in (advantages, rows(values), returns))
        return batch._replace(**dict(zip(("advantages", "values", "returns"), found, strict=True))), metrics

    return appraise


def _supervised(forward: Forward, total: Total) -> Objective:
    def prepare(trainable: Params, frozen: Params, batch: Batch) -> tuple[Batch, Totals]:
        return batch, {"num_tokens": total(batch.mask.sum())}

    def loss(
        trainable: Params, frozen: Params, reference: Params | None, batch: Batch, totals: Totals
    ) -> tuple[Array, tuple[Metrics, Array]]:
        logprobs, _ = forward.logprobs(trainable, frozen, batch)
        result, metrics = supervised.loss(rows(logprobs), rows(batch.mask), **totals)
        return result, (metrics, logprobs)

    return Objective(prepare, loss)


def _pairs(batch: Batch) -> Array:
    """Which pairs of rows count, [P * G / 2]: those of which both do."""
    return batch.kept.reshape(-1, 2).all(axis=1)


def _dpo(experiment: Experiment, forward: Forward, total: Total) -> Objective:
    def prepare(trainable: Params, frozen: Params, batch: Batch) -> tuple[Batch, Totals]:
        return batch, {"num_pairs": total(_pairs(batch).sum())}

    def loss(
        trainable: Params, frozen: Params, reference: Params | None, batch: Batch, totals: Totals
    ) -> tuple[Array, tuple[Metrics, Array]]:
        logprobs, ref_logprobs = (forward.logprobs(p, frozen, batch)[0] for p in (trainable, reference))
        result, metrics = preference.dpo_loss(
            rows(logprobs), rows(ref_logprobs), rows(batch.mask), experiment.dpo, pairs=_pairs(batch), **totals
        )
        return result, (metrics, logprobs)

    return Objective(prepare, loss)


def _reward_model(experiment: Experiment, forward: Forward, total: Total) -> Objective:
    def prepare(trainable: Params, frozen: Params, batch: Batch) -> tuple[Batch, Totals]:
        return batch, {"num_pairs": total(_pairs(batch).sum())}

    def loss(
        trainable: Params, frozen: Params, reference: Params | None, batch: Batch, totals: Totals
    ) -> tuple[Array, tuple[Metrics, Array]]:
        result, metrics = preference.bradley_terry_loss(
            forward.scores(trainable, frozen, batch).reshape(-1),
            center_rewards_coefficient=experiment.reward_model.center_rewards_coefficient,
            pairs=_pairs(batch),
            **totals,
        )
        return result, (metrics, batch.logprobs)

    return Objective(prepare, loss)
