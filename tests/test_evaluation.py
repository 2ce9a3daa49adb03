"""Success rates with their intervals, and evaluations that can be compared in pairs."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy import stats
from scripted import Scripted

from grpo_jax import evaluation
from grpo_jax.confidence import bounded_limits
from grpo_jax.errors import UserError
from grpo_jax.evaluation import (
    NOISE_STEP,
    Evaluation,
    evaluate,
    evaluate_generator,
    pass_at_k,
    success_interval,
)
from grpo_jax.experiment import (
    EvaluationConfig,
    Experiment,
    PolicyConfig,
    SamplingConfig,
    ScratchConfig,
)
from grpo_jax.policy import Policy, load
from grpo_jax.rollout import encode_prompts
from grpo_jax.tasks import Task

SCRATCH = ScratchConfig("abcd", hidden_size=16, num_layers=1, num_heads=2)


def has_an_a(*, completions: list[str], **columns: Any) -> list[bool]:
    return ["a" in completion for completion in completions]


def length(*, completions: list[str], **columns: Any) -> list[float | None]:
    """Does not apply to a completion that is empty."""
    return [float(len(completion)) or None for completion in completions]


@pytest.fixture(scope="module")
def policy() -> Policy:
    return load("scratch", seed=2, scratch=SCRATCH)


def run(policy: Policy, devices: int = 1, rewards: dict[str, Any] | None = None, **options: Any) -> Evaluation:
    held_out = [{"prompt": prompt} for prompt in ("a", "bb", "c", "dab", "ca")]
    task = Task("letters", [{"prompt": "d"}], held_out, success=has_an_a)
    settings = EvaluationConfig(**{"num_samples": 3, "temperature": 1.0, "batch_size": 6} | options)
    experiment = Experiment(
        task, rewards if rewards is not None else {"length": length}, PolicyConfig(scratch=SCRATCH), devices=devices,
        sampling=SamplingConfig(max_tokens=4), evaluation=settings,
    )  # fmt: skip
    return evaluate(policy, experiment)


# Intervals -----------------------------------------------------------------------------------------------------------


def column(won: int, n: int) -> np.ndarray:
    """Outcomes [n, 1]: one sample of each of n prompts."""
    return np.arange(n)[:, None] < won


@pytest.mark.parametrize(("won", "n"), [(7, 10), (5, 10), (0, 10), (10, 10), (1, 1)])
def test_one_sample_of_each_prompt_gives_clopper_and_pearsons_interval(won, n):
    expected = stats.binomtest(won, n).proportion_ci(0.95, method="exact")
    assert success_interval(column(won, n)) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_samples_of_a_prompt_that_always_agree_count_once():
    won = np.array([[1] * 4, [0] * 4, [1] * 4, [0] * 4], bool)
    assert success_interval(won) == success_interval(column(2, 4))


def test_samples_that_differ_make_the_interval_narrower():
    won = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 1, 1], [0, 0, 0, 0]], bool)
    low, high = success_interval(won)
    wider = success_interval(np.array([[1] * 4, [1] * 4, [0] * 4, [0] * 4, [0] * 4], bool))
    assert high - low < wider[1] - wider[0]
    assert (low, high) == bounded_limits([1, 0.5, 0.5, 0.5, 0])


@pytest.mark.parametrize("won", [0, 1])
def test_where_every_sample_agrees_only_the_prompts_count(won):
    assert success_interval(np.full((10, 4), won, bool)) == success_interval(column(10 * won, 10))


def test_the_samples_of_a_single_prompt_are_all_there_is_to_count():
    assert success_interval(np.array([[1] * 7 + [0] * 3], bool)) == success_interval(column(7, 10))


@pytest.mark.parametrize("success", [0.02, 0.5, 0.98])
@pytest.mark.parametrize(("questions", "samples"), [(1, 8), (10, 1), (10, 8), (30, 8)])
def test_the_interval_covers_the_success_rate(questions, samples, success):
    """200 repetitions; how hard a prompt is varies (correlation .3). Wilson's covers 85 % with one prompt and .02."""
    rng = np.random.default_rng(0)
    shape = (200, questions)
    chance = rng.beta(success * 7 / 3, (1 - success) * 7 / 3, shape) if questions > 1 else np.full(shape, success)
    won = rng.random((*shape, samples)) < chance[:, :, None]
    intervals = np.array([success_interval(each) for each in won])
    assert np.mean((intervals[:, 0] <= success) & (success <= intervals[:, 1])) > 0.94


