"""Controls: can a reward that knows nothing of the secret teach it?

`random` pays a number drawn anew for each step; `format only` pays for any word of the game; `shuffled labels` pays
partial credit against a secret drawn for each completion. A gain under any of them would mean that the success of the
true reward is no evidence.

    grpo-jax sweep experiments/ablations/controls.py --jobs 2
    grpo-jax table experiments/ablations/controls.py
"""

import random

from pound_case import pound

from grpo_jax.experiment import Ablation
from grpo_jax.rewards.wordle import partial_credit, valid_word
from grpo_jax.tasks.wordle import allowed


def random_reward(*, completion_ids, **columns):
    """Uniform numbers, named by the batch, so that a run can be repeated."""
    rng = random.Random(repr(completion_ids))
    return [rng.random() for _ in completion_ids]


def shuffled_labels(*, completions, completion_ids, secret, **columns):
    """Partial credit against another word for each completion."""
    rng = random.Random(repr(completion_ids))
    return partial_credit(completions=completions, secret=rng.choices(allowed(), k=len(secret)))


rewards = {
    "partial credit": partial_credit,
    "random": random_reward,
    "format only": valid_word,
    "shuffled labels": shuffled_labels,
}

ablation = Ablation(
    base=pound, arms={name: {"rewards": {"reward": reward}} for name, reward in rewards.items()}, seeds=range(10)
)
