"""The comparison of methods on held-out prompts: words spelt backwards, by a policy from scratch.

The policy first imitates a careless teacher, whose letters are wrong three times in ten, so that it is right one time
in six. Each method then has 100 steps of 16 prompts. Partial credit pays for each letter in its place; `dpo` and
`reward_model` see it only as labels of pairs, one in ten of them wrong; `sft` is shown the right answers (`answered`).
Evaluation samples at temperature 1, on words that nothing was trained on.

    grpo-jax train experiments/methods/backwards.py                        # grpo
    grpo-jax train experiments/methods/backwards.py --set method=ppo       # and rft, dpo
    python scripts/compare_methods.py experiments/methods/backwards.py     # all of them, RLHF and SFT, as a table
"""

import random
import string
from dataclasses import replace

from grpo_jax.experiment import (
    EvaluationConfig,
    Experiment,
    OptimizerConfig,
    PolicyConfig,
    SamplingConfig,
    ScratchConfig,
)
from grpo_jax.tasks import Task
from grpo_jax.tasks.wordle import words

CARELESSNESS = 0.3


def letters_in_place(*, completions, answer, **columns):
    """The share of the answer's letters that stand in their place; what is too long or too short gets nothing."""
    return [
        sum(a == b for a, b in zip(said, right, strict=True)) / len(right) if len(said) == len(right) else 0.0
        for said, right in zip(completions, answer, strict=True)
    ]


def is_right(*, completions, answer, **columns):
    return [said == right for said, right in zip(completions, answer, strict=True)]


def careless(example, rng):
    return [
        "".join(rng.choice(string.ascii_uppercase) if rng.random() < CARELESSNESS else c for c in example["answer"])
    ]


def correct(example, rng):
    return [example["answer"]]


def backwards(num_train: int = 1000, num_held_out: int = 500) -> Task:
    """Words of five letters and, as the column `answer`, the same backwards; no held-out word is trained on."""
    chosen = sorted(words())
    random.Random(0).shuffle(chosen)  # not a sample, so that however many are trained on, the held-out words stay
    examples = [{"prompt": word, "answer": word[::-1]} for word in chosen[: num_held_out + num_train]]
    return Task("backwards", examples[num_held_out:], examples[:num_held_out], is_right, careless)


config = Experiment(
    task=backwards(),
    rewards={"letters_in_place": letters_in_place},
    policy=PolicyConfig(scratch=ScratchConfig(alphabet=string.ascii_uppercase, hidden_size=96, num_layers=2)),
    steps=100,
    prompts_per_step=16,
    group_size=8,
    sampling=SamplingConfig(temperature=1.0, max_tokens=6),
    optimizer=OptimizerConfig(learning_rate=1e-3),
    evaluation=EvaluationConfig(num_prompts=500, num_samples=2, batch_size=500, temperature=1.0),
    warm_start={
        "method": "sft", "steps": 400, "group_size": 4, "prompts_per_step": 32, "optimizer.learning_rate": 3e-3,
        "optimizer.schedule": "linear",
    },
)  # fmt: skip

answered = replace(config.task, demonstrate=correct)