def test_pass_at_k_is_the_chance_that_one_of_k_samples_succeeds():
    assert pass_at_k([4], num_samples=16, k=4) == pytest.approx(1 - 495 / 1820)  # C(12, 4) / C(16, 4): .728
    assert pass_at_k([4], 16, 1) == pytest.approx(4 / 16)
    assert pass_at_k([4, 0, 16], 16, 4) == pytest.approx((1 - 495 / 1820 + 0 + 1) / 3)
    assert pass_at_k([13], 16, 4) == 1.0  # among any four, one of the thirteen


# A policy ------------------------------------------------------------------------------------------------------------


def test_an_evaluation_is_that_of_its_records(policy):
    result = run(policy)
    assert (result.num_prompts, result.num_samples, len(result.records)) == (5, 3, 15)
    assert [record["prompt"] for record in result.records[::3]] == ["a", "bb", "c", "dab", "ca"]
    won = [record["success"] for record in result.records]
    assert won == has_an_a(completions=[record["completion"] for record in result.records])
    assert 0 < result.success == np.mean(won) < 1
    assert (result.success_low, result.success_high) == success_interval(np.reshape(won, (5, 3)))
    assert result.pass_at_k == {1: pytest.approx(result.success), 2: pass_at_k(np.reshape(won, (5, 3)).sum(1), 3, 2)}
    lengths = [len(record["completion"]) for record in result.records]
    assert result.reward == pytest.approx(np.mean([n for n in lengths if n]))  # where it applies
    assert any(math.isnan(record["reward"]) for record in result.records) == (0 in lengths)
    assert result.mean_length == np.mean([record["length"] for record in result.records])
    assert result.mean_turns == 1
    assert result.clipped_ratio == np.mean([not record["ended"] for record in result.records]) > 0
    assert "records" not in result.to_dict()


@pytest.mark.parametrize(("batch_size", "devices"), [(64, 1), (12, 2), (1, 1)])
def test_batches_and_devices_change_nothing_and_a_last_batch_counts_nothing_twice(policy, batch_size, devices):
    # 5 prompts, 2 at a time: the third batch has one prompt and one repetition; 4 at a time on two devices likewise.
    expected = run(policy)
    assert run(policy, devices, batch_size=batch_size) == expected


def test_a_policy_evaluated_twice_meets_the_same_noise(policy):
    assert run(policy).records == run(policy).records
    texts = [record["completion"] for record in run(policy).records]
    assert len(set(texts[:3])) > 1  # samples of a prompt differ
    moved = replace(policy, params={**policy.params, "embed": policy.params["embed"] * 1.0001})
    same = [a == b["completion"] for a, b in zip(texts, run(moved).records, strict=True)]
    assert np.mean(same) > 0.8  # a policy that has hardly moved says hardly anything else


def test_an_evaluation_takes_the_first_prompts_and_needs_no_rewards(policy):
    result = run(policy, rewards={"none": lambda *, completions, **_: [None] * len(completions)}, num_prompts=2)
    assert (result.num_prompts, len(result.records), result.reward) == (2, 6, None)
    assert result.records[3]["prompt"] == "bb"


def test_an_evaluation_samples_at_its_own_temperature_with_noise_of_its_own():
    held_out = [{"prompt": prompt} for prompt in ("a", "bb", "c")]
    task = Task("letters", [{"prompt": "d"}], held_out, success=has_an_a)
    experiment = Experiment(
        task, {"length": length}, seed=5, sampling=SamplingConfig(temperature=0.7, top_k=3, max_tokens=4),
        evaluation=EvaluationConfig(num_samples=2, temperature=0.3, batch_size=64),
    )  # fmt: skip
    generator = Scripted(lambda prompt, sample: prompt + "a" * sample)
    prompts = encode_prompts(task, generator.tokenizer, 64, 4)
    result = evaluate_generator(generator, prompts, experiment)
    [(_, noise, sampling)] = generator.calls
    assert sampling == SamplingConfig(temperature=0.3, top_k=3, max_tokens=4)
    assert (noise.seed, noise.step, noise.prompt_ids.tolist()) == (5, NOISE_STEP, [0, 1, 2])
    assert noise.samples.tolist() == [[0, 1]] * 3
    # Sample 0 repeats the prompt, sample 1 adds an a: "a", "aa", "bb", "bba", "c", "ca".
    assert [record["completion"] for record in result.records] == ["a", "aa", "bb", "bba", "c", "ca"]
    assert result.success == 4 / 6 and result.pass_at_k == {1: pytest.approx(4 / 6), 2: 1.0}


