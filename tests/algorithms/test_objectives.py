"""Objectives beside GRPO's (see test_update): micro-batches and devices change nothing; PPO's advantages by hand."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grpo_jax.algorithms import Batch, Setup, algorithm_of
from grpo_jax.algorithms.forward import HEAD, new_head
from grpo_jax.algorithms.packing import pack
from grpo_jax.experiment import Experiment, PolicyConfig, SamplingConfig, ScratchConfig, override
from grpo_jax.logprobs import Completions, completion_hidden, completion_logprobs
from grpo_jax.policy import load
from grpo_jax.policy.lora import Model, split
from grpo_jax.sharding import Replicas
from grpo_jax.tasks import Task
from grpo_jax.update import State, make_update

P, G, T, D = 8, 4, 4, 16
SCRATCH = ScratchConfig("abcdefgh", hidden_size=D, num_layers=1, num_heads=2)
EXPERIMENT = Experiment(
    Task("none", [{"prompt": ""}], [{"prompt": ""}], success=lambda **_: [], demonstrate=lambda example, rng: []),
    rewards={"none": lambda **_: []},
    policy=PolicyConfig(scratch=SCRATCH),
    prompts_per_step=P,
    group_size=G,
    sampling=SamplingConfig(max_tokens=T),
)
RECORD = optax.GradientTransformation(  # moves nothing, and keeps the gradient as its state
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda updates, state, params: (jax.tree.map(jnp.zeros_like, updates), updates),
)


@cache
def parts():
    policy = load("scratch", seed=1, scratch=SCRATCH)
    trainable, frozen = split({**policy.params, "embed": 10 * policy.params["embed"]}, None)
    rng = np.random.default_rng(5)
    head = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), new_head(D))
    return Model(policy.config), trainable, frozen, head


@cache
def batch() -> Batch:
    """Ragged completions whose log-probabilities are near the policy's; some do not count."""
    rng = np.random.default_rng(0)
    model, trainable, frozen, _ = parts()
    prompts, lengths = rng.integers(3, 11, (P, 4)), rng.integers(1, 5, P)
    tokens, valid = rng.integers(3, 11, (P, G, T)), np.arange(T) < rng.integers(1, T + 1, (P, G, 1))
    logprobs, _ = completion_logprobs(model.bind(trainable, frozen), Completions(prompts, lengths, tokens, valid))
    noisy = np.where(valid, logprobs + 0.2 * rng.normal(size=valid.shape), 0).astype(np.float32)
    rewards, kept = rng.normal(size=(P, G)).astype(np.float32), rng.random((P, G)) < 0.8
    return Batch(prompts, lengths, tokens, valid, valid, noisy, rewards, kept)


def run(given: Batch, n: int = 1, *, found_before: bool = True, **overrides):
    """The gradient and metrics of one update on n devices, after what the method finds before its updates."""
    changes = {"num_iterations": 2, **{key.replace("__", "."): value for key, value in overrides.items()}}
    experiment = override(EXPERIMENT, changes)
    model, trainable, frozen, head = parts()
    trainable = {**trainable, **head} if experiment.method in ("ppo", "reward_model") else trainable
    reference = {path: 1.1 * value for path, value in trainable.items()}
    replicas, setup = Replicas(n), Setup(model, experiment, 0, Replicas.axis_name)
    trainable_, frozen_, reference_ = (replicas.replicate(x) for x in (trainable, frozen, reference))
    given, found = replicas.split(jax.tree.map(np.asarray, given)), {}
    before_updates = algorithm_of(experiment).make_objective(setup).before_updates
    if before_updates is not None and found_before:
        given, found = replicas.compile(before_updates)(trainable_, frozen_, reference_, given)
    state = replicas.replicate(State(trainable, RECORD.init(trainable), jnp.int32(0)))
    update = replicas.compile(make_update(setup, RECORD))
    state, output = update(state, frozen_, reference_, given, replicas.broadcast(np.bool_(False)))
    metrics = replicas.fetch({**found, **output.metrics})
    return replicas.first(state.optimizer), metrics, replicas.gather(given)


