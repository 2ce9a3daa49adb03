"""Reward functions: text to scores. `protocol` says what a reward function is, `scoring` calls them safely."""

from grpo_jax.rewards.protocol import Completion, RewardFunction, share, text, turns

__all__ = ["Completion", "RewardFunction", "share", "text", "turns"]
