"""The batch of a method that learns from the rewards of the policy's own completions."""

from collections.abc import Sequence

from grpo_jax.algorithms import dynamic_sampling
from grpo_jax.algorithms.base import TrainBatch
from grpo_jax.algorithms.batches import batch_of, completion_rows, score_metrics, tokens_of
from grpo_jax.algorithms.dynamic_sampling import Round
from grpo_jax.experiment import Experiment


def rewarded_batch(rounds: Sequence[Round], config: Experiment) -> TrainBatch:
    """The batch of a step whose prompts were sampled and scored in these rounds."""
    chosen = dynamic_sampling.combine(rounds)
    rollout = chosen.rollout
    batch = batch_of(rollout, chosen.rewards, chosen.sample_mask)
    if config.loss_config.mask_truncated_completions:
        batch = batch._replace(mask=rollout.mask & rollout.ended[..., None])
    metrics: dict[str, float] = {}
    if config.dynamic_sampling_rounds:
        metrics["dynamic_sampling/rounds"] = len(rounds) - 1
        metrics["dynamic_sampling/groups_with_signal"] = int(chosen.has_signal().sum())
    # The first round says how good the policy is: the groups that are trained on were chosen by their rewards.
    first = rounds[0]
    metrics |= score_metrics(
        first.rollout, first.scores, first.rewards, first.sample_mask, config.task, config.reward.time_limit
    )
    return TrainBatch(
        batch,
        rollout,
        tokens=sum(tokens_of(r.rollout) for r in rounds),
        new_tokens=sum(int(r.rollout.mask.sum()) for r in rounds),
        metrics=metrics,
        rows=completion_rows(rollout, chosen.scores),
        histograms={"rewards": chosen.rewards[chosen.sample_mask], "completion_lengths": rollout.mask.sum(-1)},
    )