CASES = {
    "ppo": dict(method="ppo", ppo__gamma=0.9, loss__loss_type="dapo"),
    "dpo": dict(method="dpo"),
    "ipo": dict(method="dpo", dpo__loss_type="ipo"),
    "reward_model": dict(method="reward_model", reward_model__center_rewards_coefficient=0.1),
    "rft": dict(method="rft"),
}


def assert_same(one, other, metrics, expected):
    one, other = jax.device_get((one, other))
    assert max(float(jnp.abs(g).max()) for g in other.values()) > 1e-4
    for path in other:
        assert np.abs(one[path] - other[path]).max() <= 3e-5 * max(float(jnp.abs(other[path]).max()), 1e-3), path
    assert metrics.keys() == expected.keys()
    for key in expected:
        np.testing.assert_allclose(metrics[key], expected[key], rtol=5e-5, atol=2e-6, err_msg=key)


@pytest.mark.parametrize("name", CASES)
def test_two_devices_and_four_micro_batches_give_the_gradient_of_one_batch(name):
    whole, expected, _ = run(batch(), **CASES[name])
    parted, metrics, _ = run(batch(), 2, gradient_accumulation_steps=4, **CASES[name])
    assert_same(parted, whole, metrics, expected)
    assert expected["skipped_updates"] == 0


def test_packed_rows_give_the_gradient_of_examples_in_groups():
    given = batch()._replace(sample_mask=np.ones((P, G), bool))
    examples = [
        (
            [*given.prompts[p, : given.lengths[p]], *given.tokens[p, g, given.valid[p, g]]],
            [False] * given.lengths[p] + [True] * int(given.valid[p, g].sum()),
        )
        for p in range(P)
        for g in range(G)
    ]
    packed = pack(examples, 20, multiple=8)
    assert packed.tokens.shape[0] < P * G / 1.5
    grouped, expected, _ = run(given, method="sft")
    found, metrics, _ = run(packed, 2, gradient_accumulation_steps=4, method="sft")
    assert_same(found, grouped, metrics, expected)


def test_ppos_advantages_are_those_of_its_rewards_and_values():
    # gamma = lambda = 1 without a KL and without whitening: a token's return is its completion's reward.
    given = batch()
    options = dict(method="ppo", ppo__lam=1.0, ppo__kl_coef=0.0, ppo__whiten_advantages=False)
    _, metrics, estimated = run(given, **options)
    mask = given.mask & given.sample_mask[..., None]
    returns = np.where(mask, given.rewards[..., None], 0)
    np.testing.assert_allclose(estimated.returns, returns, atol=1e-5)
    expected = np.where(mask, returns - estimated.values, 0)
    np.testing.assert_allclose(estimated.advantages, expected, atol=1e-5)
    np.testing.assert_allclose(metrics["objective/rlhf_reward"], given.rewards[given.sample_mask].mean(), rtol=1e-5)
    residual = (returns - estimated.values)[mask].var()
    np.testing.assert_allclose(metrics["value/explained_variance"], 1 - residual / returns[mask].var(), rtol=1e-4)


# Worked by hand, from log-probabilities and hidden states that the objective does not compute


def token_logprobs_of(scale: float = 1.0) -> np.ndarray:
    """Log-probabilities [P, G, T] under the policy with its parameters scaled (1.1 is the reference of `run`)."""
    model, trainable, frozen, _ = parts()
    scaled = {path: scale * value for path, value in trainable.items()}
    given = batch()
    logprobs, _ = completion_logprobs(model.bind(scaled, frozen), given.completions)
    return np.where(given.mask, logprobs, 0.0)


def pair_mean(values: np.ndarray) -> float:
    """The mean over the pairs of which both completions count."""
    return values[batch().sample_mask.reshape(-1, 2).all(1)].mean()


