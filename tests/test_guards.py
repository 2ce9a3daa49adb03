"""Training that goes wrong: spikes are skipped, undone, told or end the run; a collapse is told or ends it."""

import json
from pathlib import Path
from typing import Any

import letters
import numpy as np
import pytest

from grpo_jax.errors import RunError, UserError
from grpo_jax.experiment import Experiment, override
from grpo_jax.guards import Guard
from grpo_jax.report.diagnosis import diagnose
from grpo_jax.runs.checkpoints import kept_steps
from grpo_jax.runs.record import read_run
from grpo_jax.sweep.vectorized import require_vectorizable
from grpo_jax.training import Trainer, train

# The rule, step by step -----------------------------------------------------------------------------------------------


def guard(**fields: Any) -> Guard:
    return Guard(override(letters.config, {f"guards.{name}": value for name, value in fields.items()}))


def seen(rule: Guard, name: str, values: list[float | None], **more: Any) -> list[list[str]]:
    """The kinds of alarms of steps with these values of a metric."""
    return [[alarm.kind for alarm in rule.see(step, {name: v, **more})] for step, v in enumerate(values)]


def test_a_limit_is_a_multiple_of_the_median_of_the_last_steps() -> None:
    rule = guard(spike_factor=3.0, spike_window=3)
    limits = []
    for value in (1.0, 0.0, None, float("inf"), 5.0, 2.0, 100.0, 4.0):
        limits.append(rule.spike_limit)
        rule.see(0, {"grad_norm": value})
    # Neither a step without a gradient nor one without a number counts: 1, 5, 2; then 5, 2, 100.
    assert limits == [np.inf] * 6 + [6.0, 15.0]
    assert guard().spike_limit is None


def test_the_loss_can_be_watched_in_place_of_the_gradient() -> None:
    config = override(letters.config, {"method": "sft", "guards.spike_factor": 2.0, "guards.spike_window": 1})
    rule = Guard(override(config, {"guards.spike_metric": "loss"}))
    rule.see(0, {"loss": 3.0, "grad_norm": 50.0})
    assert rule.spike_limit == 6.0


@pytest.mark.parametrize(
    ("field", "metric", "fine", "wrong"),
    [
        ("min_entropy", "entropy", 0.5, 0.4),
        ("max_most_common_ratio", "completions/most_common_ratio", 0.5, 0.6),
    ],
)
def test_a_collapse_is_told_once_after_so_many_steps_in_a_row(field: str, metric: str, fine: float, wrong: Any) -> None:
    rule = guard(**{field: 0.5}, patience=3)
    told = seen(rule, metric, [wrong, wrong, fine, wrong, wrong, wrong, wrong, fine, wrong, wrong, wrong, None])
    assert told == [[]] * 5 + [[field]] + [[]] * 6
    stops = guard(**{field: 0.5}, patience=2, on_collapse="stop")
    assert seen(stops, metric, [wrong, wrong, wrong]) == [[], [field], [field]]
    [alarm] = stops.see(7, {metric: wrong})
    assert alarm.stopped_by == "guards.on_collapse" and alarm.message.startswith("step 7: for 2 steps ")
    assert f"guards.{field} = 0.5" in alarm.message or f"guards.{field} = 50%" in alarm.message


def test_steps_without_a_signal_are_told_unless_the_policy_is_always_right() -> None:
    equal = "frac_reward_zero_std"
    assert seen(guard(patience=2), equal, [1.0, 1.0]) == [[], ["watch_signal"]]
    assert seen(guard(patience=2), equal, [1.0, 0.9, 1.0]) == [[], [], []]
    assert seen(guard(patience=2), equal, [1.0, 1.0], success=0.94) == [[], ["watch_signal"]]
    assert seen(guard(patience=2), equal, [1.0, 1.0], success=0.95) == [[], []]
    assert seen(guard(watch_signal=False), equal, [1.0] * 30) == [[]] * 30


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "ppo"},
        {"method": "rft", "rft.select": "threshold", "rft.threshold": 0.5},
        {"advantages.baseline": "none", "advantages.scale": "none"},
        {"advantages": lambda rewards, mask: rewards},
    ],
)
def test_where_equal_rewards_teach_something_they_are_no_sign(changes: dict[str, Any]) -> None:
    rule = Guard(override(letters.config, {"guards.patience": 1, **changes}))
    assert seen(rule, "frac_reward_zero_std", [1.0]) == [[]]