def test_no_more_completions_are_sampled_at_once_than_asked_for():
    held_out = [{"prompt": prompt} for prompt in ("a", "bb", "c", "dab", "ca")]
    task = Task("letters", [{"prompt": "d"}], held_out, success=has_an_a)
    settings = EvaluationConfig(num_samples=3, batch_size=8)
    experiment = Experiment(task, {"length": length}, sampling=SamplingConfig(max_tokens=4), evaluation=settings)
    generator = Scripted(lambda prompt, sample: prompt)
    evaluate_generator(generator, encode_prompts(task, generator.tokenizer, 64, 4), experiment)
    # 2 prompts of 3 samples are 6 of the 8; the third batch has one prompt and is filled up.
    assert [noise.samples.shape for _, noise, _ in generator.calls] == [(2, 3)] * 3


def scripted(
    answer: Any, *, held_out: tuple[str, ...] = ("a", "bb", "c"), batch_multiple: int = 1, **changes: Any
) -> tuple[Evaluation, Scripted]:
    """An evaluation of scripted answers on the held-out prompts, or with `split` on the training prompt "d"."""
    split = changes.pop("split", "held_out")
    rewards = changes.pop("rewards", {"length": length})
    task = Task("letters", [{"prompt": "d"}], [{"prompt": prompt} for prompt in held_out], success=has_an_a)
    settings = EvaluationConfig(**{"num_samples": 2, "temperature": 1.0} | changes)
    experiment = Experiment(task, rewards, sampling=SamplingConfig(max_tokens=4), evaluation=settings)
    generator = Scripted(answer, batch_multiple=batch_multiple)
    prompts = encode_prompts(task, generator.tokenizer, 64, 4)
    return evaluate_generator(generator, prompts, experiment, split), generator


def test_a_single_prompts_greedy_samples_are_one_and_others_are_what_they_are():
    def one(temperature: float, answer: Any, held_out: tuple[str, ...] = ("a",)) -> Evaluation:
        options = dict(num_samples=4, temperature=temperature, held_out=held_out)
        return scripted(answer, **options)[0]

    always, sometimes = (lambda prompt, sample: "a"), (lambda prompt, sample: "ab"[sample % 2])
    found = one(0.0, always)
    assert (found.success_low, found.success_high) == success_interval(np.ones((1, 1), bool))
    found = one(1.0, sometimes)
    assert (found.success_low, found.success_high) == success_interval(np.array([[True, False, True, False]]))
    found = one(0.0, sometimes, ("a", "b"))  # several prompts: the interval is that of the prompts' means
    assert (found.success_low, found.success_high) == success_interval(np.array([[1, 0, 1, 0]] * 2, bool))


def test_an_evaluation_says_what_was_asked_and_how():
    found, generator = scripted(lambda prompt, sample: "a", split="train", temperature=0.5, num_samples=3)
    assert (found.split, found.num_prompts, found.num_samples, found.temperature) == ("train", 1, 3, 0.5)
    assert [record["prompt"] for record in found.records] == ["d"] * 3
    assert generator.calls[0][0].examples[0]["prompt"] == "d"
    assert found.to_dict() == {
        "split": "train", "num_prompts": 1, "num_samples": 3, "temperature": 0.5, "success": 1.0,
        "success_low": found.success_low, "success_high": found.success_high, "reward": 1.0,
        "pass_at_k": {1: 1.0, 2: 1.0}, "mean_length": 2.0, "mean_turns": 1.0, "clipped_ratio": 0.0,
    }  # fmt: skip


def test_success_reward_and_length_are_means_of_different_things():
    # "a" succeeds with one letter, "bcd" fails with three, and a completion of four letters is cut off.
    found, _ = scripted(lambda prompt, sample: {"a": "a", "bb": "bcd", "c": "bbbbb"}[prompt])
    assert found.success == 1 / 3 and found.reward == pytest.approx((1 + 3 + 4) / 3)
    assert found.mean_length == pytest.approx((2 + 4 + 4) / 3) and found.clipped_ratio == 1 / 3
    assert [(record["ended"], record["length"]) for record in found.records[::2]] == [(True, 2), (True, 4), (False, 4)]
    assert [record["reward"] for record in found.records[::2]] == [1, 3, 4]
    none, _ = scripted(
        lambda prompt, sample: "a", rewards={"none": lambda *, completions, **_: [None] * len(completions)}
    )
    assert none.reward is None