def test_dpo_compares_the_policy_with_its_reference():
    ratios = (token_logprobs_of() - token_logprobs_of(1.1)).sum(-1).reshape(-1, 2)  # log p / p_ref of each completion
    margins = 0.3 * (ratios[:, 0] - ratios[:, 1])
    _, metrics, _ = run(batch(), method="dpo", dpo__beta=0.3)
    np.testing.assert_allclose(metrics["loss"], pair_mean(np.log1p(np.exp(-margins))), rtol=1e-4)
    np.testing.assert_allclose(metrics["rewards/margins"], pair_mean(margins), rtol=1e-3, atol=1e-5)
    assert abs(metrics["loss"] - np.log(2)) > 1e-3  # what it is where both are the same policy


def test_a_reward_model_is_centred_by_its_coefficient():
    model, trainable, frozen, head = parts()
    given = batch()
    hidden = completion_hidden(model.bind(trainable, frozen), given.completions, after_last=True)
    last = np.take_along_axis(np.asarray(hidden), given.valid.sum(-1)[..., None, None], axis=2)[:, :, 0]
    scores = (last @ np.asarray(head[HEAD[0]]) + float(head[HEAD[1]])).reshape(-1, 2)
    loss = np.log1p(np.exp(scores[:, 1] - scores[:, 0])) + 0.2 * scores.sum(1) ** 2
    _, metrics, _ = run(given, method="reward_model", reward_model__center_rewards_coefficient=0.2)
    np.testing.assert_allclose(metrics["loss"], pair_mean(loss), rtol=1e-4)


def test_ppos_advantages_discount_by_gamma_and_look_ahead_by_lambda_and_pay_for_the_kl():
    options = dict(gamma=0.9, lam=0.5, kl_coef=0.3, whiten_advantages=False)
    given = batch()
    _, metrics, estimated = run(given, method="ppo", **{f"ppo__{key}": value for key, value in options.items()})
    mask, kl = given.mask & given.sample_mask[..., None], given.logprobs - token_logprobs_of(1.1)
    values, expected = np.asarray(estimated.values), np.zeros(mask.shape)
    paid = []
    for p, g in np.ndindex(P, G):
        size = int(mask[p, g].sum())  # completions have no tokens of an environment here
        rewards = -0.3 * kl[p, g, :size]
        if size:
            rewards[-1] += given.rewards[p, g]
            paid.append(rewards.sum())
        after = 0.0
        for t in reversed(range(size)):
            value_after = values[p, g, t + 1] if t + 1 < size else 0.0
            after = expected[p, g, t] = rewards[t] + 0.9 * value_after - values[p, g, t] + 0.9 * 0.5 * after
    np.testing.assert_allclose(estimated.advantages, expected, atol=2e-5)
    np.testing.assert_allclose(estimated.returns, np.where(mask, expected + values, 0), atol=2e-5)
    np.testing.assert_allclose(metrics["objective/rlhf_reward"], np.mean(paid), rtol=1e-4)
    assert np.abs(expected).max() > 0.1


def test_ppos_critic_is_clipped_around_its_old_values():
    given = batch()
    _, _, estimated = run(given, method="ppo")
    mask, now = given.mask & given.sample_mask[..., None], np.asarray(estimated.values)
    old, returns = (now - 0.5).astype(np.float32), (now + 0.2).astype(np.float32)  # it has come 0.5 of 0.7 up
    moved = jax.tree.map(np.asarray, estimated._replace(values=old, returns=returns))
    losses = {}
    for cliprange in (None, 0.1):
        options = dict(method="ppo", ppo__cliprange_value=cliprange, ppo__vf_coef=0.25)
        _, metrics, _ = run(moved, found_before=False, **options)
        losses[cliprange] = metrics["value_loss"]
        np.testing.assert_allclose(metrics["loss"], metrics["policy_loss"] + 0.25 * metrics["value_loss"], rtol=1e-5)
    assert mask.any()
    np.testing.assert_allclose(losses[None], 0.5 * 0.2**2, rtol=1e-4)  # the error now
    np.testing.assert_allclose(losses[0.1], 0.5 * 0.6**2, rtol=1e-4)  # held at old + 0.1, it is 0.7 - 0.1 away
