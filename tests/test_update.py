"""The update: the same whatever the devices and micro-batches, skipped when unsound; and the optimizer."""

import math
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grpo_jax.advantages import group_advantages
from grpo_jax.algorithms import Batch, Setup, TrainBatch, algorithm_of
from grpo_jax.algorithms.grpo import with_advantages
from grpo_jax.algorithms.minibatches import lay_out
from grpo_jax.errors import RunError, UserError
from grpo_jax.experiment import (
    Experiment,
    LoRAConfig,
    LossConfig,
    OptimizerConfig,
    PolicyConfig,
    SamplingConfig,
    ScratchConfig,
    override,
)
from grpo_jax.logprobs import Completions, completion_logprobs
from grpo_jax.losses import LossInputs
from grpo_jax.policy import load
from grpo_jax.policy.lora import Model, split
from grpo_jax.rollout import encode_prompts, make_actor, name_noise, rollout
from grpo_jax.sharding import Replicas
from grpo_jax.tasks import Task
from grpo_jax.update import State, UpdateWatch, decays, make_optimizer, make_update

P, G, T = 32, 3, 4
SCRATCH = ScratchConfig(hidden_size=16, num_layers=1, num_heads=2)
WORDS = [
    f"{a}{b}" if i % 3 else f"{a}{b}c"
    for i, (a, b) in enumerate(zip("abcdefgh" * 4, "klmnopqrstuvwxyz" * 2, strict=True))
]
TASK = Task(
    "words",
    train=[{"prompt": word} for word in WORDS],
    held_out=[{"prompt": "x"}],
    success=lambda **columns: [False for _ in columns["completions"]],
    demonstrate=lambda example, rng: [example["prompt"]],
)
EXPERIMENT = Experiment(
    TASK,
    rewards={"none": lambda **columns: [0.0 for _ in columns["completions"]]},
    policy=PolicyConfig(scratch=SCRATCH),
    prompts_per_step=P,
    group_size=G,
    sampling=SamplingConfig(max_tokens=T, temperature=0.8),
    optimizer=OptimizerConfig(learning_rate=0.02, eps=1e-4),
)


@cache
def policy(dtype: str = "float32", lora: LoRAConfig | None = None):
    return load("scratch", dtype=dtype, seed=1, lora=lora, scratch=SCRATCH)


@cache
def parts(dtype: str = "float32", lora: LoRAConfig | None = None):
    """The model, and its trainable and frozen parameters, with an embedding that makes distributions uneven."""
    params = policy(dtype, lora).params
    params = {**params, "embed": 10 * params["embed"]}
    return Model(policy().config, lora, dtype), *split(params, lora)


@cache
def arrays():
    """A batch whose parts differ in every way: in lengths, active tokens, rewards, and dropped completions."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 5, P)
    sizes = rng.integers(0, T + 1, (P, G)) * (rng.random((P, G)) < np.linspace(0.3, 1, P)[:, None])
    valid = np.arange(T) < sizes[..., None]
    mask = valid & (rng.random((P, G, T)) < 0.8)  # some valid tokens are the environment's
    kept = rng.random((P, G)) < 0.9
    return rng.integers(3, 29, (P, 4)), lengths, rng.integers(0, 29, (P, G, T)), valid, mask, kept


@cache
def own_logprobs(dtype: str = "float32", lora: LoRAConfig | None = None):
    """The policy's log-probabilities [P, G, T] at the experiment's temperature, and the gradient of a weighted sum."""
    model, _, frozen = parts(dtype, lora)

    def loss(trainable, weights):
        arrays_ = (jnp.asarray(x) for x in arrays()[:4])
        logprobs, _ = completion_logprobs(model.bind(trainable, frozen), Completions(*arrays_), temperature=0.8)
        return jnp.sum(weights * logprobs), logprobs

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def make_batch(drift: float = 0.0, dtype: str = "float32", lora: LoRAConfig | None = None, **changes) -> Batch:
    """The batch, its old log-probabilities `drift` (standard deviation, in nats) from the policy's own."""
    prompts, lengths, tokens, valid, mask, kept = arrays()
    (_, own), _ = own_logprobs(dtype, lora)(parts(dtype, lora)[1], jnp.zeros((P, G, T)))
    rng = np.random.default_rng(1)
    logprobs = np.where(mask, own + drift * rng.normal(size=mask.shape), 0).astype(np.float32)
    rewards = np.round(rng.random((P, G)) * 4).astype(np.float32)
    return Batch(prompts, lengths, tokens, valid, mask, logprobs, rewards, kept)._replace(**changes)


