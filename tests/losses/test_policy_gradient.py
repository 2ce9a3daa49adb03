"""The policy-gradient loss against TRL's own code, by hand, over shards, and beside values that must not leak."""

import functools
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.errors import UserError
from grpo_jax.experiment import LossConfig
from grpo_jax.losses import policy_gradient, surrogates

GOLDEN = np.load(os.environ.get("GRPO_JAX_LOSSES", Path(__file__).parents[1] / "golden" / "losses.npz"))
LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo", "reinforce")
jitted = jax.jit(policy_gradient.loss, static_argnames=("config", "axis_name"))
eager_or_jit = pytest.mark.parametrize("loss", [policy_gradient.loss, jitted], ids=["eager", "jit"])


def config_of(loss_type, **fields):
    return LossConfig(loss_type=loss_type, dr_grpo_length=9 if loss_type == "dr_grpo" else None, **fields)


def batch(rows=16, tokens=5, seed=0):
    """Random arguments of `loss`, ragged, among them a row without a token."""
    rng = np.random.default_rng(seed)
    logprobs = -rng.exponential(size=(rows, tokens))
    mask = np.arange(tokens) < rng.integers(1, tokens + 1, (rows, 1))
    mask[3] = False
    arrays = dict(
        logprobs=logprobs,
        old_logprobs=logprobs + rng.normal(0, 0.3, logprobs.shape),
        advantages=rng.normal(size=rows),
        ref_logprobs=logprobs + rng.normal(0, 0.3, logprobs.shape),
        entropy=rng.uniform(size=logprobs.shape),
    )
    return {name: array.astype(np.float32) for name, array in arrays.items()} | {"mask": mask}


def value_and_gradients(loss, arrays, config, **options):
    """((value, metrics), the gradients with respect to log-probabilities and entropy)."""
    rest = {k: v for k, v in arrays.items() if k not in ("logprobs", "entropy")}
    return jax.value_and_grad(
        lambda logprobs, entropy: loss(logprobs=logprobs, entropy=entropy, config=config, **rest, **options),
        argnums=(0, 1),
        has_aux=True,
    )(arrays["logprobs"], arrays["entropy"])


value_and_gradients_jitted = jax.jit(functools.partial(value_and_gradients, policy_gradient.loss), static_argnums=1)


@pytest.mark.parametrize("loss_type", LOSS_TYPES[:-1])
def test_agrees_with_trl(loss_type):
    # `python make_losses.py OUT.npz SEED` makes the same for other inputs; GRPO_JAX_LOSSES=OUT.npz runs this on them.
    given = {name.removeprefix("inputs/"): GOLDEN[name] for name in GOLDEN.files if name.startswith("inputs/")}
    cases = [(i, *json.loads(case)) for i, case in enumerate(GOLDEN["cases"])]
    cases = [case for case in cases if case[1]["loss_type"] == loss_type]
    assert len(cases) >= 60
    golden_of = {name: GOLDEN[name] for name in ("loss", "gradient", "entropy_gradient", "metrics", "metric_names")}
    for i, fields, mask, advantages in cases:
        config = LossConfig(**fields)
        arrays = {name: np.float32(given[name]) for name in ("logprobs", "old_logprobs", "ref_logprobs", "entropy")}
        arrays |= dict(mask=given[f"mask/{mask}"], advantages=np.float32(given[f"advantages/{advantages}"]))
        if config.importance_sampling_mode is not None:
            arrays["correction"] = surrogates.sampler_correction(
                arrays["old_logprobs"], np.float32(given["sampler_logprobs"]), arrays["mask"], config
            )
        (value, metrics), gradients = value_and_gradients_jitted(arrays, config)
        golden = {name: array[i] for name, array in golden_of.items() if name != "metric_names"}
        message = f"{fields} {mask} {advantages}"
        np.testing.assert_allclose(value, golden["loss"], rtol=1e-5, atol=1e-7, err_msg=message)
        np.testing.assert_allclose(gradients[0], golden["gradient"], rtol=1e-5, atol=1e-7, err_msg=message)
        np.testing.assert_allclose(gradients[1], golden["entropy_gradient"], rtol=1e-5, atol=1e-8, err_msg=message)
        for name, expected in zip(golden_of["metric_names"], golden["metrics"], strict=True):
            if "clip_ratio" in name and (config.importance_sampling_level == "sequence" or config.delta):
                continue  # TRL averages over sequences, and counts after delta has bounded the ratio
            if name in metrics and not np.isnan(expected) and name != "vespo/phi_seq_mean":
                np.testing.assert_allclose(metrics[name], expected, rtol=1e-5, err_msg=f"{name} {message}")


