"""Ablations: every arm at every seed, in processes of their own or all seeds of an arm in one program."""

from grpo_jax.sweep.processes import TRACK, is_finished, sweep

__all__ = ["TRACK", "is_finished", "sweep"]
