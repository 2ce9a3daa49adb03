"""What a step's lesson is made from and what it holds, and what methods have in common in making it."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np

from grpo_jax.algorithms.objectives import Batch
from grpo_jax.errors import RunError
from grpo_jax.experiment import Experiment
from grpo_jax.policy.transformer import Params
from grpo_jax.rewards.scoring import Scores
from grpo_jax.rollout import Actor, Prompts, Rollout, completion, rollout, score_rollout


@dataclass(frozen=True)
class Classroom:
    """What lessons are made from: the experiment, its prompts as tokens, and the policies on the devices.

    `start` holds the trained parameters as they were when training began (None if the method never needs them).
    """

    experiment: Experiment
    prompts: Prompts
    actor: Actor
    start: Params | None = None

    def sample(
        self,
        step: int,
        indices: Sequence[int],
        prompt_ids: Sequence[int],
        *,
        from_start: bool,
        split: str = "train",
        samples: Sequence[int] | None = None,
    ) -> Rollout:
        """Plays a group for each of these prompts, with the policy as it is or as it was at the start."""
        config = self.experiment
        actor = self.actor._replace(trainable=self.start) if from_start else self.actor
        samples = range(config.group_size) if samples is None else samples
        return rollout(
            actor, config.task, self.prompts, split, indices, prompt_ids, samples, config.sampling,
            seed=config.seed, step=step,
        )  # fmt: skip

    def score(self, played: Rollout, step: int) -> Scores:
        """The rewards of what was played. Raises `RunError` past `reward.max_failure_rate`."""
        scores = score_rollout(played, self.experiment)
        total, limit = len(scores.total), self.experiment.reward.max_failure_rate
        for name, failed in scores.failures.items():
            if failed > limit * total:
                raise RunError(
                    f"reward {name!r} failed on {failed} of the {total} completions of step {step}, above "
                    f"reward.max_failure_rate = {limit:g}."
                )
        return scores


@dataclass(frozen=True)
class Lesson:
    """What a step trains on.

    Attributes:
      batch: the arrays, on the host.
      played: the episodes that the batch is made of; None where rows hold several.
      tokens: how many tokens were read or written to make it, prompts once for each completion.
      new_tokens: how many of them the policy sampled or was shown as its own.
      metrics: what there is to say of it.
      rows: a row per completion for `completions.jsonl`, without advantages; none for demonstrations.
      histograms: arrays to histogram.
    """

    batch: Batch
    played: Rollout | None
    tokens: int
    new_tokens: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    histograms: Mapping[str, np.ndarray] = field(default_factory=dict)

    def with_advantages(self, advantages: np.ndarray) -> "Lesson":
        """The lesson with what its update found: one for each completion, or (PPO) for each token, whose mean it is.

        Args:
          advantages: [..., P, G] or, by token, [..., P, G, T], with the devices in front.
        """
        batch = self.batch
        if advantages.size == batch.mask.size > batch.kept.size:
            mask = batch.mask & batch.kept[..., None]
            advantages = np.where(mask, advantages.reshape(mask.shape), 0).sum(-1) / np.maximum(mask.sum(-1), 1)
        advantages = advantages.reshape(batch.kept.shape)
        rows = [{**row, "advantage": float(a)} for row, a in zip(self.rows, advantages.reshape(-1), strict=True)]
        return replace(self, rows=rows, histograms={**self.histograms, "advantages": advantages[batch.kept]})


def batch_of(played: Rollout, rewards: np.ndarray | None = None, kept: np.ndarray | None = None) -> Batch:
    """The arrays of a rollout; without rewards and kept [P, G] those of completions that all count alike."""
    shape = played.mask.shape[:2]
    return Batch(
        played.prompts,
        played.lengths,
        played.tokens,
        played.valid,
        played.mask,
        played.logprobs,
        np.zeros(shape, np.float32) if rewards is None else rewards,
        np.ones(shape, bool) if kept is None else kept,
    )


def tokens_of(played: Rollout) -> int:
    """Tokens of a rollout, the prompt counted once for each completion."""
    return int(played.lengths.sum()) * played.mask.shape[1] + int(played.valid.sum())


def reward_arrays(scores: Scores, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Rewards, as advantages are made from them, and kept [P, G]; the reward of what was dropped is 0."""
    kept = np.array(scores.kept, bool).reshape(shape)
    return np.where(kept, np.array(scores.signal, np.float32).reshape(shape), 0), kept


