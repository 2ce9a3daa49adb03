"""What a task is where it does not say."""

from grpo_jax.tasks import Task


def test_a_task_has_one_turn_and_neither_demonstrations_nor_an_environment() -> None:
    def success(**columns: object) -> list[bool]:
        return []

    task = Task("bare", [{"prompt": "a"}], [{"prompt": "b"}], success)
    assert (task.demonstrate, task.reply, task.max_turns, dict(task.references)) == (None, None, 1, {})
    assert (task.name, task.train, task.held_out) == ("bare", [{"prompt": "a"}], [{"prompt": "b"}])
    assert task.success is success and Task.__module__ == "grpo_jax.tasks"
