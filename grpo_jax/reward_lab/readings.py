"""Several rewards on the same groups: how well each tells the members of a group apart, and how much they agree.

A *variant* is one reward alone, or the experiment's rewards combined. Every number here is about groups, because GRPO
only compares the members of a group: if their rewards are equal it learns nothing, whatever their mean is.
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.stats import kendalltau

from grpo_jax.advantages import compute_advantages
from grpo_jax.experiment import AdvantageConfig, Experiment
from grpo_jax.experiment.configs import OnFailure
from grpo_jax.reward_lab.groups import Groups
from grpo_jax.reward_lab.shaping import Shaping, find_shaping
from grpo_jax.rewards import RewardFunction
from grpo_jax.rewards.scoring import score
from grpo_jax.tasks.calls import success_of

TOTAL = "total"  # the variant that the experiment trains on: its rewards combined
GROUP_SIZES = (2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Signal:
    """How well a variant's rewards tell the members of a group apart.

    Attributes:
      mean, std, low, high: of all rewards, `low` and `high` the smallest and the largest.
      num_values: how many different rewards occur.
      group_std: the mean over groups of the standard deviation within the group.
      no_signal: the share of groups without signal, whose members all earn the same.
      predicted: that share as `no_signal_share` predicts it from how often each value occurs.
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
    """How much two variants agree on which members of a group are better.

    `tau` is the mean over groups of Kendall's tau-b within the group (nan if there is no group in which both variants
    differ), and `num_groups` the number of groups in that mean. `flips` is the share of completions that one variant
    would make more likely and the other less likely.
    """

    first: str
    second: str
    tau: float
    num_groups: int
    flips: float


@dataclass(frozen=True)
class Reading:
    """One set of groups, scored by every variant.

    `rewards` and `advantages` are [P, G] by variant; a reward is nan where it does not apply or was dropped.
    `components` is the share of the variance of the total's advantages that comes from each of the experiment's
    rewards; empty if there is only one reward. `shaping` are the groups in which nobody is right and rewards differ.
    """

    groups: Groups
    rewards: dict[str, np.ndarray]
    advantages: dict[str, np.ndarray]
    signals: dict[str, Signal]
    agreements: list[Agreement]
    components: dict[str, float]
    shaping: Shaping


def read(groups: Groups, experiment: Experiment, extra: Mapping[str, RewardFunction]) -> Reading:
    """Scores the groups under every variant and computes the signal of each and the agreement of each two."""
    variants = score_variants(groups.arguments, groups.group_size, experiment, extra)
    rewards = {name: values.reshape(-1, groups.group_size) for name, values in variants.items()}
    advantages = {name: _advantages(values, experiment.advantages) for name, values in rewards.items()}
    parts = {name: rewards[name] for name in experiment.rewards} if TOTAL in rewards else {}
    components = component_shares(parts, rewards[TOTAL], advantages[TOTAL], experiment) if parts else {}
    own = {name: rewards[name] for name in experiment.rewards}
    success = np.reshape(
        success_of(experiment.task, groups.arguments, experiment.reward.time_limit), (-1, groups.group_size)
    )
    total = rewards[TOTAL] if TOTAL in rewards else next(iter(own.values()))
    return Reading(
        groups,
        rewards,
        advantages,
        {name: signal(values, groups.prompts) for name, values in rewards.items()},
        [agreement(a, b, rewards, advantages) for a, b in itertools.combinations(rewards, 2)],
        components,
        find_shaping(own, total, success, experiment.reward),
    )


def score_variants(
    arguments: Mapping[str, Sequence[Any]],
    group_size: int,
    experiment: Experiment,
    extra: Mapping[str, RewardFunction],
    *,
    on_failure: OnFailure | None = None,
) -> dict[str, np.ndarray]:
    """The rewards [N] of N completions under every variant.

    The variants are each of the experiment's rewards alone, their total where there are several, and the `extra` ones.
    nan where a reward does not apply or its completion is dropped. `on_failure` replaces the experiment's own failure
    policy.
    """
    config = replace(experiment.reward, on_failure=on_failure or experiment.reward.on_failure)
    own = score(experiment.rewards, arguments, config, group_size=group_size)
    values = dict(own.by_name)
    if len(experiment.rewards) > 1:
        values[TOTAL] = own.advantage_rewards
    if extra:
        values |= score(extra, arguments, replace(config, weights={}, combine="sum"), group_size=group_size).by_name
    return {name: np.array(entries, float) for name, entries in values.items()}


