"""GAE, the KL penalty and the critic's loss, each worked by hand; and over shards."""

import jax
import numpy as np
import pytest

from grpo_jax.losses.value import gae, token_rewards, value_loss

NAN = np.nan


def test_the_reward_comes_with_the_last_token_and_every_token_pays_for_the_kl():
    # 0.1 * (log p - log p_ref): differences of 0.5 and -0.2 nats. Row 2: its middle token is an environment's.
    logprobs = np.array([[-1.0, -2.0, NAN], [-1.0, NAN, -3.0]])
    ref_logprobs = np.array([[-1.5, -1.8, NAN], [-1.0, NAN, -2.0]])
    mask = np.array([[True, True, False], [True, False, True]])
    rewards = token_rewards(np.array([1.0, 2.0]), logprobs, ref_logprobs, mask, 0.1)
    np.testing.assert_allclose(rewards, [[-0.05, 1 + 0.02, 0], [0, 0, 2 + 0.1]], atol=1e-6)
    nothing = token_rewards(np.array([7.0, 2.0]), logprobs, ref_logprobs, mask & [[False], [True]], 0.1)
    np.testing.assert_allclose(nothing[0], 0)  # a row without a token has no reward


@pytest.mark.parametrize("function", [gae, jax.jit(gae, static_argnums=(3, 4))], ids=["eager", "jit"])
def test_gae_by_hand(function):
    # gamma 0.5, lambda 0.8. Row one, rewards 1, 0, 2 and values 0.4, 0.2, 0.6, backwards:
    #   delta_2 = 2 - 0.6 = 1.4                  A_2 = 1.4
    #   delta_1 = 0 + 0.5 * 0.6 - 0.2 = 0.1      A_1 = 0.1 + 0.4 * 1.4 = 0.66
    #   delta_0 = 1 + 0.5 * 0.2 - 0.4 = 0.7      A_0 = 0.7 + 0.4 * 0.66 = 0.964
    # Row two: an environment's token is between its two steps, and padding is after them.
    #   A_2 = 2 - 0.6 = 1.4;  delta_0 = 1 + 0.5 * 0.6 - 0.4 = 0.9, A_0 = 0.9 + 0.4 * 1.4 = 1.46
    rewards = np.array([[1.0, 0, 2, NAN], [1, NAN, 2, NAN]])
    values = np.array([[0.4, 0.2, 0.6, NAN], [0.4, NAN, 0.6, NAN]])
    mask = np.array([[True, True, True, False], [True, False, True, False]])
    advantages, returns = function(rewards, values, mask, 0.5, 0.8)
    np.testing.assert_allclose(advantages, [[0.964, 0.66, 1.4, 0], [1.46, 0, 1.4, 0]], rtol=1e-5)
    np.testing.assert_allclose(returns, [[1.364, 0.86, 2.0, 0], [1.86, 0, 2.0, 0]], rtol=1e-5)


def test_the_ends_of_lambda_are_the_reward_to_go_and_one_step():
    rng = np.random.default_rng(0)
    rewards, values = rng.normal(size=(2, 3, 5))
    mask = np.arange(5) < np.array([[5], [2], [0]])
    rewards, values = rewards * mask, values * mask
    to_go = rewards[:, ::-1].cumsum(1)[:, ::-1] * mask
    np.testing.assert_allclose(gae(rewards, values, mask, 1.0, 1.0)[1], to_go, rtol=1e-4, atol=1e-6)
    after = np.pad(values, ((0, 0), (0, 1)))[:, 1:]
    expected = (rewards + 0.9 * after - values) * mask
    np.testing.assert_allclose(gae(rewards, values, mask, 0.9, 0.0)[0], expected, rtol=1e-4, atol=1e-6)


def test_the_critics_loss_by_hand():
    # Old values 0, range 0.2. Value 0.5 for a return of 1: clipped to 0.2, whose error 0.64 is larger than 0.25 and has
    # no gradient. Value 0.1, within the range: 0.01 both ways. Value 0.9 for a return of 0.1: 0.64 is larger than 0.01.
    values, returns = np.array([[0.5, 0.1, 0.9, NAN]], np.float32), np.array([[1.0, 0.2, 0.1, NAN]], np.float32)
    mask = np.array([[True, True, True, False]])
    arguments = np.zeros((1, 4), np.float32), returns, mask
    (value, metrics), gradient = jax.value_and_grad(lambda x: value_loss(x, *arguments, 0.2), has_aux=True)(values)
    np.testing.assert_allclose(value, 0.5 * (0.64 + 0.01 + 0.64) / 3, rtol=1e-5)
    np.testing.assert_allclose(gradient, [[0, -0.1 / 3, 0.8 / 3, 0]], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(metrics["value_clip_ratio"], 1 / 3, rtol=1e-6)
    unclipped, _ = value_loss(values, *arguments, None)
    np.testing.assert_allclose(unclipped, 0.5 * (0.25 + 0.01 + 0.64) / 3, rtol=1e-5)


def test_eight_devices_and_micro_batches_add_up_to_the_batch():
    rng = np.random.default_rng(0)
    values, old_values, returns = rng.normal(size=(3, 16, 5)).astype(np.float32)
    mask = rng.random((16, 5)) < 0.5
    whole, gradient = jax.value_and_grad(lambda x: value_loss(x, old_values, returns, mask, 0.3)[0])(values)
    cut = [x.reshape(8, 2, 5) for x in (values, old_values, returns, mask)]
    parts = [value_loss(*piece, 0.3, num_tokens=mask.sum())[0] for piece in zip(*cut, strict=True)]
    np.testing.assert_allclose(sum(parts), whole, rtol=1e-5)
    shard = jax.pmap(
        jax.value_and_grad(lambda *given: value_loss(*given, 0.3, axis_name="devices")[0]),
        axis_name="devices",
        devices=jax.devices("cpu")[:8],
    )
    shares, gradients = shard(*cut)
    np.testing.assert_allclose(shares.sum(), whole, rtol=1e-5)
    np.testing.assert_allclose(gradients.reshape(16, 5), gradient, rtol=1e-5, atol=1e-8)
