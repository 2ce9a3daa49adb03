"""Two-digit sums."""

import random
import re

import pytest

from grpo_jax.errors import UserError
from grpo_jax.tasks import Example, Task
from grpo_jax.tasks.arithmetic import INSTRUCTION, sums

ALL_PAIRS = 90 * 91 // 2  # unordered pairs of 10..99


def addends(question: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", question)]


def pair(example: Example) -> tuple[int, ...]:
    return tuple(sorted(addends(example["prompt"][-1]["content"])))


def worked_pairs(task: Task) -> set[tuple[int, ...]]:
    questions = [m["content"] for m in task.train[0]["prompt"][:-1] if m["role"] == "user"]
    return {tuple(sorted(addends(question))) for question in questions}


def test_no_pair_is_shared_between_the_splits_and_the_worked_examples_in_either_order() -> None:
    task = sums(num_train=ALL_PAIRS - 603, num_held_out=600, shots=3)
    splits = [set(map(pair, task.train)), set(map(pair, task.held_out)), worked_pairs(task)]
    assert list(map(len, splits)) == [ALL_PAIRS - 603, 600, 3]
    assert len(set.union(*splits)) == ALL_PAIRS


def test_the_answer_is_the_sum_of_two_numbers_of_two_digits() -> None:
    task = sums(num_train=50, num_held_out=50)
    for example in [*task.train, *task.held_out]:
        numbers = addends(example["prompt"][-1]["content"])
        assert len(numbers) == 2 and all(10 <= number <= 99 for number in numbers)
        assert example["answer"] == sum(numbers)


def test_pairs_come_in_both_orders() -> None:
    first_is_larger = [a > b for a, b in (addends(e["prompt"][-1]["content"]) for e in sums().train)]
    assert 0.4 < sum(first_is_larger) / len(first_is_larger) < 0.6


def test_every_prompt_begins_with_the_same_messages_and_ends_with_the_question() -> None:
    task = sums(num_train=20, num_held_out=20, shots=2)
    prefixes = {repr(example["prompt"][:-1]) for example in [*task.train, *task.held_out]}
    assert len(prefixes) == 1
    roles = [message["role"] for message in task.train[0]["prompt"]]
    assert roles == ["system", "user", "assistant", "user", "assistant", "user"]


def test_the_worked_examples_are_right_and_tagged() -> None:
    prompt = sums(shots=4).train[0]["prompt"]
    for question, answer in zip(prompt[1:-1:2], prompt[2:-1:2], strict=True):
        assert answer["content"] == f"<answer> {sum(addends(question['content']))} </answer>"


def test_a_prompt_is_the_instruction_the_examples_and_a_question_in_these_words() -> None:
    task = sums(num_train=2, num_held_out=1, shots=1)
    system, question, answer, last = task.train[0]["prompt"]
    assert system == {"role": "system", "content": INSTRUCTION}
    a, b = addends(question["content"])
    assert question == {"role": "user", "content": f"Calculate {a} + {b}."}
    assert answer == {"role": "assistant", "content": f"<answer> {a + b} </answer>"}
    a, b = addends(last["content"])
    assert last == {"role": "user", "content": f"Calculate {a} + {b}."} and task.train[0]["answer"] == a + b
    assert (task.name, task.max_turns, task.reply, task.references) == ("sums", 1, None, {})


def test_there_are_3000_sums_to_train_on_600_to_evaluate_and_three_examples() -> None:
    task = sums()
    assert (len(task.train), len(task.held_out), len(worked_pairs(task))) == (3000, 600, 3)
    assert sums(seed=0).train == task.train
    # The same ones as ever, since the records of runs are about these.
    asked = [example["prompt"][at]["content"] for example, at in ((task.train[0], -1), (task.held_out[0], -1))]
    assert asked == ["Calculate 68 + 12.", "Calculate 30 + 27."]
    assert task.train[0]["prompt"][1]["content"] == "Calculate 41 + 86."


def test_the_seed_decides_and_the_held_out_sums_depend_on_nothing_else() -> None:
    assert sums(seed=1).train == sums(seed=1).train
    assert sums(seed=1).train != sums(seed=2).train
    assert list(map(pair, sums(num_train=10, shots=0).held_out)) == list(map(pair, sums().held_out))


def test_a_demonstration_succeeds_and_a_wrong_sum_or_a_bare_one_does_not() -> None:
    task = sums(num_train=10)
    assert task.demonstrate is not None
    example = task.train[0]
    (turn,) = task.demonstrate(example, random.Random(0))
    completions = [[{"role": "assistant", "content": c}] for c in (turn, "<answer>7</answer>", str(example["answer"]))]
    assert task.success(completions=completions, answer=[example["answer"]] * 3) == [True, False, False]


def test_asking_for_more_sums_than_there_are_is_refused() -> None:
    with pytest.raises(UserError, match="4096 sums were asked for, but there are 4095"):
        sums(num_train=4000, num_held_out=90, shots=6)
