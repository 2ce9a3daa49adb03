"""The loop: it learns, it can be stopped anywhere and gone on with, and it ends when something is wrong."""

import json
import math
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import letters
import numpy as np
import pytest

from grpo_jax import evaluation
from grpo_jax.algorithms.batches import reward_metrics, schedule
from grpo_jax.errors import RunError, UserError
from grpo_jax.experiment import (
    Experiment,
    RewardConfig,
    load,
    load_run,
    override,
)
from grpo_jax.rewards.scoring import Scores
from grpo_jax.rollout import Actor
from grpo_jax.runs.checkpoints import latest_step
from grpo_jax.runs.restore import restore_policy, source_policy
from grpo_jax.training import train

TIMES = {"step_time", "tokens_per_second"}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return Path(shutil.copy(letters.__file__, tmp_path_factory.mktemp("experiment")))


@pytest.fixture
def experiment(source) -> Experiment:
    return load(source)


@pytest.fixture(scope="module")
def finished(source, tmp_path_factory) -> Path:
    """The directory of a run that nothing has interrupted."""
    run_dir = tmp_path_factory.mktemp("runs") / "finished"
    train(load(source), run_dir, source=source, quiet=True)
    return run_dir


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def timeless(run_dir: Path) -> list[dict[str, Any]]:
    """The run's metrics without what a clock says, one dictionary for each row."""
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows(run_dir / "metrics.jsonl")]


def assert_same_run(run_dir: Path, other: Path) -> None:
    """Metrics, completions and the final parameters agree to the last bit."""
    assert timeless(run_dir) == timeless(other)
    assert (run_dir / "completions.jsonl").read_text() == (other / "completions.jsonl").read_text()
    one, two = restore_policy(run_dir).params, restore_policy(other).params
    assert one.keys() == two.keys()
    assert all(np.array_equal(one[path], two[path]) for path in one)


def at_step(step: int, action: Callable[[], Any], experiment: Experiment) -> Experiment:
    """The experiment with something done when the completions of a step are scored, once.

    The reward is called for the evaluation and for the group that are shown before training, and then for each step.
    """
    [(name, reward)] = experiment.rewards.items()
    calls = []

    def acting(**arguments: Any) -> Any:
        calls.append(None)
        return reward(**arguments) if len(calls) != 3 + step else action() or reward(**arguments)

    return replace(experiment, rewards={name: acting})


def fail() -> None:
    raise ValueError("no reward today")


# Learning ------------------------------------------------------------------------------------------------------------


def test_a_policy_learns_what_is_rewarded(experiment, tmp_path):
    result = train(override(experiment, {"steps": 40, "group_size": 8}), tmp_path / "run", quiet=True)
    rewards = [row["reward"] for row in rows(tmp_path / "run/metrics.jsonl") if "reward" in row]
    assert len(rewards) == 40
    assert np.mean(rewards[:4]) < 0.3 and np.mean(rewards[-4:]) > 0.75
    assert result.after["held_out"].success > result.before["held_out"].success + 0.5


def test_a_run_directory_explains_the_run(finished, source):
    metrics, completions = rows(finished / "metrics.jsonl"), rows(finished / "completions.jsonl")
    assert [row["step"] for row in metrics] == [0, 0, 1, 2, 3, 4]  # the evaluations before and after among the steps
    assert len(completions) == 4 * 16
    for step in range(4):
        [row] = [row for row in metrics if row["step"] == step and "reward" in row]
        scored = [c for c in completions if c["step"] == step]
        assert row["reward"] == pytest.approx(np.mean([c["reward"] for c in scored]))
        assert row["completions/mean_length"] == np.mean([c["tokens"] for c in scored])
        assert row["sampling/logprob_difference/max"] < 1e-4
        for prompt_id in {c["prompt_id"] for c in scored}:
            group = [c for c in scored if c["prompt_id"] == prompt_id]
            assert sum(c["advantage"] for c in group) == pytest.approx(0, abs=1e-5)
        assert all(c["rewards"] == {"share_of_a": c["completion"].count("a") / 3} for c in scored)
    assert (finished / "code" / source.name).read_text() == source.read_text()
    assert json.loads((finished / "run.json").read_text())["status"] == "finished"


