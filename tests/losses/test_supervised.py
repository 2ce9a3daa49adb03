"""The supervised loss: worked by hand, over shards, and with masked values that must have no effect."""

import jax
import numpy as np
import pytest

from grpo_jax.losses import supervised

LOGPROBS = np.array([[-1.0, -2.0, -9.0], [-4.0, -9.0, -9.0]], np.float32)
MASK = np.array([[True, True, False], [True, False, False]])
eager_or_jit = pytest.mark.parametrize("loss", [supervised.loss, jax.jit(supervised.loss)], ids=["eager", "jit"])


@eager_or_jit
def test_is_the_mean_over_learned_tokens(loss):
    # (1 + 2 + 4) / 3 tokens, not the mean of the rows' means, (1.5 + 4) / 2.
    value, metrics = loss(LOGPROBS, MASK)
    np.testing.assert_allclose(value, 7 / 3, rtol=1e-6)
    np.testing.assert_allclose(metrics["loss"], 7 / 3, rtol=1e-6)
    assert metrics["num_tokens"] == 3


@eager_or_jit
def test_masked_values_touch_neither_value_nor_gradient(loss):
    for poison in (np.nan, -np.inf, np.inf):
        value, gradient = jax.value_and_grad(lambda x: loss(x, MASK)[0])(np.where(MASK, LOGPROBS, poison))
        np.testing.assert_allclose(value, 7 / 3, rtol=1e-6)
        np.testing.assert_allclose(gradient, -1 / 3 * MASK, rtol=1e-6)


@eager_or_jit
def test_nothing_to_learn_is_no_loss(loss):
    assert loss(LOGPROBS, np.zeros_like(MASK))[0] == 0.0


def test_micro_batches_add_up_to_the_batch():
    first, second = (supervised.loss(LOGPROBS[i : i + 1], MASK[i : i + 1], num_tokens=3) for i in (0, 1))
    np.testing.assert_allclose(first[0], (1 + 2) / 3, rtol=1e-6)
    np.testing.assert_allclose(second[0], 4 / 3, rtol=1e-6)
    assert first[1]["num_tokens"] + second[1]["num_tokens"] == 3


def test_eight_devices_add_up_to_the_batch():
    rng = np.random.default_rng(0)
    logprobs, mask = rng.normal(size=(16, 5)).astype(np.float32), rng.random((16, 5)) < 0.5
    shard = jax.pmap(
        jax.value_and_grad(lambda x, m: supervised.loss(x, m, axis_name="devices")[0]),
        axis_name="devices",
        devices=jax.devices("cpu")[:8],
    )
    values, gradients = shard(logprobs.reshape(8, 2, 5), mask.reshape(8, 2, 5))
    whole, gradient = jax.value_and_grad(lambda x: supervised.loss(x, mask)[0])(logprobs)
    np.testing.assert_allclose(values.sum(), whole, rtol=1e-6)
    np.testing.assert_allclose(gradients.reshape(16, 5), gradient, rtol=1e-6)


def test_a_wrong_shape_is_said_clearly():
    with pytest.raises(AssertionError, match="rank"):
        supervised.loss(LOGPROBS[0], MASK[0])
    with pytest.raises(AssertionError, match="shape"):
        supervised.loss(LOGPROBS, MASK[:, :2])