def schedule(
    seed: int, step: int, num_prompts: int, num_examples: int, *, further: Sequence[int] = ()
) -> tuple[list[int], list[int]]:
    """Which examples a step trains on, and the ids that name their noise; those of `further` steps are appended.

    Examples come in shuffled epochs, each a permutation named by (seed, epoch). An example that occurs again within
    the step gets another id, so that its completions differ.
    """
    indices = []
    for position in (s * num_prompts + i for s in (step, *further) for i in range(num_prompts)):
        epoch, place = divmod(position, num_examples)
        indices.append(int(_epoch(seed, epoch, num_examples)[place]))
    ids = [index + num_examples * indices[:i].count(index) for i, index in enumerate(indices)]
    return indices, ids


@lru_cache(maxsize=4)
def _epoch(seed: int, epoch: int, num_examples: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(num_examples)


def score_metrics(played: Rollout, scores: Scores, rewards: np.ndarray, kept: np.ndarray, task: Any) -> dict:
    """What there is to say of completions and their rewards, and how many of them succeeded."""
    return {
        **reward_metrics(scores, rewards, kept),
        **completion_metrics(played),
        "success": float(np.mean(task.success(**played.reward_arguments()))),
    }


def reward_metrics(scores: Scores, rewards: np.ndarray, kept: np.ndarray) -> dict[str, float]:
    """Metrics in TRL's names of what was scored, of which training makes advantages from `rewards` [P, G].

    What was dropped or does not apply counts nowhere.
    """
    total = np.array(scores.total).reshape(kept.shape)
    groups = [(t[k], r[k]) for t, r, k in zip(total, rewards, kept, strict=True) if k.any()]
    metrics = {
        "reward": _mean(np.where(kept, total, np.nan)),
        "reward_std": _mean(np.array([totals.std() for totals, _ in groups])),
        "frac_reward_zero_std": _mean(np.array([float(np.ptp(own) == 0) for _, own in groups])),
        "frac_dropped": float(np.mean(~kept)),
    }
    for name, values in scores.by_name.items():
        known = np.array(values, float)
        known = known[~np.isnan(known)]
        metrics[f"rewards/{name}/mean"] = _mean(known)
        metrics[f"rewards/{name}/std"] = float(known.std()) if len(known) else float("nan")
    return metrics


def completion_metrics(played: Rollout) -> dict[str, float]:
    """Lengths of completions, and how alike those of a group are: the common failure is that they become one."""
    lengths = played.mask.sum(-1)
    texts = [["\n".join(e.turns) for e in group] for group in played.episodes]
    size = lengths.shape[1]
    return {
        "completions/mean_length": float(lengths.mean()),
        "completions/min_length": float(lengths.min()),
        "completions/max_length": float(lengths.max()),
        "completions/clipped_ratio": float(np.mean(~played.ended)),
        "completions/unique_fraction": float(np.mean([len(set(group)) / size for group in texts])),
        "completions/top_share": float(np.mean([max(Counter(group).values()) / size for group in texts])),
    }


def completion_rows(played: Rollout, scores: Scores) -> list[dict[str, Any]]:
    """One JSON-able row per completion, for `completions.jsonl` and tables; nobody has an advantage yet."""
    rows = []
    for p, group in enumerate(played.episodes):
        for g, episode in enumerate(group):
            at = p * len(group) + g
            rows.append(
                {
                    "prompt_id": int(played.prompt_ids[p]),
                    "sample": g,
                    "prompt": played.examples[p]["prompt"],
                    "completion": completion(played.examples[p], episode),
                    "rewards": {name: values[at] for name, values in scores.by_name.items()},
                    "reward": scores.total[at],
                    "advantage": float("nan"),
                    "tokens": int(sum(episode.trained)),
                }
            )
    return rows


def _mean(values: np.ndarray) -> float:
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")
