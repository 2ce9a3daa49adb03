"""The losses on preference pairs: compared with TRL's code, worked by hand, over shards, and with masked values."""

import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest

from grpo_jax.experiment import DPOConfig
from grpo_jax.losses.preference import bradley_terry_loss, dpo_loss

GOLDEN = np.load(os.environ.get("GRPO_JAX_PREFERENCES", Path(__file__).parents[1] / "golden" / "preferences.npz"))
CASES = [json.loads(case) for case in GOLDEN["cases"]]
jitted = jax.jit(dpo_loss, static_argnames=("config", "axis_name"))
eager_or_jit = pytest.mark.parametrize("loss", [dpo_loss, jitted], ids=["eager", "jit"])


def rows(pairs: np.ndarray) -> np.ndarray:
    """Converts [N, 2, ...] to alternating rows [2N, ...], in float32 unless it is a mask."""
    flat = pairs.reshape(-1, *pairs.shape[2:])
    return flat if flat.dtype == bool else np.float32(flat)


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda i: "-".join(map(str, CASES[i].values())))
def test_dpo_agrees_with_trl(number):
    # `python make_preferences.py OUT.npz SEED` makes other inputs; GRPO_JAX_PREFERENCES=OUT.npz runs the test on them.
    given = [rows(GOLDEN[name]) for name in ("logprobs", "ref_logprobs", "mask")]
    config = DPOConfig(**CASES[number])
    (value, metrics), gradient = jax.value_and_grad(lambda x: dpo_loss(x, *given[1:], config), has_aux=True)(given[0])
    np.testing.assert_allclose(value, GOLDEN["dpo/loss"][number], rtol=1e-5)
    np.testing.assert_allclose(gradient, rows(GOLDEN["dpo/gradient"][number]), rtol=1e-5, atol=1e-7)
    for name, expected in zip(GOLDEN["metric_names"], GOLDEN["dpo/metrics"][number], strict=True):
        np.testing.assert_allclose(metrics[name], expected, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("number", range(3))
def test_the_reward_models_loss_agrees_with_trl(number):
    coefficient = float(GOLDEN["coefficients"][number])
    (value, metrics), gradient = jax.value_and_grad(
        lambda x: bradley_terry_loss(x, center_rewards_coefficient=coefficient), has_aux=True
    )(rows(GOLDEN["rewards"]))
    np.testing.assert_allclose(value, GOLDEN["reward_model/loss"][number], rtol=1e-5)
    np.testing.assert_allclose(gradient, rows(GOLDEN["reward_model/gradient"][number]), rtol=1e-5, atol=1e-7)
    found = [metrics["rewards/accuracies"], metrics["rewards/margins"]]
    np.testing.assert_allclose(found, GOLDEN["reward_model/metrics"][number], rtol=1e-5)


@eager_or_jit
def test_arithmetic_by_hand(loss):
    # log p/p_ref: chosen 0.3 + 0.1 = 0.4 over two tokens, rejected -0.5 over one; the margin is 0.9.
    logprobs = np.array([[-1.0, -2.0], [-3.0, np.nan]], np.float32)
    ref_logprobs = np.array([[-1.3, -2.1], [-2.5, np.inf]], np.float32)
    mask = np.array([[True, True], [True, False]])
    right, wrong = np.log1p(np.exp(-0.5 * 0.9)), np.log1p(np.exp(0.5 * 0.9))  # -log sigmoid(±beta margin), beta 0.5
    expected = {
        DPOConfig(0.5): right,
        DPOConfig(0.5, label_smoothing=0.2): 0.8 * right + 0.2 * wrong,
        DPOConfig(0.5, "robust", 0.2): (0.8 * right - 0.2 * wrong) / 0.6,
        DPOConfig(0.5, "ipo"): (0.4 / 2 + 0.5 / 1 - 1) ** 2,
    }
    for config, value in expected.items():
        (found, metrics), gradient = jax.value_and_grad(
            lambda x, config=config: loss(x, ref_logprobs, mask, config), has_aux=True
        )(logprobs)
        np.testing.assert_allclose(found, value, rtol=1e-5)
        np.testing.assert_allclose(metrics["rewards/chosen"], 0.2, rtol=1e-5)
        np.testing.assert_allclose(metrics["rewards/rejected"], -0.25, rtol=1e-5)
        assert np.isfinite(gradient).all() and gradient[1, 1] == 0 and gradient[0, 0] < 0 < gradient[1, 0]


def test_a_tie_is_no_correct_pair():
    # An untrained policy is its own reference: every margin is 0, and none of its pairs is right.
    logprobs, mask = np.full((4, 3), -1.0, np.float32), np.ones((4, 3), bool)
    assert dpo_loss(logprobs, logprobs, mask, DPOConfig())[1]["rewards/accuracies"] == 0
    assert bradley_terry_loss(np.array([0.5, 0.5, 2.0, 1.0]))[1]["rewards/accuracies"] == 0.5


def test_robust_dpo_is_unbiased_under_flipped_labels():
    # Its mean over labels that are wrong with probability 0.2 is the loss of the correct labels; cDPO's mean is not.
    rng = np.random.default_rng(0)
    logprobs, ref_logprobs = rng.normal(size=(2, 2, 4)).astype(np.float32)
    mask = np.ones((2, 4), bool)

    def expected(config):
        right, wrong = (dpo_loss(logprobs[o], ref_logprobs[o], mask, config)[0] for o in ([0, 1], [1, 0]))
        return 0.8 * right + 0.2 * wrong

    clean = dpo_loss(logprobs, ref_logprobs, mask, DPOConfig(1.0))[0]
    np.testing.assert_allclose(expected(DPOConfig(1.0, "robust", 0.2)), clean, rtol=1e-5)
    assert abs(expected(DPOConfig(1.0, "sigmoid", 0.2)) - clean) > 0.01


def batch(num_pairs: int = 16):
    rng = np.random.default_rng(1)
    logprobs = -rng.exponential(size=(2 * num_pairs, 5)).astype(np.float32)
    ref_logprobs = logprobs + rng.normal(0, 0.5, logprobs.shape).astype(np.float32)
    mask = np.arange(5) < rng.integers(1, 6, (2 * num_pairs, 1))
    return logprobs, ref_logprobs, mask, rng.random(num_pairs) < 0.7


@pytest.mark.parametrize("config", [DPOConfig(), DPOConfig(0.3, "robust", 0.1), DPOConfig(0.3, "ipo")])
def test_micro_batches_and_eight_devices_add_up_to_the_batch(config):
    logprobs, ref_logprobs, mask, pairs = batch()

    def loss(x, r, m, p, **options):
        return dpo_loss(x, r, m, config, pairs=p, **options)

    (whole, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(logprobs, ref_logprobs, mask, pairs)
    cut = [x.reshape(8, -1, *x.shape[1:]) for x in (logprobs, ref_logprobs, mask, pairs)]
    parts = [loss(*piece, num_pairs=pairs.sum()) for piece in zip(*cut, strict=True)]
    np.testing.assert_allclose(sum(value for value, _ in parts), whole, rtol=1e-5)
    shard = jax.pmap(
        jax.value_and_grad(lambda *given: loss(*given, axis_name="devices"), has_aux=True),
        axis_name="devices",
        devices=jax.devices("cpu")[:8],
    )
    (values, sharded), gradients = shard(*cut)
    np.testing.assert_allclose(values.sum(), whole, rtol=1e-5)
    np.testing.assert_allclose(gradients.reshape(gradient.shape), gradient, rtol=1e-5, atol=1e-8)
    for name, value in metrics.items():
        np.testing.assert_allclose(sharded[name].sum(), value, rtol=1e-5, err_msg=name)


def test_a_pair_that_does_not_count_touches_nothing():
    logprobs, ref_logprobs, mask, pairs = batch()
    expected = dpo_loss(logprobs[np.repeat(pairs, 2)], ref_logprobs[np.repeat(pairs, 2)], mask[np.repeat(pairs, 2)],
                        DPOConfig())[0]  # fmt: skip
    np.testing.assert_allclose(dpo_loss(logprobs, ref_logprobs, mask, DPOConfig(), pairs=pairs)[0], expected, rtol=1e-6)
    assert dpo_loss(logprobs, ref_logprobs, mask, DPOConfig(), pairs=0 * pairs)[0] == 0
    scores = np.arange(32.0)  # every chosen completion loses by 1
    np.testing.assert_allclose(bradley_terry_loss(scores, pairs=pairs)[0], np.log1p(np.e), rtol=1e-6)