def test_an_update_without_tokens_has_no_entropy() -> None:
    assert seen(guard(min_entropy=0.5, patience=1), "entropy", [0.0], empty_updates=1.0) == [[]]


def test_a_rule_whose_metric_is_not_measured_is_refused_at_the_first_step() -> None:
    with pytest.raises(RunError, match=r"guards.min_entropy is set, but the steps .* do not measure 'entropy'"):
        guard(min_entropy=0.1).see(0, {"loss": 1.0})
    guard(min_entropy=0.1).replay([{"step": 0, "loss": 1.0}])  # steps of an earlier version may lack it


# What a config may say ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"guards.on_spike": "stop"}, "guards.on_spike is set, but it cannot act here: it is read with guards.spike_f"),
        ({"guards.spike_window": 5}, "guards.spike_window is set"),
        (
            {"guards.watch_signal": False, "guards.patience": 5},
            "guards.patience is set.*no rule about a collapse",
        ),
        ({"guards.spike_factor": 2.0, "guards.spike_metric": "loss"}, "the loss of a policy gradient is about 0"),
        ({"method": "sft", "guards.min_entropy": 0.1}, "the steps of method 'sft' do not measure it"),
        ({"method": "rft", "guards.min_entropy": 0.1}, "guards.min_entropy is set"),
        ({"method": "dpo", "guards.max_most_common_ratio": 0.9}, "guards.max_most_common_ratio is set"),
        ({"guards.spike_factor": 1.0}, "must be above 1, or None for no rule"),
    ],
)
def test_a_rule_that_cannot_act_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        override(letters.config, changes)


def test_a_warm_start_by_imitation_leaves_behind_the_rules_about_sampling() -> None:
    changes = {"guards.min_entropy": 0.1, "guards.patience": 3, "warm_start": {"method": "sft"}}
    config = override(letters.config, changes)  # its warm start is made, and would be refused
    warm = override(config, {"method": "sft", "warm_start": None})
    assert (warm.guards.min_entropy, warm.guards.patience) == (None, 3)


@pytest.mark.parametrize("changes", [{"guards.spike_factor": 9.0}, {"guards.on_collapse": "stop"}])
def test_seeds_in_one_program_have_no_rule_that_acts_between_steps(changes: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"cannot be vectorised: guards\..* Run it without --vectorize"):
        require_vectorizable(override(letters.config, changes))


# Runs -----------------------------------------------------------------------------------------------------------------

STEPS, SPIKE = 6, 3


def rows(run_dir: Path) -> list[dict[str, Any]]:
    found = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [row for row in found if "grad_norm" in row]


