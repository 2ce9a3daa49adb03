"""Scoring under a failure policy, a time limit and two ways to combine."""

import math
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from grpo_jax.errors import RunError
from grpo_jax.experiment import RewardConfig
from grpo_jax.rewards import RewardFunction
from grpo_jax.rewards.scoring import Scores, score

NAN = math.nan


def constant(*values: Any) -> RewardFunction:
    return lambda **_: list(values)


def score_four(rewards: dict[str, RewardFunction], weights: dict[str, float] | None = None, **options: Any) -> Scores:
    """Scores the completions a, b, c and d, two to a group. Most options are those of `RewardConfig`."""
    arguments = {
        "prompts": ["p", "p", "q", "q"],
        "completions": options.pop("completions", ["a", "b", "c", "d"]),
        "completion_ids": [[1], [2], [3], [4]],
        "secret": ["s", "s", "t", "t"],
    }
    group_size = options.pop("group_size", 2)
    return score(rewards, arguments, RewardConfig(weights=weights or {}, **options), group_size=group_size)


def same(values: list[float], expected: list[float]) -> bool:
    return values == pytest.approx(expected, abs=1e-12, nan_ok=True)


class TestCombination:
    def test_a_reward_is_called_once_with_keywords_and_columns(self) -> None:
        seen = []

        def reward(
            *, prompts: list[str], completions: list[str], completion_ids: list[list[int]], secret: list[str]
        ) -> list[float]:
            seen.append((prompts, completions, completion_ids, secret))
            return [0.0] * 4

        score_four({"r": reward})
        assert seen == [(["p", "p", "q", "q"], ["a", "b", "c", "d"], [[1], [2], [3], [4]], ["s", "s", "t", "t"])]

    def test_the_weighted_sum(self) -> None:
        scores = score_four({"x": constant(1, 2, 3, 4), "y": constant(10, 0, 0, 10)}, {"y": 0.5})
        assert scores.total == [6.0, 2.0, 3.0, 9.0]  # x + 0.5 y
        assert scores.by_name == {"x": [1, 2, 3, 4], "y": [10, 0, 0, 10]}  # before weights
        assert scores.sample_mask == [True] * 4
        assert scores.failures == {"x": 0, "y": 0}

    def test_none_contributes_nothing_and_is_no_failure(self) -> None:
        scores = score_four({"x": constant(1, 2, None, 4), "y": constant(10, None, 30, 40)})
        assert scores.total == [11.0, 2.0, 30.0, 44.0]
        assert same(scores.by_name["x"], [1, 2, NAN, 4])
        assert scores.sample_mask == [True] * 4
        assert scores.failures == {"x": 0, "y": 0}

    def test_a_completion_to_which_no_reward_applies_is_dropped(self) -> None:
        scores = score_four({"x": constant(1, None, 3, 4), "y": constant(1, None, None, None)})
        assert same(scores.total, [2, NAN, 3, 4])
        assert scores.sample_mask == [True, False, True, True]

    @pytest.mark.parametrize("values", [np.array([1, 2, 3, 4]), (True, 2, np.float32(3), np.array(4.0)), iter("")])
    def test_numbers_of_any_kind_are_numbers(self, values: Any) -> None:
        given = iter([1, 2, 3, 4]) if isinstance(values, Iterator) else values
        scores = score_four({"x": lambda **_: given})
        assert scores.total == [1.0, 2.0, 3.0, 4.0]
        assert {type(value) for value in scores.total} == {float}

    def test_normalize_then_sum_standardises_each_reward_within_its_group(self) -> None:
        # Group (a, b): x = 0, 2 -> mean 1, std 1 -> -1, +1; y = 500, 100 -> mean 300, std 200 -> +1, -1.
        # Group (c, d): x = 7, 7 -> no spread -> 0, 0;       y = 0, 400 -> mean 200, std 200 -> -1, +1.
        rewards = {"x": constant(0, 2, 7, 7), "y": constant(500, 100, 0, 400)}
        scores = score_four(rewards, {"x": 3.0}, combine="normalize_then_sum")
        assert same(scores.advantage_rewards, [3 * -1 + 1, 3 * 1 - 1, -1, 1])
        assert scores.by_name["y"] == [500, 100, 0, 400]  # as it was returned
        assert scores.total == [500, 3 * 2 + 100, 3 * 7, 3 * 7 + 400]  # what is reported is not standardised

    def test_what_does_not_apply_or_is_dropped_has_no_part_in_the_standardisation(self) -> None:
        # x applies to a, b and d: mean 2, var (4 + 0 + 4) / 3. Completion d is dropped by y: then a, b: mean 1, std 1.
        x, y = constant(0, 2, None, 4), constant(5, 5, 5, NAN)
        std = math.sqrt(8 / 3)
        alone = score_four({"x": x}, combine="normalize_then_sum", group_size=4)
        assert same(alone.advantage_rewards, [-2 / std, 0, NAN, 2 / std])
        both = score_four({"x": x, "y": y}, combine="normalize_then_sum", group_size=4, on_failure="drop")
        assert same(both.advantage_rewards, [-1, 1, 0, NAN])

    def test_a_rounding_error_is_no_spread(self) -> None:
        rewards = {"x": constant(0.1 + 0.2, 0.3, 0.8, 0.8)}
        assert same(score_four(rewards, combine="normalize_then_sum").advantage_rewards, [0, 0, 0, 0])