def test_a_run_can_be_restored_and_its_evaluation_found_again(finished):
    experiment, policy = load_run(finished), restore_policy(finished)
    expected = json.loads((finished / "summary.json").read_text())["after"]["held_out"]
    found = evaluation.evaluate(policy, experiment).to_dict()
    assert {**found, "pass_at_k": {str(k): value for k, value in found["pass_at_k"].items()}} == expected


def test_a_warm_start_and_a_control_are_runs_of_their_own(source, tmp_path):
    overrides = ["warm_start={'method': 'sft', 'steps': 20}", "control={'method': 'sft', 'steps': 2}", "steps=2"]
    experiment = load(source, overrides)
    result = train(experiment, tmp_path, source=source, overrides=overrides, quiet=True)
    for name, steps in ((".", 2), ("warm_start", 20), ("control", 2)):
        assert json.loads((tmp_path / name / "run.json").read_text())["status"] == "finished"
        assert latest_step(tmp_path / name / "checkpoints") == steps
        assert (tmp_path / name / "metrics.jsonl").is_file()

    warm = restore_policy(tmp_path / "warm_start")
    before = evaluation.evaluate(warm, experiment)
    assert before == result.before["held_out"]  # the training began where the warm start ended
    assert before.success > evaluation.evaluate(source_policy(experiment), experiment).success + 0.2
    variant, control = load_run(tmp_path / "control"), restore_policy(tmp_path / "control")
    assert (variant.method, variant.steps, variant.control) == ("sft", 2, None)
    assert evaluation.evaluate(control, variant) == result.control["held_out"]
    first = rows(tmp_path / "control/metrics.jsonl")[0]
    assert first["loss"] < 0.8  # it began at the warm start too, where a new policy's loss is log 7 = 1.95 at least
    assert json.loads((tmp_path / "summary.json").read_text())["control"]["held_out"]["success"] is not None


def test_a_reference_and_several_updates_per_step_are_trained_with(experiment, tmp_path):
    changes = {"loss.beta": 0.1, "num_iterations": 2, "gradient_accumulation_steps": 2, "steps": 2, "devices": 2}
    train(override(experiment, changes), tmp_path / "run", quiet=True)
    first, second = (row for row in rows(tmp_path / "run/metrics.jsonl") if "kl" in row)
    assert 0 < first["kl"] < second["kl"]  # measured in a step's last update, when the policy has left the reference
    assert first["sampling/logprob_difference/max"] < 1e-4  # measured in the first, when it has not
    assert second["learning_rate"] == 1e-2


def test_a_schedule_falls_over_updates_and_not_over_steps(experiment, tmp_path):
    changes = {"steps": 2, "num_iterations": 2, "optimizer.schedule": "linear", "optimizer.learning_rate": 0.08}
    train(override(experiment, changes), tmp_path / "run", quiet=True)
    # Four updates at .08, .06, .04 and .02; a step reports its last one's.
    assert metric(tmp_path / "run", "learning_rate") == pytest.approx([0.06, 0.02])


def metric(run_dir: Path, name: str) -> list[float]:
    return [row[name] for row in rows(run_dir / "metrics.jsonl") if name in row]


def test_a_reference_is_frozen_copied_or_mixed(experiment, tmp_path):
    # After a step whose reference was synced the policy has left it by one update only.
    changes = {"loss.beta": 0.1, "num_iterations": 2}
    copied = {**changes, "loss.sync_ref_model": True, "loss.ref_model_sync_steps": 1}
    kl = {}
    for name, more in (("frozen", changes), ("copied", copied), ("mixed", copied)):
        config = override(experiment, more)
        if name == "copied":
            config = override(config, {"loss.ref_model_mixup_alpha": 1.0})
        train(config, tmp_path / name, quiet=True)
        kl[name] = metric(tmp_path / name, "kl")
    assert kl["frozen"][0] == kl["copied"][0] == kl["mixed"][0] > 0
    assert kl["copied"][-1] < kl["mixed"][-1] < kl["frozen"][-1]


def test_a_run_with_a_moving_reference_and_dynamic_sampling_resumes_exactly(source, tmp_path):
    overrides = [
        "loss.beta=0.1", "loss.sync_ref_model=True", "loss.ref_model_sync_steps=1", "num_iterations=2",
        "dynamic_sampling_rounds=2",
    ]  # fmt: skip
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(load(source, overrides), whole, source=source, overrides=overrides, quiet=True)
    interrupted = at_step(2, lambda: signal.raise_signal(signal.SIGINT), load(source, overrides))
    with pytest.raises(KeyboardInterrupt):
        train(interrupted, broken, source=source, overrides=overrides, quiet=True)
    train(load(source, overrides), broken, source=source, overrides=overrides, resume=True, quiet=True)
    assert_same_run(broken, whole)


