"""Scores the completions of a step: calls every reward under one failure policy and a time limit, and combines them.

A failure is an exception, a call that exceeds its time limit, a result with the wrong number of values, or a value that
is neither None nor a number that float32 can hold (NaN and 1e39 are not). None means "does not apply" and adds nothing.
A failure never becomes a 0.
"""

import itertools
import math
import reprlib
import statistics
import threading
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from grpo_jax.errors import RunError
from grpo_jax.experiment import RewardConfig
from grpo_jax.rewards import Completion, RewardFunction, text
from grpo_jax.rewards.limits import Failure, attempt

LARGEST = 3.4028234663852886e38  # of float32, in which advantages are computed


@dataclass(frozen=True)
class Scores:
    """The rewards of N completions.

    Attributes:
      total: [N] the weighted sum of the rewards as they were returned; nan for a completion that is dropped. This is
        the reported reward, so that runs that combine rewards in different ways can be compared.
      by_name: [N] for each reward: its values before weights and normalisation; nan where it does not apply or failed.
      sample_mask: [N] false for a completion that is dropped: a reward failed under the policy `drop`, or no reward
        applies.
      failures: for each reward, the number of completions that it failed on.
      advantage_rewards: [N] the rewards from which advantages are computed: the total, or the weighted sum of the
        standardised rewards.
    """

    total: list[float]
    by_name: dict[str, list[float]]
    sample_mask: list[bool]
    failures: dict[str, int]
    advantage_rewards: list[float]


def score(
    rewards: Mapping[str, RewardFunction],
    arguments: Mapping[str, Sequence[Any]],
    config: RewardConfig,
    *,
    group_size: int,
) -> Scores:
    """Calls each reward on all N completions and combines the values that the rewards return.

    `config.combine`: `sum` is the weighted sum of the rewards as they are. `normalize_then_sum` (GDPO, Liu et al. 2026,
    2601.05242) first standardises each reward within each group, (r - mean) / population std, so that no reward
    dominates the others by its scale. Mean and std are those of the completions of the group that are not dropped and
    to which the reward applies. A reward that is constant in a group adds 0 there. The weight of a reward is 1 if it is
    not in `config.weights`.

    `config.on_failure`: `raise` ends the run at a failure; `retry` first calls again, up to `config.retries` times;
    `drop` masks the completions on which the reward failed. These are all N completions, unless only single values are
    bad.

    `config.time_limit` is the limit of each call in seconds. SIGALRM enforces it, which ends Python code, sleeps,
    regular expressions and blocking reads. It cannot end C code that never checks for signals, or a reward that sets an
    alarm itself. Signals need the main thread. In another thread each call has a thread of its own, which the limit
    ends between two lines of Python; what is blocked in one call (a sleep, a read, a regular expression) is left behind
    in the background, and while C code holds Python's lock, nothing goes on. A warning says so once.

    Args:
      rewards: the reward functions by name.
      arguments: the keyword arguments of every reward function, N entries each: `prompts`, `completions`,
        `completion_ids` and every column of the task (see `Rollout.reward_arguments`).
      config: how rewards are combined, and what happens when one fails.
      group_size: number of completions in a group. The completions of a group are consecutive.

    Raises:
      RunError: for a failure that ends the run, with the name of the reward, the failure and the completion; and for
        a weighted sum that float32 cannot hold.
    """
    if threading.current_thread() is not threading.main_thread():
        warnings.warn(
            "rewards are scored outside of the main thread: their time limit ends Python code there, but what blocks "
            "in one call (a sleep, a read) goes on in the background, and a long regular expression is not ended.",
            RuntimeWarning,
            stacklevel=2,
        )
    completions = arguments["completions"]
    attempts = 1 + config.retries if config.on_failure == "retry" else 1
    calls: dict[str, _Call] = {}
    for name, reward in rewards.items():
        calls[name] = call = _call(reward, arguments, attempts, config.time_limit)
        if call.failed and config.on_failure != "drop":
            raise RunError(f"reward {name!r} {_explain(call, completions)}") from call.cause
    by_name = {name: call.values for name, call in calls.items()}
    failures = {name: len(call.failed) for name, call in calls.items()}
    failed = {i for call in calls.values() for i in call.failed}
    applies = [any(not math.isnan(values[i]) for values in by_name.values()) for i in range(len(completions))]
    sample_mask = [a and i not in failed for i, a in enumerate(applies)]
    weights = {name: config.weights.get(name, 1.0) for name in rewards}
    total = advantage_rewards = _weighted_sums(by_name, weights, sample_mask)
    if config.combine == "normalize_then_sum":
        standardized = {name: _standardize(values, sample_mask, group_size) for name, values in by_name.items()}
        advantage_rewards = _weighted_sums(standardized, weights, sample_mask)
    for index, value in enumerate([*total, *advantage_rewards]):
        if not (math.isnan(value) or abs(value) <= LARGEST):
            raise RunError(
                f"the weighted sum of the rewards of completion {index % len(completions)} is {value:g}, more than "
                "float32 can hold: lower reward.weights, or scale the rewards down."
            )
    return Scores(total, by_name, sample_mask, failures, advantage_rewards)


