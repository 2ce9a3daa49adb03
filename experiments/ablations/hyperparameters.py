"""Does the best temperature depend on the group size and the learning rate? On POUND, without an entropy bonus.

Twenty arms and two hundred runs.

    grpo-jax sweep experiments/ablations/hyperparameters.py --jobs 2
    grpo-jax table experiments/ablations/hyperparameters.py
"""

from itertools import product

from pound_case import first_try

from grpo_jax.experiment import Ablation

TEMPERATURES = (1.0, 0.0, 0.3, 0.7, 1.3)  # the baseline's first
GROUP_SIZES = (64, 16)
LEARNING_RATES = (1e-3, 3e-4)

ablation = Ablation(
    base=first_try,
    arms={
        f"T = {temperature}, G = {group_size}, lr = {learning_rate:g}": {
            "sampling.temperature": temperature,
            "group_size": group_size,
            "optimizer.learning_rate": learning_rate,
            "warm_start.group_size": 64,  # the warm start is the same for all
        }
        for group_size, learning_rate, temperature in product(GROUP_SIZES, LEARNING_RATES, TEMPERATURES)
    },
    seeds=range(10),
)
