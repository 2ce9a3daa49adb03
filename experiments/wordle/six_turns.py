"""The full Wordle game of six turns: a tiny policy learns to play by imitation (SFT), then GRPO on winning.

Not tuned yet: no full run of it has been measured. GRPO needs a warm start that wins some of its games, and imitation
is slow to learn here; replies that interleave letters and marks (CgRxAy...) looked several times faster in one trial.

    grpo-jax train experiments/wordle/six_turns.py
"""

from grpo_jax.experiment import (
    EvaluationConfig,
    Experiment,
    OptimizerConfig,
    PolicyConfig,
    SamplingConfig,
    ScratchConfig,
)
from grpo_jax.rewards.wordle import binary, uses_feedback
from grpo_jax.tasks.wordle import PLAIN_ALPHABET, six_turns

config = Experiment(
    task=six_turns(num_secrets=200, num_held_out=200),
    rewards={"binary": binary, "uses_feedback": uses_feedback},
    policy=PolicyConfig(scratch=ScratchConfig(alphabet=PLAIN_ALPHABET, hidden_size=128, num_layers=3)),
    steps=60,
    prompts_per_step=16,
    group_size=16,
    sampling=SamplingConfig(temperature=1.0, max_tokens=6),
    optimizer=OptimizerConfig(learning_rate=5e-4),
    evaluation=EvaluationConfig(
        splits=("train", "held_out"), num_prompts=200, num_samples=4, temperature=1.0, batch_size=800
    ),
    warm_start={
        "method": "sft",
        "steps": 400,
        "prompts_per_step": 40,
        "group_size": 4,
        "optimizer.learning_rate": 2e-3,
        "optimizer.schedule": "cosine",
    },
)
