"""Which temperature explores, and does that depend on the group size and the learning rate? On POUND, without a bonus.

The article finds 0 without diversity and 1.3 too much. A study with two seeds saw 0.7 collapse onto non-words where 1.0
and 1.3 solved the task. Evaluation is at temperature 1 for every arm, so that temperature 0 is not given its answer.

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
            *(arm(t) for t in TEMPERATURES),
            *(arm(t, group_size=16) for t in TEMPERATURES),
            *(arm(t, learning_rate=3e-4) for t in (0.7, 1.0, 1.3)),
        ]
    ),
    seeds=range(5),
)