# "Moves" nothing and keeps the gradient that it was given as its state: an Adam step would hide its size.
RECORD = optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda updates, state, params: (jax.tree.map(jnp.zeros_like, updates), updates),
)


@cache
def compiled(n: int, overrides: tuple, record: bool, dtype: str, lora: LoRAConfig | None):
    experiment = override(EXPERIMENT, dict(overrides))
    optimizer = RECORD if record else make_optimizer(experiment.optimizer, 100)[0]
    update = make_update(Setup(parts(dtype, lora)[0], experiment, 0, Replicas.axis_name), optimizer)
    return optimizer, Replicas(n).compile(update)


def advantaged(batch: Batch, experiment: Experiment) -> TrainBatch:
    """The batch with its advantages, and a row for each completion."""
    batch = jax.tree.map(np.asarray, batch)
    return with_advantages(TrainBatch(batch, None, 0, 0, rows=[{}] * batch.rewards.size), experiment)


def run(
    batch: Batch,
    n: int = 1,
    *,
    state=None,
    first=False,
    record=False,
    reference=False,
    dtype="float32",
    lora=None,
    **overrides,
) -> tuple[State, dict]:
    """One update on n devices; the state afterwards and its metrics, from the first device."""
    overrides = {"num_iterations": 2, **{key.replace("__", "."): value for key, value in overrides.items()}}
    if overrides.get("loss.loss_type") == "reinforce":
        overrides["num_iterations"] = 1
    experiment = override(EXPERIMENT, overrides)
    if experiment.method == "grpo":
        batch = advantaged(batch, experiment).batch
    optimizer, update = compiled(n, tuple(sorted(overrides.items())), record, dtype, lora)
    _, trainable, frozen = parts(dtype, lora)
    if state is None:
        state = State(trainable, optimizer.init(trainable), jnp.int32(0))
    has_reference = reference or overrides.get("loss.beta")
    reference = {k: 1.1 * v for k, v in trainable.items()} if has_reference else None
    replicas = Replicas(n)
    layout = lay_out(experiment, batch, 0, replicas)
    state, output = update(
        replicas.replicate(state),
        replicas.replicate(frozen),
        None if reference is None else replicas.replicate(reference),
        layout.split(jax.tree.map(np.asarray, batch)),
        replicas.broadcast(np.bool_(first)),
    )
    for leaf in jax.tree.leaves(state):
        copies = np.asarray(leaf)
        np.testing.assert_array_equal(copies, np.broadcast_to(copies[:1], copies.shape))  # devices never drift apart
    found = replicas.fetch(output.metrics)
    if output.logprob_gaps is not None:
        found["logprob_gaps"] = layout.gather(output.logprob_gaps)
    return replicas.first(state), found


def assert_close(actual, expected, tolerance=2e-5):
    assert actual.keys() == expected.keys()
    for path in expected:
        a, b = np.asarray(actual[path]), np.asarray(expected[path])
        assert np.abs(a - b).max() <= tolerance * max(np.abs(b).max(), 1e-3), path


def assert_identical(actual, expected):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


# The same whatever the devices and micro-batches


CASES = {
    "grpo": dict(loss__beta=0.1),
    "dapo": dict(loss__loss_type="dapo", loss__entropy_coef=0.05, advantages__scale="batch"),
    "bnpo": dict(loss__loss_type="bnpo", loss__epsilon_high=0.5, loss__beta=0.1, loss__kl_estimator="k1"),
    "dr_grpo": dict(
        loss=LossConfig("dr_grpo", dr_grpo_length=4),
        advantages__scale="none",
        advantages__baseline="leave_one_out",
    ),
    "cispo": dict(loss=LossConfig("cispo", epsilon_high=1.5), advantages__scale="whiten"),
    "sapo": dict(loss__loss_type="sapo", loss__beta=0.1, loss__use_bias_correction_kl=True),
    "luspo": dict(loss=LossConfig("luspo", importance_sampling_level="sequence", delta=1.5)),
    "vespo": dict(loss__loss_type="vespo", loss__top_entropy_quantile=0.4, loss__entropy_coef=0.05),
    "reinforce": dict(loss__loss_type="reinforce", advantages__scale="none", advantages__baseline="leave_one_out"),
    "gspo": dict(loss__importance_sampling_level="sequence", loss__top_entropy_quantile=0.4),
    "sft": dict(method="sft"),
}
CLIPPED = ("grpo", "dapo", "bnpo", "dr_grpo", "luspo", "gspo")


