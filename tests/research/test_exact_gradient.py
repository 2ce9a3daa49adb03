"""The estimators' means and variances, over every batch: who is unbiased, and whose bias has which sign."""

from dataclasses import replace

import numpy as np
import pytest

from grpo_jax.errors import UserError
from grpo_jax.experiment import AdvantageConfig, LossConfig
from grpo_jax.research.exact_gradient import (
    Estimator,
    Moments,
    compare,
    completions,
    every_batch,
    exact_moments,
    family,
    make_game,
    probabilities,
    sampled_moments,
    true_gradient,
)

G = 3
FAMILY = family(horizon=2)


@pytest.fixture(scope="module")
def game():
    return make_game(vocabulary=3, horizon=2, num_prompts=1)


def test_every_completion_is_listed_once_and_its_probabilities_add_up(game):
    # Of two tokens and the end: the end alone, and each token followed by any of three.
    tokens, _, mask = completions(3, 2)
    assert [tuple(t[m]) for t, m in zip(tokens, mask, strict=True)] == [
        (0,), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2)
    ]  # fmt: skip
    assert len(completions(3, 3)[0]) == 1 + 2 + 4 * 3
    np.testing.assert_allclose(probabilities(game, game.logits).sum(-1), 1, rtol=1e-6)


def test_the_gradient_of_a_bandit_worked_by_hand():
    # One token: the gradient of sum p r with respect to a logit is p (r - mean reward).
    bandit = make_game(vocabulary=4, horizon=1, num_prompts=1)
    p, r = np.asarray(probabilities(bandit, bandit.logits))[0], bandit.rewards[0]
    np.testing.assert_allclose(true_gradient(bandit)[0, 0], p * (r - p @ r), atol=1e-7)


@pytest.mark.parametrize(
    "name, factor",
    [
        ("REINFORCE, no baseline", 1.0),
        ("RLOO", 1.0),
        ("REINFORCE, group mean", (G - 1) / G),  # a reward is part of its own baseline
        ("Dr. GRPO", (G - 1) / G / 2),  # and divided by the longest length
    ],
)
def test_the_unbiased_estimators_have_the_true_gradient_as_their_mean(game, name, factor):
    mean = exact_moments(game, FAMILY[name], G).mean
    np.testing.assert_allclose(mean, factor * true_gradient(game), atol=1e-6)


@pytest.mark.parametrize("name, unbiased", [("RLOO", True), ("GRPO", False)])
def test_a_sampled_estimate_lies_within_its_interval_of_the_exact_one(game, name, unbiased):
    sampled, exact = sampled_moments(game, FAMILY[name], G, samples=20_000), exact_moments(game, FAMILY[name], G)
    error = np.where(sampled.error > 0, sampled.error, np.inf)
    assert np.abs((sampled.mean - exact.mean) / error).max() < 4
    np.testing.assert_allclose(sampled.variance, exact.variance, rtol=0.05)
    truth = true_gradient(game)
    assert (np.abs((sampled.mean - truth) / error).max() < 4) == unbiased


def test_a_baseline_lowers_the_variance_where_rewards_have_an_offset(game):
    raised = replace(game, rewards=game.rewards + 5)
    without, rloo = (exact_moments(raised, FAMILY[name], G) for name in ("REINFORCE, no baseline", "RLOO"))
    np.testing.assert_allclose(without.mean, rloo.mean, atol=1e-5)
    assert rloo.variance < without.variance / 10


def test_grpo_prefers_short_right_and_long_wrong_answers():
    # (Dr. GRPO, 2503.20783, section 3.1.) The first token decides whether the answer is right, so whether it ends there
    # (token 0) has no bearing on the reward: its gradient is 0 after the right token (1) and after the wrong one (2).
    game = make_game(vocabulary=3, horizon=3, num_prompts=1)
    game = replace(game, rewards=(game.tokens[:, 0] == 1).astype(np.float32)[None])
    after_right, after_wrong = (game.prefixes[game.tokens[:, 0] == token][0, 1] for token in (1, 2))
    np.testing.assert_allclose(true_gradient(game)[0, 1:], 0, atol=1e-7)
    grpo, dr_grpo = (exact_moments(game, family(3)[name], 2).mean[0] for name in ("GRPO", "Dr. GRPO"))
    assert grpo[after_right, 0] > 0.002 and grpo[after_wrong, 0] < -0.002
    np.testing.assert_allclose(dr_grpo[1:], 0, atol=1e-6)


