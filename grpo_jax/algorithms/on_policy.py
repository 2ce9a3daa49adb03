"""GRPO's and PPO's lessons: completions of the policy as it is, with their rewards."""

from collections.abc import Sequence

from grpo_jax.algorithms import dynamic_sampling
from grpo_jax.algorithms.dynamic_sampling import Round
from grpo_jax.algorithms.lesson import (
    Classroom,
    Lesson,
    batch_of,
    completion_rows,
    reward_arrays,
    schedule,
    score_metrics,
    tokens_of,
)
from grpo_jax.experiment import Experiment


def lesson(room: Classroom, step: int) -> Lesson:
    """Plays and scores a step's prompts, and further ones where dynamic sampling asks for them."""
    return lesson_of(_rounds(room, step), room.experiment)


def lesson_of(rounds: Sequence[Round], config: Experiment) -> Lesson:
    """The lesson of a step whose prompts were played and scored in these rounds."""
    chosen = dynamic_sampling.combine(rounds)
    played = chosen.played
    batch = batch_of(played, chosen.rewards, chosen.kept)
    if config.loss.mask_truncated_completions:
        batch = batch._replace(mask=played.mask & played.ended[..., None])
    metrics = {}
    if config.dynamic_sampling_rounds:
        metrics["dynamic_sampling/rounds"] = len(rounds) - 1
        metrics["dynamic_sampling/groups_with_signal"] = int(chosen.has_signal().sum())
    # How good the policy is, the first round says: the groups that are trained on were chosen by their rewards.
    first = rounds[0]
    metrics |= score_metrics(first.played, first.scores, first.rewards, first.kept, config.task)
    return Lesson(
        batch,
        played,
        tokens=sum(tokens_of(r.played) for r in rounds),
        new_tokens=sum(int(r.played.mask.sum()) for r in rounds),
        metrics=metrics,
        rows=completion_rows(played, chosen.scores),
        histograms={"rewards": chosen.rewards[chosen.kept], "completion_lengths": played.mask.sum(-1)},
    )


def _rounds(room: Classroom, step: int) -> list[Round]:
    """The step's prompts, and further rounds while some groups have no signal and rounds are left.

    A further round's prompts are those to which the schedule would come after the last step, so that the first
    round of every step has the same prompts with and without dynamic sampling.
    """
    config = room.experiment
    size = config.prompts_per_step
    further = [step + r * config.steps for r in range(1, config.dynamic_sampling_rounds + 1)]
    indices, prompt_ids = schedule(config.seed, step, size, len(config.task.train), further=further)
    rounds: list[Round] = []
    for start in range(0, len(indices), size):
        played = room.sample(step, indices[start : start + size], prompt_ids[start : start + size], from_start=False)
        scores = room.score(played, step)
        rounds.append(Round(played, scores, *reward_arrays(scores, played.mask.shape[:2])))
        if sum(int(r.has_signal().sum()) for r in rounds) >= size:
            break
    return rounds
