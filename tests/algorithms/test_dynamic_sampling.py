"""Which groups a step trains on when some of those that it played have no signal."""

import numpy as np
import pytest

from grpo_jax.algorithms.dynamic_sampling import Round, choose

YES, NO = True, False


@pytest.mark.parametrize(
    "signals, chosen",
    [
        ([[YES, YES]], [(0, 0), (0, 1)]),
        ([[NO, YES, NO], [NO, YES, YES]], [(1, 1), (0, 1), (1, 2)]),
        ([[NO, NO, YES], [NO, NO, NO], [NO, NO, YES]], [(2, 2), (0, 1), (0, 2)]),  # one too few: place 1 stays empty
        ([[NO, YES], [YES, YES]], [(1, 0), (0, 1)]),  # one too many
    ],
)
def test_groups_without_a_signal_are_replaced_in_order(signals, chosen):
    assert choose([np.array(signal) for signal in signals]) == chosen


def test_a_signal_is_a_difference_among_the_kept_rewards():
    rewards = np.array([[1.0, 0.0], [1.0, 1.0], [1.0, 0.0], [np.nan, 1.0]])
    kept = np.array([[YES, YES], [YES, YES], [YES, NO], [NO, NO]])
    assert Round(None, None, rewards, kept).has_signal().tolist() == [YES, NO, NO, NO]
