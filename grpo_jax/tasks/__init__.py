"""Tasks: prompts in disjoint splits, what counts as success, and the environment that replies. Text only."""

from grpo_jax.tasks.task import Example, Task

__all__ = ["Example", "Task"]
