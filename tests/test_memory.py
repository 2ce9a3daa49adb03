"""The arithmetic of a run's memory, what is free, and the sentences about a run that does not fit."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import letters
import pytest

from grpo_jax import memory, sharding
from grpo_jax.errors import RunError, UserError, exit_status
from grpo_jax.experiment import LoRAConfig, ScratchConfig, override
from grpo_jax.memory import Plan, Term, free_memory, needs, out_of_memory_explained, require_memory, terms
from grpo_jax.policy import load
from grpo_jax.policy.config import from_scratch
from grpo_jax.runs.checkpoints import kept_steps
from grpo_jax.runs.record import read_run
from grpo_jax.training import Trainer, train

GIB = 2**30


def plan(num_devices: int = 1, prompt_length: int = 3, samples: bool = True, **changes: Any) -> Plan:
    config = override(letters.config, {name.replace("__", "."): value for name, value in changes.items()})
    return Plan(config, from_scratch(config.policy.scratch), num_devices, prompt_length, samples)


def found(*arguments: Any, **changes: Any) -> dict[str, Term]:
    return {term.what: term for term in terms(plan(*arguments, **changes))}


NUM_PARAMS = sum(x.size for x in load("scratch", scratch=letters.config.policy.scratch).params.values())


def test_the_certain_terms_worked_by_hand() -> None:
    of = found(loss__beta=0.1)
    assert of["weights and optimizer"].certain == 12 * NUM_PARAMS  # weights, and Adam's two moments
    assert of["gradients"].certain == of["the reference policy"].certain == 4 * NUM_PARAMS
    # 1 layer, 2 heads of 8, keys and values in float32, for 2 of 3 tokens (the last is not read again), of 16 rows; an
    # evaluation has 4 prompts, and 2 rows of each.
    assert of["keys and values"].certain == 16 * 2 * (1 * 2 * 2 * 8 * 4)
    assert of["completions"].certain == (16 + 4 * 2) * memory.COMPLETION
    assert found()["the reference policy"].certain == 0


def test_adapters_and_devices_and_pieces_make_a_run_smaller() -> None:
    adapters = found(policy__lora=LoRAConfig(rank=2), policy__dtype="bfloat16")
    lora = load("scratch", lora=LoRAConfig(rank=2), scratch=letters.config.policy.scratch).params
    trained = sum(x.size for path, x in lora.items() if ".lora_" in path)
    assert adapters["weights and optimizer"].certain == 12 * trained + 2 * NUM_PARAMS
    one, four = found(), found(4)
    assert four["keys and values"].certain == one["keys and values"].certain / 4
    for changes in ({"gradient_accumulation_steps": 4}, {"num_minibatches": 4}):
        assert found(**changes)["activations"].likely < one["activations"].likely / 2
    deep = {"policy__scratch": ScratchConfig("abcd", hidden_size=16, num_layers=9, num_heads=2)}
    assert found(**deep, gradient_checkpointing=True)["activations"].likely < found(**deep)["activations"].likely / 3


def test_nothing_is_certain_of_what_another_generator_or_an_offline_method_samples() -> None:
    assert found(samples=False)["keys and values"].certain == 0
    many = {"group_size": 1000, "evaluation__num_samples": 1}
    assert found(method="sft", **many)["keys and values"].certain < found(**many)["keys and values"].certain / 10


def with_free(monkeypatch: pytest.MonkeyPatch, machine: float | None, device: float | None = None) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda: machine)
    monkeypatch.setattr(sharding, "free_memory", lambda count: device)


def test_devices_of_a_cpu_share_its_memory_and_those_of_an_accelerator_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    with_free(monkeypatch, 10.0)
    [one], [four] = needs(plan()), needs(plan(4))
    policy = 16 * NUM_PARAMS
    assert one.total("certain") > policy and four.total("certain") == pytest.approx(one.total("certain") + 3 * policy)
    with_free(monkeypatch, 10.0, 20.0)
    on_device, on_host = needs(plan(4))
    assert (on_device.free, on_host.free) == (20.0, 10.0)
    assert on_device.total("certain") == policy and on_host.largest("certain").what == "completions"


def test_what_samples_and_what_trains_is_not_held_at_once() -> None:
    parts = [Term("a", 1, 1, "always", ""), Term("s", 5, 5, "sampling", ""), Term("t", 3, 4, "training", "")]
    assert memory.Need(parts, None).total("certain") == 6 and memory.Need(parts, None).largest("likely").what == "s"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"group_size": 10**9}, "most of it for completions, and 8.0 GiB are free: lower prompts_per_step or group_si"),
        ({"prompts_per_step": 10**9}, "lower prompts_per_step or group_size"),
        ({"evaluation.num_samples": 10**9}, "lower evaluation.num_samples"),
        (
            {"group_size": 10**5, "sampling.max_tokens": 2000},
            "for keys and values.*lower prompts_per_step, group_size or sampling.max_tokens",
        ),
        (
            {"policy.scratch.hidden_size": 16384, "policy.scratch.num_layers": 3},
            r"for weights and optimizer.*: lower policy.scratch.hidden_size or num_layers \(or train adapters alone",
        ),
        ({"policy.scratch.num_layers": 10**6}, "for weights and optimizer"),
    ],
)
def test_a_run_that_cannot_fit_is_refused_before_it_starts(
    changes: dict[str, Any], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_free(monkeypatch, 8.0 * GIB)
    with pytest.raises(UserError, match=f"^this run needs at least .* GiB of memory, .*{says}"):
        train(override(letters.config, changes), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_run_that_may_not_fit_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    tight = plan(group_size=64, sampling__max_tokens=500)
    with_free(monkeypatch, None)
    [need] = needs(tight)
    assert need.total("certain") < need.total("likely") / 2 and require_memory(tight) == []
    with_free(monkeypatch, need.total("likely"))
    [warning] = require_memory(tight)
    assert "this run may need" in warning and "most of it for activations" in warning
    assert warning.endswith("raise gradient_accumulation_steps or set gradient_checkpointing")
    with_free(monkeypatch, 2 * need.total("likely"))
    assert require_memory(tight) == []


def test_what_is_free_is_what_the_machine_and_its_cgroups_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def group(folder: str, limit: str, usage: int, cached: int) -> None:
        path = tmp_path / "sys/fs/cgroup" / folder
        path.mkdir(parents=True, exist_ok=True)
        (path / "memory.max").write_text(limit)
        (path / "memory.current").write_text(str(usage))
        (path / "memory.stat").write_text(f"anon 5\nfile {cached}\n")

    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/job/step\n")
    (tmp_path / "proc/meminfo").write_text("MemTotal: 99 kB\nMemAvailable: 40 kB\nSwapFree: 2 kB\n")
    monkeypatch.setattr(memory, "Path", lambda path: tmp_path / path.lstrip("/"))
    assert free_memory() == 42 * 1024
    group("job/step", "max\n", 7, 0)
    assert free_memory() == 42 * 1024
    group("job", "9000", 5000, 1000)
    assert free_memory() == 5000
    (tmp_path / "proc/meminfo").unlink()
    assert free_memory() is None


def test_this_machine_has_some_memory() -> None:
    assert free_memory() is None or 0 < free_memory() < 2**60  # type: ignore[operator]
    assert sharding.free_memory(1) is None or sharding.free_memory(1) > 0  # type: ignore[operator]


def too_large() -> None:
    jnp.zeros(2**50, jnp.int8).block_until_ready()


def test_memory_that_runs_out_is_one_sentence_and_the_checkpoints_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Trainer.step
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", lambda trainer, number: too_large() if number == 2 else step(trainer, number))
        with pytest.raises(
            RunError, match=r"^the run is out of memory \(RESOURCE_EXHAUSTED.*\): .* Its checkpoints are"
        ):
            train(letters.config, tmp_path / "run", quiet=True)
    info = read_run(tmp_path / "run")
    assert info["status"] == "failed" and "the run is out of memory" in info["error"]
    assert kept_steps(tmp_path / "run" / "checkpoints") == [2]
    train(letters.config, tmp_path / "run", quiet=True, resume=True)
    assert read_run(tmp_path / "run")["status"] == "finished"


def test_the_sentence_names_the_settings_of_the_largest_term_and_other_errors_stay_as_they_are() -> None:
    with pytest.raises(RunError, match="gradient_checkpointing"), out_of_memory_explained() as plans:
        plans.append(plan(group_size=64, sampling__max_tokens=500))
        raise MemoryError
    with pytest.raises(RunError, match="choose a smaller policy"), out_of_memory_explained():
        raise MemoryError
    with pytest.raises(ZeroDivisionError), out_of_memory_explained():
        raise ZeroDivisionError


def test_a_command_that_is_out_of_memory_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(too_large) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: out of memory: RESOURCE_EXHAUSTED") and said.count("\n") == 1
    with pytest.raises(jax.errors.JaxRuntimeError):
        exit_status(lambda: (_ for _ in ()).throw(jax.errors.JaxRuntimeError("INTERNAL: another error")))


def test_many_rounds_of_dynamic_sampling_are_refused_and_what_they_may_sample_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=r"must be between 0 \(off\) and 1000"):
        override(letters.config, {"dynamic_sampling_rounds": 10**6})
    train(override(letters.config, {"dynamic_sampling_rounds": 1000, "steps": 1}), tmp_path / "run")
    assert "(up to 16,016 completions with dynamic sampling)" in " ".join(capsys.readouterr().out.split())