@pytest.mark.parametrize("name", CASES)
def test_eight_devices_and_four_micro_batches_give_the_gradient_of_one_batch(name):
    batch = make_batch(drift=0.3)
    whole, expected = run(batch, record=True, **CASES[name])
    parted, metrics = run(batch, 8, record=True, gradient_accumulation_steps=4, **CASES[name])
    assert max(float(jnp.abs(g).max()) for g in whole.optimizer.values()) > 1e-3
    assert_close(parted.optimizer, whole.optimizer)
    assert metrics.keys() == expected.keys()
    for key in expected:
        np.testing.assert_allclose(metrics[key], expected[key], rtol=2e-5, atol=2e-6, err_msg=key)
    assert expected["skipped_updates"] == 0
    assert name not in CLIPPED or expected["clip_ratio/region_mean"] > 0.02


@pytest.mark.parametrize(("n", "micro"), [(8, 1), (1, 4)])
def test_devices_alone_and_accumulation_alone_change_nothing_either(n, micro):
    batch = make_batch(drift=0.3)
    whole, _ = run(batch, record=True, **CASES["grpo"])
    parted, _ = run(batch, n, record=True, gradient_accumulation_steps=micro, **CASES["grpo"])
    assert_close(parted.optimizer, whole.optimizer)


def test_the_gradient_is_the_one_worked_by_hand():
    # At ratio 1 nothing is clipped and GRPO's gradient is that of -1/N sum_i 1/|o_i| sum_t A_i log p(o_it), over the N
    # sequences with a token that counts: weights -A / (N |o_i|) on the log-probabilities.
    batch = make_batch()
    active = batch.mask & batch.sample_mask[..., None]
    tokens = active.sum(-1)
    advantages = np.asarray(group_advantages(batch.rewards, mask=batch.sample_mask))
    weights = -advantages[..., None] * active / (np.maximum(tokens, 1)[..., None] * (tokens > 0).sum())
    _, expected = own_logprobs()(parts()[1], jnp.asarray(weights, jnp.float32))
    state, metrics = run(batch, 8, record=True, first=True)
    assert_close(state.optimizer, expected)
    np.testing.assert_allclose(metrics["grad_norm"], optax.global_norm(expected), rtol=1e-4)
    assert metrics["num_tokens"] == active.sum()
    assert metrics["sampling/logprob_difference/max"] < 1e-4
    np.testing.assert_allclose(metrics["importance_ratio"], 1, atol=1e-5)


@pytest.mark.parametrize("ddof", [0, 1])
def test_the_advantages_have_the_experiments_divisor(ddof):
    batch = make_batch()
    experiment = override(EXPERIMENT, {"advantages.ddof": ddof})
    found = advantaged(batch, experiment)
    for p in np.flatnonzero(batch.sample_mask.sum(1) >= 2)[:8]:
        own = batch.rewards[p][batch.sample_mask[p]]
        expected = (own - own.mean()) / own.std(ddof=ddof) if np.ptp(own) else 0 * own
        np.testing.assert_allclose(found.batch.advantages[p][batch.sample_mask[p]], expected, atol=1e-5)
    np.testing.assert_array_equal([row["advantage"] for row in found.rows], found.batch.advantages.reshape(-1))


def weigh_by_place(inputs: LossInputs) -> tuple[jax.Array, dict[str, jax.Array]]:
    """A loss per token: the later the token, the more it counts."""
    place = jnp.arange(1, inputs.mask.shape[1] + 1)
    per_token = -place * inputs.advantages * jnp.exp(inputs.logprobs - inputs.old_logprobs)
    return per_token, {"own/place": jnp.broadcast_to(place, inputs.mask.shape), "own/sum": inputs.entropy.sum()}


def pull_to_the_reference(inputs: LossInputs) -> tuple[jax.Array, dict[str, jax.Array]]:
    """A scalar loss, divided by a count of the whole batch, which reads the reference."""
    square = jnp.where(inputs.mask, (inputs.logprobs - inputs.ref_logprobs) ** 2, 0.0)
    return square.sum() / inputs.num_sequences, {"own/groups": inputs.mask.any(-1).sum() / inputs.num_groups}


def centred_by_batch(rewards, mask):
    """Advantages of a function's own, relative to the whole batch."""
    return rewards - jnp.where(mask, rewards, 0.0).sum() / mask.sum()


