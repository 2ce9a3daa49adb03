"""Groups are sampled as training samples them, or read back from what a run has saved."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from grpo_jax.algorithms.batches import schedule
from grpo_jax.errors import UserError
from grpo_jax.experiment import EvaluationConfig, Experiment, PolicyConfig, SamplingConfig, ScratchConfig
from grpo_jax.policy.tokenizer import CharacterTokenizer
from grpo_jax.reward_lab.groups import import_rewards, read_groups, sample_groups
from grpo_jax.rollout import encode_prompts, make_actor, name_noise, rollout
from grpo_jax.runs.restore import source_policy
from grpo_jax.sharding import Replicas
from grpo_jax.tasks import Task

TOKENIZER = CharacterTokenizer("abc")


def length(*, completions, **_) -> list[float]:
    return [float(len(c)) for c in completions]


def make_task(prompts: list[str]) -> Task:
    examples = [{"prompt": prompt, "number": i} for i, prompt in enumerate(prompts)]
    return Task("toy", examples, examples[:1], success=lambda *, completions, **_: [False] * len(completions))


def make_experiment(prompts: list[str]) -> Experiment:
    return Experiment(
        task=make_task(prompts),
        rewards={"length": length},
        policy=PolicyConfig(scratch=ScratchConfig("abc", hidden_size=8, num_layers=1, num_heads=1)),
        steps=1,
        prompts_per_step=2,
        group_size=3,
        devices=1,
        sampling=SamplingConfig(max_tokens=4),
        evaluation=EvaluationConfig(num_prompts=1),
    )


def saved(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_first_groups_are_those_that_training_begins_with_and_can_be_read_back(tmp_path):
    experiment = make_experiment(["a", "b", "c"])
    policy = source_policy(experiment)
    indices, ids = schedule(experiment.seed, 0, experiment.prompts_per_step, 3)  # as training has it
    prompts = encode_prompts(experiment.task, TOKENIZER, policy.config.max_positions, experiment.sampling.max_tokens)
    actor, batch = make_actor(policy, Replicas()), prompts.batch("train", indices)
    noise = name_noise(experiment.seed, 0, ids, range(3))
    first = rollout(actor, experiment.task, batch, noise, experiment.sampling).reward_arguments()
    once, hot = sample_groups(actor, experiment, temperatures=[1.0, 5.0], num_prompts=2, num_groups=2)
    assert once.arguments["completions"][:6] == first["completions"]
    assert (once.group_size, len(once.prompts)) == (3, 4) and once.prompts[:2] == once.prompts[2:]
    assert once.arguments["completions"][6:] != once.arguments["completions"][:6]
    assert hot.label == "temperature 5" and hot.arguments["completions"] != once.arguments["completions"]

    rows = [
        {"step": 0, "prompt_id": ids[i // 3], "prompt": prompt, "completion": said}
        for i, (prompt, said) in enumerate(zip(first["prompts"], first["completions"], strict=True))
    ]
    read = read_groups(saved(tmp_path / "x.jsonl", rows), experiment, TOKENIZER)
    assert read.arguments["number"] == first["number"]
    assert read.arguments["completions"] == first["completions"]


def test_the_columns_of_saved_rows_are_found_by_their_prompt_their_own_columns_or_their_id(tmp_path):
    rows = [{"prompt": "b", "completion": text} for text in ("a", "ab")]
    groups = read_groups(saved(tmp_path / "x.jsonl", rows), make_experiment(["a", "b"]), TOKENIZER)
    assert groups.arguments["number"] == [1, 1] and groups.arguments["completion_ids"] == [[3], [3, 4]]
    same = make_experiment(["a", "a", "a"])
    by_column = saved(tmp_path / "x.jsonl", [{"prompt": "a", "completion": t, "number": 2} for t in "ab"])
    assert read_groups(by_column, same, TOKENIZER).arguments["number"] == [2, 2]
    by_id = saved(tmp_path / "x.jsonl", [{"prompt": "a", "completion": t, "prompt_id": 3 + 1} for t in "ab"])
    assert read_groups(by_id, same, TOKENIZER).arguments["number"] == [1, 1]


def test_rows_of_a_run_are_found_by_their_columns_whatever_these_are_called(tmp_path):
    examples = [{"prompt": "", "columns": name, "reward": {1: 2}} for name in ("one", "two")]
    task = Task("toy", examples, examples, success=lambda *, completions, **_: [False] * len(completions))
    saved_columns = {"columns": "two", "reward": "{1: 2}"}  # as JSON holds them
    rows = [{"prompt": "", "completion": "a", "reward": 0.5, "columns": saved_columns} for _ in range(2)]
    groups = read_groups(saved(tmp_path / "x.jsonl", rows), replace(make_experiment(["a"]), task=task), TOKENIZER)
    assert groups.arguments["columns"] == ["two", "two"] and groups.example(0) == examples[1]


def test_rows_without_a_prompt_id_are_grouped_by_their_example_and_not_by_an_equal_prompt(tmp_path):
    rows = [{"prompt": "a", "completion": t, "columns": {"number": n}} for n in (0, 1) for t in "bc"]
    groups = read_groups(saved(tmp_path / "x.jsonl", rows), make_experiment(["a", "a"]), TOKENIZER)
    assert groups.group_size == 2 and groups.arguments["number"] == [0, 0, 1, 1]


def test_steps_are_groups_of_their_own(tmp_path):
    rows = [{"prompt": "a", "completion": "a", "step": s} for s in (0, 0, 1, 1)]
    groups = read_groups(saved(tmp_path / "x.jsonl", rows), make_experiment(["a"]), TOKENIZER)
    assert (groups.group_size, list(groups.prompts)) == (2, [0, 1])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "has no rows"),
        ([{"prompt": "a", "completion": "a"}], "groups of 1 to 1 completions"),
        ([{"prompt": p, "completion": "a"} for p in "aabbb"], "groups of 2 to 3 completions"),
        ([{"prompt": "a"}], "x.jsonl:1 lacks a prompt or a completion"),
        ([{"prompt": "z", "completion": "a"}], "x.jsonl:1: the prompt is that of no examples of toy"),
        ([{"prompt": "c", "completion": "a"}], "x.jsonl:1: the prompt is that of 2 examples"),
    ],
)
def test_a_file_that_cannot_be_read_as_groups_is_one_sentence(tmp_path, rows, message):
    with pytest.raises(UserError, match=message):
        read_groups(saved(tmp_path / "x.jsonl", rows), make_experiment(["a", "b", "c", "c"]), TOKENIZER)


def test_rewards_are_named_by_module_and_function_beside_the_experiment(tmp_path):
    (tmp_path / "mine_for_groups.py").write_text("def one(*, completions, **_): return [1.0] * len(completions)")
    found = import_rewards(["mine_for_groups:one", "grpo_jax.rewards.wordle:binary"], tmp_path)
    assert list(found) == ["one", "binary"] and found["one"](completions=["a"]) == [1.0]
    for name, message in (("one", "module:function"), ("mine_for_groups:two", "no function"), ("nowhere:f", "nowhere")):
        with pytest.raises(UserError, match=message):
            import_rewards([name], tmp_path)