def _advantages(rewards: np.ndarray, how: AdvantageConfig | Callable[..., Any]) -> np.ndarray:
    """The advantages [P, G] that training would compute from these rewards alone; 0 where a reward is nan."""
    applies = ~np.isnan(rewards)
    # A function that returns advantages by token gets completions of one token.
    found = compute_advantages(how, np.where(applies, rewards, 0.0), applies, token_mask=applies[..., None])
    return np.asarray(found).reshape(rewards.shape)


def signal(rewards: np.ndarray, prompts: Sequence[int]) -> Signal:
    """The signal of rewards [P, G], whose groups are of the given prompts [P]."""
    known = rewards[~np.isnan(rewards)]
    if not known.size:
        return Signal(math.nan, math.nan, math.nan, math.nan, 0, math.nan, math.nan, math.nan, {})
    groups = [row[~np.isnan(row)] for row in _rounded(rewards)]
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
        predicted=float(np.mean([no_signal_share(values, size) for values, size in sizes])),
        predicted_by_size={
            size: float(np.mean([no_signal_share(v, size) for v in pooled.values() if len(v)])) for size in GROUP_SIZES
        },
    )


def no_signal_share(values: np.ndarray, group_size: int) -> float:
    """The probability that G independent samples all earn the same: the sum over values v of p_v ** G.

    For a binary reward with success rate p this is p^G + (1 - p)^G. `values` are the rewards [N] of one prompt, and p_v
    is the share of v among them. The estimate is biased upwards if all values come from one group, and less so if they
    come from several.
    """
    counts = np.unique(values, return_counts=True)[1]
    return float(((counts / len(values)) ** group_size).sum())


def agreement(
    first: str, second: str, rewards: Mapping[str, np.ndarray], advantages: Mapping[str, np.ndarray]
) -> Agreement:
    """The agreement of two variants, from their rewards and advantages [P, G] by name."""
    taus = []
    for a, b in zip(_rounded(rewards[first]), _rounded(rewards[second]), strict=True):
        both = ~np.isnan(a) & ~np.isnan(b)
        if both.sum() > 1 and np.ptp(a[both]) > 0 and np.ptp(b[both]) > 0:
            taus.append(float(kendalltau(a[both], b[both]).statistic))
    flips = np.sign(advantages[first]) * np.sign(advantages[second]) < 0
    return Agreement(first, second, float(np.mean(taus)) if taus else math.nan, len(taus), float(flips.mean()))


def component_shares(
    parts: Mapping[str, np.ndarray], total: np.ndarray, advantages: np.ndarray, experiment: Experiment
) -> dict[str, float]:
    """The share of the variance of the total's advantages [P, G] that comes from each reward: cov(part, A) / var(A).

    The total is the sum of its weighted (or standardised and weighted) parts, so the shares sum to 1. A reward that
    works against the others has a negative share. Within a group, an advantage is the total's deviation from the mean
    times a gain (one over the scale), so the contribution of a part is its own deviation times the same gain. All
    shares are nan if no group has a signal.
    """
    mask = ~np.isnan(total)
    standardized = experiment.reward.combine == "normalize_then_sum"
    deviation = _deviation(advantages, mask)
    gain = _divide(np.abs(deviation).max(1), np.abs(_deviation(total, mask)).max(1))
    variance = float((deviation**2).sum())
    shares = {}
    for name, values in parts.items():
        term = _advantages(np.where(mask, values, np.nan), AdvantageConfig()) if standardized else values
        term = np.nan_to_num(term) * experiment.reward.weights.get(name, 1.0)
        covariance = float((gain[:, None] * _deviation(term, mask) * deviation).sum())
        shares[name] = covariance / variance if variance else math.nan
    return shares


def _deviation(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Each entry minus the mean of its row, over the entries where `mask` is true; 0 elsewhere."""
    filled = np.where(mask, values, 0.0)
    mean = filled.sum(1, keepdims=True) / np.maximum(mask.sum(1, keepdims=True), 1)
    return np.where(mask, filled - mean, 0.0)


def _divide(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """x / y, and 0 where y is 0."""
    return np.where(y == 0, 0.0, x / np.where(y == 0, 1.0, y))


def _rounded(rewards: np.ndarray) -> np.ndarray:
    """The rewards rounded to a millionth of the largest, so that sums which differ only by rounding are equal."""
    largest = np.nanmax(np.abs(rewards), initial=0.0)
    return np.round(rewards / largest, 6) if largest else rewards