def raising(**_: Any) -> list[float]:
    raise ValueError("no such word")


FAILURES: dict[str, tuple[RewardFunction, str]] = {
    "an exception": (raising, r"raised ValueError: no such word \(at test_scoring.py:\d+\)"),
    "a missing column": (lambda *, colour, **_: [0.0], "raised TypeError: .*'colour'"),
    "too few values": (constant(1, 2, 3), "returned 3 values"),
    "too many values": (constant(1, 2, 3, 4, 5), "returned 5 values"),
    "nothing": (lambda **_: None, "raised TypeError: 'NoneType' object is not iterable"),
    "one number": (lambda **_: 1.0, "raised TypeError: 'float' object is not iterable"),
    "a time-out": (lambda **_: time.sleep(60), r"ran past its time limit of 0\.2 s \(at test_scoring.py:\d+\)"),
}
BAD_ENTRIES = [NAN, math.inf, -math.inf, "1.0", [1.0], 1j, 10**400]


class TestFailure:
    @pytest.mark.parametrize("case", FAILURES)
    def test_raise_ends_the_run_in_one_sentence(self, case: str) -> None:
        reward, reason = FAILURES[case]
        with pytest.raises(
            RunError, match=f"reward 'mine' {reason} for completion 0, 'a', and 3 more; it must"
        ) as info:
            score_four({"mine": reward}, time_limit=0.2)
        assert "\n" not in str(info.value)

    @pytest.mark.parametrize("entry", BAD_ENTRIES, ids=[repr(entry)[:9] for entry in BAD_ENTRIES])
    def test_a_bad_entry_is_named_with_its_completion(self, entry: Any) -> None:
        with pytest.raises(
            RunError, match=r"reward 'mine' returned .* for completion 2, 'c'; it must return one finite"
        ):
            score_four({"mine": constant(1, 2, entry, 4)})

    def test_long_completions_and_long_messages_are_shortened_to_one_line(self) -> None:
        def verbose(**_: Any) -> list[float]:
            raise ValueError("one line\n" * 500)

        with pytest.raises(RunError) as info:
            score_four({"mine": verbose}, completions=["w" * 5000] * 4)
        assert len(str(info.value)) < 600
        assert "\n" not in str(info.value)

    @pytest.mark.parametrize("case", FAILURES)
    def test_drop_masks_all_completions_of_a_call_that_failed(self, case: str) -> None:
        scores = score_four({"mine": FAILURES[case][0], "x": constant(1, 2, 3, 4)}, on_failure="drop", time_limit=0.2)
        assert scores.sample_mask == [False] * 4
        assert same(scores.total, [NAN] * 4)
        assert same(scores.by_name["mine"], [NAN] * 4)
        assert scores.by_name["x"] == [1, 2, 3, 4]
        assert scores.failures == {"mine": 4, "x": 0}

    @pytest.mark.parametrize("entry", BAD_ENTRIES, ids=[repr(entry)[:9] for entry in BAD_ENTRIES])
    def test_drop_masks_only_the_completion_of_a_bad_entry(self, entry: Any) -> None:
        scores = score_four({"mine": constant(1, entry, None, 4), "x": constant(1, 1, 1, 1)}, on_failure="drop")
        assert scores.sample_mask == [True, False, True, True]
        assert same(scores.total, [2, NAN, 1, 5])
        assert scores.failures == {"mine": 1, "x": 0}

    def test_retry_calls_again_until_it_succeeds(self) -> None:
        outcomes = iter([None, [1, 2, 3, NAN], [1, 2, 3, 4]])
        assert score_four({"r": lambda **_: next(outcomes)}, on_failure="retry", retries=2).total == [1, 2, 3, 4]

    def test_retry_raises_when_its_retries_are_used_up(self) -> None:
        calls: list[int] = []

        def reward(**_: Any) -> list[float]:
            calls.append(1)
            return []

        with pytest.raises(RunError, match="returned 0 values"):
            score_four({"r": reward}, on_failure="retry", retries=2)
        assert len(calls) == 3

    def test_a_failure_that_ends_the_run_ends_it_before_the_next_reward_is_called(self) -> None:
        later: list[int] = []
        with pytest.raises(RunError):
            score_four({"bad": raising, "later": lambda **_: later.append(1)})
        assert later == []

    @pytest.mark.parametrize(("policy", "calls"), [("drop", 1), ("raise", 1), ("retry", 3)])
    def test_only_the_policy_of_retries_calls_again(self, policy: str, calls: int) -> None:
        made: list[int] = []

        def reward(**_: Any) -> list[float]:
            made.append(1)
            return [1.0, 2.0, NAN if len(made) < 3 else 3.0, 4.0]

        if policy == "raise":
            with pytest.raises(RunError):
                score_four({"r": reward}, on_failure=policy, retries=2)
        else:
            scores = score_four({"r": reward}, on_failure=policy, retries=2)
            assert scores.failures == {"r": 1 if policy == "drop" else 0}
            assert scores.sample_mask == [True, True, policy == "retry", True]
        assert len(made) == calls

    def test_the_failures_of_two_rewards_drop_what_either_failed_on(self) -> None:
        rewards = {"x": constant(1, NAN, 3, 4), "y": constant(NAN, 2, NAN, 4), "z": constant(1, 1, 1, 1)}
        scores = score_four(rewards, {"z": 0.5}, on_failure="drop")
        assert scores.failures == {"x": 1, "y": 2, "z": 0} and scores.sample_mask == [False, False, False, True]
        assert same(scores.total, [NAN, NAN, NAN, 8.5])
        assert same(scores.by_name["x"], [1, NAN, 3, 4]) and same(scores.by_name["y"], [NAN, 2, NAN, 4])
        assert same(scores.advantage_rewards, scores.total)

    @pytest.mark.parametrize(("bad", "more"), [([3], ""), ([1, 3], ", and 1 more"), ([0, 1, 2], ", and 2 more")])
    def test_the_first_bad_completion_is_named_and_the_others_are_counted(self, bad: list[int], more: str) -> None:
        values = [NAN if i in bad else 1.0 for i in range(4)]
        said = f"reward 'mine' returned nan for completion {bad[0]}, '{'abcd'[bad[0]]}'{more}; it must"
        with pytest.raises(RunError, match=said):
            score_four({"mine": constant(*values)})

    def test_an_error_deep_in_a_library_is_placed_in_the_rewards_own_file(self) -> None:
        def reward(**_: Any) -> list[float]:
            return [float(re.compile("(") is None)] * 4

        line = reward.__code__.co_firstlineno + 1
        with pytest.raises(RunError, match=rf"raised PatternError|raised error: .* \(at test_scoring.py:{line}\)"):
            score_four({"mine": reward})

    def test_an_error_is_placed_at_the_innermost_line_of_the_rewards_own_file(self) -> None:
        line = raising.__code__.co_firstlineno + 1
        with pytest.raises(RunError, match=rf"no such word \(at test_scoring.py:{line}\)"):
            score_four({"mine": lambda **columns: raising(**columns)})

    def test_an_interrupt_is_not_a_failure(self) -> None:
        def interrupted(**_: Any) -> list[float]:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            score_four({"r": interrupted}, on_failure="drop")


