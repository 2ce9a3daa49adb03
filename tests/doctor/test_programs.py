"""Checks of compiled programs: the update, the log-probabilities, the export and the memory, on tiny policies."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import letters
import pytest

from grpo_jax.doctor import Check, Subject, examine, exported, memory, updates
from grpo_jax.experiment import Experiment, LoRAConfig, override
from grpo_jax.losses import LossInputs
from grpo_jax.policy import Policy, load
from grpo_jax.rollout import Actor
from grpo_jax.runs.restore import source_policy

UNCHANGED = (
    updates.accumulation_changes_nothing,
    updates.devices_change_nothing,
    updates.padding_changes_nothing,
    updates.order_changes_nothing,
)


def subject_of(changes: dict[str, Any] | None = None) -> Subject:
    experiment: Experiment = override(letters.config, {"devices": None, "prompts_per_step": 8, **(changes or {})})
    return Subject(experiment, source_policy(experiment))


@pytest.fixture(scope="module")
def subject() -> Subject:
    return subject_of()


def refuted(check: Check, words: str) -> None:
    assert (check.verdict, words in check.sentence) == ("refuted", True), check


# The update -----------------------------------------------------------------------------------------------------------


def test_the_update_is_the_same_however_its_batch_is_cut_shared_padded_and_ordered(subject):
    for check in UNCHANGED:
        found = check(subject)
        assert found.verdict == "proved" and 0 < found.figures["gradient"] < 1e-5, found
    assert len({len(set(row)) for row in updates._batch(subject).mask.sum(-1).tolist()} - {1}) > 0


def mean_of_what_is_here(inputs: LossInputs) -> tuple[jax.Array, dict[str, jax.Array]]:
    """A loss with every fault: a mean over this micro-batch, over padding too, weighted by the place of a row."""
    weights = 1 + jnp.arange(len(inputs.logprobs))[:, None] / len(inputs.logprobs)
    loss = -jnp.mean(weights * inputs.advantages * inputs.logprobs)
    return loss, {}


def test_a_loss_that_takes_means_over_parts_padding_and_places_is_refuted():
    subject = subject_of({"loss": mean_of_what_is_here})
    for check in UNCHANGED:
        refuted(check(subject), "a mean over part of a batch")


def test_with_one_device_there_is_nothing_to_compare():
    check = updates.devices_change_nothing(subject_of({"devices": 1}))
    assert check.verdict == "not applicable" and "one device" in check.sentence


def test_the_gradient_reaches_every_tensor_and_the_optimizer_steps_once(subject):
    check = updates.gradient_reaches_the_parameters(subject)
    assert (check.verdict, check.figures["without_gradient"]) == ("proved", [])
    assert updates.learning_rate_follows_the_updates(subject).verdict == "proved"


def test_a_loss_without_gradient_or_without_that_of_an_adapter_and_one_that_is_not_finite_are_refuted(subject):
    own = updates._outcome(subject)
    for changes, words in (
        ({"gradient": jax.tree.map(jnp.zeros_like, own.gradient)}, "the loss does not train them"),
        ({"gradient": {**own.gradient, "q.lora_a": jnp.zeros(3)}}, "such as q.lora_a"),
        ({"loss": float("nan")}, "every update is skipped"),
    ):
        other = replace(subject, found={("outcome", 1, 1): own._replace(**changes)})
        refuted(updates.gradient_reaches_the_parameters(other), words)


def test_better_completions_become_likelier_and_a_gradient_of_the_wrong_sign_is_refuted(subject):
    check = updates.better_completions_become_likelier(subject)
    assert check.verdict == "proved" and check.figures["cosine"] > 0.3
    own = updates._outcome(subject)
    wrong = own._replace(gradient={path: -x for path, x in own.gradient.items()})
    other = replace(subject, found={**subject.found, ("outcome", 1, 1): wrong})
    refuted(updates.better_completions_become_likelier(other), "the wrong sign")


def test_rewards_of_other_completions_are_refuted(subject):
    batch = subject.train_batch.batch
    mixed = replace(subject.train_batch, batch=batch._replace(advantages=batch.advantages[:, ::-1]))
    programs = {key: found for key, found in subject.found.items() if "outcome" not in key}
    other = replace(subject, found=programs)
    vars(other)["train_batch"] = mixed
    refuted(updates.better_completions_become_likelier(other), "rewards are those of other completions")


def test_one_step_of_the_optimizer_for_each_micro_batch_is_refuted(subject):
    own = updates._outcome(subject)
    other = replace(subject, found={("outcome", 1, 1): own, ("outcome", updates.PROMPTS, 1): own._replace(steps=4)})
    refuted(updates.learning_rate_follows_the_updates(other), "4 micro-batches are 4 steps")


def test_a_learning_rate_of_0_is_refuted_and_a_warm_up_without_end_a_warning(subject):
    for changes, verdict in (({"learning_rate": 0.0}, "refuted"), ({"warmup_steps": 4}, "warning")):
        experiment = override(subject.experiment, {f"optimizer.{name}": value for name, value in changes.items()})
        other = replace(subject, experiment=experiment)
        assert updates.learning_rate_follows_the_updates(other).verdict == verdict


# The sampler ----------------------------------------------------------------------------------------------------------


def test_the_sampler_reports_what_the_trainer_computes(subject):
    check = updates.sampler_and_trainer_agree(subject)
    assert check.verdict == "proved" and check.figures["value"] < 1e-4 and check.figures["tokens"] > 20
    check = updates.sampler_and_trainer_agree(subject_of({"method": "sft"}))
    assert check.verdict == "proved" and check.figures["tokens"] > 20


def test_truncated_sampling_is_a_warning(subject):
    other = replace(subject, experiment=override(subject.experiment, {"sampling.top_p": 0.9}))
    assert updates.sampler_and_trainer_agree(other).verdict == "warning"


class Misreporting:
    """A sampler whose log-probabilities are those of another temperature."""

    def __init__(self, actor: Actor) -> None:
        self.actor = actor

    def __getattr__(self, name: str) -> Any:
        return getattr(self.actor, name)

    def generate(self, *arguments: Any) -> Any:
        generation, state = self.actor.generate(*arguments)
        return generation._replace(logprobs=generation.logprobs / 2), state


@pytest.mark.parametrize("method", ["grpo", "sft"])
def test_a_sampler_that_reports_another_temperature_is_refuted(method, subject):
    programs = {key: found for key, found in subject.found.items() if key[0] == "program"}
    subject = replace(subject_of({"method": method}), found=programs if method == "grpo" else {})
    vars(subject)["moved_actor"] = Misreporting(subject.moved_actor)
    refuted(updates.sampler_and_trainer_agree(subject), "the two compute different policies")


# The export -----------------------------------------------------------------------------------------------------------

ADAPTERS = {"policy.lora": LoRAConfig(rank=2)}


@pytest.mark.parametrize("changes", [{}, ADAPTERS], ids=["all parameters", "adapters"])
def test_the_exported_policy_says_what_the_policy_says(changes):
    check = exported.exported_policy_is_the_policy(subject_of(changes))
    assert check.verdict == "proved" and check.figures["to_sampler"] < 1e-4
    effect = check.figures["effect_of_adapters"]
    assert effect is None if not changes else effect > 100 * check.figures["value"]


def without_adapters(policy: Policy, directory: Any) -> None:
    from grpo_jax.policy import export

    export(replace(policy, lora=None, params={k: x for k, x in policy.params.items() if "lora_" not in k}), directory)


def test_an_export_without_its_adapters_is_refuted(monkeypatch):
    monkeypatch.setattr(exported, "export", without_adapters)
    refuted(exported.exported_policy_is_the_policy(subject_of(ADAPTERS)), "another policy than what was trained")


def test_an_export_with_another_tokenizer_is_refuted(monkeypatch):
    other = load("scratch", scratch=replace(letters.config.policy.scratch, alphabet="dcba"))

    def exchanged(*arguments: Any, **options: Any) -> Policy:
        return replace(load(*arguments, **options), make_tokenizer=other.make_tokenizer)

    monkeypatch.setattr(exported, "load", exchanged)
    refuted(exported.exported_policy_is_the_policy(subject_of()), "the exported tokenizer")


def test_without_room_on_the_disk_nothing_is_exported(monkeypatch):
    monkeypatch.setattr(exported.shutil, "disk_usage", lambda place: type("Usage", (), {"free": 10}))
    assert exported.exported_policy_is_the_policy(subject_of()).verdict == "not applicable"


# Memory ---------------------------------------------------------------------------------------------------------------


def test_a_step_fits_into_memory_or_not(subject, monkeypatch):
    check = memory.memory_is_enough(subject)
    parameters = sum(x.size for x in subject.policy.params.values())
    needed = check.figures["needed"]
    assert check.verdict == "proved" and check.figures["optimizer"] > 2 * 4 * parameters
    assert needed > 5 * 4 * parameters * check.figures["devices"]
    monkeypatch.setattr(memory, "available_bytes", lambda: (needed - 1, "the machine"))
    refuted(memory.memory_is_enough(subject), "which is more than")
    monkeypatch.setattr(memory, "available_bytes", lambda: (needed + 1, "the machine"))
    assert memory.memory_is_enough(subject).verdict == "warning"
    monkeypatch.setattr(memory, "available_bytes", lambda: (None, ""))
    assert memory.memory_is_enough(subject).verdict == "not applicable"


def test_the_limit_of_a_container_counts(tmp_path, monkeypatch):
    machine, _ = memory.available_bytes()
    assert machine is not None and machine > 2**20
    limit = tmp_path / "memory.max"
    limit.write_text("1048576\n")
    (tmp_path / "unlimited").write_text("max\n")
    monkeypatch.setattr(memory, "_cgroup_files", lambda: [tmp_path / "unlimited", limit, tmp_path / "missing"])
    assert memory.available_bytes() == (2**20, "the container")


# All methods ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["ppo", "rft", "dpo", "sft", "reward_model"])
def test_every_method_can_be_examined(method):
    subject = subject_of({"method": method})
    assert updates.order_changes_nothing(subject).verdict == "proved"
    assert updates.gradient_reaches_the_parameters(subject).verdict == "proved"


def test_an_experiment_in_which_all_is_well_has_no_refutation(subject):
    certificate = examine(subject)
    assert [check for check in certificate.checks if check.verdict == "refuted"] == []
    found = {check.name: check.verdict for check in certificate.checks}
    assert found["the number of devices changes nothing"] == "proved"
    assert [name for name, verdict in found.items() if verdict == "not applicable"] == ["the chat template round-trips"]
