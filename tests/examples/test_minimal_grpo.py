"""examples/minimal_grpo.py gives the framework's numbers, step by step, and it learns."""

import ast
import importlib.util
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from grpo_jax.experiment import EvaluationConfig, Experiment, OptimizerConfig, PolicyConfig, SamplingConfig
from grpo_jax.tasks import Task
from grpo_jax.training import train

FILE = Path(__file__).parents[2] / "examples" / "minimal_grpo.py"
STEPS = 3


def load_example() -> Any:
    spec = importlib.util.spec_from_file_location("minimal_grpo", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["minimal_grpo"] = module
    spec.loader.exec_module(module)
    return module


minimal = load_example()
SETTINGS = minimal.Settings(prompts_per_step=8, group_size=8, learning_rate=1e-2, seed=3)


def letters_in_place(*, completions: list[str], answer: list[str], **columns: Any) -> list[float]:
    return [minimal.reward(c, a) for c, a in zip(completions, answer, strict=True)]


def framework() -> Experiment:
    """The experiment that the example is."""
    words = ["".join(letters) for letters in itertools.product(SETTINGS.letters, repeat=SETTINGS.word_length)]
    examples = [{"prompt": word, "answer": word[::-1]} for word in words]
    task = Task("backwards", examples, examples[:1], success=lambda *, completions, **_: [False] * len(completions))
    return Experiment(
        task,
        rewards={"letters_in_place": letters_in_place},
        policy=PolicyConfig(),
        steps=STEPS,
        prompts_per_step=SETTINGS.prompts_per_step,
        group_size=SETTINGS.group_size,
        num_iterations=SETTINGS.updates_per_batch,
        devices=1,
        seed=SETTINGS.seed,
        sampling=SamplingConfig(temperature=SETTINGS.temperature, max_tokens=SETTINGS.max_tokens),
        optimizer=OptimizerConfig(learning_rate=SETTINGS.learning_rate, max_grad_norm=SETTINGS.max_grad_norm),
        evaluation=EvaluationConfig(num_prompts=1),
    )


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_completions_rewards_advantages_losses_and_parameters_are_the_frameworks(tmp_path: Path) -> None:
    steps = list(minimal.train(SETTINGS, STEPS))
    result = train(framework(), tmp_path / "run", quiet=True)
    completions = rows(tmp_path / "run" / "completions.jsonl")
    metrics = [row for row in rows(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    clipped = 0.0
    for number, (step, row) in enumerate(zip(steps, metrics, strict=True)):
        own = [c for c in completions if c["step"] == number]
        assert [c["completion"] for c in own] == [text for group in step.completions for text in group]
        assert [c["prompt"] for c in own[:: SETTINGS.group_size]] == step.words
        np.testing.assert_allclose([c["reward"] for c in own], step.rewards.ravel(), atol=1e-7)
        np.testing.assert_allclose([c["advantage"] for c in own], np.ravel(step.batch.advantages), atol=1e-5)
        assert row["loss"] == pytest.approx(step.loss, rel=1e-4, abs=1e-5)
        assert row["grad_norm"] == pytest.approx(step.grad_norm, rel=1e-3)
        # The framework's own log-probabilities of these tokens agree with its sampler's, and so with these.
        assert row["sampling/logprob_difference/max"] < 1e-4
        clipped += row["clip_ratio/region_mean"]
    assert clipped > 0.01  # the second updates clip
    for path, value in result.policy.params.items():
        np.testing.assert_allclose(steps[-1].params[path], value, atol=2e-4, err_msg=path)
    start = minimal.load("scratch", seed=SETTINGS.seed).params
    moved = max(float(np.abs(value - start[path]).max()) for path, value in result.policy.params.items())
    assert moved > 0.02  # a hundred times the tolerance


def test_log_probabilities_are_the_frameworks_to_five_digits() -> None:
    from grpo_jax.logprobs import Completions, completion_logprobs
    from grpo_jax.policy.transformer import bind

    step = next(minimal.train(SETTINGS, 1))
    policy = minimal.load("scratch", seed=SETTINGS.seed)
    prompts = np.asarray(step.batch.prompts)
    lengths = np.full(len(prompts), prompts.shape[1])
    given = Completions(prompts, lengths, np.asarray(step.batch.tokens), np.asarray(step.batch.mask))
    found, _ = completion_logprobs(bind(policy.config, policy.params), given)
    mask = np.asarray(step.batch.mask)
    np.testing.assert_allclose(np.asarray(found)[mask], np.asarray(step.batch.old_logprobs)[mask], atol=1e-5)


def test_it_is_one_short_file_that_takes_nothing_but_the_policy() -> None:
    source = FILE.read_text()
    assert len(source.splitlines()) <= 200
    taken = [
        (node.module, alias.name)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("grpo_jax")
        for alias in node.names
    ]
    assert taken == [("grpo_jax.policy", "load")]
    assert not any(isinstance(n, ast.Import) and "grpo_jax" in ast.unparse(n) for n in ast.walk(ast.parse(source)))


def test_the_reward_rises(capsys: pytest.CaptureFixture[str]) -> None:
    rewards = minimal.main(steps=40)
    assert np.mean(rewards[-5:]) > np.mean(rewards[:5]) + 0.08
    assert "step  39" in capsys.readouterr().out
