"""A tiny policy and a reward that fails now and then: what `scripts/soak.py` trains for 10,000 steps and kills.

The policy writes three letters of four, and the more of them are the prompt's own first letter the better. The reward
raises an exception for one step in some 200, sleeps past its time limit for one in some 2,000, and returns NaN for one
completion in some 100. Which ones follows from the completions, so that a run that is killed and resumed meets the same
failures. Nothing is to be learned from it about learning. Some 100 steps take a second on one core.

    grpo-jax train experiments/robustness/soak.py --set steps=200
    python scripts/soak.py            # 10,000 steps, with faults from outside
    python scripts/kill.py            # some 100 processes are killed, of every method
"""

import itertools
import math
import time
import zlib

from grpo_jax.experiment import (
    EvaluationConfig,
    Experiment,
    OptimizerConfig,
    PolicyConfig,
    RewardConfig,
    SamplingConfig,
    ScratchConfig,
)
from grpo_jax.tasks import Task

LETTERS = "abcd"


def _one_in(count: int, *texts: str) -> bool:
    """Whether texts are among the one in `count` that are chosen to fail."""
    return zlib.crc32("\n".join(texts).encode()) % count == 0


def first_letter(*, prompts, completions, **columns):
    """The share of the prompt's first letter, where the reward does not fail."""
    if _one_in(200, "raise", *prompts, *completions):
        raise ValueError("the reward fails for these completions")
    if _one_in(2000, "sleep", *prompts, *completions):
        time.sleep(3600)
    return [
        math.nan if _one_in(100, prompt, completion) else completion.count(prompt[0]) / 3
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


def is_right(*, prompts, completions, **columns):
    return [completion == 3 * prompt[0] for prompt, completion in zip(prompts, completions, strict=True)]


def demonstrate(example, rng):
    return [3 * example["prompt"][0]]


_prompts = ["".join(letters) for letters in itertools.product(LETTERS, repeat=3)]
_examples = [{"prompt": prompt, "chosen": 3 * prompt[0], "rejected": prompt} for prompt in _prompts]

config = Experiment(
    task=Task("first letter", _examples[::2], _examples[1::2], is_right, demonstrate),
    rewards={"first_letter": first_letter},
    policy=PolicyConfig(scratch=ScratchConfig(LETTERS, hidden_size=16, num_layers=1, num_heads=2)),
    steps=10_000,
    prompts_per_step=4,
    group_size=4,
    devices=1,
    checkpoint_every=100,
    sampling=SamplingConfig(max_tokens=3),
    reward=RewardConfig(on_failure="drop", max_failure_rate=1.0, time_limit=2.0),
    optimizer=OptimizerConfig(learning_rate=1e-4),
    evaluation=EvaluationConfig(num_samples=2, temperature=1.0, every=1000),
)