@eager_or_jit
def test_arithmetic_by_hand(loss):
    # Two sequences, of three tokens and of one. Ratios 1, 1.5, 0.5 under A = 1, and 0.5 under A = -2; epsilon 0.2.
    # Surrogates: 1; min(1.5, 1.2) = 1.2, clipped; min(0.5, 0.8) = 0.5, not clipped; min(-1, -1.6) = -1.6, clipped.
    ratio = np.array([[1.0, 1.5, 0.5], [0.5, 9.0, 9.0]], np.float32)
    mask = np.array([[True, True, True], [True, False, False]])
    old = np.full((2, 3), -2.0, np.float32)
    arguments = (old + np.log(ratio), old, np.array([1.0, -2.0]), mask)
    expected = {
        "grpo": -((1 + 1.2 + 0.5) / 3 + -1.6 / 1) / 2,
        "bnpo": -(1 + 1.2 + 0.5 - 1.6) / 4,
        "dapo": -(1 + 1.2 + 0.5 - 1.6) / 4,
        "dr_grpo": -(1 + 1.2 + 0.5 - 1.6) / (2 * 9),
    }
    for loss_type, value in expected.items():
        result, metrics = loss(*arguments, config_of(loss_type))
        np.testing.assert_allclose(result, value, rtol=1e-6)
        np.testing.assert_allclose(metrics["loss"], value, rtol=1e-6)
        np.testing.assert_allclose(metrics["importance_ratio"], (1 + 1.5 + 0.5 + 0.5) / 4, rtol=1e-6)
        np.testing.assert_allclose(metrics["clip_ratio/low_mean"], 1 / 4)
        np.testing.assert_allclose(metrics["clip_ratio/high_mean"], 1 / 4)
        np.testing.assert_allclose(metrics["clip_ratio/region_mean"], 2 / 4)
        assert "kl" not in metrics and "entropy" not in metrics
    # With epsilon_high = 0.6 the second ratio is within the region: 1 + 1.5 + 0.5 - 1.6.
    np.testing.assert_allclose(loss(*arguments, config_of("dapo", epsilon_high=0.6))[0], -1.4 / 4, rtol=1e-6)


@eager_or_jit
def test_kl_and_entropy_by_hand(loss):
    # On policy and without advantages the surrogate is 0. The policy is e times as sure of one token as the reference
    # is (d = -1), half as sure of the other (d = log 2).
    logprobs = np.array([[-1.0, -1.0]], np.float32)
    arguments = (logprobs, logprobs, np.zeros(1), np.ones((1, 2), bool))
    ref = logprobs + np.array([[-1.0, np.log(2)]], np.float32)
    expected = {
        "k1": (1 - np.log(2)) / 2,
        "k2": (1 / 2 + np.log(2) ** 2 / 2) / 2,
        "k3": ((np.exp(-1) + 1 - 1) + (2 - np.log(2) - 1)) / 2,
    }
    for kind, kl in expected.items():
        config = LossConfig(beta=0.5, kl_estimator=kind, entropy_coef=0.1)
        value, metrics = loss(*arguments, config, ref_logprobs=ref, entropy=np.array([[1.0, 3.0]]))
        np.testing.assert_allclose(metrics["kl"], kl, rtol=1e-6)
        np.testing.assert_allclose(metrics["entropy"], 2.0, rtol=1e-6)
        np.testing.assert_allclose(value, 0.5 * kl - 0.1 * 2.0, rtol=1e-6)


def test_the_surrogate_is_ppos_minimum():
    ratio, advantages = np.meshgrid(np.linspace(0.1, 3, 30), [-2.0, -0.5, 0.0, 0.5, 2.0])
    expected = np.minimum(ratio * advantages, np.clip(ratio, 0.8, 1.28) * advantages)
    np.testing.assert_allclose(surrogates.clipped_surrogate(ratio, advantages, 0.2, 0.28), expected, rtol=1e-6)


