"""Group std, mean only, leave-one-out or batch std: does it matter how rewards become advantages?

grpo-jax sweep experiments/ablations/advantages.py --jobs 2
grpo-jax table experiments/ablations/advantages.py
"""

from backwards_case import backwards

from grpo_jax.experiment import Ablation

ablation = Ablation(
    base=backwards,
    arms={
        "group std": {},
        "mean only": {"advantages.scale": "none"},
        "leave-one-out": {"advantages.baseline": "leave_one_out", "advantages.scale": "none"},
        "batch std": {"advantages.scale": "batch"},
    },
    seeds=range(10),
)
