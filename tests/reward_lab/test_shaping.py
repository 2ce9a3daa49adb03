"""Groups whose spread is shaping alone, counted by hand."""

import numpy as np
import pytest

from grpo_jax.experiment import Experiment, RewardConfig
from grpo_jax.reward_lab.groups import Groups
from grpo_jax.reward_lab.readings import read
from grpo_jax.reward_lab.shaping import Shaping, find_shaping, sentence
from grpo_jax.tasks import Task

# Four groups of two: one right answer; both wrong, of equal length; both wrong, one longer; both right, one longer.
EXACT = np.array([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
BREVITY = np.array([[-0.1, -0.1], [-0.2, -0.2], [-0.1, -0.3], [-0.1, -0.2]])


def test_a_group_that_is_all_wrong_and_still_differs_is_counted_with_the_reward_that_makes_the_difference():
    """Only the third group: the first has a right answer, the second does not differ, the fourth is right."""
    found = find_shaping({"exact": EXACT, "brevity": BREVITY}, EXACT + BREVITY, EXACT == 1, RewardConfig())
    assert found == Shaping(4, no_success=1, no_outcome=1, flagged=1, outcome="exact", causes={"brevity": 1})
    assert found.share == 0.25


def test_a_group_counts_once_whether_success_or_the_outcomes_reward_is_missing():
    """All four answers of the first two groups fail by the task's count, though one of them earns the outcome's reward.

    The first differs by 1 in exact, the second by 0.2 in brevity. The third is a success by the task's count, but earns
    nothing of exact.
    """
    exact = np.array([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    brevity = np.array([[0.0, -0.5], [0.0, -0.2], [0.0, -0.2]])
    success = np.array([[False, False], [False, False], [True, True]])
    found = find_shaping({"exact": exact, "brevity": brevity}, exact + brevity, success, RewardConfig())
    assert (found.no_success, found.no_outcome, found.flagged) == (2, 2, 3)
    assert found.causes == {"brevity": 2, "exact": 1}


def test_the_outcome_is_the_reward_of_the_largest_weight_and_a_weight_can_turn_the_cause():
    """In the only group style spreads by 0.5 and brevity by 0.2; with the weights 0.1 and 1 by 0.05 and 0.2."""
    style, brevity = np.array([[0.5, 0.0]]), np.array([[-0.2, 0.0]])
    success = np.array([[False, False]])
    plain = find_shaping({"style": style, "brevity": brevity}, style + brevity, success, RewardConfig())
    assert (plain.outcome, plain.causes) == ("style", {"style": 1})
    weights = RewardConfig(weights={"style": 0.1})
    weighed = find_shaping({"style": style, "brevity": brevity}, 0.1 * style + brevity, success, weights)
    assert (weighed.outcome, weighed.causes) == ("brevity", {"brevity": 1})


def test_rounding_and_completions_that_are_dropped_are_no_spread():
    total = np.array([[0.1 + 0.2, 0.3], [np.nan, 0.5], [np.nan, np.nan]])
    found = find_shaping({"one": total}, total, np.zeros((3, 2), bool), RewardConfig())
    assert (found.num_groups, found.flagged) == (3, 0)
    assert sentence(found, "temperature 1") is None


def test_the_sentence_counts_names_the_cause_and_says_what_to_do():
    found = Shaping(8, no_success=2, no_outcome=1, flagged=2, outcome="exact", causes={"brevity": 2})
    said = sentence(found, "temperature 1")
    assert said is not None and said.startswith(
        "temperature 1: the spread of 2 of 8 groups (25%) is shaping alone (no completion succeeds in 2, none earns "
        "more of exact than the least in 1). It comes from brevity in 2: "
    )
    assert "Pay brevity only where the answer is right, such as by a factor of exact" in said
    own = sentence(Shaping(8, 2, 0, 2, "credit", {"credit": 2}), "temperature 1")
    assert own is not None and "Look whether more of credit leads to success" in own and "none earns" not in own


@pytest.mark.parametrize(("penalize_wrong", "flagged"), [(True, 1), (False, 0)])
def test_a_reading_finds_a_length_penalty_that_is_the_whole_signal_of_wrong_answers(penalize_wrong, flagged):
    def exact(*, completions, **_):
        return [float(c == "yes") for c in completions]

    def brevity(*, completions, **_):
        return [-len(c) / 100 if c == "yes" or penalize_wrong else 0.0 for c in completions]

    task = Task(
        "toy", [{"prompt": "p"}], [{"prompt": "p"}], lambda *, completions, **_: [c == "yes" for c in completions]
    )
    experiment = Experiment(task=task, rewards={"exact": exact, "brevity": brevity})
    texts = ["yes", "no", "no", "never"]
    arguments = {"prompts": ["p"] * 4, "completions": texts, "completion_ids": [[0]] * 4}
    found = read(Groups("by hand", arguments, 2, [0, 0]), experiment, {}).shaping
    assert found.flagged == flagged and found.causes == ({"brevity": 1} if flagged else {})