OWN = {
    "a loss per token": dict(loss=weigh_by_place),
    "a scalar loss": dict(loss=pull_to_the_reference),
    "advantages": dict(advantages=centred_by_batch),
    "advantages by token": dict(advantages=lambda rewards, mask, token_mask: rewards[..., None] * token_mask),
}


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "gspo", "cispo"])
def test_a_group_that_is_split_over_devices_gives_the_gradient_of_a_whole_one(name):
    # Two prompts for six devices: each group goes to three of them, a completion to each.
    few = jax.tree.map(lambda x: x[-2:], make_batch(drift=0.3))
    changes = {**CASES[name], "prompts_per_step": 2}
    whole, expected = run(few, record=True, **changes)
    parted, metrics = run(few, 6, record=True, **changes)
    assert max(float(jnp.abs(g).max()) for g in whole.optimizer.values()) > 1e-3
    assert_close(parted.optimizer, whole.optimizer)
    for key in expected:
        np.testing.assert_allclose(metrics[key], expected[key], rtol=2e-5, atol=2e-6, err_msg=key)


@pytest.mark.parametrize("name", OWN)
def test_a_loss_and_advantages_of_ones_own_are_exact_over_devices_and_micro_batches(name):
    batch = make_batch(drift=0.3)
    whole, expected = run(batch, record=True, reference=True, **OWN[name])
    parted, metrics = run(batch, 8, record=True, reference=True, gradient_accumulation_steps=4, **OWN[name])
    assert max(float(jnp.abs(g).max()) for g in whole.optimizer.values()) > 1e-3
    assert_close(parted.optimizer, whole.optimizer)
    assert metrics.keys() == expected.keys()
    for key in expected:
        np.testing.assert_allclose(metrics[key], expected[key], rtol=2e-5, atol=2e-6, err_msg=key)


