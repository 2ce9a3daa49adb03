"""The toy experiment of the tests, as a file and as a module: prompts are letters, and the more a's the better."""

from grpo_jax.experiment import (
    EvaluationConfig,
    Experiment,
    OptimizerConfig,
    PolicyConfig,
    SamplingConfig,
    ScratchConfig,
)
from grpo_jax.tasks import Task


def share_of_a(*, completions, **columns):
    return [completion.count("a") / 3 for completion in completions]


task = Task(
    "letters",
    [{"prompt": prompt, "chosen": "aaa", "rejected": "bcd"} for prompt in ("b", "c", "d", "bc", "cd", "db")],
    [{"prompt": prompt, "chosen": "aab", "rejected": "dd"} for prompt in ("bd", "cb", "dc", "b")],
    success=lambda *, completions, **columns: [completion.count("a") >= 2 for completion in completions],
    demonstrate=lambda example, rng: [rng.choice(["aab", "aba"])],
)
config = Experiment(
    task=task,
    rewards={"share_of_a": share_of_a},
    policy=PolicyConfig(scratch=ScratchConfig("abcd", hidden_size=16, num_layers=1, num_heads=2)),
    steps=4,
    prompts_per_step=4,
    group_size=4,
    devices=1,
    checkpoint_every=2,
    sampling=SamplingConfig(max_tokens=3),
    optimizer=OptimizerConfig(learning_rate=1e-2),
    evaluation=EvaluationConfig(num_samples=2, temperature=1.0),
)
