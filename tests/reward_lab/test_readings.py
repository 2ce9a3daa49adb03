"""Readings: every statistic against numbers worked by hand."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax.experiment import AdvantageConfig, Experiment, RewardConfig
from grpo_jax.reward_lab.groups import Groups
from grpo_jax.reward_lab.readings import agreement, component_shares, no_signal_share, read, signal
from grpo_jax.tasks import Task

TASK = Task("toy", [{"prompt": "p"}], [{"prompt": "p"}], success=lambda *, completions, **_: [False] * len(completions))


def length(*, completions, **_):
    return [float(len(c)) for c in completions]


def letter_a(*, completions, **_):
    return [float(c.count("a")) for c in completions]


def odd_only(*, completions, **_):
    return [1.0 if len(c) % 2 else None for c in completions]


def make_experiment(rewards=None, **reward) -> Experiment:
    rewards = rewards or {"length": length, "a": letter_a}
    advantages = AdvantageConfig(scale="none" if "combine" in reward else "group")
    return Experiment(task=TASK, rewards=rewards, reward=RewardConfig(**reward), advantages=advantages)


def make_groups(*groups: list[str]) -> Groups:
    texts = [text for group in groups for text in group]
    arguments = {"prompts": ["p"] * len(texts), "completions": texts, "completion_ids": [[0]] * len(texts)}
    return Groups("by hand", arguments, len(groups[0]), [0] * len(groups))


def test_the_share_of_groups_without_signal_is_p_to_the_g_plus_its_complement():
    assert no_signal_share(np.array([1, 0, 0, 0]), 3) == pytest.approx(0.25**3 + 0.75**3)
    assert no_signal_share(np.ones(5), 8) == 1
    assert no_signal_share(np.array([0.0, 0.1, 0.2]), 2) == pytest.approx(3 * (1 / 3) ** 2)


@given(st.lists(st.integers(0, 2), min_size=1, max_size=5), st.integers(2, 4))
def test_the_share_of_groups_without_signal_is_that_of_all_groups_that_could_be_drawn(values, size):
    drawn = list(itertools.product(values, repeat=size))
    expected = sum(len(set(group)) == 1 for group in drawn) / len(drawn)
    assert no_signal_share(np.array(values, float), size) == pytest.approx(expected)


def test_signal_by_hand():
    # Two groups of one prompt; of its values, 3/4 are 0 and 1/4 are 1. The second group has no signal.
    found = signal(np.array([[0.0, 1.0], [0.0, 0.0]]), [7, 7])
    assert (found.mean, found.low, found.high, found.num_values) == (0.25, 0, 1, 2)
    assert found.group_std == pytest.approx((0.5 + 0) / 2)
    assert found.no_signal == 0.5
    assert found.predicted == pytest.approx(0.25**2 + 0.75**2)
    assert found.predicted_by_size[8] == pytest.approx(0.25**8 + 0.75**8)


def test_theory_keeps_prompts_apart():
    # A prompt that is always solved and one that never is: no group has a signal, though half of all rewards are 1.
    found = signal(np.array([[1.0, 1.0], [0.0, 0.0]]), [0, 1])
    assert found.no_signal == found.predicted == 1


def test_rewards_that_differ_by_rounding_alone_are_no_signal_and_what_does_not_apply_counts_nowhere():
    found = signal(np.array([[0.1 + 0.2, 0.3], [math.nan, 0.3]]), [0, 0])
    assert (found.no_signal, found.num_values) == (1, 1)
    assert math.isnan(signal(np.full((2, 2), math.nan), [0, 0]).no_signal)


def test_agreement_by_hand():
    rewards = {
        "a": np.array([[0.0, 1, 2], [0, 0, 1]]),
        "b": np.array([[0.0, 1, 2], [5, 5, 5]]),
        "c": np.array([[2.0, 1, 0], [0, 1, 0]]),
    }
    advantages = {name: values - values.mean(1, keepdims=True) for name, values in rewards.items()}
    same = agreement("a", "b", rewards, advantages)
    assert (same.tau, same.num_groups, same.flips) == (1, 1, 0)
    # First group: reversed, -1, two flips. Second: one pair each way and the rest ties, tau-b = -1/2; two flips
    # (the second and third member), since the first is below the mean under both.
    other = agreement("a", "c", rewards, advantages)
    assert other.tau == pytest.approx((-1 - 0.5) / 2)
    assert other.flips == pytest.approx(4 / 6)


def test_the_components_of_a_total_by_hand():
    # Deviations of the parts: a -1 1, b -2 2, so the total is -3 3 and a carries (1·3 + 1·3) / (9 + 9) = 1/3.
    parts = {"length": np.array([[0.0, 2.0]]), "a": np.array([[0.0, 4.0]])}
    total = np.array([[0.0, 6.0]])
    found = component_shares(parts, total, np.array([[-1.0, 1.0]]), make_experiment())
    assert found == {"length": pytest.approx(1 / 3), "a": pytest.approx(2 / 3)}


def test_a_component_that_works_against_the_others_has_a_negative_share():
    parts = {"length": np.array([[0.0, 2.0]]), "a": np.array([[0.0, 1.0]])}
    total = np.array([[0.0, 1.0]])  # length - a
    found = component_shares(parts, total, np.array([[-1.0, 1.0]]), make_experiment(weights={"a": -1.0}))
    assert found == {"length": pytest.approx(2), "a": pytest.approx(-1)}


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.lists(st.text("ab", max_size=5), min_size=3, max_size=3), min_size=2, max_size=2),
    st.sampled_from(["sum", "normalize_then_sum"]),
)
def test_components_sum_to_one_or_there_is_no_signal(groups, combine):
    reading = read(make_groups(*groups), make_experiment(combine=combine, weights={"length": 0.5}), {})
    shares = list(reading.components.values())
    if np.abs(reading.advantages["total"]).max() == 0:
        assert all(math.isnan(share) for share in shares)
    else:
        assert sum(shares) == pytest.approx(1, abs=1e-4)


def test_every_reward_is_read_alone_and_in_total_and_further_ones_beside():
    groups = make_groups(["a", "bb"], ["aaa", "aaa"])
    reading = read(groups, make_experiment(), {"odd_only": odd_only})
    assert list(reading.rewards) == ["length", "a", "total", "odd_only"]
    np.testing.assert_array_equal(reading.rewards["total"], [[2, 2], [6, 6]])
    np.testing.assert_array_equal(reading.advantages["length"], [[-1, 1], [0, 0]])
    np.testing.assert_array_equal(reading.advantages["a"], [[1, -1], [0, 0]])
    assert math.isnan(reading.rewards["odd_only"][0, 1]) and reading.advantages["odd_only"][0, 1] == 0
    pairs = {(a.first, a.second): a for a in reading.agreements}
    assert pairs["length", "a"].flips == 0.5 and pairs["length", "a"].tau == -1


def test_a_single_reward_is_its_own_total():
    reading = read(make_groups(["a", "bb"]), make_experiment({"length": length}), {})
    assert list(reading.rewards) == ["length"] and reading.components == {}
