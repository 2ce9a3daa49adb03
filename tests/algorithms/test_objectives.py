"""Objectives beside GRPO's (see test_update): micro-batches and devices change nothing; PPO's advantages by hand."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grpo_jax.algorithms import Batch, Setup, algorithm_of
from grpo_jax.algorithms.forward import new_head
from grpo_jax.algorithms.packing import pack
from grpo_jax.experiment import Experiment, PolicyConfig, SamplingConfig, ScratchConfig, override
from grpo_jax.logprobs import Completions, completion_logprobs
from grpo_jax.policy import load
from grpo_jax.policy.lora import Model, split
from grpo_jax.sharding import Replicas
from grpo_jax.tasks import Task
from grpo_jax.update import State, make_update

P, G, T, D = 8, 4, 4, 16
SCRATCH = ScratchConfig("abcdefgh", hidden_size=D, num_layers=1, num_heads=2)
EXPERIMENT = Experiment(
    Task("none", [], [], success=lambda **_: [], demonstrate=lambda example, rng: []),
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


def run(given: Batch, n: int = 1, **overrides):
    """The gradient and metrics of one update on n devices."""
    experiment = override(EXPERIMENT, {key.replace("__", "."): value for key, value in overrides.items()})
    model, trainable, frozen, head = parts()
    trainable = {**trainable, **head} if experiment.method in ("ppo", "reward_model") else trainable
    reference = {path: 1.1 * value for path, value in trainable.items()}
    replicas, setup = Replicas(n), Setup(model, experiment, 0, Replicas.axis_name)
    trainable_, frozen_, reference_ = (replicas.replicate(x) for x in (trainable, frozen, reference))
    given, found = replicas.split(jax.tree.map(np.asarray, given)), {}
    before_updates = algorithm_of(experiment).make_objective(setup).before_updates
    if before_updates is not None:
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
