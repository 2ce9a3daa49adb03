"""The training methods, one file each: how a step's batch is made, its loss, and what it needs for that.

    grpo           own completions and their rewards, relative to a group's
    ppo            own completions and their rewards, with a critic
    sft            demonstrations
    rft            own completions, the best of them
    dpo            preference pairs
    reward_model   preference pairs, for a scalar head

`base` holds the protocol. The other modules hold what several methods share.
"""

from grpo_jax.algorithms.base import Algorithm, Objective, Setup, StepContext, TrainBatch
from grpo_jax.algorithms.batch import Batch
from grpo_jax.algorithms.dpo import DPO
from grpo_jax.algorithms.grpo import GRPO
from grpo_jax.algorithms.ppo import PPO
from grpo_jax.algorithms.registry import ALGORITHMS, algorithm_of
from grpo_jax.algorithms.reward_model import RewardModel
from grpo_jax.algorithms.rft import RFT
from grpo_jax.algorithms.sft import SFT

__all__ = [
    "ALGORITHMS",
    "DPO",
    "GRPO",
    "PPO",
    "RFT",
    "SFT",
    "Algorithm",
    "Batch",
    "Objective",
    "RewardModel",
    "Setup",
    "StepContext",
    "TrainBatch",
    "algorithm_of",
]
