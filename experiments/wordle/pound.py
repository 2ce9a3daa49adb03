"""The article's Wordle case: one guess at the secret POUND, learned from partial credit alone.

A policy of under 1M parameters with one token per capital letter first learns (SFT) what legal words look like, the
secret excluded. GRPO then samples a group at temperature 1 and scores it with the article's partial credit.
A run takes some 20 s on two cores (40 s with compilation). Of twenty seeds, each run twice with starts that differ by
rounding alone, 39 of 40 runs end at 98 % POUND or more, and one at 0 % (docs/results/reward_variants.md): which one
collapses turns on the last digit, so it is another one in a process with another number of cores. Without the entropy
bonus and with groups of 64 half of them collapse onto a non-word that the partial credit pays 0.8 to 0.9 for its
repeated letters, such as POUUD or POUOU.

    grpo-jax train experiments/wordle/pound.py
    grpo-jax train experiments/wordle/pound.py --set sampling.temperature=0.7   # can collapse onto a non-word
"""

from grpo_jax.experiment import (
    EvaluationConfig,
    Experiment,
    LossConfig,
    OptimizerConfig,
    PolicyConfig,
    SamplingConfig,
    ScratchConfig,
)
from grpo_jax.rewards.wordle import partial_credit
from grpo_jax.tasks.wordle import single_guess

config = Experiment(
    task=single_guess("POUND"),
    rewards={"partial_credit": partial_credit},
    policy=PolicyConfig(scratch=ScratchConfig(alphabet="ABCDEFGHIJKLMNOPQRSTUVWXYZ", hidden_size=96, num_layers=2)),
    steps=120,
    prompts_per_step=1,
    group_size=128,
    sampling=SamplingConfig(temperature=1.0, max_tokens=6),
    # The bonus keeps every letter in play until the right one has been sampled. Advantages are in units of the group's
    # own standard deviation, so that the bonus weighs less and less as the group agrees.
    loss=LossConfig(entropy_coef=0.1),
    optimizer=OptimizerConfig(learning_rate=1e-3),
    evaluation=EvaluationConfig(num_samples=512, batch_size=512, temperature=1.0),
    warm_start={"method": "sft", "steps": 300, "optimizer.learning_rate": 3e-3, "optimizer.schedule": "linear"},
)
