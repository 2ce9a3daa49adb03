"""A task that cannot be trained on is one sentence when an experiment is made of it."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest

from grpo_jax.errors import UserError
from grpo_jax.experiment import Experiment, load
from grpo_jax.tasks import Task
from grpo_jax.tasks.wordle import single_guess, six_turns

GOOD = {"prompt": "2 + 2", "answer": "4"}


def make(train=(GOOD,), held_out=({"prompt": "3 + 3", "answer": "6"},), **more) -> Task:
    return Task("toy", list(train), list(held_out), success=lambda **_: [], **more)


def chat(*messages) -> dict:
    return GOOD | {"prompt": list(messages)}


@pytest.mark.parametrize(
    ("example", "problem"),
    [
        ("2 + 2", "it is '2 + 2', and must be a dict with the key 'prompt'"),
        ({"answer": "4"}, "it has no 'prompt', but the keys 'answer'"),
        (GOOD | {"prompt": None}, "its prompt is None, and must be a string or a list of messages"),
        (GOOD | {"prompt": 7}, "its prompt is 7, and must be a string or a list of messages"),
        (chat(), "its prompt has no messages"),
        (chat({"role": "user"}), "message 0 of its prompt is {'role': 'user'}, and must have a 'role' and a 'content'"),
        (
            chat({"role": "system", "content": "Add."}, {"role": "human", "content": "2 + 2"}),
            "message 1 of its prompt has the role 'human', and must have 'system', 'developer', 'user', 'assistant' or "
            "'tool'",
        ),
        (chat({"role": "user", "content": None}), "the content of message 0 of its prompt is None"),
        (GOOD | {"completions": "x"}, "a column cannot have the name 'completions', which is an argument of every"),
        (GOOD | {"answer": math.nan}, "the column 'answer' holds NaN"),
        (GOOD | {"answer": [1.0, np.float32("nan")]}, "the column 'answer' holds NaN"),
        (GOOD | {"answer": {"x": np.array([np.nan])}}, "the column 'answer' holds NaN"),
        (
            {"prompt": "p", "answr": "4"},
            "all examples of a split must have the same columns, but this one lacks 'answer' and has also 'answr'",
        ),
        ({"prompt": "p"}, "all examples of a split must have the same columns, but this one lacks 'answer' (see"),
        (GOOD | {"more": 1}, "all examples of a split must have the same columns, but this one has also 'more' (see"),
        (GOOD | {"prompt": "\ud800"}, "its prompt '\\ud800' has half of a surrogate pair, which no tokenizer reads"),
        (chat({"role": "user", "content": "a\udfff"}), "message 0 of its prompt has half of a surrogate pair"),
        (GOOD | {"answer": {("a", 1): 2}}, "it cannot be written as JSON: TypeError: keys must be str"),
        (GOOD | {3: "x"}, "the column 3 must have a string as its name"),
    ],
)
@pytest.mark.parametrize("split", ["train", "held_out"])
def test_a_wrong_example_is_named_by_its_split_and_its_index(example, problem, split):
    task = make(**{split: [GOOD, GOOD | {"prompt": "1 + 1"}, example]})
    with pytest.raises(UserError, match=re.escape(f"task 'toy', {split} example 2: {problem}")):
        Experiment(task=task, rewards={"one": len})


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_a_split_needs_an_example(split):
    with pytest.raises(UserError, match=f"task 'toy' has no {split} examples: it needs at least one"):
        Experiment(task=make(**{split: []}), rewards={"one": len})


@pytest.mark.parametrize("turns", [0, -1, 1.5, True])
def test_a_task_has_at_least_one_turn(turns):
    with pytest.raises(UserError, match=r"max_turns = .*: it must be a number, 1 or above"):
        make(max_turns=turns).check()


def test_the_splits_may_have_columns_of_their_own():
    make(train=[GOOD | {"chosen": "4", "rejected": "5"}]).check()


def test_a_task_is_checked_once_and_again_when_it_has_grown():
    task = make()
    task.check()
    task.train.append({"prompt": None, "answer": "4"})
    with pytest.raises(UserError, match="train example 1: its prompt is None"):
        replace(Experiment(task=make(), rewards={"one": len}), task=task)


def test_held_out_examples_that_are_trained_on_are_a_warning_unless_the_task_means_it():
    again = dict(reversed(GOOD.items()))  # made twice, with the same content
    [sentence] = make(train=[GOOD | {"answer": "5"}, GOOD], held_out=[GOOD | {"answer": "6"}, again]).warnings()
    assert sentence.startswith(
        "1 of the 2 held_out examples of task 'toy' are train examples too (held_out 1 is train 1)"
    )
    assert make().warnings() == []
    assert make(train=[GOOD], held_out=[GOOD]).warnings() == []  # the very same object
    assert single_guess().warnings() == [] and six_turns(5, 0).warnings() == []


def test_a_file_with_such_a_task_loads_and_says_so(tmp_path, capsys):
    text = """
        from grpo_jax.experiment import Experiment
        from grpo_jax.tasks import Task
        task = Task("toy", [{"prompt": "a"}], [{"prompt": "a"}], success=len)
        config = Experiment(task=task, rewards={"length": len})
    """
    (tmp_path / "toy.py").write_text("\n".join(line.strip() for line in text.splitlines()))
    assert load(tmp_path / "toy.py").task.name == "toy"
    assert capsys.readouterr().err.startswith("warning: 1 of the 1 held_out examples of task 'toy' are train examples")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"name": 3}, "task 3 has name = 3: it must be a text."),
        ({"references": {"x": "1"}}, "task 'toy' has references = {'x': '1'}: it must be numbers by name."),
        ({"train": 5}, "task 'toy' has train = 5: it must be a sequence of examples."),
    ],
)
def test_a_field_of_another_type_is_named(change, problem):
    with pytest.raises(UserError) as caught:
        replace(make(), **change).check()
    assert str(caught.value) == problem
