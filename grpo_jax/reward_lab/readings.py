"""What several reward functions say about the same groups of completions, before anything is trained on them.

A *variant* is a reward on its own, or the experiment's rewards combined. Every figure here is about groups, because
that is all GRPO sees of a reward: a reward that cannot tell the members of a group apart teaches nothing, however
sensible its mean is.
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import kendalltau

from grpo_jax.advantages import group_advantages
from grpo_jax.experiment import AdvantageConfig, Experiment
from grpo_jax.reward_lab.groups import Groups
from grpo_jax.rewards import RewardFunction
from grpo_jax.rewards.scoring import score

TOTAL = "total"  # the variant that the experiment trains on: its rewards combined
GROUP_SIZES = (2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Signal:
    """What a variant's rewards tell of the groups.

    Attributes:
      mean, std, low, high: of all rewards; num_values: how many values occur.
      group_std: the mean over groups of the standard deviation within the group.
      no_signal: the share of groups whose members all earn the same.
      predicted: the same share as binomial theory has it from how often each value occurs: see `dead_share`.
      predicted_by_size: that prediction for other group sizes.
    """

    mean: float
    std: float
    low: float
    high: float
    num_values: int
    group_std: float
    no_signal: float
    predicted: float
    predicted_by_size: dict[int, float]


@dataclass(frozen=True)
class Agreement:
    """How alike two variants rank.

    `tau` is the mean over groups of Kendall's tau-b within the group (nan if in no group both variants vary), and
    `num_groups` the number of groups that it is over. `flips` is the share of completions that one variant would make
    likelier and the other unlikelier.
    """

    first: str
    second: str
    tau: float
    num_groups: int
    flips: float


@dataclass(frozen=True)
class Reading:
    """One set of groups, read by every variant.

    `rewards` and `advantages` are [P, G] by variant; a reward is nan where it does not apply or was dropped.
    `components` is the share of the total's advantage variance that comes from each of the experiment's rewards; empty
    where there is only one.
    """

    groups: Groups
    rewards: dict[str, np.ndarray]
    advantages: dict[str, np.ndarray]
    signals: dict[str, Signal]
    agreements: list[Agreement]
    components: dict[str, float]


def read(groups: Groups, experiment: Experiment, extra: Mapping[str, RewardFunction]) -> Reading:
    """Scores the groups under every variant and says what each has to tell, and how they agree."""
    variants = score_variants(groups.arguments, groups.group_size, experiment, extra)
    rewards = {name: values.reshape(-1, groups.group_size) for name, values in variants.items()}
    advantages = {name: _advantages(values, experiment.advantages) for name, values in rewards.items()}
    parts = {name: rewards[name] for name in experiment.rewards} if TOTAL in rewards else {}
    components = component_shares(parts, rewards[TOTAL], advantages[TOTAL], experiment) if parts else {}
    return Reading(
        groups,
        rewards,
        advantages,
        {name: signal(values, groups.prompts) for name, values in rewards.items()},
        [agreement(a, b, rewards, advantages) for a, b in itertools.combinations(rewards, 2)],
        components,
    )


def score_variants(
    arguments: Mapping[str, Sequence[Any]],
    group_size: int,
    experiment: Experiment,
    extra: Mapping[str, RewardFunction],
    *,
    on_failure: str | None = None,
) -> dict[str, np.ndarray]:
    """The rewards [N] of N completions under every variant: each of the experiment's rewards alone, their total where
    there are several, and the `extra` ones. nan where a reward does not apply or its completion is dropped.

    `on_failure` takes the place of the experiment's own failure policy.
    """
    config, columns = experiment.reward, dict(arguments)
    options = {name: columns.pop(name) for name in ("prompts", "completions", "completion_ids")} | {
        "columns": columns,
        "group_size": group_size,
        "on_failure": on_failure or config.on_failure,
        "retries": config.retries,
        "time_limit": config.time_limit,
    }
    own = score(experiment.rewards, config.weights, combine=config.combine, **options)
    values = dict(own.by_name)
    if len(experiment.rewards) > 1:
        values[TOTAL] = own.signal
    if extra:
        values |= score(extra, **options).by_name
    return {name: np.array(entries, float) for name, entries in values.items()}


def _advantages(rewards: np.ndarray, options: AdvantageConfig) -> np.ndarray:
    """The advantages [P, G] that training would have from these rewards alone; 0 where there is none."""
    applies = ~np.isnan(rewards)
    return np.asarray(
        group_advantages(
            np.where(applies, rewards, 0.0),
            scale=options.scale,
            baseline=options.baseline,
            ddof=options.ddof,
            mask=applies,
        )
    )


def signal(rewards: np.ndarray, prompts: Sequence[int]) -> Signal:
    """What rewards [P, G] of groups of the given prompts [P] have to tell."""
    known = rewards[~np.isnan(rewards)]
    if not known.size:
        return Signal(*[math.nan] * 4, 0, *[math.nan] * 3, {})
    groups = [row[~np.isnan(row)] for row in _levels(rewards)]
    by_prompt = defaultdict(list)
    for prompt, row in zip(prompts, groups, strict=True):
        by_prompt[prompt].append(row)
    pooled = {prompt: np.concatenate(rows) for prompt, rows in by_prompt.items()}
    sizes = [(pooled[prompt], len(row)) for prompt, row in zip(prompts, groups, strict=True) if len(row)]
    return Signal(
        mean=float(known.mean()),
        std=float(known.std()),
        low=float(known.min()),
        high=float(known.max()),
        num_values=len(np.unique(np.concatenate(groups))),
        group_std=float(np.mean([row[~np.isnan(row)].std() for row in rewards if not np.isnan(row).all()])),
        no_signal=float(np.mean([np.ptp(row) == 0 for row in groups if len(row)])),
        predicted=float(np.mean([dead_share(values, size) for values, size in sizes])),
        predicted_by_size={
            size: float(np.mean([dead_share(v, size) for v in pooled.values() if len(v)])) for size in GROUP_SIZES
        },
    )


def dead_share(values: np.ndarray, group_size: int) -> float:
    """The chance that a group of independent draws is all of one value: the sum over values v of p_v ** G.

    For a binary reward with success rate p that is p^G + (1 - p)^G. `values` are the rewards [N] of one prompt, and p_v
    is the share that v has of them. From the members of a single group alone this is biased upwards; with several
    groups of the prompt, less so.
    """
    counts = np.unique(values, return_counts=True)[1]
    return float(((counts / len(values)) ** group_size).sum())


def agreement(
    first: str, second: str, rewards: Mapping[str, np.ndarray], advantages: Mapping[str, np.ndarray]
) -> Agreement:
    """How alike two variants rank the members of each group, from their rewards and advantages [P, G]."""
    taus = []
    for a, b in zip(_levels(rewards[first]), _levels(rewards[second]), strict=True):
        both = ~np.isnan(a) & ~np.isnan(b)
        if both.sum() > 1 and np.ptp(a[both]) > 0 and np.ptp(b[both]) > 0:
            taus.append(float(kendalltau(a[both], b[both]).statistic))
    flips = np.sign(advantages[first]) * np.sign(advantages[second]) < 0
    return Agreement(first, second, float(np.mean(taus)) if taus else math.nan, len(taus), float(flips.mean()))


def component_shares(
    parts: Mapping[str, np.ndarray], total: np.ndarray, advantages: np.ndarray, experiment: Experiment
) -> dict[str, float]:
    """The share of the variance of the total's advantages [P, G] that each reward carries: cov(part, A) / var(A).

    The total is the sum of its weighted (or standardised and weighted) parts, so the shares sum to 1. A reward that
    works against the others has a negative share. Within a group, an advantage is the total's deviation times a gain
    (one over the scale), and so a part carries its own deviation times the same gain. nan where no group has a signal.
    """
    kept = ~np.isnan(total)
    standardized = experiment.reward.combine == "normalize_then_sum"
    spread = _deviation(advantages, kept)
    gain = _divide(np.abs(spread).max(1), np.abs(_deviation(total, kept)).max(1))
    variance = float((spread**2).sum())
    shares = {}
    for name, values in parts.items():
        term = _advantages(np.where(kept, values, np.nan), AdvantageConfig()) if standardized else values
        term = np.nan_to_num(term) * experiment.reward.weights.get(name, 1.0)
        carried = float((gain[:, None] * _deviation(term, kept) * spread).sum())
        shares[name] = carried / variance if variance else math.nan
    return shares


def _deviation(values: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Each kept entry less the mean of its row's kept entries; 0 elsewhere."""
    filled = np.where(kept, values, 0.0)
    mean = filled.sum(1, keepdims=True) / np.maximum(kept.sum(1, keepdims=True), 1)
    return np.where(kept, filled - mean, 0.0)


def _divide(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.where(y == 0, 0.0, x / np.where(y == 0, 1.0, y))


def _levels(rewards: np.ndarray) -> np.ndarray:
    """The rewards to six digits of the largest, so that sums that differ by rounding alone count as equal."""
    largest = np.nanmax(np.abs(rewards), initial=0.0)
    return np.round(rewards / largest, 6) if largest else rewards
