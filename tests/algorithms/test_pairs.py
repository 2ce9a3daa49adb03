"""Labels of preference pairs: ties, noise of a stated level, names; and calibration worked by hand."""

import math

import numpy as np
import pytest

from grpo_jax.algorithms.pairs import label
from grpo_jax.algorithms.reward_model import calibration_error
from grpo_jax.experiment import PreferenceConfig

KEPT = np.ones((1, 4), bool)


def names(num_prompts: int, step: int = 0) -> list[tuple[int, ...]]:
    return [(0, step, p) for p in range(num_prompts)]


def test_the_higher_reward_is_chosen_and_ties_and_failures_have_no_label():
    rewards = np.array([[1.0, 2.0, 5.0, 5.0], [3.0, 1.0, 0.0, 9.0]], np.float32)
    kept = np.array([[True] * 4, [True, True, True, False]])
    order, valid, flipped = label(rewards, kept, names(2), PreferenceConfig())
    assert order[0, :2].tolist() == [1, 0] and order[1, :2].tolist() == [0, 1]
    assert valid.tolist() == [[True, False], [True, False]]
    assert not flipped.any()
    assert sorted(order[0].tolist()) == [0, 1, 2, 3]


def many(config: PreferenceConfig, difference: float, step: int = 0) -> float:
    """The share of 4000 labels that are wrong, where the rewards differ by `difference`."""
    rewards = np.tile([0.0, difference], (40, 100))
    _, valid, flipped = label(rewards, np.ones_like(rewards, bool), names(40, step), config)
    assert valid.all()
    return float(flipped.mean())


@pytest.mark.parametrize("level", [0.1, 0.4])
def test_flipped_labels_are_as_many_as_stated_whatever_the_difference(level):
    config = PreferenceConfig(noise_level=level)
    for difference in (0.01, 100.0):
        assert many(config, difference) == pytest.approx(level, abs=4 * math.sqrt(level * (1 - level) / 4000))


def test_bradley_terry_labels_err_more_where_the_rewards_are_close():
    config = PreferenceConfig(label_noise="bradley_terry", noise_level=0.5)
    for difference in (0.1, 0.5, 2.0):
        wrong = 1 / (1 + math.exp(difference / 0.5))
        assert many(config, difference) == pytest.approx(wrong, abs=4 * math.sqrt(wrong * (1 - wrong) / 4000))
    assert many(config, 1e6) == 0


def test_noise_is_named_by_the_seed_the_step_and_the_prompt():
    config = PreferenceConfig(noise_level=0.5)
    rewards = np.tile([0.0, 1.0], (3, 20))
    kept = np.ones_like(rewards, bool)
    whole = label(rewards, kept, names(3), config)[0]
    np.testing.assert_array_equal(label(rewards[1:], kept[1:], names(3)[1:], config)[0], whole[1:])
    assert (label(rewards, kept, names(3, step=1), config)[0] != whole).any()


def test_calibration_by_hand():
    # Confidence 0.75 (margin ln 3) four times, right three times: no gap. 0.9 (ln 9) twice, right once: 0.4.
    margins = np.log([3, 3, 3, 1 / 3])
    assert calibration_error(margins) == pytest.approx(0, abs=1e-9)
    both = np.concatenate([margins, np.log([9.01, 1 / 9.01])])
    assert calibration_error(both) == pytest.approx(2 / 6 * (9.01 / 10.01 - 0.5), abs=1e-6)
    assert math.isnan(calibration_error(np.zeros(0)))


def test_ten_bins_divide_the_confidences_from_a_half_to_one():
    # .72 and .78 are in different bins (.70 to .75, .75 to .80): one right and one wrong, with gaps of .28 and .78.
    margins = np.log([0.72 / 0.28, 0.22 / 0.78])
    assert calibration_error(margins) == pytest.approx((0.28 + 0.78) / 2)
    # .76 and .78 are in one, whose mean confidence is .77 and whose accuracy is a half.
    assert calibration_error(np.log([0.76 / 0.24, 0.22 / 0.78])) == pytest.approx(0.77 - 0.5)
    assert calibration_error(np.array([50.0])) == pytest.approx(0)  # a confidence of 1 is in the last bin
