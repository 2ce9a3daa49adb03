"""Advantages compared with the article's figures, TRL's code and float64 arithmetic; and their general properties."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from grpo_jax.advantages import compute_advantages, group_advantages
from grpo_jax.errors import UserError
from grpo_jax.experiment import AdvantageConfig, RewardConfig
from grpo_jax.rewards.scoring import score

GOLDEN = np.load(Path(__file__).parent / "golden" / "losses.npz")
SCALES, BASELINES = ("group", "batch", "whiten", "none"), ("mean", "leave_one_out", "none")
OPTIONS = ("scale", "baseline", "ddof", "axis_name")
jitted = jax.jit(group_advantages, static_argnames=OPTIONS)
eager_or_jit = pytest.mark.parametrize("advantages", [group_advantages, jitted], ids=["eager", "jit"])


def in_float64(rewards, mask=None, *, scale="group", baseline="mean", ddof=0):
    """The definition, one completion at a time."""
    r = np.asarray(rewards, np.float64)
    mask = np.ones(r.shape, bool) if mask is None else mask

    def std(x):
        return np.std(x, ddof=ddof) if len(x) > ddof else 0.0

    result = np.zeros(r.shape)
    for p, g in zip(*np.nonzero(mask), strict=True):
        others = [r[p, j] for j in range(r.shape[1]) if mask[p, j] and j != g]
        group = r[p][mask[p]]
        base = dict(mean=group.mean(), leave_one_out=np.mean(others) if others else r[p, g], none=0.0)[baseline]
        divisor = dict(group=std(group), batch=std(r[mask]), none=1.0, whiten=1.0)[scale]
        result[p, g] = (r[p, g] - base) / divisor if divisor > 0 else 0.0
    if scale == "whiten" and mask.any():
        divisor = std(result[mask])
        result[mask] = (result[mask] - result[mask].mean()) / divisor if divisor > 1e-12 else 0.0
    return result


@st.composite
def batches(draw, offsets=(0.0, 0.8, -1.0, 1e3, 1e6)):
    """Rewards [4, 6] as float32: multiples of a unit that ranges from 1e-6 to 1e6, above an offset; and a mask."""
    offset = draw(st.sampled_from(offsets))
    unit = draw(st.sampled_from([u for u in (1e-6, 1e-3, 0.1, 1.0, 1e3, 1e6) if u >= abs(offset) * 1e-6]))
    steps = draw(hnp.arrays(np.int32, (4, 6), elements=st.integers(-20, 20)))
    mask = draw(hnp.arrays(bool, (4, 6)))
    return (offset + unit * steps).astype(np.float32), mask


def tolerance(expected):
    return dict(rtol=2e-5, atol=2e-6 * max(1.0, np.abs(expected).max()) if np.abs(expected).max() > 1e-3 else 1e-10)


@eager_or_jit
def test_the_articles_group_of_eight(advantages):
    # FOUND, NOUDI, FOUND, "WORD ", CROWN, INDOM, DONUT, FROWN; secret POUND. Mean 3.4 / 8 = 0.425; population variance
    # (2 * 0.8^2 + 0.6^2 + 0 + 2 * 0.2^2 + 0.3^2 + 0.5^2) / 8 - 0.425^2 = 0.2575 - 0.180625 = 0.076875, std 0.27726.
    rewards = np.array([[0.8, 0.6, 0.8, 0.0, 0.2, 0.3, 0.5, 0.2]])
    printed = np.array([[1.3525, 0.6312, 1.3525, -1.5328, -0.8115, -0.4508, 0.2705, -0.8115]])
    np.testing.assert_allclose(advantages(rewards), printed, atol=5e-5)
    np.testing.assert_allclose(advantages(rewards), (rewards - 0.425) / 0.076875**0.5, rtol=1e-6)


@eager_or_jit
def test_arithmetic_by_hand(advantages):
    # Rewards 1, 2, 6: mean 3, deviations -2, -1, 3, squares 4 + 1 + 9 = 14.
    # Rewards 4, 5, 6: mean 5, deviations -1, 0, 1, squares 1 + 0 + 1 = 2.
    rewards = np.array([[1, 2, 6], [4, 5, 6]])
    deviations = np.array([[-2, -1, 3], [-1, 0, 1]])
    population, sample = np.array([[14 / 3], [2 / 3]]) ** 0.5, np.array([[14 / 2], [2 / 2]]) ** 0.5
    np.testing.assert_allclose(advantages(rewards, scale="none"), deviations, rtol=1e-6)
    np.testing.assert_allclose(advantages(rewards), deviations / population, rtol=1e-6)
    np.testing.assert_allclose(advantages(rewards, ddof=1), deviations / sample, rtol=1e-6)
    # All six rewards: mean 4, deviations -3, -2, 2, 0, 1, 2, squares 9 + 4 + 4 + 0 + 1 + 4 = 22.
    np.testing.assert_allclose(advantages(rewards, scale="batch"), deviations / (22 / 6) ** 0.5, rtol=1e-6)
    np.testing.assert_allclose(advantages(rewards, scale="batch", ddof=1), deviations / (22 / 5) ** 0.5, rtol=1e-6)
    # The others of 1 are 2 and 6 with mean 4; of 2 they are 1 and 6; of 6 they are 1 and 2.
    leave_one_out = [[1 - 4, 2 - 3.5, 6 - 1.5], [4 - 5.5, 5 - 5, 6 - 4.5]]
    np.testing.assert_allclose(advantages(rewards, scale="none", baseline="leave_one_out"), leave_one_out, rtol=1e-6)
    np.testing.assert_allclose(advantages(rewards, baseline="none"), rewards / population, rtol=1e-6)
    np.testing.assert_array_equal(advantages(rewards, scale="none", baseline="none"), rewards)
    assert advantages(rewards).dtype == jnp.float32


@eager_or_jit
@pytest.mark.parametrize("scale, baseline", [(s, b) for s in SCALES for b in BASELINES if (s, b) != ("none", "none")])
def test_equal_rewards_have_exactly_no_advantage(advantages, scale, baseline):
    for size in (1, 6, 7, 12):
        for reward in (0.8, 0.1, -0.7, 1 / 3, 1e6 / 3, 1e-7):
            result = advantages(np.full((3, size), reward), scale=scale, baseline=baseline)
            np.testing.assert_array_equal(result, 0.0, err_msg=f"{size} rewards of {reward}")


@eager_or_jit
def test_a_group_of_equal_rewards_has_none_beside_one_with_a_signal(advantages):
    rewards = np.array([[0.8] * 7, [0.8] * 6 + [0.3]])
    for scale in ("group", "batch", "none"):
        for baseline in ("mean", "leave_one_out"):
            result = np.asarray(advantages(rewards, scale=scale, baseline=baseline))
            np.testing.assert_array_equal(result[0], 0.0)
            assert np.all(result[1] != 0.0)


def test_rewards_that_differ_by_rounding_count_as_equal():
    rewards = np.array([[np.float32(0.3) + np.float32(0.4), 0.7, 0.7]], np.float32)
    assert rewards[0, 0] != rewards[0, 1], "in float32, 0.3 + 0.4 is not 0.7"
    for scale in SCALES:
        np.testing.assert_array_equal(group_advantages(rewards, scale=scale), 0.0)


@pytest.mark.parametrize("offset, unit", [(1e6, 0.5), (-1e6, 1.0), (0.0, 1e-6), (0.8, 1e-6), (0.0, 1e-30), (0.0, 1e30)])
def test_large_rewards_and_small_differences_keep_their_digits(offset, unit):
    rewards = (offset + unit * np.array([[0, 1, 2, 5]])).astype(np.float32)
    np.testing.assert_allclose(group_advantages(rewards), in_float64(rewards), rtol=1e-6, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(batch=batches(), ddof=st.sampled_from([0, 1]))
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("baseline", BASELINES)
def test_agrees_with_float64(scale, baseline, batch, ddof):
    rewards, mask = batch
    for m in (None, mask):
        options = dict(scale=scale, baseline=baseline, ddof=ddof)
        expected = in_float64(rewards, m, **options)
        np.testing.assert_allclose(jitted(rewards, mask=m, **options), expected, **tolerance(expected))


@settings(max_examples=30, deadline=None)
@given(batch=batches(offsets=(0.0,)), shift=st.integers(-4, 4), factor=st.sampled_from([2.0**-20, 0.5, 4.0, 2.0**20]))
def test_neither_a_shift_nor_a_unit_changes_anything(batch, shift, factor):
    rewards, mask = batch
    steps = np.round(rewards / max(np.abs(rewards).max(), 1e-9) * 64).astype(np.float32)  # shifts of these are exact
    for baseline in ("mean", "leave_one_out"):
        for scale in ("group", "batch"):
            before = jitted(steps, mask=mask, scale=scale, baseline=baseline)
            after = jitted((steps + shift) * factor, mask=mask, scale=scale, baseline=baseline)
            np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(batch=batches(offsets=(0.0, 0.8)), order=st.permutations(range(6)))
@pytest.mark.parametrize("scale", SCALES)
def test_the_order_within_a_group_does_not_matter(scale, batch, order):
    rewards, mask = batch
    before = np.asarray(jitted(rewards, mask=mask, scale=scale))
    after = jitted(rewards[:, order], mask=mask[:, order], scale=scale)
    np.testing.assert_allclose(after, before[:, order], **tolerance(before))


@settings(max_examples=30, deadline=None)
@given(batch=batches(offsets=(0.0, 0.8)))
def test_leave_one_out_is_the_mean_baseline_stretched(batch):
    rewards, _ = batch
    mean = np.asarray(jitted(rewards, scale="none"))
    leave_one_out = jitted(rewards, scale="none", baseline="leave_one_out")
    np.testing.assert_allclose(leave_one_out, mean * 6 / 5, **tolerance(mean))


@settings(max_examples=30, deadline=None)
@given(batch=batches(offsets=(0.0, 0.8)), poison=st.sampled_from([np.nan, np.inf, -np.inf, 1e30]))
@pytest.mark.parametrize("scale", ["group", "none"])
@pytest.mark.parametrize("baseline", BASELINES)
def test_a_masked_group_is_the_smaller_group(scale, baseline, batch, poison):
    rewards, mask = batch
    result = np.asarray(jitted(np.where(mask, rewards, poison), mask=mask, scale=scale, baseline=baseline))
    np.testing.assert_array_equal(result[~mask], 0.0)
    for r, m, row in zip(rewards, mask, result, strict=True):
        if m.any():
            alone = in_float64(r[m][None], scale=scale, baseline=baseline)[0]
            np.testing.assert_allclose(row[m], alone, **tolerance(alone))


@eager_or_jit
def test_a_wholly_masked_batch_is_all_zero(advantages):
    for scale in SCALES:
        for baseline in BASELINES:
            mask = np.zeros((2, 3), bool)
            result = advantages(np.full((2, 3), np.nan), scale=scale, baseline=baseline, mask=mask)
            np.testing.assert_array_equal(result, 0.0)


@eager_or_jit
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_reward_that_is_no_number_shows(advantages, bad):
    rewards = np.array([[1.0, bad, 3.0], [1.0, 2.0, 4.0]])
    for baseline in ("mean", "leave_one_out"):
        group = np.asarray(advantages(rewards, baseline=baseline))
        assert np.isnan(group[0]).all() and np.isfinite(group[1]).all()
        assert np.isnan(advantages(rewards, scale="batch", baseline=baseline)).all()
        unscaled = np.asarray(advantages(rewards, scale="none", baseline=baseline))
        assert not np.isfinite(unscaled[0]).any() and np.isfinite(unscaled[1]).all()


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_agrees_with_trl_but_for_its_epsilon(scale):
    # TRL divides by std + 1e-4, we divide by std. Its epsilon is removed here; nothing else differs.
    rewards, golden = GOLDEN["rewards"], GOLDEN[f"advantages_by_scale/{scale}"]
    std = np.nanstd(rewards, axis=None if scale == "batch" else 1, ddof=1, keepdims=True)
    epsilon = 1.0 if scale == "none" else (std + 1e-4) / np.where(std < 1e-9, 1, std)
    result = group_advantages(np.nan_to_num(rewards), scale=scale, ddof=1, mask=~np.isnan(rewards))
    np.testing.assert_allclose(result, golden * epsilon, rtol=1e-5, atol=2e-7)
    np.testing.assert_array_equal(result[1], 0.0)  # eight times 0.8


def test_gdpo_agrees_with_trl_but_for_its_epsilon():
    # Each reward is standardised in its group; the weighted sum is whitened over the batch. TRL's 1e-4 is negligible
    # compared with the std of the rewards (10^4). For the std of the sum it is removed by scaling both to the same std.
    rewards, golden, weights = GOLDEN["several_rewards"], GOLDEN["normalize_then_sum"], GOLDEN["reward_weights"]
    functions = {str(i): lambda i=i, **_: [None if np.isnan(r) else r for r in rewards[..., i].flat] for i in range(3)}
    arguments = dict.fromkeys(("prompts", "completions", "completion_ids"), [""] * 32)
    config = RewardConfig(weights={str(i): float(w) for i, w in enumerate(weights)}, combine="normalize_then_sum")
    scores = score(functions, arguments, config, group_size=8)
    for ddof in (0, 1):
        result = np.asarray(group_advantages(np.reshape(scores.advantage_rewards, (4, 8)), scale="whiten", ddof=ddof))
        np.testing.assert_allclose(result.std(ddof=ddof), 1, rtol=1e-6)
    np.testing.assert_allclose(result, golden / golden.std(ddof=1), rtol=1e-5, atol=1e-6)


def test_reinforce_plus_plus_by_hand():
    # Rewards 1, 3 and 0, 8: mean 3, squares 4 + 0 + 9 + 25 = 38. Minus the groups' means: -1, 1, -4, 4, squares 34.
    rewards = np.array([[1.0, 3.0], [0.0, 8.0]])
    deviations = np.array([[-2, 0], [-3, 5]]) / (38 / 4) ** 0.5
    np.testing.assert_allclose(group_advantages(rewards, baseline="none", scale="whiten"), deviations, rtol=1e-6)
    centred = np.array([[-1, 1], [-4, 4]]) / (34 / 4) ** 0.5
    np.testing.assert_allclose(group_advantages(rewards, scale="whiten"), centred, rtol=1e-6)
    # Lite PPO divides by the std of the rewards instead, which includes the difference between the groups.
    lite = np.array([[-1, 1], [-4, 4]]) / (38 / 4) ** 0.5
    np.testing.assert_allclose(group_advantages(rewards, scale="batch"), lite, rtol=1e-6)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("baseline", BASELINES)
def test_eight_devices_agree_with_one(scale, baseline):
    rng = np.random.default_rng(0)
    rewards = rng.normal(size=(16, 5)).astype(np.float32)
    mask = rng.random((16, 5)) < 0.8
    mask[2:4] = False  # no completion of the second device counts
    options = dict(scale=scale, baseline=baseline, ddof=1)
    shard = jax.pmap(
        lambda r, m: group_advantages(r, mask=m, axis_name="devices", **options),
        axis_name="devices",
        devices=jax.devices("cpu")[:8],
    )
    sharded = shard(rewards.reshape(8, 2, 5), mask.reshape(8, 2, 5)).reshape(16, 5)
    np.testing.assert_allclose(sharded, jitted(rewards, mask=mask, **options), rtol=1e-6, atol=1e-6)


def test_a_wrong_shape_or_option_is_said_clearly():
    with pytest.raises(AssertionError, match=r"rewards must have shape \[prompts, group size\]"):
        group_advantages(np.ones(8))
    with pytest.raises(AssertionError, match="mask must have the shape of rewards"):
        group_advantages(np.ones((2, 4)), mask=np.ones((4, 2), bool))
    with pytest.raises(UserError, match="scale = 'grup' is unknown"):
        group_advantages(np.ones((2, 4)), scale="grup")
    with pytest.raises(UserError, match="baseline = 'median' is unknown"):
        group_advantages(np.ones((2, 4)), baseline="median")


def test_compiles_within_a_larger_program():
    step = jax.jit(jax.vmap(functools.partial(group_advantages, ddof=1)))
    rewards = np.arange(12.0).reshape(2, 2, 3)
    np.testing.assert_allclose(step(rewards), np.tile([-1.0, 0.0, 1.0], (2, 2, 1)), atol=1e-6)


# The KL in the reward


def with_kl(config, rewards, kl, token_mask, sample_mask=None):
    rewards, token_mask = np.array(rewards, np.float32), np.array(token_mask, bool)
    sample_mask = np.ones(rewards.shape, bool) if sample_mask is None else np.array(sample_mask)
    return np.asarray(
        compute_advantages(config, rewards, sample_mask, token_mask=token_mask, kl=np.array(kl, np.float32))
    )


def test_the_kl_of_a_completion_is_taken_from_its_reward():
    # RLOO by hand. Sums of the KL where the mask is True: 0.5 and 2, so rewards are 1 - 0.1 * 0.5 = 0.95 and
    # 0 - 0.1 * 2 = -0.2; each less the other's.
    config = AdvantageConfig("none", "leave_one_out", kl_coef=0.1)
    found = with_kl(config, [[1, 0]], [[[0.2, 0.3, 9], [1, 1, 0]]], [[[1, 1, 0], [1, 1, 1]]])
    np.testing.assert_allclose(found, [[0.95 + 0.2, -0.2 - 0.95]], atol=1e-6)


def test_a_tokens_advantage_is_less_by_the_kl_from_there_on():
    # REINFORCE++ by hand: 1 - 0.1 * (0.2 + 0.3), 1 - 0.1 * 0.3; and 0 - 0.1 * (1 + 1), 0 - 0.1 * 1. The third token of
    # the first completion is masked: it counts neither as KL nor as a token.
    kl, mask = [[[0.2, 0.3, 9]], [[1, 1, 0]]], [[[1, 1, 0]], [[1, 1, 0]]]
    plain = with_kl(AdvantageConfig("none", "none", kl_coef=0.1, kl_level="token"), [[1], [0]], kl, mask)
    np.testing.assert_allclose(plain, [[[0.95, 0.97, 0]], [[-0.2, -0.1, 0]]], atol=1e-6)
    values = np.array([0.95, 0.97, -0.2, -0.1])
    scaled = (values - values.mean()) / values.std()
    found = with_kl(AdvantageConfig("whiten", "none", kl_coef=0.1, kl_level="token"), [[1], [0]], kl, mask)
    np.testing.assert_allclose(found[[0, 0, 1, 1], 0, [0, 1, 0, 1]], scaled, rtol=1e-5)
    assert (found[..., 2] == 0).all()


@pytest.mark.parametrize("ddof", [0, 1])
def test_the_divisor_is_the_configs_also_with_the_kl_in_the_reward(ddof):
    # Rewards less the KL are 1 - 0.5 * 2 = 0 and 1 - 0.5 * 0 = 1: half a unit around their mean, with the population's
    # standard deviation 1/2 and the sample's 1/sqrt(2). With one token each, tokens are scaled as completions are.
    kl, mask, expected = [[[2], [0]]], [[[1], [1]]], np.array([-1, 1]) / (1, 2**0.5)[ddof]
    for scale in ("group", "batch", "whiten"):
        found = with_kl(AdvantageConfig(scale, ddof=ddof, kl_coef=0.5), [[1, 1]], kl, mask)
        np.testing.assert_allclose(found, [expected], rtol=1e-6)
    config = AdvantageConfig("whiten", ddof=ddof, kl_coef=0.5, kl_level="token")
    np.testing.assert_allclose(with_kl(config, [[1, 1]], kl, mask)[..., 0], [expected], rtol=1e-6)


def test_a_completion_that_was_dropped_counts_in_no_kl_either():
    config = AdvantageConfig("none", "mean", kl_coef=1.0)
    found = with_kl(config, [[1, 0, 0]], np.ones((1, 3, 1)) * [[[1], [2], [50]]], np.ones((1, 3, 1)), [[1, 1, 0]])
    np.testing.assert_allclose(found, [[1, -1, 0]], atol=1e-6)  # rewards 0 and -2, whose mean is -1