def test_groups_without_a_signal_are_refilled_from_further_prompts(experiment, tmp_path):
    # Two tokens at most and rewards of 0 or 1 for "a": of groups of two, most have equal rewards.
    def has_a(*, completions: list[str], **columns: Any) -> list[float]:
        return [float("a" in completion) for completion in completions]

    changes = {"group_size": 2, "sampling.max_tokens": 2, "steps": 3}
    few = override(replace(experiment, rewards={"has_a": has_a}), changes)
    train(few, tmp_path / "without", quiet=True)
    train(override(few, {"dynamic_sampling_rounds": 6}), tmp_path / "with", quiet=True)
    # The first round is the one that is played without it, as long as the policies are the same.
    assert metric(tmp_path / "with", "reward")[0] == metric(tmp_path / "without", "reward")[0]
    assert metric(tmp_path / "with", "frac_reward_zero_std")[0] > 0
    assert metric(tmp_path / "with", "dynamic_sampling/rounds")[0] > 0
    assert metric(tmp_path / "with", "dynamic_sampling/groups_with_signal")[0] == 4
    trained = [c for c in rows(tmp_path / "with/completions.jsonl") if c["step"] == 0]
    assert len(trained) == 8 and all(abs(c["advantage"]) == 1 for c in trained)
    assert len({c["prompt_id"] for c in trained}) == 4


def test_completions_that_were_cut_off_are_not_trained_on(experiment, tmp_path):
    train(override(experiment, {"steps": 1}), tmp_path / "all", quiet=True)
    train(override(experiment, {"steps": 1, "loss.mask_truncated_completions": True}), tmp_path / "some", quiet=True)
    cut = metric(tmp_path / "all", "completions/clipped_ratio")[0]
    assert 0 < cut < 1
    assert metric(tmp_path / "all", "reward") == metric(tmp_path / "some", "reward")  # they still count in the rewards
    assert metric(tmp_path / "all", "grad_norm") != metric(tmp_path / "some", "grad_norm")


def test_a_sampler_that_differs_from_the_trainer_is_corrected_and_does_not_stop_the_run(experiment, tmp_path):
    class Crooked(Actor):
        def generate(self, *arguments: Any) -> Any:
            generation, state = super().generate(*arguments)
            lower = np.where(generation.mask, generation.logprobs - 0.25, 0).astype(np.float32)
            return generation._replace(logprobs=lower), state

    changes = {"steps": 1, "num_iterations": 2, "loss.importance_sampling_mode": "token_truncate"}
    config = override(experiment, changes)
    train(config, tmp_path / "run", quiet=True, make_generator=lambda actor: Crooked(*actor))
    assert metric(tmp_path / "run", "sampling/logprob_difference/max")[0] == pytest.approx(0.25, abs=1e-4)
    assert metric(tmp_path / "run", "sampling/importance_sampling_ratio/mean")[0] == pytest.approx(np.exp(0.25), 1e-4)


# Stopping and going on -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 3])
def test_a_run_that_broke_off_and_is_gone_on_with_is_the_run_that_never_did(source, finished, tmp_path, step):
    run_dir = tmp_path / "run"
    with pytest.raises(RunError, match="no reward today"):
        train(at_step(step, fail, load(source)), run_dir, source=source, quiet=True)
    assert json.loads((run_dir / "run.json").read_text())["status"] == "failed"
    assert latest_step(run_dir / "checkpoints") == (None if step == 1 else 2)
    train(load(source), run_dir, source=source, resume=True, quiet=True)
    assert_same_run(run_dir, finished)


def test_ctrl_c_ends_after_the_step_under_way_with_what_was_learned_saved(source, finished, tmp_path, capsys):
    run_dir = tmp_path / "run"
    interrupted = at_step(2, lambda: signal.raise_signal(signal.SIGINT), load(source))
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(interrupted, run_dir, source=source, quiet=True)
    assert signal.getsignal(signal.SIGINT) is handler
    assert "stopping after this step" in capsys.readouterr().err
    assert json.loads((run_dir / "run.json").read_text())["status"] == "interrupted"
    assert latest_step(run_dir / "checkpoints") == 3  # saved though 3 is no multiple of checkpoint_every
    train(load(source), run_dir, source=source, resume=True, quiet=True)
    assert_same_run(run_dir, finished)