def test_dividing_by_the_groups_spread_weighs_hard_prompts_more():
    # (Dr. GRPO, section 3.1: "question-level difficulty bias".) Prompts solved half of the time and rarely, as bandits.
    game = make_game(vocabulary=3, horizon=1, num_prompts=2)
    logits = np.log(np.array([[[0.5, 0.3, 0.2]], [[0.05, 0.55, 0.4]]], np.float32))
    game = replace(game, logits=logits, behaviour=logits, rewards=np.array([[1.0, 0, 0], [1.0, 0, 0]], np.float32))
    weights = {}
    for scale in ("group", "none"):
        estimator = Estimator(AdvantageConfig(scale=scale), LossConfig("reinforce"))
        found = compare(game, exact_moments(game, estimator, 6))
        weights[scale] = found["weight 1"] / found["weight 0"]
    assert weights["none"] == pytest.approx(1, abs=1e-4)
    assert weights["group"] > 1.1


def test_the_ratio_makes_up_for_a_sampler_that_has_drifted():
    # After one token there is no further one whose ratio could be missing: with every bound far away the ratio, as
    # CISPO's weight or in the surrogate, gives the true gradient, and REINFORCE, which has none, does not.
    game = make_game(vocabulary=3, horizon=1, num_prompts=1, drift=0.7)
    game = replace(game, rewards=np.array([[1.0, 0.6, 0.0]], np.float32))
    advantages = AdvantageConfig(scale="none", baseline="none")
    far = dict(epsilon=1.0, epsilon_high=100.0)
    for loss in (LossConfig("dapo", **far), LossConfig("cispo", epsilon_high=100.0), LossConfig("grpo", **far)):
        mean = exact_moments(game, Estimator(advantages, loss), 2).mean
        np.testing.assert_allclose(mean, true_gradient(game), atol=1e-6)
    off = compare(game, exact_moments(game, Estimator(advantages, LossConfig("reinforce")), 2))
    assert off["bias"] > 0.05


def test_too_many_batches_to_list_are_refused():
    with pytest.raises(UserError, match="batches to list, more than 2,000,000: sample them instead"):
        exact_moments(make_game(3, 3, 2), FAMILY["GRPO"], 8)


# The comparison itself -----------------------------------------------------------------------------------------------


def test_what_is_said_of_an_estimator_by_hand():
    """Its mean is 3 times the truth of prompt 0, and once that of prompt 1; further parts are 0."""
    game = make_game(vocabulary=3, horizon=2, num_prompts=2, seed=1)
    truth = true_gradient(game).astype(np.float64)
    first, second = ((truth[p] ** 2).sum() for p in (0, 1))
    mean = np.stack([3 * truth[0], truth[1]])
    found = compare(game, Moments(mean, np.full_like(mean, 0.01), 4.0))
    scale = (3 * first + second) / (first + second)
    excess = np.stack([(3 / scale - 1) * truth[0], (1 / scale - 1) * truth[1]])
    size = np.sqrt(first + second)
    lengths = true_gradient(game, np.tile(game.mask.sum(-1), (2, 1))).astype(np.float64)
    assert found == pytest.approx(
        {
            "scale": scale,
            "scale error": 1.96 * 0.01 * size / (first + second),
            "bias": np.linalg.norm(excess) / size,
            "bias error": 1.96 * 0.01 * np.sqrt(mean.size) / scale / size,
            "noise": 2 / np.linalg.norm(mean),
            "length": (excess * lengths).sum() / size / np.linalg.norm(lengths),
            "weight 0": 3 / scale,
            "weight 1": 1 / scale,
        },
        rel=1e-6,
    )
    assert found["bias"] > 0.1 and abs(found["length"]) > 1e-3