def numbers(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of the steps without what depends on the clock."""
    return [{k: v for k, v in row.items() if k not in ("step_time", "tokens_per_second")} for row in rows(run_dir)]


def exploding(**changes: Any) -> Experiment:
    """Six steps of which the fourth has a gradient that is 1000 times as large."""
    settings = {
        "steps": STEPS, "checkpoint_every": 2, "advantages.scale": "none", "evaluation.num_prompts": 1,
        "evaluation.num_samples": 1, "guards.spike_factor": 20.0, "guards.spike_window": 2,
    }  # fmt: skip
    return override(letters.config, settings | {k.replace("__", "."): v for k, v in changes.items()})


@pytest.fixture(autouse=True)
def spike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Multiplies the advantages of step `SPIKE` by 1000."""
    from grpo_jax.algorithms import grpo

    make_batch = grpo.GRPO.make_batch

    def made(self: Any, context: Any, step: int) -> Any:
        batch = make_batch(self, context, step)
        return batch.with_advantages(batch.batch.advantages * (1000.0 if step == SPIKE else 1.0))

    monkeypatch.setattr(grpo.GRPO, "make_batch", made)


def params(result: Any) -> list[bytes]:
    return [np.asarray(x).tobytes() for _, x in sorted(result.policy.params.items())]


def test_a_spike_is_skipped_and_counted_and_told_once(tmp_path: Path) -> None:
    config = exploding()
    train(config, tmp_path / "run", quiet=True)
    assert [row["spiked_updates"] for row in rows(tmp_path / "run")] == [0, 0, 0, 1, 0, 0]
    assert [row["skipped_updates"] for row in rows(tmp_path / "run")] == [0, 0, 0, 1, 1, 1]
    spike = rows(tmp_path / "run")[SPIKE]
    before = [row["grad_norm"] for row in rows(tmp_path / "run")][1:3]
    assert spike["spike_limit"] == pytest.approx(20 * np.mean(before)) and spike["grad_norm"] > spike["spike_limit"]
    [warning] = read_run(tmp_path / "run")["warnings"]
    assert warning["kind"] == "spike" and "step 3: the gradient norm was above" in warning["message"]
    assert warning["message"].endswith(
        "20 times the median of the 2 steps before (guards.spike_factor): the update was not made."
    )
    assert warning["message"] in diagnose(tmp_path / "run")


def test_without_a_rule_nothing_of_it_is_measured(tmp_path: Path) -> None:
    train(exploding(guards__spike_factor=None, guards__spike_window=20, steps=1), tmp_path / "run", quiet=True)
    assert not {"spiked_updates", "spike_limit", "rolled_back"} & rows(tmp_path / "run")[0].keys()


@pytest.mark.parametrize(("action", "stops"), [("skip", (4,)), ("rollback", (1,)), ("rollback", (4, 5))])
def test_a_run_that_is_interrupted_does_what_the_uninterrupted_run_did(
    action: str, stops: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = exploding(guards__on_spike=action, checkpoint_every=3)
    whole = train(config, tmp_path / "whole", quiet=True)
    step, left = Trainer.step, list(stops)

    def interrupted(trainer: Trainer, number: int) -> None:
        if left and number == left[0]:
            trainer.save(left.pop(0))
            raise KeyboardInterrupt
        step(trainer, number)

    monkeypatch.setattr(Trainer, "step", interrupted)
    for _ in stops:
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "parts", quiet=True, resume=True)
    parts = train(config, tmp_path / "parts", quiet=True, resume=True)
    assert not left and numbers(tmp_path / "parts") == numbers(tmp_path / "whole")
    assert params(parts) == params(whole)


def test_a_spike_takes_the_run_back_and_its_batches_are_left_out(tmp_path: Path) -> None:
    config = exploding(guards__on_spike="rollback", checkpoint_every=2)
    stayed = train(
        exploding(steps=SPIKE - 1), tmp_path / "before", quiet=True
    )  # the policy of the checkpoint of step 2
    seen: dict[int, list[bytes]] = {}
    step = Trainer.step
    with pytest.MonkeyPatch.context() as patch:

        def noted(trainer: Trainer, number: int) -> None:
            step(trainer, number)
            seen[number] = [np.asarray(x).tobytes() for _, x in sorted(trainer.policy().params.items())]

        patch.setattr(Trainer, "step", noted)
        train(config, tmp_path / "run", quiet=True)
    found = rows(tmp_path / "run")
    assert [row.get("rolled_back") for row in found] == [None, None, None, 2, None, None]
    assert seen[SPIKE] == params(stayed) != seen[SPIKE - 1]
    assert [row["step"] for row in found] == list(range(STEPS)) and found[-1]["num_tokens"] > found[SPIKE]["num_tokens"]
    assert kept_steps(tmp_path / "run" / "checkpoints") == [4, 6]
    [warning] = read_run(tmp_path / "run")["warnings"]
    assert warning["message"].endswith(": the last 2 steps were undone.")


def test_a_spike_ends_the_run_before_its_update(tmp_path: Path) -> None:
    result = train(exploding(guards__on_spike="stop"), tmp_path / "run", quiet=True)
    info = read_run(tmp_path / "run")
    assert (info["status"], info["stop"]["by"], info["stop"]["steps"]) == ("stopped", "guards.on_spike", SPIKE + 1)
    assert len(rows(tmp_path / "run")) == SPIKE + 1 and "the update was not made" in info["stop"]["reason"]
    before = train(exploding(steps=SPIKE), tmp_path / "before", quiet=True)
    assert params(result) == params(before)


def test_a_spike_that_is_only_told_changes_nothing(tmp_path: Path) -> None:
    warned = train(exploding(guards__on_spike="warn"), tmp_path / "run", quiet=True)
    assert "the update was made all the same" in read_run(tmp_path / "run")["warnings"][0]["message"]
    without = train(exploding(guards__spike_factor=None, guards__spike_window=20), tmp_path / "without", quiet=True)
    for one, other in zip(numbers(tmp_path / "run"), numbers(tmp_path / "without"), strict=True):
        assert {k: one[k] for k in other} == other
    assert params(warned) == params(without)


def test_a_spike_is_found_in_any_update_and_on_any_number_of_devices(tmp_path: Path) -> None:
    changes = {"num_iterations": 2, "num_minibatches": 2, "gradient_accumulation_steps": 2, "devices": 2}
    train(override(exploding(), changes), tmp_path / "run", quiet=True)
    found = rows(tmp_path / "run")
    assert [row["spiked_updates"] for row in found] == [0, 0, 0, 4, 0, 0] and found[-1]["skipped_updates"] == 4


def pays_nothing(*, completions: list[str], **columns: Any) -> list[float]:
    return [0.0 for _ in completions]


def test_a_run_without_a_signal_ends_where_that_is_declared(tmp_path: Path) -> None:
    changes = {"rewards": {"nothing": pays_nothing}, "guards.patience": 2, "guards.on_collapse": "stop"}
    train(override(letters.config, changes), tmp_path / "run", quiet=True)
    info = read_run(tmp_path / "run")
    assert (info["status"], info["stop"]["by"], info["stop"]["steps"]) == ("stopped", "guards.on_collapse", 2)
    assert info["stop"]["reason"].startswith("step 1: for 2 steps no group had rewards that differ")
    signs = diagnose(tmp_path / "run")
    assert sum("No group" in sign or "no group" in sign for sign in signs) == 1


def test_a_policy_that_learns_one_string_has_collapsed(tmp_path: Path) -> None:
    changes = {
        "steps": 60, "optimizer.learning_rate": 0.1, "checkpoint_every": 100, "guards.watch_signal": False,
        "guards.max_most_common_ratio": 0.8, "guards.patience": 2, "guards.on_collapse": "stop",
    }  # fmt: skip
    train(override(letters.config, changes), tmp_path / "run", quiet=True)
    info, found = read_run(tmp_path / "run"), rows(tmp_path / "run")
    assert info["stop"]["by"] == "guards.on_collapse" and "answers every prompt alike" in info["stop"]["reason"]
    assert [row["completions/most_common_ratio"] > 0.8 for row in found[-3:]] == [False, True, True]


def test_a_warm_start_that_is_stopped_fails_the_run(tmp_path: Path) -> None:
    warm = {"rewards": {"nothing": pays_nothing}, "guards.patience": 1, "guards.on_collapse": "stop"}
    with pytest.raises(RunError, match="the warm start was stopped: step 0: for 1 steps no group"):
        train(override(letters.config, {"warm_start": warm, "steps": 1}), tmp_path / "run", quiet=True)
    assert read_run(tmp_path / "run")["status"] == "failed"
