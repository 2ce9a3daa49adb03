"""Groups of 2 to 128 at equal sampled tokens: a few large groups or many small ones?

grpo-jax sweep experiments/ablations/group_size.py --vectorize
grpo-jax table experiments/ablations/group_size.py
"""

from pound_case import first_try

from grpo_jax.experiment import Ablation

ablation = Ablation(
    base=first_try,
    arms={f"G = {g}": {"group_size": g, "warm_start.group_size": 64} for g in (64, 16, 32, 128)},
    seeds=range(5),
    budget="tokens",
)
