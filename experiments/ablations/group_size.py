"""Groups of 2 or of 16: at equal rollouts (128 a step) and at equal prompts (16 a step).

grpo-jax sweep experiments/ablations/group_size.py --jobs 2
grpo-jax table experiments/ablations/group_size.py
"""

from backwards_case import backwards

from grpo_jax.experiment import Ablation

ablation = Ablation(
    base=backwards,
    arms={
        "16 prompts x 8": {},
        "64 x 2, equal rollouts": {"prompts_per_step": 64, "group_size": 2},
        "8 x 16, equal rollouts": {"prompts_per_step": 8, "group_size": 16},
        "16 x 2, equal prompts": {"group_size": 2},
        "16 x 16, equal prompts": {"group_size": 16},
    },
    seeds=range(10),
)