def test_a_loss_of_ones_own_worked_by_hand():
    batch = make_batch()
    active = batch.mask & batch.sample_mask[..., None]
    _, metrics = run(batch, record=True, loss=weigh_by_place)
    advantages = np.asarray(group_advantages(batch.rewards, mask=batch.sample_mask))
    place = np.broadcast_to(np.arange(1, T + 1), active.shape)
    np.testing.assert_allclose(metrics["loss"], -(place * advantages[..., None])[active].mean(), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(metrics["own/place"], place[active].mean(), rtol=1e-5)


def test_a_reference_is_kept_only_for_a_loss_that_reads_it():
    for loss, reads in ((weigh_by_place, False), (pull_to_the_reference, True)):
        experiment = override(EXPERIMENT, {"loss": loss})
        assert algorithm_of(experiment).needs_reference(experiment) == reads


@pytest.mark.parametrize(
    ("loss", "says"),
    [
        (lambda inputs: inputs.logprobs, r"must return \(loss, metrics\)"),
        (
            lambda inputs: (inputs.logprobs.sum(0), {}),
            r"a loss of shape \[\d+\]: it must have one value",
        ),
        (lambda inputs: (inputs.nothing, {}), "raised AttributeError: .*nothing"),
        (lambda inputs: (inputs.logprobs, {"m": inputs.mask[0]}), "a metric 'm' of shape"),
    ],
)
def test_a_loss_of_ones_own_that_is_wrong_is_one_sentence(loss, says):
    experiment = override(EXPERIMENT, {"loss": loss})
    with pytest.raises(UserError, match=says):
        algorithm_of(experiment).needs_reference(experiment)


def test_advantages_of_ones_own_of_a_wrong_shape_are_one_sentence():
    with pytest.raises(UserError, match=r"returned shape \[32\]: it must be that of the rewards, \[32, 3\]"):
        run(make_batch(), advantages=lambda rewards, mask: rewards.mean(1))


def test_sft_is_the_mean_negative_log_likelihood_of_the_tokens():
    # At temperature 1, whatever the sampler's.
    batch = make_batch()
    active = batch.mask & batch.sample_mask[..., None]
    model, trainable, frozen = parts()
    logprobs, _ = completion_logprobs(model.bind(trainable, frozen), batch.completions)
    _, metrics = run(batch, record=True, first=True, **CASES["sft"])
    np.testing.assert_allclose(metrics["loss"], -np.asarray(logprobs)[active].mean(), rtol=1e-5)
    assert metrics["num_tokens"] == active.sum()
    assert not any(key.startswith("sampling/") for key in metrics)
    # Its batches have no log-probabilities, so the contract does not concern it.
    without = batch._replace(logprobs=np.zeros_like(batch.logprobs))
    assert run(without, first=True, record=True, **CASES["sft"])[0].skipped == 0


def test_one_device_and_eight_play_the_same_completions_and_make_the_same_update():
    new = policy()
    prompts = encode_prompts(TASK, new.tokenizer, 2048, 4)
    played = [
        rollout(
            make_actor(new, Replicas(n)),
            TASK,
            prompts.batch("train", range(P)),
            name_noise(0, 0, range(P), range(G)),
            EXPERIMENT.sampling,
        )
        for n in (1, 8)
    ]
    one, eight = played
    for name in ("tokens", "mask", "valid", "ended"):
        np.testing.assert_array_equal(getattr(one, name), getattr(eight, name))
    np.testing.assert_allclose(one.logprobs, eight.logprobs, atol=1e-5)
    assert len(np.unique(one.tokens.reshape(P * G, -1), axis=0)) > P * G // 2

    trainable = split(new.params, None)[0]
    optimizer = make_optimizer(EXPERIMENT.optimizer, 100)[0]
    states = []
    for n, rolled in zip((1, 8), played, strict=True):
        rewards = (rolled.tokens == 5).any(-1) + 0.1 * rolled.tokens.sum(-1) / 29
        batch = Batch(
            rolled.prompts, rolled.lengths, rolled.tokens, rolled.valid, rolled.mask, rolled.logprobs,
            rewards.astype(np.float32), np.ones((P, G), bool),
        )  # fmt: skip
        state = State(trainable, optimizer.init(trainable), jnp.int32(0))
        state, metrics = run(batch, n, state=state, first=True)
        assert metrics["skipped_updates"] == 0 and metrics["sampling/logprob_difference/max"] < 1e-4
        states.append(state)
    assert_close(states[1].trainable, states[0].trainable, tolerance=1e-4)
    assert max(float(jnp.abs(states[0].trainable[k] - trainable[k]).max()) for k in trainable) > 0.01


def test_a_sampler_that_differs_is_made_up_for():
    # Recomputing replaces the sampler's log-probabilities by the trainer's own and weighs by the ratio of the two.
    experiment = override(EXPERIMENT, {"loss.importance_sampling_mode": "token_truncate"})
    batch, own = make_batch(drift=0.5), make_batch()
    model, trainable, frozen = parts()
    replicas, setup = Replicas(8), Setup(model, experiment, 0, Replicas.axis_name)
    recompute = replicas.compile(algorithm_of(experiment).make_objective(setup).before_updates)
    given = replicas.split(jax.tree.map(np.asarray, batch))
    recomputed, metrics = recompute(replicas.replicate(trainable), replicas.replicate(frozen), None, given)
    recomputed, metrics = replicas.gather(recomputed), replicas.fetch(metrics)
    active = batch.mask & batch.sample_mask[..., None]
    np.testing.assert_allclose(recomputed.logprobs[active], own.logprobs[active], atol=2e-5)
    ratio = np.exp(own.logprobs - batch.logprobs)
    np.testing.assert_allclose(recomputed.correction[active], np.minimum(ratio, 3.0)[active], rtol=1e-4)
    gaps = np.abs(own.logprobs - batch.logprobs)[active]
    np.testing.assert_allclose(metrics["sampling/logprob_difference/mean"], gaps.mean(), rtol=1e-3)
    np.testing.assert_allclose(metrics["sampling/importance_sampling_ratio/min"], ratio[active].min(), rtol=1e-3)

    # The weights of the gradient are those of on-policy GRPO times the ratio, and the contract holds.
    state, metrics = run(jax.tree.map(np.asarray, recomputed), 8, record=True, first=True)
    tokens = active.sum(-1)
    advantages = np.asarray(group_advantages(batch.rewards, mask=batch.sample_mask))
    weights = -advantages[..., None] * active / (np.maximum(tokens, 1)[..., None] * (tokens > 0).sum())
    _, expected = own_logprobs()(trainable, jnp.asarray(weights * np.minimum(ratio, 3.0), jnp.float32))
    assert_close(state.optimizer, expected, tolerance=1e-4)
    assert metrics["skipped_updates"] == 0


# Unsound updates are skipped


def changed(batch: Batch, field: str, value: float, where=(3, 1, 0)) -> Batch:
    array = np.array(getattr(batch, field))
    array[where[: array.ndim]] = value
    return batch._replace(**{field: array})


def active_place(batch: Batch) -> tuple[int, int, int]:
    return tuple(int(i) for i in np.argwhere(batch.mask & batch.sample_mask[..., None])[7])


@pytest.mark.parametrize("n", [1, 8])
@pytest.mark.parametrize(
    ("field", "value"), [("rewards", np.nan), ("rewards", np.inf), ("logprobs", 0.02), ("logprobs", np.nan)]
)
def test_an_unsound_step_leaves_everything_bit_identical_and_is_counted(n, field, value):
    # A single bad number on one of the devices; 0.02 nats is above the bound of the log-probability contract, 0.01.
    batch = make_batch()
    before, metrics = run(batch, n, first=True)  # one good update, so that Adam's moments are not 0
    assert metrics["skipped_updates"] == 0
    batch = make_batch()._replace(logprobs=np.array(batch.logprobs))
    place = active_place(batch)
    fresh = State(parts()[1], before.optimizer, before.skipped)  # the parameters that the log-probabilities are of
    bad = changed(batch, field, value if field == "rewards" else batch.logprobs[place] + value, place)
    after, metrics = run(bad, n, state=fresh, first=True)
    assert_identical((after.trainable, after.optimizer), (fresh.trainable, fresh.optimizer))
    assert after.skipped == metrics["skipped_updates"] == 1
    after, metrics = run(bad, n, state=after, first=True)
    assert after.skipped == 2
    good, metrics = run(batch, n, state=after, first=True)
    assert good.skipped == 2 and (good.trainable["embed"] != after.trainable["embed"]).any()


@pytest.mark.parametrize("n", [1, 8])
@pytest.mark.parametrize("field", ["sample_mask", "mask"])  # all completions dropped; no token to train on
def test_a_step_with_nothing_to_train_on_leaves_everything_bit_identical(n, field):
    batch = make_batch()
    before, metrics = run(batch, n, first=True)  # now Adam's momentum would move the parameters without a gradient
    assert metrics["empty_updates"] == 0
    nothing = batch._replace(**{field: np.zeros_like(getattr(batch, field))})
    after, metrics = run(nothing, n, state=before)
    assert_identical((after.trainable, after.optimizer), (before.trainable, before.optimizer))
    assert metrics["empty_updates"] == 1 and metrics["num_tokens"] == 0
    assert after.skipped == metrics["skipped_updates"] == 0
    # Prompts are shared out in their order: with eight devices, all tokens are now the last one's.
    some = batch._replace(mask=batch.mask & (np.arange(P) >= P - P // 8)[:, None, None])
    after, metrics = run(some, n, state=before)
    assert metrics["empty_updates"] == 0 and metrics["num_tokens"] > 0
    assert (after.trainable["embed"] != before.trainable["embed"]).any()


def said(skipped: int, norm: float = 1.0, empty: int = 0) -> dict[str, float]:
    """The metrics of an update, as a watch sees them."""
    return {"skipped_updates": skipped, "grad_norm": norm, "empty_updates": empty}


def test_the_first_skipped_and_the_first_empty_update_are_told_with_the_reason():
    watch = UpdateWatch(limit=10)
    assert watch.see(0, [said(0)]) == []
    [note] = watch.see(1, [said(0), said(1, math.nan), said(1)])
    assert note == "step 1: an update was skipped, because its gradient is not finite (gradient norm nan)"
    [note] = watch.see(2, [said(1, empty=1)])
    assert note == "step 2: an update was not made, because there was no token left to train on"
    assert watch.see(3, [said(2, math.inf), said(2, empty=1)]) == []  # each is told once
    [note] = UpdateWatch(limit=10).see(4, [said(1, 0.5)])
    assert note == "step 4: an update was skipped, because of its log-probabilities (gradient norm 0.5)"


def test_so_many_skipped_updates_in_a_row_end_the_run_and_one_good_one_between_them_does_not():
    watch = UpdateWatch(limit=3)
    watch.skipped = 5  # those of before the run was resumed
    watch.see(7, [said(6, math.nan), said(7, math.nan)])
    watch.see(8, [said(7)])
    watch.see(9, [said(8, math.nan), said(9, math.nan)])
    with pytest.raises(RunError, match=r"step 10: 3 updates in a row were skipped, .* is not finite .*optimizer\.max_"):
        watch.see(10, [said(10, math.inf)])


def test_the_skipped_updates_before_a_run_was_resumed_count_among_those_in_a_row():
    before, after = UpdateWatch(limit=3), UpdateWatch(limit=3)
    before.see(7, [said(0), said(1, math.nan), said(2, math.nan)])
    after.skipped, after.in_a_row = before.skipped, before.in_a_row
    with pytest.raises(RunError, match="step 8: 3 updates in a row were skipped"):
        after.see(8, [said(3, math.nan)])


def test_a_parameter_that_is_not_a_number_skips_the_step():
    _, trainable, _ = parts()
    broken = {**trainable, "norm.scale": trainable["norm.scale"].at[3].set(jnp.nan)}
    optimizer = make_optimizer(EXPERIMENT.optimizer, 100)[0]
    before = State(broken, optimizer.init(broken), jnp.int32(4))
    after, metrics = run(make_batch(), state=before)
    assert_identical((after.trainable, after.optimizer), (before.trainable, before.optimizer))
    assert after.skipped == 5 and not np.isfinite(metrics["grad_norm"])


def test_the_contract_binds_the_first_iteration_alone():
    drifted = make_batch(drift=0.3)
    assert run(drifted, first=True)[0].skipped == 1
    state, metrics = run(drifted, first=False)
    assert state.skipped == 0 and metrics["sampling/logprob_difference/max"] > 0.1
    # Where nothing was sampled the log-probabilities may be anything.
    batch = make_batch()
    junk = np.where(batch.mask & batch.sample_mask[..., None], batch.logprobs, np.nan)
    assert run(batch._replace(logprobs=junk), first=True)[0].skipped == 0


def test_a_dropped_completion_may_hold_any_reward_and_does_not_move_the_policy():
    batch = make_batch()
    p, g = (int(i) for i in np.argwhere(~batch.sample_mask & batch.mask.any(-1))[0])
    states = [run(changed(batch, "rewards", value, (p, g)), first=True)[0] for value in (0.0, np.nan, 100.0)]
    assert states[1].skipped == 0
    for state in states[1:]:
        assert_identical(state.trainable, states[0].trainable)


def test_later_iterations_on_the_same_batch_clip():
    batch = make_batch()
    state, metrics = run(batch, first=True)
    assert metrics["clip_ratio/region_mean"] == 0
    shares, norms = [], []
    for _ in range(6):
        state, metrics = run(batch, state=state)
        shares.append(float(metrics["clip_ratio/region_mean"]))
        norms.append(float(metrics["grad_norm"]))
    assert shares[-1] > 0.1 and metrics["clip_ratio/low_mean"] > 0 and metrics["clip_ratio/high_mean"] > 0
    assert state.skipped == 0


# Which parameters, in which precision


def test_lora_trains_the_adapters_and_nothing_else():
    lora = LoRAConfig(rank=2, alpha=4.0, targets=("q", "up"))
    _, trainable, frozen = parts("float32", lora)
    assert set(trainable) == {f"layers.{t}.lora_{x}" for t in ("q", "up") for x in "ab"}
    assert frozen.keys() == policy().params.keys()
    batch = make_batch(lora=lora)
    state, metrics = run(batch, first=True, lora=lora)
    assert state.trainable.keys() == trainable.keys()
    assert metrics["skipped_updates"] == 0
    for name in ("q", "up"):  # b starts at 0, so the first gradient reaches b alone, and the second a as well
        assert (state.trainable[f"layers.{name}.lora_b"] != 0).all()
        assert_identical(state.trainable[f"layers.{name}.lora_a"], trainable[f"layers.{name}.lora_a"])
    second, _ = run(batch, state=state, lora=lora)
    assert (second.trainable["layers.q.lora_a"] != state.trainable["layers.q.lora_a"]).any()


def test_a_bfloat16_policy_has_float32_masters_that_small_updates_add_up_in():
    model, trainable, frozen = parts("bfloat16")
    assert not frozen and {v.dtype for v in trainable.values()} == {jnp.dtype("float32")}
    bound = model.bind(trainable, frozen)
    assert bound.layers.q.kernel[...].dtype == bound.embed[...].dtype == jnp.bfloat16
    # Adam's first updates are about the learning rate, 1e-5: below half a bfloat16 step (2^-9 of the value) for every
    # value above 0.01, so in bfloat16 nothing would ever move.
    batch = make_batch(dtype="bfloat16")
    tiny = dict(optimizer__learning_rate=1e-5, optimizer__eps=1e-12)
    state, metrics = run(batch, first=True, dtype="bfloat16", **tiny)
    assert metrics["skipped_updates"] == 0 and np.isfinite(metrics["loss"])
    assert {v.dtype for v in jax.tree.leaves(state.trainable)} == {jnp.dtype("float32")}
    scale, before = np.asarray(state.trainable["norm.scale"]), np.asarray(trainable["norm.scale"])
    np.testing.assert_allclose(np.abs(scale - before), 1e-5, rtol=0.05)
    np.testing.assert_array_equal(scale.astype(jnp.bfloat16), before.astype(jnp.bfloat16))


# The optimizer


def rates(steps: int = 10, **options) -> list[float]:
    _, schedule = make_optimizer(OptimizerConfig(learning_rate=1.0, **options), steps)
    return [float(schedule(i)) for i in range(steps)]


def test_schedules_worked_by_hand():
    np.testing.assert_allclose(rates(4), [1, 1, 1, 1])
    np.testing.assert_allclose(rates(4, schedule="linear"), [1, 0.75, 0.5, 0.25])  # 0 would be the fifth
    cosine = [(1 + math.cos(math.pi * i / 4)) / 2 for i in range(4)]
    np.testing.assert_allclose(rates(4, schedule="cosine"), cosine, rtol=1e-6)


def test_a_warm_up_ends_at_the_learning_rate_and_never_wastes_an_update_at_0():
    np.testing.assert_allclose(rates(6, warmup_steps=4), [0.25, 0.5, 0.75, 1, 1, 1])
    np.testing.assert_allclose(rates(6, warmup_steps=4, schedule="linear"), [0.25, 0.5, 0.75, 1, 1, 0.5])
    np.testing.assert_allclose(rates(3, warmup_steps=1, schedule="linear"), [1, 1, 0.5])
    # Of the two updates after the warm-up, the second is in the middle of the cosine.
    np.testing.assert_allclose(rates(6, warmup_steps=4, schedule="cosine"), [0.25, 0.5, 0.75, 1, 1, 0.5], rtol=1e-6)
    np.testing.assert_allclose(rates(4, warmup_steps=8), np.arange(1, 5) / 8)  # longer than the run


def stepped(config: OptimizerConfig, params: dict, grads: dict, updates: int = 1) -> dict:
    optimizer, _ = make_optimizer(config, 10)
    state = optimizer.init(params)
    for _ in range(updates):
        changes, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, changes)
    return params


def test_adamw_worked_by_hand():
    # Two updates with the gradient 0.5: the corrected moments are 0.5 and 0.25, so each is lr * 0.5 / (0.5 + eps),
    # and by lr * decay * value towards 0.
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.2, eps=0.5, max_grad_norm=None)
    params = stepped(config, {"w.kernel": jnp.array([2.0])}, {"w.kernel": jnp.array([0.5])}, updates=2)
    first = 2.0 - 0.1 * (0.5 / (0.5 + 0.5) + 0.2 * 2.0)
    np.testing.assert_allclose(params["w.kernel"], [first - 0.1 * (0.5 + 0.2 * first)], rtol=1e-6)


def test_weight_decay_spares_norms_and_biases():
    lora = LoRAConfig(rank=2, targets=("q",))
    params = {k: jnp.ones_like(v) for k, v in policy("float32", lora).params.items()}
    params["layers.q.bias"] = jnp.ones((2, 16))
    zeros = {k: jnp.zeros_like(v) for k, v in params.items()}
    after = stepped(OptimizerConfig(learning_rate=0.1, weight_decay=0.5), params, zeros)
    spared = {k for k in params if float(after[k].min()) == 1}
    assert spared == {"layers.attention_norm.scale", "layers.mlp_norm.scale", "norm.scale", "layers.q.bias"}
    for k in params.keys() - spared:
        np.testing.assert_allclose(after[k], 0.95, rtol=1e-6)  # 1 - 0.1 * 0.5
    assert decays(params) == {k: k not in spared for k in params}


def test_the_gradient_is_clipped_by_its_global_norm():
    # (3, 4) over two leaves has the norm 5; at most 1 makes it (0.6, 0.8). With b1 = b2 = 0 and eps = 1, Adam moves by
    # lr * g / (|g| + 1).
    options = dict(learning_rate=1.0, b1=0.0, b2=0.0, eps=1.0)
    params, grads = {"a": jnp.zeros(1), "b": jnp.zeros(1)}, {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    clipped = stepped(OptimizerConfig(max_grad_norm=1.0, **options), params, grads)
    np.testing.assert_allclose([clipped["a"][0], clipped["b"][0]], [-0.6 / 1.6, -0.8 / 1.8], rtol=1e-6)
    for bound in (None, 5.1):
        whole = stepped(OptimizerConfig(max_grad_norm=bound, **options), params, grads)
        np.testing.assert_allclose([whole["a"][0], whole["b"][0]], [-3 / 4, -4 / 5], rtol=1e-6)
