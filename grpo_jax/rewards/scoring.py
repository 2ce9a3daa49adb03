"""Scoring a step's completions: every reward called under one failure policy and a time limit, then combined.

A failure is an exception, a call past its time limit, a result that is not one entry per completion, or an entry that
is neither None nor a finite number. None means "does not apply" and counts for nothing. A failure never becomes a 0.
"""

import math
import reprlib
import signal
import statistics
import textwrap
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from grpo_jax.errors import RunError, UserError
from grpo_jax.rewards import Completion, RewardFunction, text

_ALARM_INTERVAL = 0.05  # s; alarms repeat past the limit, since a bare `except:` in a reward may swallow the first


@dataclass(frozen=True)
class Scores:
    """The rewards of N completions.

    Attributes:
      total: [N] the weighted sum of the rewards as they were returned, nan where the completion is dropped. This is
        what is reported, so that runs which combine rewards in different ways can be compared.
      by_name: each reward's own values [N], before weights and normalisation, nan where it does not apply or failed.
      kept: [N] false where a reward failed under the policy `drop`, and where no reward applies.
      failures: for each reward, the number of completions that it failed on.
      signal: [N] what advantages are made from: the total, or the weighted sum of the standardised rewards.
    """

    total: list[float]
    by_name: dict[str, list[float]]
    kept: list[bool]
    failures: dict[str, int]
    signal: list[float]


def score(
    rewards: Mapping[str, RewardFunction],
    weights: Mapping[str, float] | None = None,
    *,
    prompts: Sequence[Any],
    completions: Sequence[Completion],
    completion_ids: Sequence[Sequence[int]],
    columns: Mapping[str, Sequence[Any]],
    combine: Literal["sum", "normalize_then_sum"] = "sum",
    group_size: int,
    on_failure: Literal["raise", "retry", "drop"] = "raise",
    retries: int = 2,
    time_limit: float = 60.0,
) -> Scores:
    """Calls each reward on all N completions and combines what they return, weighted (by 1 where no weight is given).

    `sum` adds the rewards as they are. `normalize_then_sum` first standardises each within every group of `group_size`
    consecutive completions, (r - mean) / population std over the kept completions to which it applies, so that none
    drowns the others by its scale (GDPO, Liu et al. 2026, 2601.05242); one that is constant in a group adds 0 there.

    `raise` ends the run at a failure; `retry` calls again up to `retries` times first; `drop` masks the completions
    concerned, which are all of them unless single entries are bad. `time_limit` holds for each call, in seconds. It is
    kept by SIGALRM, which ends Python code, sleeps, regular expressions and blocking reads; out of its reach are C code
    that never looks for signals and a reward that sets an alarm of its own. Signals need the main thread: in another
    this raises `UserError` rather than run without a limit.

    Raises `RunError` for a failure that ends the run, with the reward's name, what it did, and on which completion.
    """
    if threading.current_thread() is not threading.main_thread():
        raise UserError("rewards must be scored in the main thread: their time limit is kept by a signal.")
    arguments = {**columns, "prompts": prompts, "completions": completions, "completion_ids": completion_ids}
    attempts = 1 + retries if on_failure == "retry" else 1
    calls: dict[str, _Call] = {}
    for name, reward in rewards.items():
        calls[name] = call = _call(reward, arguments, attempts, time_limit)
        if call.failed and on_failure != "drop":
            raise RunError(f"reward {name!r} {_explain(call, completions)}") from call.cause
    by_name = {name: call.values for name, call in calls.items()}
    failures = {name: len(call.failed) for name, call in calls.items()}
    failed = {i for call in calls.values() for i in call.failed}
    applies = [any(not math.isnan(values[i]) for values in by_name.values()) for i in range(len(completions))]
    kept = [a and i not in failed for i, a in enumerate(applies)]
    factors = {name: (weights or {}).get(name, 1.0) for name in rewards}
    total = signal = _weighted_sums(by_name, factors, kept)
    if combine == "normalize_then_sum":
        standardized = {name: _standardize(values, kept, group_size) for name, values in by_name.items()}
        signal = _weighted_sums(standardized, factors, kept)
    return Scores(total, by_name, kept, failures, signal)


