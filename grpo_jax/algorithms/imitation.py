"""SFT's and RFT's lessons: completions to imitate, shown by the task or picked among the policy's own."""

import numpy as np

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
from grpo_jax.algorithms.objectives import Batch
from grpo_jax.algorithms.packing import pack
from grpo_jax.experiment import RFTConfig
from grpo_jax.rollout import Rollout, demonstrations


def of_demonstrations(room: Classroom, step: int) -> Lesson:
    """The task's demonstrations for a step's prompts, `group_size` of each."""
    config = room.experiment
    indices, prompt_ids = schedule(config.seed, step, config.prompts_per_step, len(config.task.train))
    shown = demonstrations(
        config.task, room.prompts, "train", indices, prompt_ids, range(config.group_size), room.actor.tokenizer,
        seed=config.seed, step=step,
    )  # fmt: skip
    tokens, new_tokens = tokens_of(shown), int(shown.mask.sum())
    if not config.sft.packing and config.sft.completion_only_loss:
        return Lesson(batch_of(shown), shown, tokens, new_tokens)
    batch = _whole_examples(room, shown)
    return Lesson(batch, None, tokens, new_tokens, {"packing/efficiency": float(np.mean(batch.valid))})


def _whole_examples(room: Classroom, shown: Rollout) -> Batch:
    """Prompts and completions in one row each, or several to a row: what is learned may lie in the prompt as well."""
    config = room.experiment.sft
    examples = []
    for p, group in enumerate(shown.episodes):
        prompt = shown.prompts[p, : shown.lengths[p]].tolist()
        # Nothing predicts an example's first token.
        learned = [False] + [not config.completion_only_loss] * (len(prompt) - 1)
        examples += [([*prompt, *e.ids], [*learned, *e.trained]) for e in group]
    # Each device and micro-batch has the same number of rows.
    multiple = room.actor.num_devices * room.experiment.gradient_accumulation_steps
    return pack(examples, config.max_length if config.packing else None, multiple)


def of_own_best(room: Classroom, step: int) -> Lesson:
    """The policy's own completions of a step's prompts, of which only the good ones count."""
    config = room.experiment
    indices, prompt_ids = schedule(config.seed, step, config.prompts_per_step, len(config.task.train))
    played = room.sample(step, indices, prompt_ids, from_start=config.rft.samples_from == "start")
    scores = room.score(played, step)
    rewards, kept = reward_arrays(scores, played.mask.shape[:2])
    chosen = select(rewards, kept, config.rft)
    rows = completion_rows(played, scores)
    return Lesson(
        batch_of(played, rewards, chosen),
        played,
        tokens_of(played),
        int(played.mask.sum()),
        {**score_metrics(played, scores, rewards, kept, config.task), "frac_imitated": float(chosen.mean())},
        [{**row, "imitated": bool(keep)} for row, keep in zip(rows, chosen.reshape(-1), strict=True)],
        {"rewards": rewards[kept], "completion_lengths": played.mask.sum(-1)},
    )


def select(rewards: np.ndarray, kept: np.ndarray, config: RFTConfig) -> np.ndarray:
    """Which completions [P, G] to imitate, of those that are kept. A group of equal rewards has no best."""
    if config.select == "threshold":
        return kept & (rewards >= config.threshold)
    lowest = np.min(rewards, axis=1, where=kept, initial=np.inf)
    highest = np.max(rewards, axis=1, where=kept, initial=-np.inf)
    best = kept & (rewards == highest[:, None]) & (highest > lowest)[:, None]
    return best & (best.cumsum(axis=1) == 1)
