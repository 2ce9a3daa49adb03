"""Training: the loop over the steps of a run, and the stages of an experiment around it."""

from grpo_jax.training.stages import run, starting_policy, train
from grpo_jax.training.trainer import MakeGenerator, Trainer

__all__ = ["MakeGenerator", "Trainer", "run", "starting_policy", "train"]
