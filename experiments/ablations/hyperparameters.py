"""Which temperature explores, and does that depend on the group size and the learning rate? On POUND, without a bonus.

The article finds 0 without diversity and 1.3 too much. A study with two seeds saw 0.7 collapse onto non-words where 1.0
and 1.3 solved the task. Evaluation is at temperature 1 for every arm, so that temperature 0 is not given its answer.

    grpo-jax sweep experiments/ablations/hyperparameters.py --jobs 2
    grpo-jax table experiments/ablations/hyperparameters.py
"""

from pound_case import first_try

from grpo_jax.experiment import Ablation

ablation = Ablation(
    base=first_try,
    arms={
        f"T = {t}, G = {g}, lr = {lr:g}": {
            "sampling.temperature": t,
            "group_size": g,
            "optimizer.learning_rate": lr,
            "warm_start.group_size": 64,
        }
        for g in (64, 16)
        for lr in (1e-3, 3e-4)
        for t in (1.0, 0.0, 0.3, 0.7, 1.3)
    },
    seeds=range(5),
)