@pytest.mark.parametrize("epsilon", [0.0, 0.2])
def test_the_first_update_has_the_whole_policy_gradient(epsilon):
    # At ratio 1 the loss is -A and its gradient -A * grad log p, however narrow the region: the edge is inside.
    gradient = jax.grad(lambda r: surrogates.clipped_surrogate(r, jnp.array([2.0, -3.0]), epsilon, epsilon).sum())
    np.testing.assert_array_equal(gradient(jnp.ones(2)), [2.0, -3.0])


def test_a_clipped_token_has_no_gradient():
    gradient = jax.grad(lambda r: surrogates.clipped_surrogate(r, jnp.array([1.0, 1.0, -1.0, -1.0]), 0.2, 0.2).sum())
    np.testing.assert_array_equal(gradient(jnp.array([1.3, 0.7, 1.3, 0.7])), [0.0, 1.0, -1.0, 0.0])


@pytest.mark.parametrize("kind, unbiased", [("k1", True), ("k2", False), ("k3", True)])
def test_kl_estimators_have_the_expectations_that_they_claim(kind, unbiased):
    policy, reference = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.3, 0.5])
    expectation = policy @ surrogates.kl_estimate(np.log(policy), np.log(reference), kind)
    exact = policy @ np.log(policy / reference)
    assert (abs(expectation - exact) < 1e-6) == unbiased


@pytest.mark.parametrize(
    "kind, target",
    [
        ("k1", lambda p, q: jnp.zeros(())),
        ("k2", lambda p, q: p @ jnp.log(p / q)),
        ("k3", lambda p, q: q @ jnp.log(q / p)),
    ],
)
def test_kl_estimators_have_the_gradients_that_they_claim(kind, target):
    logits, reference = jnp.array([0.3, -0.2, 1.0]), jnp.array([0.2, 0.3, 0.5])

    def on_average(logits):  # the policy samples the token, and the gradient does not flow through that
        sampled = jax.lax.stop_gradient(jax.nn.softmax(logits))
        return sampled @ surrogates.kl_estimate(jax.nn.log_softmax(logits), jnp.log(reference), kind)

    exact = jax.grad(lambda logits: target(jax.nn.softmax(logits), reference))(logits)
    np.testing.assert_allclose(jax.grad(on_average)(logits), exact, atol=1e-6)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_micro_batches_add_up_to_the_batch(loss_type):
    config, arrays = config_of(loss_type, beta=0.04, entropy_coef=0.01), batch()
    whole, gradients = value_and_gradients(jitted, arrays, config)
    counts = dict(num_tokens=arrays["mask"].sum(), num_sequences=16)
    parts = [
        value_and_gradients(jitted, {name: array[rows] for name, array in arrays.items()}, config, **counts)
        for rows in (slice(0, 4), slice(4, 9), slice(9, 16))
    ]
    total = functools.reduce(lambda x, y: jax.tree.map(jnp.add, x, y), [part[0] for part in parts])
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-6), total, whole)
    for i in (0, 1):
        pieces = np.concatenate([part[1][i] for part in parts])
        np.testing.assert_allclose(pieces, gradients[i], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_eight_devices_add_up_to_the_batch(loss_type):
    config, arrays = config_of(loss_type, beta=0.04, entropy_coef=0.01), batch()
    whole, gradients = value_and_gradients(jitted, arrays, config)
    shard = jax.pmap(
        lambda arrays: value_and_gradients(policy_gradient.loss, arrays, config, axis_name="devices"),
        axis_name="devices",
        devices=jax.devices("cpu")[:8],
    )
    values, pieces = shard({name: array.reshape(8, 2, *array.shape[1:]) for name, array in arrays.items()})
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x.sum(), y, rtol=2e-6), values, whole)
    for i in (0, 1):
        np.testing.assert_allclose(pieces[i].reshape(16, 5), gradients[i], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("loss_type", ["dapo", "vespo"])
def test_the_most_uncertain_tokens_are_those_of_the_whole_batch(loss_type):
    config, arrays = config_of(loss_type, top_entropy_quantile=0.3, entropy_coef=0.01), batch()
    mask, entropy = arrays["mask"], arrays["entropy"]
    chosen = policy_gradient.highest_entropy_tokens(entropy, mask, 0.3)
    np.testing.assert_array_equal(chosen, mask & (entropy >= np.quantile(entropy[mask], 0.7)))
    whole, gradients = value_and_gradients(jitted, arrays, config)
    assert not np.any(gradients[0][~chosen]) and np.any(gradients[0][chosen])
    np.testing.assert_array_equal(gradients[1] != 0, chosen)

    shard = jax.pmap(
        lambda arrays: value_and_gradients(policy_gradient.loss, arrays, config, axis_name="devices"),
        axis_name="devices",
        devices=jax.devices("cpu")[:8],
    )
    values, pieces = shard({name: array.reshape(8, 2, *array.shape[1:]) for name, array in arrays.items()})
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x.sum(), y, rtol=2e-6), values, whole)
    np.testing.assert_allclose(pieces[0].reshape(16, 5), gradients[0], rtol=1e-6, atol=1e-9)

    counts = dict(num_tokens=mask.sum(), num_sequences=16, num_high_entropy=chosen.sum())
    parts = [
        value_and_gradients(
            jitted, {name: array[rows] for name, array in arrays.items()}, config, high_entropy=chosen[rows], **counts
        )
        for rows in (slice(0, 4), slice(4, 9), slice(9, 16))
    ]
    for i in (0, 1):
        np.testing.assert_allclose(np.concatenate([p[1][i] for p in parts]), gradients[i], rtol=1e-6, atol=1e-9)


