"""Preference pairs without humans: completions, labelled by any reward function with a stated noise.

What DPO and a reward model learn from, and what a reward model is evaluated on.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from grpo_jax import sharding as devices
from grpo_jax.algorithms.lesson import (
    Classroom,
    Lesson,
    batch_of,
    completion_rows,
    reward_arrays,
    reward_metrics,
    schedule,
    tokens_of,
)
from grpo_jax.algorithms.objectives import make_forward
from grpo_jax.evaluation import NOISE_STEP, Evaluation, success_interval
from grpo_jax.experiment import PreferenceConfig
from grpo_jax.policy.lora import Model
from grpo_jax.rewards import text
from grpo_jax.rewards.scoring import Scores
from grpo_jax.rollout import Rollout, beside, demonstrations, take_rows


def lesson(room: Classroom, step: int) -> Lesson:
    """The pairs of a step's prompts, chosen beside rejected."""
    config = room.experiment
    source = step if config.preferences.epoch_steps is None else step % config.preferences.epoch_steps
    indices, prompt_ids = schedule(config.seed, source, config.prompts_per_step, len(config.task.train))
    pairs = labelled(room, "train", indices, prompt_ids, source, range(config.group_size))
    return Lesson(
        batch_of(pairs.played, kept=np.repeat(pairs.valid, 2, axis=1)),
        pairs.played,
        tokens_of(pairs.played),
        int(pairs.played.mask.sum()),
        pairs.metrics(),
        pairs.rows(),
    )


