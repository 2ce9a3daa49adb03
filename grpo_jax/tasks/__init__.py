"""Tasks: prompts in disjoint splits, what counts as success, and the environment that replies. Text only."""

from grpo_jax.tasks.task import Example, Task, from_dataset

__all__ = ["Example", "Task", "from_dataset"]
