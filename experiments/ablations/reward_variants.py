"""Which reward teaches POUND: binary, the article's partial credit, or the strict one?

Success is always the exact word, whatever the reward pays for. Expected: binary never sees a signal; the article's
partial credit pays for repeated letters (POUUD earns 0.9), which the strict one does not. A run ends near 0 or near 1,
and which it is can turn on rounding, so this takes twenty seeds.

    grpo-jax sweep experiments/ablations/reward_variants.py --vectorize
    grpo-jax table experiments/ablations/reward_variants.py
"""

from pound_case import first_try, pound

from grpo_jax.experiment import Ablation
from grpo_jax.rewards.wordle import binary, partial_credit, partial_credit_strict

rewards = {
    "partial credit": partial_credit,
    "strict partial credit": partial_credit_strict,
    "binary": binary,
}
without_bonus = {"loss": first_try.loss, "group_size": first_try.group_size}

ablation = Ablation(
    base=pound,
    arms={name: {"rewards": {"reward": reward}} for name, reward in rewards.items()}
    | {f"{name}, no bonus": {"rewards": {"reward": rewards[name]}, **without_bonus} for name in list(rewards)[:2]},
    seeds=range(20),
)