def test_a_second_ctrl_c_acts_at_once(experiment, tmp_path):
    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(at_step(1, twice, experiment), tmp_path / "run", quiet=True)
    assert [row["step"] for row in rows(tmp_path / "run/metrics.jsonl")] == [0, 0]  # step 1 was not finished


def test_a_finished_run_that_is_gone_on_with_stays_as_it_is(source, finished, tmp_path):
    run_dir = tmp_path / "run"
    train(load(source), run_dir, source=source, quiet=True)
    train(load(source), run_dir, source=source, resume=True, quiet=True)
    assert_same_run(run_dir, finished)


def test_a_budget_of_tokens_ends_a_run_with_the_step_that_uses_it_up(source, tmp_path):
    """Two steps of 16 completions sample at most 2 × 16 × 3 = 96 tokens, three of at least one token each 48."""
    overrides = ["steps=40", "token_budget=97", "checkpoint_every=1"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    result = train(load(source, overrides), whole, source=source, overrides=overrides, quiet=True)
    sampled = metric(whole, "num_sampled_tokens")
    assert sampled == list(np.cumsum(metric(whole, "completions/mean_length")) * 16)
    assert sampled[-2] < 97 <= sampled[-1]
    last = rows(whole / "metrics.jsonl")[-1]
    assert last["step"] == latest_step(whole / "checkpoints") == len(sampled)
    assert last["evaluation/success"] == result.after["held_out"].success
    # A run that is gone on with counts what it had sampled; one that had used its budget up stays as it is.
    with pytest.raises(RunError, match="no reward today"):
        train(at_step(2, fail, load(source, overrides)), broken, source=source, overrides=overrides, quiet=True)
    for _ in range(2):
        train(load(source, overrides), broken, source=source, overrides=overrides, resume=True, quiet=True)
        assert_same_run(broken, whole)


def test_a_run_without_a_checkpoint_has_no_policy_to_restore(source, tmp_path):
    with pytest.raises(RunError):
        train(at_step(0, fail, load(source)), tmp_path / "run", source=source, quiet=True)
    with pytest.raises(UserError, match="has no checkpoint yet"):
        restore_policy(tmp_path / "run")
    with pytest.raises(UserError, match="is not the directory of a run"):
        restore_policy(tmp_path)


# What ends a run -----------------------------------------------------------------------------------------------------


def test_a_broken_log_probability_contract_stops_the_run_at_the_first_bad_token(experiment, tmp_path):
    TOKENS, bad = ["", "", "", *"abcd"], []

    class Crooked(Actor):
        def generate(self, prompts: Any, noise: Any, sampling: Any) -> Any:
            generation, state = super().generate(prompts, noise, sampling)
            if noise.step == 1:
                logprobs = generation.logprobs.copy()
                logprobs[2, 3, 0] -= 0.25
                bad.append(TOKENS[generation.tokens[2, 3, 0]])
                generation = generation._replace(logprobs=logprobs)
            return generation, state

    with pytest.raises(RunError) as caught:
        train(experiment, tmp_path / "run", quiet=True, make_generator=lambda actor: Crooked(*actor))
    message = str(caught.value)
    assert message.startswith(f"step 1: token 0 ({bad[0]!r}) of sample 3 of prompt ")
    assert "missed by 0.2500, more than sampling.max_logprob_difference = 0.01" in message
    assert latest_step(tmp_path / "run/checkpoints") is None


def test_a_reward_that_is_no_number_ends_the_run_with_one_sentence(experiment, tmp_path):
    def broken(*, completions: list[str], **columns: Any) -> list[float]:
        return [math.nan] * len(completions)

    with pytest.raises(RunError, match=r"reward 'broken' returned nan for completion 0, .*, and 7 more") as caught:
        train(replace(experiment, rewards={"broken": broken}), tmp_path / "run", quiet=True)
    assert "\n" not in str(caught.value)


def every(n: int, experiment: Experiment) -> Experiment:
    """The experiment with a reward that fails on every n-th completion, which is then dropped."""
    [(name, reward)] = experiment.rewards.items()

    def leaky(**arguments: Any) -> list[float | None]:
        return [math.nan if i % n == 0 else value for i, value in enumerate(reward(**arguments))]

    return replace(experiment, rewards={name: leaky}, reward=RewardConfig(on_failure="drop", max_failure_rate=0.4))


def test_a_dropped_completion_is_masked_and_counted(experiment, tmp_path):
    train(override(every(4, experiment), {"steps": 1}), tmp_path / "run", quiet=True)
    [row] = [row for row in rows(tmp_path / "run/metrics.jsonl") if "reward" in row]
    assert row["frac_dropped"] == 0.25  # the first of each group of four
    completions = rows(tmp_path / "run/completions.jsonl")
    kept = [c for c in completions if c["sample"] > 0]
    assert all(c["reward"] is None and c["advantage"] == 0 for c in completions if c["sample"] == 0)
    assert row["reward"] == pytest.approx(np.mean([c["reward"] for c in kept]))
    for prompt_id in {c["prompt_id"] for c in kept}:
        assert sum(c["advantage"] for c in kept if c["prompt_id"] == prompt_id) == pytest.approx(0, abs=1e-5)


def test_too_many_failures_of_a_reward_end_the_run(experiment, tmp_path):
    message = "reward 'share_of_a' failed on 8 of the 16 completions of step 0, above reward.max_failure_rate = 0.4"
    with pytest.raises(RunError, match=message):
        train(every(2, experiment), tmp_path / "run", quiet=True)


# Parts ---------------------------------------------------------------------------------------------------------------


def test_examples_come_in_shuffled_epochs():
    steps = [schedule(0, step, num_prompts=4, num_examples=6) for step in range(6)]
    order = [index for indices, _ in steps for index in indices]
    epochs = [order[start : start + 6] for start in range(0, 24, 6)]
    assert all(sorted(epoch) == list(range(6)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) > 1
    assert steps[3] == schedule(0, 3, 4, 6)  # a resumed run finds the same
    assert order != [index for step in range(6) for index in schedule(1, step, 4, 6)[0]]


def test_an_example_that_occurs_again_within_a_step_gets_another_name():
    indices, ids = schedule(0, 0, num_prompts=7, num_examples=3)
    assert len(set(ids)) == 7
    assert [i % 3 for i in ids] == indices
    assert schedule(0, 5, 4, 1) == ([0, 0, 0, 0], [0, 1, 2, 3])
    assert schedule(0, 1, 3, 9)[0] == schedule(0, 1, 3, 9)[1]  # without repetitions the name is the example's place


def test_metrics_of_rewards_worked_by_hand():
    nan = math.nan
    scores = Scores(
        total=[1.0, 0.0, 1.0, 0.5, 0.5, nan],
        by_name={"exact": [1.0, 0.0, 1.0, 0.5, 0.5, nan], "format": [nan, nan, 1.0, 0.0, nan, nan]},
        sample_mask=[True] * 5 + [False],
        failures={"exact": 1, "format": 0},
        advantage_rewards=[1.0, 0.0, 1.0, 0.5, 0.5, nan],
    )
    rewards, kept = np.array([[1, 0, 1], [0.5, 0.5, 0]]), np.array([[True] * 3, [True, True, False]])
    metrics = reward_metrics(scores, rewards, kept)
    assert metrics == pytest.approx(
        {
            "reward": (1 + 0 + 1 + 0.5 + 0.5) / 5,
            "reward_std": (math.sqrt(2) / 3 + 0) / 2,  # 1, 0, 1: mean 2/3, variance (1/9 + 4/9 + 1/9) / 3 = 2/9
            "frac_reward_zero_std": 1 / 2,
            "frac_dropped": 1 / 6,
            "rewards/exact/mean": 0.6,
            "rewards/exact/std": math.sqrt((0.16 + 0.36 + 0.16 + 0.01 + 0.01) / 5),
            "rewards/format/mean": 0.5,
            "rewards/format/std": 0.5,
        }
    )


def test_equal_rewards_have_no_spread_whatever_their_value():
    scores = Scores([0.8] * 6, {"r": [0.8] * 6}, [True] * 6, {"r": 0}, [0.8] * 6)
    metrics = reward_metrics(scores, np.full((1, 6), 0.8, np.float32), np.ones((1, 6), bool))
    assert metrics["frac_reward_zero_std"] == 1.0
    nothing = reward_metrics(scores, np.zeros((1, 6)), np.zeros((1, 6), bool))
    assert math.isnan(nothing["reward"]) and nothing["frac_dropped"] == 1.0
