"""Which groups a step trains on when some of those that it played have no signal."""

import numpy as np
import pytest

from grpo_jax.algorithms.dynamic_sampling import Round, choose, combine
from grpo_jax.rewards.scoring import Scores
from grpo_jax.rollout import from_completions

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


def test_a_group_of_another_round_keeps_its_own_scores_and_failures_add_up():
    def played(first: int, rewards: list[list[float]], mask: list[list[bool]], failed: int) -> Round:
        total = [first + i for i in range(4)]
        by_name = {"r": [10.0 * t for t in total], "s": [-1.0 * t for t in total]}
        kept = [k for row in mask for k in row]
        scores = Scores(total, by_name, kept, {"r": failed, "s": 1}, [100.0 * t for t in total])
        rollout = from_completions([[1, 3], [1, 4]], [[first, 2], [first + 1, 2]])  # groups of one stand for them
        return Round(rollout, scores, np.array(rewards, float), np.array(mask))

    one = played(10, [[0, 0], [1, 2]], [[YES, NO], [YES, YES]], 2)
    two = played(20, [[5, 6], [7, 7]], [[YES, YES], [YES, NO]], 3)
    two.rollout.examples[:] = one.rollout.examples[:] = [{"prompt": "p"}, {"prompt": "q"}]
    both = combine([one, two])  # place 0 is refilled with group 0 of round 1, whose rows are 20 and 21
    assert both.scores.total == [20, 21, 12, 13] and both.scores.by_name["r"] == [200, 210, 120, 130]
    assert both.scores.by_name["s"] == [-20, -21, -12, -13]
    assert both.scores.advantage_rewards == [2000, 2100, 1200, 1300]
    assert both.scores.failures == {"r": 5, "s": 2} and both.scores.sample_mask == [YES] * 4
    assert both.rewards.tolist() == [[5, 6], [1, 2]] and both.sample_mask.all()
    assert both.rollout.tokens[:, 0, 0].tolist() == [20, 11]
    assert combine([one]) is one
