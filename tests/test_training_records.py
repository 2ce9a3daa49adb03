"""What the loop writes and returns: each number of it beside what it is made of."""

import json
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import letters
import numpy as np
import pytest
from scripted import Scripted

from grpo_jax import training
from grpo_jax.errors import RunError, UserError
from grpo_jax.experiment import Experiment, override
from grpo_jax.policy import Policy, load
from grpo_jax.rollout import Actor, from_completions
from grpo_jax.runs.checkpoints import latest_step
from grpo_jax.runs.log import RunLog
from grpo_jax.runs.restore import restore_policy
from grpo_jax.runs.result import Result, summarize
from grpo_jax.runs.signals import stop_between_steps
from grpo_jax.training import Trainer, starting_policy, train
from grpo_jax.update import State, UpdateOutput


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@dataclass
class Told:
    """A run, the notes that were shown while it ran, and what it came to."""

    run_dir: Path
    config: Experiment
    result: Result
    notes: list[str] = field(default_factory=list)

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return rows(self.run_dir / "metrics.jsonl")

    @property
    def steps(self) -> list[dict[str, Any]]:
        return [row for row in self.metrics if "grad_norm" in row]


def told(config: Experiment, run_dir: Path, **options: Any) -> Told:
    notes: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunLog, "note", lambda log, message: notes.append(f"{log.run_dir.name}: {message}"))
        return Told(run_dir, config, train(config, run_dir, quiet=True, **options), notes)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Told:
    changes = {
        "steps": 4, "evaluation.splits": ("held_out", "train"), "evaluation.every": 2, "evaluation.num_prompts": 3,
        "optimizer.learning_rate": 0.1,
        "task": replace(letters.task, references={"a good player": 0.75}),
    }  # fmt: skip
    directory = tmp_path_factory.mktemp("runs") / "run"
    return told(override(letters.config, changes), directory, overrides=iter(["steps=4"]))


def test_tokens_are_counted_over_the_run_and_divided_by_a_steps_time(run: Told) -> None:
    completions = rows(run.run_dir / "completions.jsonl")
    read = written = 0
    for step, row in enumerate(run.steps):
        mine = [c for c in completions if c["step"] == step]
        new = sum(c["tokens"] for c in mine)
        written += new
        read += new + sum(1 + len(c["prompt"]) for c in mine)  # each prompt with its begin token, for each completion
        assert (row["num_sampled_tokens"], row["num_tokens"]) == (written, read)
        assert row["tokens_per_second"] * row["step_time"] == pytest.approx(new)
        assert row["success"] == np.mean([c["completion"].count("a") >= 2 for c in mine])
        assert row["skipped_updates"] == 0 and row["learning_rate"] == pytest.approx(0.1)
        assert row["sampling/logprob_difference/mean"] <= row["sampling/logprob_difference/max"] < 1e-4
    assert 0 < sum(row["step_time"] for row in run.steps) < run.result.seconds


def test_the_policy_is_evaluated_before_every_so_often_and_after(run: Told) -> None:
    evaluations = [row for row in run.metrics if "grad_norm" not in row]
    assert [(row["step"], "evaluation/success" in row) for row in evaluations] == [
        (0, True), (0, False), (2, True), (2, False), (4, True), (4, False),
    ]  # fmt: skip
    for row, split, found in zip(
        [*evaluations[:2], *evaluations[-2:]], ["held_out", "train"] * 2,
        [*run.result.before.values(), *run.result.after.values()], strict=True,
    ):  # fmt: skip
        prefix = "evaluation" if split == "held_out" else "evaluation/train"
        assert found.split == split and found.num_prompts == 3
        assert row[f"{prefix}/success"] == found.success and row[f"{prefix}/reward"] == found.reward
        asked = {"held_out": ["bd", "cb", "dc"], "train": ["b", "c", "d"]}[split]
        assert [record["prompt"] for record in found.records[::2]] == asked
    values = [[value for key, value in row.items() if key != "step"] for row in evaluations[::2]]
    assert values[0] != values[1] != values[2]  # each is of the policy as it was


def test_the_summary_says_what_was_before_and_after_and_what_to_compare_it_with(run: Told) -> None:
    found = json.loads((run.run_dir / "summary.json").read_text())
    assert set(found) == {"before", "after", "control", "references", "seconds", "stop"}
    for when in ("before", "after"):
        of_result = getattr(run.result, when)
        assert set(found[when]) == {"held_out", "train"}
        assert {split: each["reward"] for split, each in found[when].items()} == {
            split: each.reward for split, each in of_result.items()
        }
    assert found["before"] != found["after"] and found["control"] == {}
    assert json.loads((run.run_dir / "run.json").read_text())["overrides"] == ["steps=4"]
    assert found["references"] == {"a good player": 0.75} and found["seconds"] == run.result.seconds > 0


