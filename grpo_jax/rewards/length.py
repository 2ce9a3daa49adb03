"""Rewards that depend on the length of a completion."""

from collections.abc import Sequence

from grpo_jax.errors import UserError
from grpo_jax.rewards import RewardFunction


def soft_overlong_punishment(max_completion_len: int, soft_punish_cache: int) -> RewardFunction:
    """Returns DAPO's soft over-long penalty (Yu et al. 2025, https://arxiv.org/abs/2503.14476, eq. 13), in [-1, 0].

    0 up to `max_completion_len - soft_punish_cache` tokens, falling linearly to -1 at `max_completion_len`, and -1
    beyond. As TRL's `get_soft_overlong_punishment`; the tokens counted are those that the policy sampled. A
    `soft_punish_cache` of 0 is a step.

    Raises:
      UserError: unless 0 <= soft_punish_cache <= max_completion_len.
    """
    if not 0 <= soft_punish_cache <= max_completion_len:
        raise UserError(
            f"soft_punish_cache = {soft_punish_cache} must be between 0 and max_completion_len = {max_completion_len}."
        )
    free = max_completion_len - soft_punish_cache

    def soft_overlong(*, completion_ids: Sequence[Sequence[int]], **_: object) -> list[float]:
        return [min(0.0, max(-1.0, (free - len(ids)) / (soft_punish_cache or 1))) for ids in completion_ids]

    return soft_overlong