@pytest.mark.parametrize(
    ("num_samples", "powers"), [(1, [1]), (2, [1, 2]), (3, [1, 2]), (4, [1, 2, 4]), (8, [1, 2, 4, 8])]
)
def test_pass_at_k_is_reported_for_powers_of_two_up_to_the_samples(num_samples, powers):
    found, _ = scripted(lambda prompt, sample: "ab"[sample > 0], num_samples=num_samples, held_out=("a", "b"))
    assert list(found.pass_at_k) == powers
    for k, value in found.pass_at_k.items():
        assert value == pytest.approx(k / num_samples)  # one of n samples succeeds: C(n - 1, k) / C(n, k) = 1 - k / n


@pytest.mark.parametrize(
    ("batch_size", "multiple", "sizes"), [(64, 4, [8]), (8, 4, [4, 4]), (1, 1, [1] * 5), (1, 2, [2] * 3)]
)
def test_batches_are_multiples_of_the_devices(batch_size, multiple, sizes):
    held_out = ("a", "bb", "c", "dab", "ca")
    found, generator = scripted(
        lambda prompt, sample: prompt, held_out=held_out, batch_multiple=multiple, batch_size=batch_size
    )
    assert [len(prompts.examples) for prompts, _, _ in generator.calls] == sizes
    assert [record["completion"] for record in found.records[::2]] == list(held_out)
    named = [i for _, noise, _ in generator.calls for i in noise.prompt_ids.tolist()]
    places = [e["prompt"] for prompts, _, _ in generator.calls for e in prompts.examples]
    assert [named[places.index(prompt)] for prompt in held_out] == [0, 1, 2, 3, 4]


def test_a_policy_is_put_on_no_more_devices_than_the_experiment_has(policy, monkeypatch):
    made = []

    def make_actor(given: Policy, replicas: Any) -> Scripted:
        made.append((given, replicas.count))
        return Scripted(lambda prompt, sample: "a", batch_multiple=replicas.count)

    monkeypatch.setattr(evaluation, "make_actor", make_actor)
    task = Task("letters", [{"prompt": "d"}], [{"prompt": "b"}], success=has_an_a)
    for devices, count in ((3, 3), (None, 8)):
        experiment = Experiment(task, {"length": length}, sampling=SamplingConfig(max_tokens=4), devices=devices)
        assert evaluate(policy, experiment, "train").records[0]["prompt"] == "d"
        assert evaluate(policy, experiment).records[0]["prompt"] == "b"
        assert made[-2:] == [(policy, count)] * 2
    crowded = replace(experiment, sampling=SamplingConfig(max_tokens=2047))
    with pytest.raises(UserError, match="2047 new ones exceed the policy's context of 2048"):
        evaluate(policy, crowded)


class Repeating(Scripted):
    """Gives its answer once more in every further turn."""

    def generate(self, *arguments: Any) -> Any:
        generation, _ = super().generate(*arguments)
        return generation, generation

    def continue_generation(self, state: Any, *_: Any) -> Any:
        return state, state


def test_what_the_environment_says_is_no_part_of_an_evaluations_length():
    task = Task(
        "letters", [{"prompt": "d"}], [{"prompt": "a"}, {"prompt": "bb"}], success=lambda **_: [True] * 2,
        reply=lambda example, turns: "dddd", max_turns=2,
    )  # fmt: skip
    rewards = {"one": lambda *, completions, **_: [1.0] * len(completions)}
    experiment = Experiment(task, rewards, sampling=SamplingConfig(max_tokens=4))
    generator = Repeating(lambda prompt, sample: prompt)
    result = evaluate_generator(generator, encode_prompts(task, generator.tokenizer, 64, 4), experiment)
    # "a" and its end twice, and "bb" and its end twice: 4 and 6 tokens, whatever stands between them.
    assert [(record["length"], record["turns"]) for record in result.records] == [(4, 2), (6, 2)]
    assert (result.mean_length, result.mean_turns) == (5, 2)