@dataclass(frozen=True)
class _Call:
    """What came of calling a reward: its values (nan for None and failures), where it failed, how, and the error."""

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
    try:
        entries = _within(time_limit, lambda: list(reward(**arguments)))
    except _TimeUp as error:
        return replace(failure, reason=f"ran past its time limit of {time_limit:g} s{_place(error)}", cause=error)
    except Exception as error:
        message = textwrap.shorten(str(error), 200)  # on one line
        return replace(failure, reason=f"raised {type(error).__name__}: {message}{_place(error)}", cause=error)
    if len(entries) != num:
        return replace(failure, reason=f"returned {len(entries)} values")
    bad = [i for i, entry in enumerate(entries) if not (entry is None or _is_finite(entry))]
    values = [math.nan if entry is None or i in bad else float(entry) for i, entry in enumerate(entries)]
    return _Call(values, bad, f"returned {reprlib.repr(entries[bad[0]])}" if bad else "")


def _is_finite(entry: Any) -> bool:
    """Whether the entry is a finite number of any kind: Python's, NumPy's, a scalar array."""
    try:
        return math.isfinite(entry)
    except (TypeError, ValueError, OverflowError):
        return False


def _weighted_sums(
    terms: Mapping[str, Sequence[float]], factors: Mapping[str, float], kept: Sequence[bool]
) -> list[float]:
    """For each completion the sum of the terms that apply to it; nan where it is dropped."""

    def of(index: int) -> float:
        return sum(factors[name] * values[index] for name, values in terms.items() if not math.isnan(values[index]))

    return [of(index) if keep else math.nan for index, keep in enumerate(kept)]


def _standardize(values: Sequence[float], kept: Sequence[bool], group_size: int) -> list[float]:
    """(r - mean) / population std of the kept values within each group; nan where there is none."""
    masked = [value if keep else math.nan for value, keep in zip(values, kept, strict=True)]
    groups = [masked[start : start + group_size] for start in range(0, len(masked), group_size)]
    return [value for group in groups for value in _standardize_group(group)]


def _standardize_group(group: Sequence[float]) -> list[float]:
    """A spread below 1e-9 of the values is a rounding error (0.1 + 0.2 beside 0.3), and its values become 0."""
    present = [value for value in group if not math.isnan(value)]
    if not present:
        return list(group)
    mean, std = statistics.fmean(present), statistics.pstdev(present)
    scale = 1 / std if std > 1e-9 * max(map(abs, present)) else 0.0
    return [(value - mean) * scale for value in group]


def _explain(call: _Call, completions: Sequence[Completion]) -> str:
    first, *others = call.failed
    return (
        f"{call.reason} for completion {first}, {reprlib.repr(text(completions[first]))}"
        f"{f', and {len(others)} more' if others else ''}; it must return one finite number, or None where it does not "
        "apply, for each completion (reward.on_failure = 'drop' would mask those that it fails on)."
    )


def _place(error: BaseException) -> str:
    """The last line of the reward's own file that the error came through, as ` (at file:line)`."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    own = [frame for frame in frames if frame.filename == frames[0].filename]
    return f" (at {Path(own[-1].filename).name}:{own[-1].lineno})" if own else ""


class _TimeUp(BaseException):
    """A reward ran past its limit. Not an `Exception`, so that a reward's own `except Exception` lets it through."""


def _within(seconds: float, function: Callable[[], Any]) -> Any:
    """Returns `function()`, or raises `_TimeUp` once `seconds` have passed. Leaves the alarm as it was found."""
    running, reached = True, False

    def ring(*_: object) -> None:
        nonlocal reached
        if running:
            reached = True
            raise _TimeUp

    started = time.monotonic()
    handler = signal.signal(signal.SIGALRM, ring)
    delay, interval = signal.setitimer(signal.ITIMER_REAL, seconds, _ALARM_INTERVAL)
    try:
        try:
            result = function()
        finally:
            running = False  # the inner `finally`, so that an alarm at this very moment still finds the outer one
    finally:
        left = max(delay - (time.monotonic() - started), 1e-3) if delay else 0.0
        signal.setitimer(signal.ITIMER_REAL, left, interval)
        signal.signal(signal.SIGALRM, handler)
    if reached:
        raise _TimeUp
    return result