def test_the_gradient_of_other_values_is_an_average_over_the_prompts():
    game = make_game(vocabulary=3, horizon=1, num_prompts=2)
    values = np.array([[1.0, 0.0, 0.0], [0.0, 0.0, 3.0]], np.float32)
    p = np.asarray(probabilities(game, game.logits))
    expected = [p[i] * (values[i] - p[i] @ values[i]) / 2 for i in (0, 1)]
    np.testing.assert_allclose(true_gradient(game, values)[:, 0], expected, atol=1e-6)


def test_every_batch_has_the_probability_that_the_sampler_draws_it_in_any_order():
    game = make_game(vocabulary=2, horizon=1, num_prompts=2, drift=1.0)
    chosen, weights = every_batch(game, 2)
    (a, b), (c, d) = np.asarray(probabilities(game, game.behaviour), np.float64)
    groups = {(0, 0): (a * a, c * c), (0, 1): (2 * a * b, 2 * c * d), (1, 1): (b * b, d * d)}
    expected = {(one, two): groups[one][0] * groups[two][1] for one in groups for two in groups}
    found = {tuple(map(tuple, batch.tolist())): weight for batch, weight in zip(chosen, weights, strict=True)}
    assert found == pytest.approx(expected) and sum(found.values()) == pytest.approx(1)
    assert not np.allclose(game.behaviour, game.logits)
    same = make_game(vocabulary=2, horizon=1, num_prompts=2)
    np.testing.assert_array_equal(same.behaviour, same.logits)
    np.testing.assert_array_equal(same.logits, game.logits)  # drift is of the sampler alone


def test_prompts_become_harder_and_a_seed_makes_a_game():
    game = make_game(vocabulary=4, horizon=2, num_prompts=3, seed=5)
    success = (np.asarray(probabilities(game, game.logits)) * game.rewards).sum(-1)
    for share, wanted in zip(success, (0.5, 0.25, 0.125), strict=True):
        assert wanted - 0.1 < share <= wanted + 0.05 + 1e-6
    assert set(np.unique(game.rewards)) == {0, 1}
    assert not np.array_equal(make_game(4, 2, 3, seed=6).logits, game.logits)


def test_the_estimators_of_the_literature_are_these():
    found = {
        name: (e.advantages.scale, e.advantages.baseline, e.loss.loss_type, e.loss.importance_sampling_level)
        for name, e in family(5).items()
    }
    assert found == {
        "REINFORCE, no baseline": ("none", "none", "reinforce", "token"),
        "REINFORCE, group mean": ("none", "mean", "reinforce", "token"),
        "RLOO": ("none", "leave_one_out", "reinforce", "token"),
        "REINFORCE++": ("whiten", "none", "reinforce", "token"),
        "REINFORCE++-baseline": ("whiten", "mean", "reinforce", "token"),
        "Dr. GRPO": ("none", "mean", "dr_grpo", "token"),
        "GRPO": ("group", "mean", "grpo", "token"),
        "GRPO, delta 1.3": ("group", "mean", "grpo", "token"),
        "DAPO": ("group", "mean", "dapo", "token"),
        "Lite PPO": ("batch", "mean", "dapo", "token"),
        "GSPO": ("group", "mean", "grpo", "sequence"),
        "LUSPO": ("group", "mean", "luspo", "sequence"),
        "CISPO": ("group", "mean", "cispo", "token"),
        "SAPO": ("group", "mean", "sapo", "token"),
        "VESPO": ("group", "mean", "vespo", "token"),
    }
    losses = {name: e.loss for name, e in family(5).items()}
    assert (losses["Dr. GRPO"].dr_grpo_length, losses["GRPO, delta 1.3"].delta) == (5, 1.3)
    assert (losses["DAPO"].epsilon_high, losses["CISPO"].epsilon_high) == (0.28, 5.0)