def test_a_group_is_shown_of_the_policy_before_and_of_the_policy_after(run: Told) -> None:
    before, after = run.result.group_before, run.result.group_after
    for group in (before, after):
        assert [(row["prompt"], row["prompt_id"], row["sample"]) for row in group] == [("bd", 0, g) for g in range(4)]
        assert [row["reward"] for row in group] == [row["completion"].count("a") / 3 for row in group]
    once = told(override(run.config, {"steps": 0}), run.run_dir.parent / "none")
    assert once.result.group_before == once.result.group_after == before != after
    assert latest_step(once.run_dir / "checkpoints") == 0  # a run without steps can be restored too
    assert once.result.after == once.result.before == run.result.before
    assert not any("training" in note for note in once.notes)


def test_what_happens_is_said_with_its_numbers(run: Told) -> None:
    evaluating = ["run: evaluating 3 held-out prompts", "run: evaluating 3 train prompts"]
    training_ = "run: training: steps 1 to 4, 4 prompts × 4 completions each; the first compiles"
    assert run.notes[1:] == [*evaluating, training_, *evaluating * 2]
    assert run.notes[0] == f"run: writing to {run.run_dir}"


def test_the_policy_that_is_returned_is_that_of_the_last_checkpoint(run: Told) -> None:
    params = run.result.policy.params
    restored = restore_policy(run.run_dir).params
    assert params.keys() == restored.keys()
    assert all(np.array_equal(params[path], restored[path]) for path in params)
    assert latest_step(run.run_dir / "checkpoints") == 4


@pytest.fixture(scope="module")
def start() -> Policy:
    return load("scratch", scratch=letters.config.policy.scratch)


# Resuming and starting ------------------------------------------------------------------------------------------------


def add_one(*_: Any) -> Any:
    """An update that adds 1 to every parameter, in place of that of a method without advantages."""

    def update(state: State, *_: Any) -> tuple[State, UpdateOutput]:
        moved = jax.tree.map(lambda x: x + 1, state.trainable)
        return state._replace(trainable=moved), UpdateOutput(
            {"grad_norm": jnp.float32(1), "skipped_updates": jnp.int32(0), "empty_updates": jnp.int32(0)}
        )

    return update


