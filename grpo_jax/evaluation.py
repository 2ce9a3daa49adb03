"""A policy on a split of a task: success and reward, with intervals that are clustered by prompt."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from grpo_jax.confidence import bounded_limits
from grpo_jax.experiment import Experiment
from grpo_jax.policy import Policy
from grpo_jax.rollout import (
    Generator,
    Prompts,
    Split,
    encode_prompts,
    example_row,
    make_actor,
    name_noise,
    rollout,
    score_rollout,
)
from grpo_jax.sharding import up_to
from grpo_jax.tasks.calls import success_of

NOISE_STEP = 2**31 - 1  # the step that names the noise of every evaluation, so that they can be compared in pairs


@dataclass(frozen=True)
class Evaluation:
    """What a policy scored.

    Attributes:
      split, num_prompts, num_samples, temperature: what was asked, and how.
      success: the share of completions that succeeded; success_low and success_high its 95 % interval.
      reward: the mean combined reward; None for an experiment without rewards.
      pass_at_k: the chance that at least one of k samples succeeds, unbiased (Chen et al. 2021, 2107.03374).
      mean_length, mean_turns: sampled tokens and turns (the guesses of a game) per completion.
      clipped_ratio: the share of completions that the token limit cut off.
      records: each completion with its example (its place in the split, its prompt, its columns), success and reward.
    """

    split: str
    num_prompts: int
    num_samples: int
    temperature: float
    success: float
    success_low: float
    success_high: float
    reward: float | None
    pass_at_k: dict[int, float]
    mean_length: float
    mean_turns: float
    clipped_ratio: float
    records: list[dict[str, Any]] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the records."""
        return {key: value for key, value in asdict(self).items() if key != "records"}


def evaluate(policy: Policy, experiment: Experiment, split: Split = "held_out") -> Evaluation:
    """Evaluates a policy on a split of the experiment's task as `experiment.evaluation` says."""
    task, sampling = experiment.task, experiment.sampling
    prompts = encode_prompts(task, policy.require_tokenizer(), policy.config.max_positions, sampling.max_tokens)
    return evaluate_generator(make_actor(policy, up_to(experiment.devices)), prompts, experiment, split)


def evaluate_generator(
    generator: Generator, prompts: Prompts, experiment: Experiment, split: Split = "held_out"
) -> Evaluation:
    """The same for anything that completes prompts, such as a policy that is on its devices already."""
    task, config = experiment.task, experiment.evaluation
    examples = getattr(task, split)[: config.num_prompts]
    sampling = replace(experiment.sampling, temperature=config.temperature)
    n = generator.batch_multiple
    size = max(config.batch_size // config.num_samples // n, 1) * n
    size = min(size, -(-len(examples) // n) * n)
    records: list[dict[str, Any]] = []
    for start in range(0, len(examples), size):
        wanted = list(range(start, min(start + size, len(examples))))
        # The last batch is filled up with repetitions, so that its shape is that of the others.
        indices = (wanted * size)[:size]
        ids = [index + size * (place >= len(wanted)) for place, index in enumerate(indices)]
        noise = name_noise(experiment.seed, NOISE_STEP, ids, range(config.num_samples))
        found = rollout(generator, task, prompts.batch(split, indices), noise, sampling, experiment.reward.time_limit)
        arguments = found.reward_arguments()
        success = success_of(task, arguments, experiment.reward.time_limit)
        rewards: Sequence[float | None] = [None] * len(success)
        if experiment.rewards:
            rewards = score_rollout(found, experiment).total
        episodes = [episode for group in found.episodes for episode in group]
        asked = [example_row(examples[i], i) for i in indices for _ in range(config.num_samples)]
        rows = zip(asked, arguments["completions"], success, rewards, episodes, strict=True)
        records += [
            {
                **example,
                "completion": completion,
                "success": bool(won),
                "reward": reward,
                "length": sum(episode.trained),
                "turns": len(episode.turns),
                "ended": episode.ended,
            }
            for example, completion, won, reward, episode in list(rows)[: len(wanted) * config.num_samples]
        ]
    won = np.array([record["success"] for record in records]).reshape(len(examples), config.num_samples)
    # Greedy samples of a single prompt are copies of one sample.
    low, high = success_interval(won[:, :1] if len(won) == 1 and config.temperature == 0 else won)
    known = [r["reward"] for r in records if r["reward"] is not None and not math.isnan(r["reward"])]
    powers = [2**i for i in range(config.num_samples.bit_length())]
    return Evaluation(
        split=split,
        num_prompts=len(examples),
        num_samples=config.num_samples,
        temperature=config.temperature,
        success=float(won.mean()),
        success_low=low,
        success_high=high,
        reward=float(np.mean(known)) if known else None,
        pass_at_k={k: pass_at_k(won.sum(1), config.num_samples, k) for k in powers},
        mean_length=float(np.mean([record["length"] for record in records])),
        mean_turns=float(np.mean([record["turns"] for record in records])),
        clipped_ratio=float(np.mean([not record["ended"] for record in records])),
        records=records,
    )


def success_interval(won: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of a success rate, from outcomes [prompts, samples].

    Samples of one prompt are correlated. So the values are the prompts' means, and the interval is that of their mean
    (`bounded_limits`); with one sample of each prompt it is Clopper and Pearson's (1934). It is about prompts like
    these; with a single prompt it is about further samples of that prompt. Wilson's interval (1927), with an effective
    number of samples, covers as little as 85 % where success is rare or almost certain (measured in
    docs/results/interval_coverage.md).
    """
    low, high = bounded_limits(won.mean(1) if len(won) > 1 else won[0])
    return float(low), float(high)


def pass_at_k(successes: Sequence[int] | np.ndarray, num_samples: int, k: int) -> float:
    """The mean over prompts of 1 - C(n - c, k) / C(n, k), for c successes among n samples (2107.03374, eq. 1)."""
    misses = [math.comb(num_samples - int(c), k) / math.comb(num_samples, k) for c in successes]
    return 1 - sum(misses) / len(misses)
