"""The article's Wordle case: one guess at the secret POUND, learned from partial credit alone.

A policy of under 1M parameters with one token per capital letter first learns (SFT) what legal words look like, the
secret excluded. GRPO then samples a group at temperature 1 and scores it with the article's partial credit.
Seeds 0 to 4 end at 98.8 to 99.8 % POUND, in some 20 s on two cores (40 s with compilation). A process of one core
rounds otherwise: there seeds 0 to 2 end at 99.6, 98.4 and 0 %. Without the
entropy bonus (groups of 64, a warm start of 100 or 300 steps) five of thirteen runs collapsed onto a non-word that the
partial credit pays 0.8 to 0.9 for its repeated letters, such as PODOD or POUUU.

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