@dataclass(frozen=True)
class _Call:
    """The result of calling a reward.

    Attributes:
      values: [N] its values; nan for None and failures.
      failed: the indices of the completions that it failed on.
      reason: how it failed, as the predicate of a sentence.
      cause: the exception, if there was one.
    """

    values: list[float]
    failed: Sequence[int] = ()
    reason: str = ""
    cause: BaseException | None = None


def _call(reward: RewardFunction, arguments: Mapping[str, Any], attempts: int, time_limit: float) -> _Call:
    for _ in range(attempts):
        call = _call_once(reward, arguments, time_limit)
        if not call.failed:
            break
    return call


def _call_once(reward: RewardFunction, arguments: Mapping[str, Any], time_limit: float) -> _Call:
    num = len(arguments["completions"])
    failure = _Call([math.nan] * num, range(num))
    # A generator without an end must not fill the memory before its time is up.
    entries = attempt(lambda: list(itertools.islice(reward(**arguments), num + 1000)), time_limit, __file__)
    if isinstance(entries, Failure):
        return replace(failure, reason=entries.reason, cause=entries.cause)
    if len(entries) != num:
        return replace(failure, reason=f"returned {len(entries)} values")
    bad = [i for i, entry in enumerate(entries) if not (entry is None or _is_finite(entry))]
    values = [math.nan if entry is None or i in bad else float(entry) for i, entry in enumerate(entries)]
    return _Call(values, bad, f"returned {reprlib.repr(entries[bad[0]])}" if bad else "")


def _is_finite(entry: Any) -> bool:
    """Whether the entry is a number that float32 can hold: one of Python or NumPy, or a scalar array."""
    try:
        return math.isfinite(entry) and abs(float(entry)) <= LARGEST
    except (TypeError, ValueError, OverflowError):
        return False


def _weighted_sums(
    terms: Mapping[str, Sequence[float]], weights: Mapping[str, float], sample_mask: Sequence[bool]
) -> list[float]:
    """Computes, for each completion, the weighted sum of the terms that apply to it; nan if it is dropped."""

    def sum_at(index: int) -> float:
        return sum(weights[name] * values[index] for name, values in terms.items() if not math.isnan(values[index]))

    return [sum_at(index) if included else math.nan for index, included in enumerate(sample_mask)]


def _standardize(values: Sequence[float], sample_mask: Sequence[bool], group_size: int) -> list[float]:
    """Computes (r - mean) / population std of the unmasked values within each group; nan where there is no value."""
    masked = [value if included else math.nan for value, included in zip(values, sample_mask, strict=True)]
    groups = [masked[start : start + group_size] for start in range(0, len(masked), group_size)]
    return [value for group in groups for value in _standardize_group(group)]


def _standardize_group(group: Sequence[float]) -> list[float]:
    """Standardises the values of one group.

    A std below 1e-9 of the largest value is a rounding error (0.1 + 0.2 beside 0.3). The values then become 0.
    """
    present = [value for value in group if not math.isnan(value)]
    if not present:
        return list(group)
    mean, std = statistics.fmean(present), statistics.pstdev(present)
    scale = 1 / std if std > 1e-9 * max(map(abs, present)) else 0.0
    return [(value - mean) * scale for value in group]


def _explain(call: _Call, completions: Sequence[Completion]) -> str:
    """Returns the rest of the error message after the name of the reward."""
    first, *others = call.failed
    return (
        f"{call.reason} for completion {first}, {reprlib.repr(text(completions[first]))}"
        f"{f', and {len(others)} more' if others else ''}; it must return one finite number of float32, or None where "
        "it does not apply, for each completion (reward.on_failure = 'drop' would mask the completions where it fails)."
    )
