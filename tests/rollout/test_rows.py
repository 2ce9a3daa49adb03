"""What a saved row says of its example and its episode."""

import json
from pathlib import Path

import numpy as np
from scripted import Scripted, context_of

from grpo_jax.algorithms.batches import completion_rows
from grpo_jax.evaluation import evaluate_generator
from grpo_jax.experiment import EvaluationConfig, Experiment, SamplingConfig
from grpo_jax.rewards.scoring import Scores
from grpo_jax.rollout import Episode, PromptBatch, example_row, plain, take_groups, transcript
from grpo_jax.rollout.episodes import collect
from grpo_jax.runs.files import json_line
from grpo_jax.tasks import Task

EXAMPLES = [{"prompt": "", "reward": word, "step": len(word)} for word in ("ab", "cd", "d")]


def episode(turns=("x",), replies=()) -> Episode:
    return Episode([1], [True], [0.0], list(turns), list(replies), ended=True)


def rows_of(episodes: list[list[Episode]], indices=(2, 0)) -> list[dict]:
    batch = PromptBatch([EXAMPLES[i] for i in indices], np.zeros((2, 1)), np.ones(2), indices=indices)
    rollout = collect(batch, [2, 3], episodes, shortest=4)
    assert take_groups([rollout], [(0, 1), (0, 0)]).indices == [0, 2]
    return completion_rows(rollout, Scores([1.0] * 4, {}, [], {}, []))


def test_a_row_holds_its_columns_under_one_key_and_its_place_in_the_split():
    rows = rows_of([[episode(), episode()], [episode(), episode()]])
    assert [row["example"] for row in rows] == [2, 2, 0, 0] and [row["prompt_id"] for row in rows] == [2, 2, 3, 3]
    assert rows[2]["columns"] == {"reward": "ab", "step": 2} and rows[2]["reward"] == 1.0
    assert "turns" not in rows[0] and rows[0]["completion"] == "x"


def test_an_episode_of_several_turns_has_them_in_order_beside_the_completion():
    played = episode(["CRANE", "POUND"], ["XXXGX"])
    rows = rows_of([[played, episode()], [episode(), episode()]])
    assert rows[0]["turns"] == transcript(played) == [
        {"role": "policy", "text": "CRANE"},
        {"role": "environment", "text": "XXXGX"},
        {"role": "policy", "text": "POUND"},
    ]  # fmt: skip
    assert rows[0]["completion"][1] == {"role": "user", "content": "XXXGX"}
    assert rows[1]["turns"] == [{"role": "policy", "text": "x"}] and rows[1]["completion"] == "x"


def test_what_json_cannot_hold_is_shown_by_its_repr():
    value = {"set": {1}, "bytes": b"a", "path": Path("a"), "inf": float("inf"), "keys": {1: 2}, "many": (1, {2})}
    columns = example_row({"prompt": "p", **value, "array": np.arange(2), "number": np.float32(0.5)})["columns"]
    assert columns == {
        "set": "{1}", "bytes": "b'a'", "path": repr(Path("a")), "inf": "inf", "keys": "{1: 2}", "many": [1, "{2}"],
        "array": [0, 1], "number": 0.5,
    }  # fmt: skip
    assert json.loads(json_line(columns)) == columns and plain(None) is None and plain(True) is True


def test_an_evaluation_says_which_example_each_completion_is_of():
    task = Task("toy", EXAMPLES[:1], EXAMPLES, success=lambda *, completions, **_: [True] * len(completions))
    experiment = Experiment(
        task,
        {"one": lambda *, completions, **_: [1.0] * len(completions)},
        sampling=SamplingConfig(max_tokens=2),
        evaluation=EvaluationConfig(num_samples=2, batch_size=4),
    )
    generator = Scripted(lambda *_: "a")
    records = evaluate_generator(generator, context_of(experiment, generator).prompts, experiment).records
    assert [record["example"] for record in records] == [0, 0, 1, 1, 2, 2]
    assert records[4]["columns"] == {"reward": "d", "step": 1}
