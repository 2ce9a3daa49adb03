"""What methods have in common in making a step's batch: arrays, the schedule of prompts, metrics and rows."""

from collections import Counter
from functools import lru_cache
from typing import Any

import numpy as np

from grpo_jax.algorithms.batch import Batch
from grpo_jax.rewards.scoring import Scores
from grpo_jax.rollout import Rollout, completion, example_row, has_turns, index_of, transcript
from grpo_jax.tasks import Task
from grpo_jax.tasks.calls import TIME_LIMIT, success_of


def batch_of(rollout: Rollout, rewards: np.ndarray | None = None, sample_mask: np.ndarray | None = None) -> Batch:
    """The arrays of a rollout. Without rewards and sample_mask [P, G] all completions count, with rewards of 0."""
    shape = rollout.mask.shape[:2]
    return Batch(
        rollout.prompts,
        rollout.lengths,
        rollout.tokens,
        rollout.valid,
        rollout.mask,
        rollout.logprobs,
        np.zeros(shape, np.float32) if rewards is None else rewards,
        np.ones(shape, bool) if sample_mask is None else sample_mask,
    )


def tokens_of(rollout: Rollout) -> int:
    """Tokens of a rollout, the prompt counted once for each completion."""
    return int(rollout.lengths.sum()) * rollout.mask.shape[1] + int(rollout.valid.sum())


def reward_arrays(scores: Scores, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The rewards that advantages are made from, and the sample mask, [P, G]; 0 for a dropped completion."""
    sample_mask = np.array(scores.sample_mask, bool).reshape(shape)
    return np.where(sample_mask, np.array(scores.advantage_rewards, np.float32).reshape(shape), 0), sample_mask


def schedule(
    seed: int, step: int, num_prompts: int, num_examples: int, *, occurred: Counter[int] | None = None
) -> tuple[list[int], list[int]]:
    """Which examples a step trains on, and the ids that name their noise.

    Examples come in shuffled epochs, each a permutation named by (seed, epoch). An example that occurs again within
    the step gets another id, so that its completions differ.

    Args:
      occurred: how often each example has occurred in earlier rounds of the step. These examples are added to it.
    """
    occurred, indices, ids = Counter() if occurred is None else occurred, [], []
    for position in range(step * num_prompts, (step + 1) * num_prompts):
        epoch, place = divmod(position, num_examples)
        index = int(_epoch(seed, epoch, num_examples)[place])
        indices.append(index)
        ids.append(index + num_examples * occurred[index])
        occurred[index] += 1
    return indices, ids


@lru_cache(maxsize=4)
def _epoch(seed: int, epoch: int, num_examples: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(num_examples)


def score_metrics(
    rollout: Rollout,
    scores: Scores,
    rewards: np.ndarray,
    sample_mask: np.ndarray,
    task: Task,
    time_limit: float = TIME_LIMIT,
) -> dict[str, float]:
    """Metrics of completions and their rewards, and the share that succeeded; `time_limit` is for `task.success`."""
    return {
        **reward_metrics(scores, rewards, sample_mask),
        **completion_metrics(rollout),
        "success": float(np.mean(success_of(task, rollout.reward_arguments(), time_limit))),
    }


def reward_metrics(scores: Scores, rewards: np.ndarray, sample_mask: np.ndarray) -> dict[str, float]:
    """Metrics of scores, in TRL's names. Completions that were dropped count in no mean.

    Args:
      scores: what the reward functions returned.
      rewards, sample_mask: what advantages are made from, [P, G] (see `reward_arrays`).
    """
    total = np.array(scores.total).reshape(sample_mask.shape)
    groups = [(t[k], r[k]) for t, r, k in zip(total, rewards, sample_mask, strict=True) if k.any()]
    metrics = {
        "reward": _mean(np.where(sample_mask, total, np.nan)),
        "reward_std": _mean(np.array([totals.std() for totals, _ in groups])),
        "frac_reward_zero_std": _mean(np.array([float(np.ptp(own) == 0) for _, own in groups])),
        "frac_dropped": float(np.mean(~sample_mask)),
    }
    for name, values in scores.by_name.items():
        known = np.array(values, float)
        known = known[~np.isnan(known)]
        metrics[f"rewards/{name}/mean"] = _mean(known)
        metrics[f"rewards/{name}/std"] = float(known.std()) if len(known) else float("nan")
    return metrics


def completion_metrics(rollout: Rollout) -> dict[str, float]:
    """Lengths of completions, and how alike they are: a policy that collapses repeats one of them.

    `top_share` is the share of a group that its commonest text has, the mean over groups; `most_common_ratio` is the
    share of all completions that the commonest text of all has.
    """
    lengths = rollout.mask.sum(-1)
    texts = [["\n".join(e.turns) for e in group] for group in rollout.episodes]
    size = lengths.shape[1]
    of_all = Counter(text for group in texts for text in group)
    return {
        "completions/mean_length": float(lengths.mean()),
        "completions/min_length": float(lengths.min()),
        "completions/max_length": float(lengths.max()),
        "completions/clipped_ratio": float(np.mean(~rollout.ended)),
        "completions/unique_fraction": float(np.mean([len(set(group)) / size for group in texts])),
        "completions/top_share": float(np.mean([max(Counter(group).values()) / size for group in texts])),
        "completions/most_common_ratio": max(of_all.values()) / of_all.total(),
    }


def completion_rows(rollout: Rollout, scores: Scores) -> list[dict[str, Any]]:
    """One JSON-able row per completion, for `completions.jsonl` and tables, without advantages yet.

    Beside `completion`, which is what rewards saw, the rows of a batch with several turns have `turns`: each turn's
    role ("policy" or "environment") and text, in their order.
    """
    several = has_turns(rollout.episodes)
    rows = []
    for p, group in enumerate(rollout.episodes):
        asked = example_row(rollout.examples[p], index_of(rollout, p))
        for g, episode in enumerate(group):
            at = p * len(group) + g
            rows.append(
                {
                    "prompt_id": int(rollout.prompt_ids[p]),
                    "sample": g,
                    **asked,
                    "completion": completion(rollout.examples[p], episode),
                    **({"turns": transcript(episode)} if several else {}),
                    "rewards": {name: values[at] for name, values in scores.by_name.items()},
                    "reward": scores.total[at],
                    "advantage": float("nan"),
                    "tokens": int(sum(episode.trained)),
                }
            )
    return rows


def _mean(values: np.ndarray) -> float:
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")
