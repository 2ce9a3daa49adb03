"""Losses: log-probabilities of the tokens that were sampled or shown -> a scalar loss and its metrics.

Pure functions of arrays `[B, T]` (B sequences of T tokens) and a mask of the tokens that are trained on. What they
return is their arrays' *contribution* to the loss and metrics of the whole batch: divided by what the whole batch
counts, so that contributions add up, over micro-batches and devices, to the number that one big batch would give.
"""

from grpo_jax.losses.inputs import LossInputs

__all__ = ["LossInputs"]