def forever(**_: Any) -> list[float]:
    while True:
        pass


def forever_under_except_exception(**_: Any) -> list[float]:
    while True:
        try:
            forever()
        except Exception:
            pass


def forever_under_bare_except(completions: list[str], **_: Any) -> list[float]:
    values = []
    for _ in completions:
        try:
            forever()
        except:  # noqa: E722 - as people write it
            values.append(0.0)
    return values


def forever_in_a_regular_expression(**_: Any) -> list[float]:
    return [float(bool(re.fullmatch("(a+)+", "a" * 60 + "b")))]


class TestTimeLimit:
    @pytest.mark.parametrize(
        "reward",
        [forever, forever_under_except_exception, forever_under_bare_except, forever_in_a_regular_expression],
    )
    def test_work_without_end_is_ended(self, reward: Callable[..., list[float]]) -> None:
        started = time.monotonic()
        with pytest.raises(RunError, match=r"ran past its time limit of 0\.1 s"):
            score_four({"mine": reward}, time_limit=0.1)
        assert time.monotonic() - started < 5

    def test_a_reward_in_time_leaves_no_alarm_behind(self) -> None:
        handler = signal.getsignal(signal.SIGALRM)
        score_four({"x": constant(1, 2, 3, 4)}, time_limit=0.1)
        assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
        assert signal.getsignal(signal.SIGALRM) is handler

    def test_an_alarm_that_was_set_before_still_rings(self) -> None:
        rung: list[int] = []
        handler = signal.signal(signal.SIGALRM, lambda *_: rung.append(1))
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            with pytest.raises(RunError):
                score_four({"mine": forever}, time_limit=0.05)
            assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] < 0.16  # less what the reward took, at least
            time.sleep(0.3)
        finally:
            signal.signal(signal.SIGALRM, handler)
        assert rung == [1]

    def test_outside_the_main_thread_rewards_are_scored_and_a_warning_says_what_the_limit_is_worth(self) -> None:
        with pytest.warns(RuntimeWarning, match="outside of the main thread: their time limit ends Python code"):
            scores = in_a_thread(lambda: score_four({"x": constant(1, 2, 3, 4)}))
        assert scores.total == [1, 2, 3, 4]

    @pytest.mark.filterwarnings("ignore:rewards are scored outside of the main thread")
    def test_outside_the_main_thread_an_error_names_its_place(self) -> None:
        def broken(**_: object) -> list[float]:
            raise ValueError("no")

        with pytest.raises(RunError, match=r"raised ValueError: no \(at test_scoring.py:\d+\)"):
            in_a_thread(lambda: score_four({"mine": broken}))

    @pytest.mark.filterwarnings("ignore:rewards are scored outside of the main thread")
    @pytest.mark.parametrize("catches_all", [False, True])
    def test_outside_the_main_thread_a_loop_is_ended_at_its_limit(self, catches_all: bool) -> None:
        turns = [0]

        def busy(**_: object) -> list[float]:
            while True:
                try:
                    turns[0] += 1
                except BaseException:
                    if not catches_all or turns[0] < 0:
                        raise

        with pytest.raises(RunError, match=r"ran past its time limit of 0.1 s \(at test_scoring.py:\d+\)"):
            in_a_thread(lambda: score_four({"mine": busy}, time_limit=0.1))
        before = turns[0]
        time.sleep(0.1)
        assert turns[0] == before

    @pytest.mark.filterwarnings("ignore:rewards are scored outside of the main thread")
    def test_outside_the_main_thread_a_sleeping_reward_is_left_behind(self) -> None:
        started, woken = time.monotonic(), threading.Event()

        def sleeps(**_: object) -> list[float]:
            woken.wait(20)
            return [1.0] * 4

        scores = in_a_thread(lambda: score_four({"mine": sleeps}, time_limit=0.1, on_failure="drop"))
        woken.set()
        assert scores.sample_mask == [False] * 4 and time.monotonic() - started < 10


def in_a_thread(function: Callable[[], Any]) -> Any:
    """What a function returns or raises in a thread other than the main one."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


class TestFloat32:
    """Advantages are computed in float32, which holds at most 3.4028235e38."""

    def test_what_float32_cannot_hold_is_a_failure_like_nan(self) -> None:
        with pytest.raises(RunError, match=r"reward 'r' returned 1e\+39 for completion 1"):
            score_four({"r": constant(0.0, 1e39, 0.0, 0.0)})
        scores = score_four({"r": constant(1.0, 1e39, -1e39, 3e38)}, on_failure="drop")
        assert scores.sample_mask == [True, False, False, True]
        assert scores.failures == {"r": 2}

    def test_a_weighted_sum_that_it_cannot_hold_ends_the_run(self) -> None:
        with pytest.raises(RunError, match=r"rewards of completion 2 is 1e\+40, more than float32 can hold"):
            score_four({"r": constant(0.0, 1.0, 1e30, 0.0)}, {"r": 1e10})

    def test_a_reward_that_exits_is_a_failure(self) -> None:
        def exits(**_: Any) -> list[float]:
            raise SystemExit(0)

        with pytest.raises(RunError, match="reward 'r' raised SystemExit: 0"):
            score_four({"r": exits})
