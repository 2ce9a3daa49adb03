"""The soft over-long penalty, compared with TRL's and with values worked by hand."""

from pathlib import Path

import numpy as np
import pytest

from grpo_jax.errors import UserError
from grpo_jax.rewards.length import soft_overlong_punishment

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "losses.npz")


def penalties(max_completion_len: int, soft_punish_cache: int, lengths: list[int]) -> list[float]:
    reward = soft_overlong_punishment(max_completion_len, soft_punish_cache)
    return reward(completion_ids=[[0] * n for n in lengths], completions=[""] * len(lengths), prompts=[])


def test_agrees_with_trl() -> None:
    np.testing.assert_allclose(penalties(20, 8, list(range(25))), GOLDEN["overlong"])


def test_falls_linearly_over_the_last_tokens() -> None:
    assert penalties(10, 4, [0, 6, 7, 9, 10, 11, 50]) == [0, 0, -1 / 4, -3 / 4, -1, -1, -1]
    assert penalties(10, 0, [9, 10, 11, 12]) == [0, 0, -1, -1]


def test_a_cache_longer_than_the_completion_is_a_mistake() -> None:
    with pytest.raises(UserError, match="soft_punish_cache = 11 must be between 0 and max_completion_len = 10"):
        soft_overlong_punishment(10, 11)