def test_reinforce_by_hand():
    # The mean over sequences of -A * sum log p, whatever sampled them: (-2 * -3 + 1 * -4) / 2, gradient -A / 2.
    logprobs, old, mask = np.array([[-1.0, -2.0], [-4.0, 9.0]]), np.full((2, 2), -5.0), [[True, True], [True, False]]
    arrays = dict(logprobs=logprobs, old_logprobs=old, advantages=np.array([2.0, -1.0]), mask=np.array(mask))
    value, gradient = jax.value_and_grad(
        lambda x: policy_gradient.loss(x, *list(arrays.values())[1:], config_of("reinforce"))[0]
    )(logprobs)
    np.testing.assert_allclose(value, (2 * 3 - 1 * 4) / 2)
    np.testing.assert_allclose(gradient, [[-1.0, -1.0], [0.5, 0.0]])


def test_two_sided_clipping_is_intellect_2s_minimum():
    ratio, advantages = np.meshgrid(np.linspace(0.1, 8, 60), [-2.0, -0.5, 0.0, 0.5, 2.0])
    expected = np.minimum(np.minimum(ratio, 4.0) * advantages, np.clip(ratio, 0.8, 1.28) * advantages)
    np.testing.assert_allclose(surrogates.clipped_surrogate(ratio, advantages, 0.2, 0.28, 4.0), expected, rtol=1e-6)


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_the_importance_ratio_makes_the_gradient_that_of_the_reverse_kl(kind):
    logits, reference = jnp.array([0.3, -0.2, 1.0]), jnp.array([0.2, 0.3, 0.5])

    def on_average(logits):
        sampled = jax.lax.stop_gradient(jax.nn.log_softmax(logits))
        logprobs = jax.nn.log_softmax(logits)
        kl = surrogates.kl_estimate(logprobs, jnp.log(reference), kind)
        return jnp.exp(sampled) @ (jnp.exp(logprobs - sampled) * kl)

    exact = jax.grad(lambda x: jax.nn.softmax(x) @ (jax.nn.log_softmax(x) - jnp.log(reference)))(logits)
    np.testing.assert_allclose(jax.grad(on_average)(logits), exact, atol=1e-6)


def test_gspo_has_one_ratio_for_a_sequence():
    old, mask = np.zeros((2, 3), np.float32), np.array([[True, True, False], [True, True, True]])
    ratio = surrogates.importance_ratio(np.log(np.array([[4.0, 1.0, 7.0], [1.0, 1.0, 8.0]])), old, mask, "sequence")
    np.testing.assert_allclose(ratio, [[2.0] * 3, [2.0] * 3], rtol=1e-6)  # sqrt(4 * 1), cbrt(1 * 1 * 8)


