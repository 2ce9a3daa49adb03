"""Group std, mean only, leave-one-out or batch std: does it matter how rewards become advantages?

The task has one prompt, so that a batch is one group, and batch std must give the numbers of group std.

    grpo-jax sweep experiments/ablations/advantages.py --vectorize
    grpo-jax table experiments/ablations/advantages.py
"""

from pound_case import first_try

from grpo_jax.experiment import Ablation

ablation = Ablation(
    base=first_try,
    arms={
        "group std": {},
        "mean only": {"advantages.scale": "none"},
        "leave-one-out": {"advantages.baseline": "leave_one_out", "advantages.scale": "none"},
        "batch std": {"advantages.scale": "batch"},
    },
    seeds=range(10),
)
