"""The full game over all 2,315 secrets, for a GPU: imitation of the random consistent player, then GRPO on the win.

Judged on all secrets, one game each: whether the policy has learned to play, against players that know the same words:
blind .26 %, random consistent 98.2 %, optimal 100 % in 3.42 guesses (`mean_turns` of a run that wins everything).
The sizes are an estimate for ten minutes of one H100. This was run for a few steps on a CPU, and not yet on a GPU.

    grpo-jax train experiments/wordle/ladder.py --run-dir runs/ladder
    grpo-jax train experiments/wordle/ladder.py --run-dir runs/ladder --resume     # when the ten minutes are over
"""

from grpo_jax.experiment import (
    EvaluationConfig,
    Experiment,
    OptimizerConfig,
    PolicyConfig,
    SamplingConfig,
    ScratchConfig,
)
from grpo_jax.rewards.wordle import binary
from grpo_jax.tasks.wordle import PLAIN_ALPHABET, six_turns

config = Experiment(
    task=six_turns(num_secrets=2315, num_held_out=0),
    rewards={"binary": binary},
    policy=PolicyConfig(scratch=ScratchConfig(PLAIN_ALPHABET, hidden_size=256, num_layers=4, num_heads=8)),
    steps=400,
    prompts_per_step=64,
    group_size=16,
    sampling=SamplingConfig(temperature=1.0, max_tokens=6),
    optimizer=OptimizerConfig(learning_rate=3e-4, schedule="linear", warmup_steps=10),
    evaluation=EvaluationConfig(num_prompts=2315, temperature=1.0, batch_size=1024, every=100),
    warm_start={
        "method": "sft",
        "steps": 1500,
        "prompts_per_step": 256,
        "group_size": 1,
        "evaluation.every": 0,
        "optimizer": OptimizerConfig(learning_rate=2e-3, schedule="linear", warmup_steps=50, b2=0.99),
    },
)
