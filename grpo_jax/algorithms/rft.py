"""RFT: imitation of the best of the policy's own completions (rejection-sampling fine-tuning).

RAFT, https://arxiv.org/abs/2304.06767, takes the best of each group; RFT, https://arxiv.org/abs/2308.01825, all that
are good enough.
"""

import numpy as np

from grpo_jax.algorithms.base import Algorithm, Objective, Setup, StepContext, TrainBatch
from grpo_jax.algorithms.batches import batch_of, completion_rows, reward_arrays, schedule, score_metrics, tokens_of
from grpo_jax.algorithms.imitation import imitation_objective
from grpo_jax.experiment import Experiment, RFTConfig, requirements


class RFT(requirements.RFT, Algorithm):
    """Supervised fine-tuning on the good ones among the policy's own completions."""

    def needs_reference(self, experiment: Experiment) -> bool:
        return experiment.rft.samples_from == "start"

    def make_batch(self, context: StepContext, step: int) -> TrainBatch:
        config = context.experiment
        indices, prompt_ids = schedule(config.seed, step, config.prompts_per_step, len(config.task.train))
        rollout = context.sample(step, indices, prompt_ids, from_start=config.rft.samples_from == "start")
        scores = context.score(rollout, step)
        rewards, sample_mask = reward_arrays(scores, rollout.mask.shape[:2])
        chosen = select(rewards, sample_mask, config.rft)
        rows = completion_rows(rollout, scores)
        metrics = score_metrics(rollout, scores, rewards, sample_mask, config.task, config.reward.time_limit)
        return TrainBatch(
            batch_of(rollout, rewards, chosen),
            rollout,
            tokens_of(rollout),
            int(rollout.mask.sum()),
            {**metrics, "frac_imitated": float(chosen.mean())},
            [{**row, "imitated": bool(keep)} for row, keep in zip(rows, chosen.reshape(-1), strict=True)],
            {"rewards": rewards[sample_mask], "completion_lengths": rollout.mask.sum(-1)},
        )

    def make_objective(self, setup: Setup) -> Objective:
        return imitation_objective(setup)


def select(rewards: np.ndarray, sample_mask: np.ndarray, config: RFTConfig) -> np.ndarray:
    """Which completions [P, G] to imitate, of those that count. A group of equal rewards has no best."""
    if config.select == "threshold":
        return sample_mask & (rewards >= config.threshold)
    lowest = np.min(rewards, axis=1, where=sample_mask, initial=np.inf)
    highest = np.max(rewards, axis=1, where=sample_mask, initial=-np.inf)
    best = sample_mask & (rewards == highest[:, None]) & (highest > lowest)[:, None]
    return best & (best.cumsum(axis=1) == 1)