@dataclass(frozen=True)
class Pairs:
    """Completions, two and two: of a group's rows, 2i is chosen and 2i + 1 rejected.

    Attributes:
      valid: [P, G / 2] False where the two are equally good, or could not be scored, so that there is no label.
      flipped: [P, G / 2] whether the label is wrong: the chosen one has the lower reward.
      scores: their rewards, in the order in which they were sampled; None for labelled data.
      order: [P, G] which sample stands where.
    """

    played: Rollout
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
        shape = self.played.mask.shape[:2]
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
        rows = completion_rows(self.played, ordered)
        labels = np.where(np.repeat(self.valid, 2, axis=1), ["chosen", "rejected"] * (size // 2), "tied")
        return [{**row, "label": str(label)} for row, label in zip(rows, labels.reshape(-1), strict=True)]


def labelled(
    room: Classroom, split: str, indices: Sequence[int], prompt_ids: Sequence[int], step: int, samples: Sequence[int]
) -> Pairs:
    """Pairs of these prompts, as `PreferenceConfig` says where they come from and who labels them."""
    config, preferences = room.experiment, room.experiment.preferences
    task, given = config.task, dict(seed=config.seed, step=step)
    if preferences.completions == "columns":
        chosen, rejected = (
            demonstrations(
                replace(task, demonstrate=lambda example, rng, column=column: [text(example[column])]),
                room.prompts, split, indices, prompt_ids, [0], room.actor.tokenizer, **given,
            )
            for column in ("chosen", "rejected")
        )  # fmt: skip
        shape = (len(indices), 1)
        order = np.tile([0, 1], (len(indices), 1))
        return Pairs(beside([chosen, rejected]), np.ones(shape, bool), np.zeros(shape, bool), order)
    if preferences.completions == "demonstrations":
        played = demonstrations(task, room.prompts, split, indices, prompt_ids, samples, room.actor.tokenizer, **given)
    else:
        played = room.sample(step, indices, prompt_ids, from_start=True, split=split, samples=samples)
    scores = room.score(played, step)
    rewards, kept = reward_arrays(scores, played.mask.shape[:2])
    names = [(config.seed, step, int(prompt_id)) for prompt_id in prompt_ids]
    order, valid, flipped = label(rewards, kept, names, preferences)
    return Pairs(take_rows(played, order), valid, flipped, order, scores)


def label(
    rewards: np.ndarray, kept: np.ndarray, names: Sequence[tuple[int, ...]], config: PreferenceConfig
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compares samples 2i and 2i + 1 of each group.

    Args:
      rewards, kept: [P, G], G even; what is not kept is not compared.
      names: by which each prompt's noise is drawn, P of them.

    Returns:
      The order [P, G] in which each pair's chosen sample comes before its rejected one; which pairs have a label,
      [P, G / 2]; and which labels are wrong, [P, G / 2].
    """
    difference = rewards[:, 0::2].astype(np.float64) - rewards[:, 1::2]
    valid = kept[:, 0::2] & kept[:, 1::2] & (difference != 0)
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


@dataclass(frozen=True)
class PairEvaluation(Evaluation):
    """A reward model on labelled pairs: `success` is its accuracy, the share whose chosen completion it ranks higher.

    Attributes:
      num_pairs: how many pairs there were; `num_samples` are the completions of a prompt that were compared.
      log_loss: the mean of -log sigmoid(r_chosen - r_rejected) in nats; log 2 = 0.693 knows nothing.
      calibration_error: the mean gap between how sure the model is and how often it is right (expected calibration
        error over ten equal bins of its confidence; Guo et al. 2017, 1706.04599).
    """

    num_pairs: int
    log_loss: float
    calibration_error: float


def evaluate_pairs(room: Classroom, split: str) -> PairEvaluation:
    """Evaluates the reward model on pairs of `evaluation.num_prompts` prompts, labelled as in training.

    Each has `evaluation.num_samples` completions (at least 2), compared two and two.
    """
    config, task, n = room.experiment, room.experiment.task, room.actor.num_devices
    columns = config.preferences.completions == "columns"
    num_samples = 2 if columns else max(config.evaluation.num_samples // 2 * 2, 2)
    num_prompts = min(config.evaluation.num_prompts, len(getattr(task, split)))
    size = max(config.evaluation.batch_size // num_samples // n, 1) * n
    size = min(size, -(-num_prompts // n) * n)
    score = scorer(room.actor.model, room.prompts.common, n)
    scores, valid, lengths, ended, records = [], [], [], [], []
    for start in range(0, num_prompts, size):
        wanted = list(range(start, min(start + size, num_prompts)))
        # The last batch is filled up with repetitions, so that its shape is that of the others.
        indices = (wanted * size)[:size]
        pairs = labelled(room, split, indices, indices, NOISE_STEP, range(num_samples))
        batch = devices.shard(batch_of(pairs.played), n)
        found = devices.unshard(np.asarray(score(room.actor.trainable, room.actor.frozen, batch)))
        rows = slice(len(wanted))
        scores.append(found[rows].astype(np.float64))
        valid.append(pairs.valid[rows])
        lengths.append(pairs.played.mask[rows].sum(-1))
        ended.append(pairs.played.ended[rows])
        flat = found.reshape(-1)
        records += [{**row, "learned_reward": float(value)} for row, value in zip(pairs.rows(), flat, strict=True)][
            : len(wanted) * num_samples
        ]
    rewards, counted = np.concatenate(scores), np.concatenate(valid)
    margins = rewards[:, 0::2] - rewards[:, 1::2]
    right = margins > 0
    # A prompt's pairs are kin, but where every prompt has labels they are not equally many: count pairs alone.
    low, high = success_interval(right[counted][:, None]) if counted.any() else (0.0, 1.0)
    return PairEvaluation(
        split=split,
        num_prompts=num_prompts,
        num_samples=num_samples,
        temperature=config.sampling.temperature,
        success=float(right[counted].mean()) if counted.any() else float("nan"),
        success_low=low,
        success_high=high,
        reward=float(rewards.mean()),
        pass_at_k={},
        mean_length=float(np.concatenate(lengths).mean()),
        mean_turns=1.0,
        clipped_ratio=float(np.mean(~np.concatenate(ended))),
        records=records,
        num_pairs=int(counted.sum()),
        log_loss=float(np.logaddexp(0, -margins[counted]).mean()) if counted.any() else float("nan"),
        calibration_error=calibration_error(margins[counted]),
    )


def calibration_error(margins: np.ndarray, num_bins: int = 10) -> float:
    """The expected calibration error of sigmoid(margin), r_chosen - r_rejected of each pair; nan without pairs."""
    if not margins.size:
        return float("nan")
    confidence = 1 / (1 + np.exp(-np.abs(margins)))  # in the completion that it ranks higher: 1/2 to 1
    bins = np.minimum(((confidence - 0.5) * 2 * num_bins).astype(int), num_bins - 1)
    right = margins > 0
    gaps = [abs(confidence[bins == b].mean() - right[bins == b].mean()) * (bins == b).sum() for b in set(bins)]
    return float(sum(gaps) / len(margins))


@lru_cache(maxsize=16)
def scorer(model: Model, common: int, n: int) -> Any:
    """A reward model's scores [P, G] of a batch: (trainable, frozen, batch) -> scores, on n devices."""
    return devices.parallel(make_forward(model, common).scores, n)
