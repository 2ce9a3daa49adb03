"""Reward model: a scalar head on a policy, trained on preference pairs (Bradley & Terry 1952).

(Ouyang et al. 2022, https://arxiv.org/abs/2203.02155, eq. 1.) `grpo_jax.reward_model.learned_reward` makes a reward
function of a trained one.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np

from grpo_jax.algorithms.base import Algorithm, Metrics, Objective, Setup, StepContext, Totals, TrainBatch
from grpo_jax.algorithms.batch import Batch
from grpo_jax.algorithms.batches import batch_of
from grpo_jax.algorithms.forward import make_forward
from grpo_jax.algorithms.pairs import counted_pairs, labelled_pairs, preference_batch
from grpo_jax.evaluation import NOISE_STEP, Evaluation, success_interval
from grpo_jax.experiment import Experiment, requirements
from grpo_jax.losses import preference
from grpo_jax.policy.lora import Model
from grpo_jax.policy.transformer import Params
from grpo_jax.rollout import Actor, Split
from grpo_jax.sharding import Array, Replicas


class RewardModel(requirements.RewardModel, Algorithm):
    """A scalar head and the policy below it, trained to score the chosen completion of each pair higher."""

    has_head: ClassVar[bool] = True

    def needs_reference(self, experiment: Experiment) -> bool:
        return experiment.preferences.completions == "start"

    def make_batch(self, context: StepContext, step: int) -> TrainBatch:
        return preference_batch(context, step)

    def make_objective(self, setup: Setup) -> Objective:
        forward = setup.forward()
        coefficient = setup.experiment.reward_model.center_rewards_coefficient

        def prepare(trainable: Params, frozen: Params, batch: Batch) -> tuple[Batch, Totals]:
            return batch, {"num_pairs": setup.total(counted_pairs(batch).sum())}

        def loss(
            trainable: Params, frozen: Params, reference: Params | None, batch: Batch, totals: Totals
        ) -> tuple[Array, tuple[Metrics, Array]]:
            scores = forward.scores(trainable, frozen, batch).reshape(-1)
            result, metrics = preference.bradley_terry_loss(
                scores,
                center_rewards_coefficient=coefficient,
                pairs=counted_pairs(batch),
                num_pairs=totals["num_pairs"],
            )
            return result, (metrics, batch.logprobs)

        return Objective(prepare, loss)

    def evaluate(self, context: StepContext, split: Split) -> Evaluation:
        return evaluate_pairs(context, split)


@dataclass(frozen=True)
class PairEvaluation(Evaluation):
    """A reward model on labelled pairs: `success` is its accuracy, the share whose chosen completion it ranks higher.

    Attributes:
      num_pairs: how many pairs there were; `num_samples` are the completions of a prompt that were compared.
      log_loss: the mean of -log sigmoid(r_chosen - r_rejected) in nats; log 2 = 0.693 is chance.
      calibration_error: the mean gap between the model's confidence and its accuracy (expected calibration
        error over ten equal bins of its confidence; Guo et al. 2017, 1706.04599).
    """

    num_pairs: int
    log_loss: float
    calibration_error: float


def evaluate_pairs(context: StepContext, split: Split) -> PairEvaluation:
    """Evaluates the reward model on pairs of `evaluation.num_prompts` prompts, labelled as in training.

    Each has `evaluation.num_samples` completions (at least 2), compared two and two.
    """
    config, task, actor = context.experiment, context.experiment.task, context.generator
    assert isinstance(actor, Actor), "a reward model is evaluated on its own devices"
    n = actor.batch_multiple
    columns = config.preferences.completions == "columns"
    num_samples = 2 if columns else max(config.evaluation.num_samples // 2 * 2, 2)
    num_prompts = min(config.evaluation.num_prompts, len(getattr(task, split)))
    size = max(config.evaluation.batch_size // num_samples // n, 1) * n
    size = min(size, -(-num_prompts // n) * n)
    score = scorer(actor.model, context.prompts.shared_prefix_length, actor.replicas)
    scores, valid, lengths, ended, records = [], [], [], [], []
    for start in range(0, num_prompts, size):
        wanted = list(range(start, min(start + size, num_prompts)))
        # The last batch is filled up with repetitions, so that its shape is that of the others.
        indices = (wanted * size)[:size]
        pairs = labelled_pairs(context, split, indices, indices, NOISE_STEP, range(num_samples))
        batch = actor.replicas.split(batch_of(pairs.rollout))
        found = actor.replicas.gather(score(actor.trainable, actor.frozen, batch))
        rows = slice(len(wanted))
        scores.append(found[rows].astype(np.float64))
        valid.append(pairs.valid[rows])
        lengths.append(pairs.rollout.mask[rows].sum(-1))
        ended.append(pairs.rollout.ended[rows])
        flat = found.reshape(-1)
        records += [{**row, "learned_reward": float(value)} for row, value in zip(pairs.rows(), flat, strict=True)][
            : len(wanted) * num_samples
        ]
    rewards, counted = np.concatenate(scores), np.concatenate(valid)
    margins = rewards[:, 0::2] - rewards[:, 1::2]
    right = margins > 0
    # Prompts have different numbers of labelled pairs, so pairs are counted one by one, not clustered by prompt.
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
def scorer(model: Model, shared_prefix_length: int, replicas: Replicas) -> Any:
    """A reward model's scores [P, G] of a placed batch: (trainable, frozen, batch) -> scores."""
    return replicas.compile(make_forward(model, shared_prefix_length).scores)