def test_a_control_begins_where_the_warm_start_ended_and_a_finished_run_is_gone_on_with_unchanged(
    tmp_path: Path, start: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("grpo_jax.training.trainer.make_update", add_one)
    ended: dict[str, float] = {}
    save = training.Trainer.start_saving

    def noted(trainer: Trainer, step: int) -> None:
        gained = trainer.policy().params["norm.scale"] - start.params["norm.scale"]
        ended[trainer.log.run_dir.name] = float(gained.mean())
        save(trainer, step)

    monkeypatch.setattr(training.Trainer, "start_saving", noted)
    warm_start, control = {"method": "sft", "steps": 5}, {"method": "sft", "steps": 2}
    changes = {"method": "sft", "steps": 1, "warm_start": warm_start, "control": control}
    config = override(letters.config, changes)
    shown: list[tuple[str, int, bool]] = []
    display_of = training.stages.display_of

    def displayed(experiment: Experiment, *, title: str = "", quiet: bool = False) -> Any:
        shown.append((title, experiment.steps, quiet))
        return display_of(experiment, title=title, quiet=quiet)

    monkeypatch.setattr("grpo_jax.training.stages.display_of", displayed)
    right = Scripted(lambda prompt, sample: "aaa")  # what samples completions, in place of the policy
    first = told(config, tmp_path / "run", make_generator=lambda actor: right)
    assert shown == [("", 1, True), ("warm start", 5, True), ("control", 2, True)]
    assert [each["held_out"].success for each in (first.result.before, first.result.after, first.result.control)] == [
        1
    ] * 3
    assert ended == {"warm_start": 5, "run": 6, "control": 7}  # the control's 2 steps begin at 5 as well
    files = [tmp_path / "run" / name / "metrics.jsonl" for name in ("", "warm_start", "control")]
    before = [path.read_text() for path in files]
    ended.clear()
    again = told(config, tmp_path / "run", resume=True, make_generator=lambda actor: right)
    assert [path.read_text() for path in files] == before and not ended
    assert again.result.after == first.result.after and again.result.control == first.result.control
    assert not any("training" in note for note in again.notes)
    started = [note for note in first.notes if "training" in note]
    assert [note.split(":")[0] for note in started] == ["warm_start", "run", "control"]
    assert [row["step"] for row in rows(files[0])] == [0, 0, 1] and rows(files[2])[-1]["step"] == 2
    assert "evaluation/success" in rows(files[2])[-1] and "evaluation/success" not in rows(files[1])[-1]
    with pytest.raises(UserError, match="is not empty"):
        train(config, tmp_path / "run", quiet=True)


def never_sound(*_: Any) -> Any:
    """An update that is always skipped."""

    def update(state: State, *_: Any) -> tuple[State, UpdateOutput]:
        state = state._replace(skipped=state.skipped + 1)
        metrics = {"grad_norm": jnp.float32(jnp.nan), "skipped_updates": state.skipped, "empty_updates": jnp.int32(0)}
        return state, UpdateOutput(metrics)

    return update


def test_a_run_of_which_no_update_is_made_says_so_and_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grpo_jax.training.trainer.make_update", never_sound)
    config = override(letters.config, {"method": "sft", "steps": 5, "optimizer.max_skipped_updates": 3})
    notes: list[str] = []
    monkeypatch.setattr(RunLog, "note", lambda log, message: notes.append(message))
    with pytest.raises(RunError, match="step 2: 3 updates in a row were skipped"):
        train(config, tmp_path / "run", quiet=True, make_generator=lambda actor: Scripted(lambda *_: "aaa"))
    assert [note for note in notes if "skipped" in note] == [
        "step 0: an update was skipped, because its gradient is not finite (gradient norm nan)"
    ]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"


@dataclass
class Log:
    """A run's log that keeps its notes."""

    run_dir: Path = Path("nowhere")
    notes: list[str] = field(default_factory=list)
    policy_commit: str | None = None

    def note(self, message: str) -> None:
        self.notes.append(message)

    def starts_from(self, commit: str | None) -> None:
        self.policy_commit = commit


def test_a_policy_from_elsewhere_is_named_before_it_is_loaded_and_its_commit_is_recorded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def loaded(experiment: Experiment, commit: str | None) -> Any:
        return SimpleNamespace(experiment=experiment, asked=commit, after=list(log.notes), commit="1a2b")

    config, log = override(letters.config, {"policy.source": "package:small"}), Log()
    monkeypatch.setattr("grpo_jax.training.stages.source_policy", loaded)
    first = starting_policy(config, log)  # type: ignore[arg-type]
    assert vars(first) == {"experiment": config, "asked": None, "after": ["loading package:small"], "commit": "1a2b"}
    assert log.policy_commit == "1a2b"
    log.notes.clear()
    second = starting_policy(letters.config, log)  # type: ignore[arg-type]
    assert vars(second) == {"experiment": letters.config, "asked": "1a2b", "after": [], "commit": "1a2b"}


def test_a_summary_keeps_splits_and_parts_apart() -> None:
    def evaluations(name: str) -> Any:
        return {"held_out": SimpleNamespace(to_dict=lambda: {"from": name})}

    result = Result(Path(), None, evaluations("b"), evaluations("a"), evaluations("c"), [], [], 2.5)  # type: ignore[arg-type]
    config = override(letters.config, {"task": replace(letters.task, references={"r": 0.5})})
    assert summarize(result, config) == {
        "before": {"held_out": {"from": "b"}},
        "after": {"held_out": {"from": "a"}},
        "control": {"held_out": {"from": "c"}},
        "references": {"r": 0.5},
        "seconds": 2.5,
        "stop": None,
    }


# A trainer before its first step --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "changes", "has_reference", "has_head"),
    [
        ("grpo", {}, False, False),
        ("grpo", {"loss.beta": 0.1}, True, False),
        ("ppo", {}, True, True),
        ("reward_model", {}, True, True),
        ("sft", {}, False, False),
        ("dpo", {}, True, False),
    ],
)
def test_a_trainer_keeps_what_its_method_needs(
    method: str, changes: dict[str, Any], has_reference: bool, has_head: bool, start: Policy
) -> None:
    config = override(letters.config, {"method": method, "devices": 2, "evaluation.batch_size": 4, **changes})
    made: list[Actor] = []
    trainer = Trainer(config, start, Log(), lambda actor: made.append(actor) or Scripted(lambda p, s: "a"))  # type: ignore
    heads = {"value_head.kernel", "value_head.bias"} if has_head else set()
    assert set(trainer.state.trainable) == set(start.params) | heads
    policy = trainer.policy()
    assert policy.params.keys() == start.params.keys() and policy.lora == start.lora  # a head is no part of it
    assert all(np.array_equal(policy.params[path], start.params[path]) for path in start.params)
    assert (trainer.reference is not None) == has_reference and trainer.replicas.count == 2
    context = trainer.context()
    assert (context.start is not None) == has_reference and context.experiment is config
    assert [actor.trainable for actor in made][-1] is trainer.state.trainable
    if has_reference:
        assert made[0].trainable is trainer.reference
        assert trainer.reference["embed"] is not trainer.state.trainable["embed"]  # updates overwrite the state's
    assert (trainer.setup.shared_prefix_length, trainer.setup.axis_name) == (0, "replicas")
    assert (trainer.tokens_seen, trainer.tokens_sampled) == (0, 0)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"devices": 2, "gradient_accumulation_steps": 4, "group_size": 3},
            r"4 groups of 3 completions cannot be shared equally by 2 devices in .* 4 micro-batch.* a multiple of 8",
        ),
        ({"devices": None, "group_size": 3}, "cannot be shared equally by 8 devices"),
        ({"devices": 9}, "devices=9 was asked for, but this machine has 8"),
        ({"sampling.max_tokens": 2047}, r"prompt 0 of letters \(train\) has 2 tokens, .* 2047 new .* of 2048"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_compiled(changes: Any, says: str, start: Policy) -> None:
    with pytest.raises(UserError, match=says):
        Trainer(override(letters.config, changes), start, Log())  # type: ignore[arg-type]


def test_a_run_is_over_after_its_steps_or_its_tokens() -> None:
    def over(done: int, sampled: int, budget: int | None) -> bool:
        config = override(letters.config, {"steps": 4, "token_budget": budget})
        log = SimpleNamespace(stop=None)
        trainer = SimpleNamespace(experiment=config, tokens_sampled=sampled, last_step=config.num_steps, log=log)
        return Trainer.is_over(trainer, done)  # type: ignore[arg-type]

    assert [over(done, 100, None) for done in (0, 3, 4, 5)] == [False, False, True, True]
    assert [over(1, sampled, 50) for sampled in (49, 50, 51)] == [False, True, True]
    assert over(4, 0, 50)


def test_the_first_token_that_the_update_missed_is_named_with_its_numbers(start: Policy) -> None:
    rollout = from_completions([[1, 3], [1, 4]], [[3, 4, 5], [6, 3, 4]])
    rollout.prompt_ids[:] = [40, 7]
    rollout.logprobs[1, 0, 2] = -1.25
    config = override(letters.config, {"devices": 1, "sampling.max_logprob_difference": 0.5})
    trainer = Trainer(config, start, Log())  # type: ignore[arg-type]
    gaps = np.zeros((2, 1, 4), np.float32)
    gaps[0, 0, 0] = 0.5  # not above the bound
    trainer.check_logprobs(gaps, rollout, 6)
    gaps[1, 0, 2], gaps[1, 0, 3] = 0.625, 9.0
    with pytest.raises(RunError) as caught:
        trainer.check_logprobs(gaps, rollout, 6)
    assert str(caught.value).startswith(
        "step 6: token 2 ('b') of sample 0 of prompt 7 was sampled with log-probability -1.2500, which the update "
        "missed by 0.6250, more than sampling.max_logprob_difference = 0.5: "
    )
    gaps[0, 0, 1] = np.nan  # no number is within the bound
    with pytest.raises(RunError, match=r"token 1 \('b'\) of sample 0 of prompt 40"):
        trainer.check_logprobs(gaps, rollout, 6)


# Stopping -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def quiet_signals() -> Iterator[list[int]]:
    """Signals that nothing else has taken are noted, so that a test cannot end the process."""
    heard: list[int] = []
    before = {n: signal.signal(n, lambda number, _: heard.append(number)) for n in (signal.SIGINT, signal.SIGTERM)}
    yield heard
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_first_signal_asks_and_a_second_acts(number: signal.Signals, quiet_signals: list[int], capsys: Any) -> None:
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with stop_between_steps() as stop:
        assert not stop()
        signal.raise_signal(number)
        assert stop() and stop()
        assert capsys.readouterr().err == "\nstopping after this step (again to stop at once)\n"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers and quiet_signals == []


def test_another_thread_cannot_be_asked_to_stop(quiet_signals: list[int]) -> None:
    found: list[Any] = []

    def work() -> None:
        with stop_between_steps() as stop:
            found.append((stop(), signal.getsignal(signal.SIGINT)))

    handler = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [(False, handler)]
