"""What each method trains on in a step: a `Lesson`, made from the experiment, the step's number and the policy.

A method is a way to make lessons, here, and an objective (`grpo_jax.algorithms.objectives`). Lessons follow from (seed, step) and
the parameters alone, so a resumed run has those of the uninterrupted one.

    grpo, ppo           own completions and their rewards     on_policy
    sft                 demonstrations                        imitation
    rft                 own completions, the best of them     imitation
    dpo, reward_model   completions, two and two              pairs
"""

from collections.abc import Callable, Mapping

from grpo_jax.algorithms import imitation, on_policy, pairs
from grpo_jax.algorithms.lesson import Classroom, Lesson

__all__ = ["LESSONS", "Classroom", "Lesson"]

LESSONS: Mapping[str, Callable[[Classroom, int], Lesson]] = {
    "grpo": on_policy.lesson,
    "ppo": on_policy.lesson,
    "sft": imitation.of_demonstrations,
    "rft": imitation.of_own_best,
    "dpo": pairs.lesson,
    "reward_model": pairs.lesson,
}
"""The lesson of a step, by method."""
