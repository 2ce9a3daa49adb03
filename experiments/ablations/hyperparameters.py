"""Does the best temperature depend on the group size and the learning rate? On POUND, without an entropy bonus.

`temperature.py` has the five temperatures at groups of 64 and a learning rate of 1e-3.

    grpo-jax sweep experiments/ablations/hyperparameters.py --jobs 2
    grpo-jax table experiments/ablations/hyperparameters.py
"""

from pound_case import first_try

from grpo_jax.experiment import Ablation

TEMPERATURES = (1.0, 0.0, 0.3, 0.7, 1.3)


def arm(temperature, group_size=64, learning_rate=1e-3):
    """The name of an arm and its overrides; the warm start is the same for all."""
    name = f"T = {temperature}, G = {group_size}, lr = {learning_rate:g}"
    return name, {
        "sampling.temperature": temperature,
        "group_size": group_size,
        "optimizer.learning_rate": learning_rate,
        "warm_start.group_size": 64,
    }


ablation = Ablation(
    base=first_try,
    arms=dict(
        [
            arm(1.0),
            *(arm(t, group_size=16) for t in TEMPERATURES),
            *(arm(t, learning_rate=3e-4) for t in (0.7, 1.0, 1.3)),
        ]
    ),
    seeds=range(5),
)
