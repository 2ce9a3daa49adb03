"""The comparison of methods on the article's Wordle case: same policy, same start, as many completions for each.

The policy first learns (SFT) what words look like, the secret POUND excluded; each method then has 100 steps of 64
completions. `dpo` and `reward_model` see the partial credit only as labels of pairs (32 a step), one in ten of them
wrong, and all their completions come from the policy at the start.

    grpo-jax train experiments/methods/pound.py                        # grpo
    grpo-jax train experiments/methods/pound.py --set method=ppo       # and rft, dpo
    python scripts/compare_methods.py --seeds 5                        # all of them, and RLHF, as a table
"""

from grpo_jax.experiment import (
    EvaluationConfig,
    Experiment,
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
    steps=100,
    prompts_per_step=1,
    group_size=64,
    sampling=SamplingConfig(temperature=1.0, max_tokens=6),
    optimizer=OptimizerConfig(learning_rate=1e-3),
    evaluation=EvaluationConfig(num_samples=512, batch_size=512, temperature=1.0),
    warm_start={"method": "sft", "steps": 100, "optimizer.learning_rate": 3e-3},
)
