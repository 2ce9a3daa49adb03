"""The methods by name. A further one is a file of its own and a line here (and in `experiment.requirements`)."""

from collections.abc import Mapping

from grpo_jax.algorithms.base import Algorithm
from grpo_jax.algorithms.dpo import DPO
from grpo_jax.algorithms.grpo import GRPO
from grpo_jax.algorithms.ppo import PPO
from grpo_jax.algorithms.reward_model import RewardModel
from grpo_jax.algorithms.rft import RFT
from grpo_jax.algorithms.sft import SFT
from grpo_jax.errors import UserError
from grpo_jax.experiment import Experiment

ALGORITHMS: Mapping[str, Algorithm] = {a.name: a for a in (GRPO(), PPO(), SFT(), RFT(), DPO(), RewardModel())}


def algorithm_of(experiment: Experiment) -> Algorithm:
    """The algorithm of an experiment's method."""
    if isinstance(experiment.method, str):
        return ALGORITHMS[experiment.method]
    if not isinstance(experiment.method, Algorithm):
        raise UserError(
            f"Experiment.method = {experiment.method_name!r} says what it needs, but not how it trains: it must be a "
            "grpo_jax.algorithms.Algorithm."
        )
    return experiment.method
