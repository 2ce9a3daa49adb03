"""The functions of a task are called under a time limit, and what they return is checked."""

import math
import random
import time
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.errors import RunError
from grpo_jax.tasks import Task
from grpo_jax.tasks.calls import demonstration_of, reply_of, success_of

COLUMNS: dict[str, Any] = {"prompts": ["p", "p"], "completions": ["yes", "no"], "completion_ids": [[1], [2]]}
EXAMPLE = {"prompt": "a question"}


def task_with(success: Callable[..., Any] = lambda **_: [], **functions: Any) -> Task:
    return Task("puzzle", [EXAMPLE], [EXAMPLE], success=success, **functions)


def fails(*_: Any, **columns: Any) -> Any:
    raise KeyError("secret")


def exits(*_: Any, **columns: Any) -> Any:
    raise SystemExit(0)


def hangs(*_: Any, **columns: Any) -> Any:
    time.sleep(60)


class TestSuccess:
    @pytest.mark.parametrize(
        "values",
        [
            [True, False],
            (1, 0),
            [1.0, 0.0],
            np.array([True, False]),
            np.array([1, 0]),
            [np.bool_(True), np.int64(0)],
            jnp.array([True, False]),
        ],
    )
    def test_truth_values_of_python_numpy_and_jax(self, values: Any) -> None:
        found = success_of(task_with(lambda **_: values), COLUMNS)
        assert found == [True, False]
        assert all(type(value) is bool for value in found)

    @pytest.mark.parametrize("value", [math.nan, 0.3, None, "yes", 2, -1, np.array([True, True]), [], object()])
    def test_anything_else_is_an_error_that_names_the_task_the_value_and_the_completion(self, value: Any) -> None:
        with pytest.raises(RunError) as caught:
            success_of(task_with(lambda **_: [True, value]), COLUMNS)
        assert str(caught.value).startswith("the function 'success' of task 'puzzle' returned ")
        assert "for completion 1, 'no'; it must return one truth value (True, False, 1 or 0)" in str(caught.value)

    def test_of_several_the_first_is_named_and_the_others_are_counted(self) -> None:
        with pytest.raises(RunError, match=r"returned nan for completion 0, 'yes', and no truth value for 1 more; "):
            success_of(task_with(lambda **_: [math.nan, 0.3]), COLUMNS)

    def test_a_wrong_number_of_values(self) -> None:
        with pytest.raises(RunError, match=r"'success' of task 'puzzle' returned 1 values for 2 completions; "):
            success_of(task_with(lambda **_: [True]), COLUMNS)

    def test_an_exception_is_one_sentence_with_the_place(self) -> None:
        with pytest.raises(RunError, match=r"raised KeyError: 'secret' \(at test_calls\.py:\d+\); it must") as caught:
            success_of(task_with(fails), COLUMNS)
        assert isinstance(caught.value.__cause__, KeyError)

    def test_what_is_no_list(self) -> None:
        with pytest.raises(RunError, match="raised TypeError: 'bool' object is not iterable; it must"):
            success_of(task_with(lambda **_: True), COLUMNS)

    def test_a_function_that_exits_does_not_end_the_run_with_the_status_of_a_finished_one(self) -> None:
        with pytest.raises(RunError, match="raised SystemExit: 0"):
            success_of(task_with(exits), COLUMNS)

    def test_a_function_that_hangs_is_ended(self) -> None:
        began = time.monotonic()
        with pytest.raises(RunError, match=r"'success' of task 'puzzle' ran past its time limit of 0\.1 s"):
            success_of(task_with(hangs), COLUMNS, 0.1)
        assert time.monotonic() - began < 10


class TestReply:
    @pytest.mark.parametrize("answer", ["go on", "", None])
    def test_a_string_or_none(self, answer: str | None) -> None:
        assert reply_of(task_with(reply=lambda example, turns: answer), EXAMPLE, ["hi"]) == answer

    def test_a_task_without_an_environment_answers_nothing(self) -> None:
        assert reply_of(task_with(), EXAMPLE, ["hi"]) is None

    @pytest.mark.parametrize("answer", [3, math.nan, ["go on"], True])
    def test_anything_else_is_an_error_that_names_the_task_and_the_turns(self, answer: Any) -> None:
        with pytest.raises(RunError, match=r"'reply' of task 'puzzle' returned .* after the turns \['hi'\]; it must"):
            reply_of(task_with(reply=lambda example, turns: answer), EXAMPLE, ["hi"])

    def test_an_exception_and_a_hang(self) -> None:
        with pytest.raises(RunError, match=r"'reply' .* raised KeyError: .*test_calls.*, for the prompt 'a question'"):
            reply_of(task_with(reply=fails), EXAMPLE, ["hi"])
        with pytest.raises(RunError, match=r"ran past its time limit of 0\.1 s"):
            reply_of(task_with(reply=hangs), EXAMPLE, ["hi"], 0.1)

    def test_a_person_has_no_time_limit_and_may_interrupt(self) -> None:
        def interrupts(*_: Any) -> str:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            reply_of(task_with(reply=interrupts), EXAMPLE, ["hi"], None)


class TestDemonstration:
    @pytest.mark.parametrize("turns", [["a"], ("a", "b")])
    def test_the_turns(self, turns: Any) -> None:
        task = task_with(demonstrate=lambda example, rng: turns)
        assert demonstration_of(task, EXAMPLE, random.Random(0)) == list(turns)

    @pytest.mark.parametrize("turns", ["abc", [], None, [1], [None], math.nan])
    def test_anything_else_is_an_error(self, turns: Any) -> None:
        with pytest.raises(RunError, match=r"'demonstrate' of task 'puzzle' returned .* for the prompt 'a "):
            demonstration_of(task_with(demonstrate=lambda example, rng: turns), EXAMPLE, random.Random(0))

    def test_an_exception_and_a_hang(self) -> None:
        with pytest.raises(RunError, match=r"'demonstrate' of task 'puzzle' raised KeyError"):
            demonstration_of(task_with(demonstrate=fails), EXAMPLE, random.Random(0))
        with pytest.raises(RunError, match=r"ran past its time limit of 0\.1 s"):
            demonstration_of(task_with(demonstrate=hangs), EXAMPLE, random.Random(0), 0.1)
