"""Preference pairs without humans: completions, labelled by any reward function with a stated noise.

DPO and a reward model learn from them, and a reward model is evaluated on them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.algorithms.base import StepContext, TrainBatch
from grpo_jax.algorithms.batch import Batch
from grpo_jax.algorithms.batches import (
    batch_of,
    completion_rows,
    reward_arrays,
    reward_metrics,
    schedule,
    tokens_of,
)
from grpo_jax.experiment import PreferenceConfig
from grpo_jax.rewards import text
from grpo_jax.rewards.scoring import Scores
from grpo_jax.rollout import Rollout, Split, demonstrations, join_groups, name_noise, take_rows


def preference_batch(context: StepContext, step: int) -> TrainBatch:
    """The pairs of a step's prompts, each chosen completion beside its rejected one."""
    config = context.experiment
    source = step if config.preferences.epoch_steps is None else step % config.preferences.epoch_steps
    indices, prompt_ids = schedule(config.seed, source, config.prompts_per_step, len(config.task.train))
    pairs = labelled_pairs(context, "train", indices, prompt_ids, source, range(config.group_size))
    return TrainBatch(
        batch_of(pairs.rollout, sample_mask=np.repeat(pairs.valid, 2, axis=1)),
        pairs.rollout,
        tokens_of(pairs.rollout),
        int(pairs.rollout.mask.sum()),
        pairs.metrics(),
        pairs.rows(),
    )


def counted_pairs(batch: Batch) -> jax.Array:
    """Which pairs of rows count, [P * G / 2]: those of which both do."""
    return jnp.all(batch.sample_mask.reshape(-1, 2), axis=1)


@dataclass(frozen=True)
class Pairs:
    """Completions, two and two: of a group's rows, 2i is chosen and 2i + 1 rejected.

    Attributes:
      valid: [P, G / 2] False where the two are equally good, or could not be scored, so that there is no label.
      flipped: [P, G / 2] whether the label is wrong: the chosen one has the lower reward.
      scores: their rewards, in the order in which they were sampled; None for labelled data.
      order: [P, G] which sample stands where.
    """

    rollout: Rollout
    valid: np.ndarray
    flipped: np.ndarray
    order: np.ndarray
    scores: Scores | None = None

    def metrics(self) -> dict[str, float]:
        """How many labels there are, how many of them wrong, and the rewards behind them."""
        pairs = int(self.valid.sum())
        found = {"preferences/pairs": pairs, "preferences/frac_tied": float(np.mean(~self.valid))}
        if self.scores is None:
            return found
        flipped = float(self.flipped.sum() / pairs) if pairs else float("nan")
        shape = self.rollout.mask.shape[:2]
        return {
            **found,
            "preferences/frac_flipped": flipped,
            **reward_metrics(self.scores, *reward_arrays(self.scores, shape)),
        }

    def rows(self) -> list[dict[str, Any]]:
        """A row per completion, with its label, for `completions.jsonl`."""
        num_prompts, size = self.order.shape
        scores = self.scores or Scores([float("nan")] * self.order.size, {}, [], {}, [])
        at = (self.order + size * np.arange(num_prompts)[:, None]).reshape(-1)
        ordered = Scores(
            [scores.total[i] for i in at], {k: [v[i] for i in at] for k, v in scores.by_name.items()}, [], {}, []
        )
        rows = completion_rows(self.rollout, ordered)
        labels = np.where(np.repeat(self.valid, 2, axis=1), ["chosen", "rejected"] * (size // 2), "tied")
        return [{**row, "label": str(label)} for row, label in zip(rows, labels.reshape(-1), strict=True)]


def labelled_pairs(
    context: StepContext,
    split: Split,
    indices: Sequence[int],
    prompt_ids: Sequence[int],
    step: int,
    samples: Sequence[int],
) -> Pairs:
    """Pairs of these prompts. `PreferenceConfig` says where they come from and who labels them.

    Args:
      indices: which examples of the split.
      prompt_ids, step, samples: name the noise of what is sampled and of the labels.
    """
    config, preferences = context.experiment, context.experiment.preferences
    task, tokenizer = config.task, context.generator.tokenizer
    if preferences.completions == "columns":
        chosen, rejected = (
            demonstrations(
                replace(task, demonstrate=lambda example, rng, column=column: [text(example[column])]),
                context.prompts.batch(split, indices),
                name_noise(config.seed, step, prompt_ids, [0]),
                tokenizer,
                config.reward.time_limit,
            )
            for column in ("chosen", "rejected")
        )
        shape = (len(indices), 1)
        order = np.tile([0, 1], (len(indices), 1))
        return Pairs(join_groups([chosen, rejected]), np.ones(shape, bool), np.zeros(shape, bool), order)
    if preferences.completions == "demonstrations":
        noise = name_noise(config.seed, step, prompt_ids, samples)
        prompts = context.prompts.batch(split, indices)
        rollout = demonstrations(task, prompts, noise, tokenizer, config.reward.time_limit)
    else:
        rollout = context.sample(step, indices, prompt_ids, split=split, samples=samples, from_start=True)
    scores = context.score(rollout, step)
    rewards, sample_mask = reward_arrays(scores, rollout.mask.shape[:2])
    names = [(config.seed, step, int(prompt_id)) for prompt_id in prompt_ids]
    order, valid, flipped = label(rewards, sample_mask, names, preferences)
    return Pairs(take_rows(rollout, order), valid, flipped, order, scores)


def label(
    rewards: np.ndarray, sample_mask: np.ndarray, names: Sequence[tuple[int, ...]], config: PreferenceConfig
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compares samples 2i and 2i + 1 of each group.

    Args:
      rewards, sample_mask: [P, G], G even; a pair is compared if both of its completions count.
      names: by which each prompt's noise is drawn, P of them.

    Returns:
      The order [P, G] in which each pair's chosen sample comes before its rejected one; which pairs have a label,
      [P, G / 2]; and which labels are wrong, [P, G / 2].
    """
    difference = rewards[:, 0::2].astype(np.float64) - rewards[:, 1::2]
    valid = sample_mask[:, 0::2] & sample_mask[:, 1::2] & (difference != 0)
    uniform = np.stack([np.random.default_rng(name).random(difference.shape[1]) for name in names])
    if config.noise_level == 0:
        prefers_first = difference > 0
    elif config.label_noise == "flip":
        prefers_first = (difference > 0) ^ (uniform < config.noise_level)
    else:
        prefers_first = uniform < 1 / (1 + np.exp(-np.clip(difference / config.noise_level, -500, 500)))
    even = np.arange(0, rewards.shape[1], 2)
    order = np.stack([even + ~prefers_first, even + prefers_first], axis=-1).reshape(rewards.shape)
    return order, valid, valid & (prefers_first != (difference > 0))