@eager_or_jit
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_masked_values_touch_neither_value_nor_gradient(loss, loss_type):
    config, arrays = config_of(loss_type, beta=0.04, entropy_coef=0.01), batch()
    mask = arrays["mask"]
    clean = value_and_gradients(loss, arrays, config)
    for poison in (np.nan, np.inf, -np.inf):
        poisoned = {
            name: np.where(mask if array.ndim == 2 else mask.any(axis=1), array, poison) if name != "mask" else mask
            for name, array in arrays.items()
        }
        jax.tree.map(np.testing.assert_array_equal, value_and_gradients(loss, poisoned, config), clean)
    assert np.all(np.asarray(clean[1][0])[~mask] == 0.0)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_a_batch_without_tokens_is_no_loss(loss_type):
    config, arrays = config_of(loss_type, beta=0.04, entropy_coef=0.01), batch()
    arrays["mask"] = np.zeros_like(arrays["mask"])
    (value, metrics), gradients = value_and_gradients(jitted, arrays, config)
    assert value == 0.0 and not any(metrics.values())
    assert not np.any(gradients[0]) and not np.any(gradients[1])


def test_an_empty_sequence_still_counts_as_a_sequence():
    # One sequence with the loss -1, one without a token: the mean over sequences is -1 / 2.
    zeros, mask = np.zeros((2, 1), np.float32), np.array([[True], [False]])
    assert policy_gradient.loss(zeros, zeros, np.ones(2), mask, LossConfig())[0] == -0.5


def test_advantages_may_be_given_per_token():
    arrays = batch()
    spread = arrays | {"advantages": np.repeat(arrays["advantages"][:, None], 5, axis=1)}
    config = LossConfig(beta=0.04)
    assert jitted(**arrays, config=config)[0] == jitted(**spread, config=config)[0]
    spread["advantages"][0, 0] += 1.0
    assert jitted(**arrays, config=config)[0] != jitted(**spread, config=config)[0]


def test_gradients_flow_through_the_trained_policy_alone():
    config, arrays = LossConfig(beta=0.04), batch()
    constants = ("old_logprobs", "advantages", "ref_logprobs")
    rest = {name: array for name, array in arrays.items() if name not in constants}
    gradients = jax.grad(lambda given: policy_gradient.loss(**given, **rest, config=config)[0])(
        {name: arrays[name] for name in constants}
    )
    assert not any(np.any(gradient) for gradient in gradients.values())


def test_half_precision_is_calculated_in_float32():
    arrays = batch()
    half = {name: jnp.asarray(array, jnp.bfloat16) if name != "mask" else array for name, array in arrays.items()}
    widened = {name: np.asarray(array, np.float32) if name != "mask" else array for name, array in half.items()}
    config = LossConfig(beta=0.04)
    value = jitted(**half, config=config)[0]
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, jitted(**widened, config=config)[0], rtol=1e-6)  # bfloat16 has 8 bits: 4e-3


def test_a_missing_input_or_wrong_shape_is_said_clearly():
    arrays = batch()
    four = [arrays[name] for name in ("logprobs", "old_logprobs", "advantages", "mask")]
    with pytest.raises(UserError, match=r"LossConfig.beta = 0.04 needs ref_logprobs"):
        policy_gradient.loss(*four, LossConfig(beta=0.04))
    with pytest.raises(UserError, match=r"entropy_coef = 0.1 needs the tokens' entropy"):
        policy_gradient.loss(*four, LossConfig(entropy_coef=0.1))
    with pytest.raises(AssertionError, match=r"must have shape \[batch, tokens\]"):
        policy_gradient.loss(four[0][0], *four[1:], LossConfig())
    with pytest.raises(AssertionError, match="shape"):
        policy_gradient.loss(four[0], four[1], four[2][:-1], four[3], LossConfig())
    with pytest.raises(UserError, match="kl_estimator = 'k4' is unknown"):
        surrogates.kl_estimate(four[0], four[1], "k4")
