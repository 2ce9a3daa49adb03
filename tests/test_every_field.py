"""Every field of an experiment has its effect on a run, and no other: an option that nothing reads fails here.

Each field is changed in a run of two steps, which is compared with the same run without the change. The table says for
each field which of these must differ (and all others must agree to the last digit):

    before    the evaluation before training     samples   the completions of step 0     rewards   their rewards
    advantages  their advantages                 gradient  step 0's loss and gradient norm
    after     the parameters after two steps     files     something else, which `check` looks at
"""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import letters
import numpy as np
import pytest

from grpo_jax.errors import RunError
from grpo_jax.experiment import (
    Experiment,
    LoRAConfig,
    RewardConfig,
    RFTConfig,
    ScratchConfig,
    SFTConfig,
    override,
)
from grpo_jax.runs.checkpoints import latest_step
from grpo_jax.tasks import Task
from grpo_jax.training import train


def share_of_a(*, completions: list[str], **columns: Any) -> list[float]:
    return [completion.count("a") / 3 for completion in completions]


def length(*, completions: list[str], **columns: Any) -> list[float]:
    return [float(len(completion)) for completion in completions]


def sometimes_nan(*, completions: list[str], **columns: Any) -> list[float]:
    return [float("nan") if "d" in completion else float("b" in completion) for completion in completions]


def slow(**arguments: Any) -> list[float]:
    import time

    time.sleep(0.2)
    return share_of_a(**arguments)


BASE = override(
    letters.config,
    {
        "steps": 2, "seed": 1, "optimizer.learning_rate": 3e-2, "checkpoint_every": 50,
        "evaluation.num_prompts": 3, "evaluation.batch_size": 64,
        "rewards": {"share_of_a": share_of_a, "length": length}, "reward.weights": {"length": 0.1},
    },
)  # fmt: skip

PARTS = ("before", "samples", "rewards", "advantages", "gradient", "after")
LATER = {"gradient", "after"}
SCORES = {"before", "rewards", "advantages", *LATER}  # what follows from other rewards
FROM_START = {"before", "samples", "rewards", "advantages", *LATER}  # what follows from another policy


@dataclass(frozen=True)
class Case:
    """A change of a field: its new value, and which parts of a run differ by it.

    Attributes:
      value: the new value.
      differs: the parts that must differ; all others must be equal.
      may: parts of which either is right: they follow from rounding, or from a policy of other random weights.
      given: overrides of both runs.
      also: overrides that can only be made together with this one.
      check: (run directory without the change, with it) -> whether something else differs as it should.
      fails: what the run with the change must end with.
    """

    value: Any
    differs: frozenset[str] = frozenset()
    may: frozenset[str] = frozenset()
    given: tuple[tuple[str, Any], ...] = ()
    also: tuple[tuple[str, Any], ...] = ()
    check: Callable[[Path, Path], bool] | None = None
    fails: str = ""


def case(
    value: Any, differs: Any = (), check: Any = None, *, may: Any = (), fails: str = "", also: Any = (), **given: Any
) -> Case:
    names = tuple((key.replace("__", "."), value) for key, value in given.items())
    return Case(value, frozenset(differs), frozenset(may), names, tuple(dict(also).items()), check, fails)


def rows(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def last(run_dir: Path, name: str) -> float:
    return [row[name] for row in rows(run_dir) if name in row][-1]


def metric(name: str) -> Callable[[Path, Path], bool]:
    """Whether a metric's last value differs."""
    return lambda one, other: last(one, name) != last(other, name)


def has_metric(name: str) -> Callable[[Path, Path], bool]:
    return lambda one, other: any(name in row for row in rows(other)) and not any(name in row for row in rows(one))


def same_up_to_rounding(one: Path, other: Path) -> bool:
    losses = ([row["loss"] for row in rows(run_dir) if "loss" in row] for run_dir in (one, other))
    return bool(np.allclose(*losses, rtol=1e-4, atol=1e-6))


def num_steps(one: Path, other: Path) -> bool:
    return latest_step(one / "checkpoints") != latest_step(other / "checkpoints")


def num_rows(one: Path, other: Path) -> bool:
    return len(rows(one)) != len(rows(other))


def has(name: str) -> Callable[[Path, Path], bool]:
    return lambda one, other: not (one / name).exists() and (other / name).exists()


def lacks(name: str) -> Callable[[Path, Path], bool]:
    return lambda one, other: (one / name).exists() and not (other / name).exists()


def warnings(run_dir: Path) -> list[str]:
    return [each["message"] for each in json.loads((run_dir / "run.json").read_text()).get("warnings", [])]


def warns(text: str) -> Callable[[Path, Path], bool]:
    """Whether the run with the change warns of something, and the one without it does not."""
    return lambda one, other: (
        any(text in said for said in warnings(other)) and not any(text in said for said in warnings(one))
    )


class Flaky:
    """A reward that fails the first time that it is called, and again every third time."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, **arguments: Any) -> list[float]:
        self.calls += 1
        if self.calls % 3 == 0:
            raise ValueError(f"the {self.calls}rd call")
        return share_of_a(**arguments)


DROPS = RewardConfig(on_failure="drop", max_failure_rate=1.0)
RETRIES = RewardConfig(on_failure="retry", retries=1)
PPO = dict(method="ppo", num_iterations=2)
DPO = dict(method="dpo")
PREFERENCES = dict(method="dpo", preferences__noise_level=0.2)
RM = dict(method="reward_model")
RFT = dict(method="rft")
SFT = dict(method="sft")
REFERENCE = dict(loss__beta=0.5, num_iterations=2)
OFF_POLICY = dict(num_iterations=2, optimizer__learning_rate=0.1)  # so that ratios leave 1 in the second update
CORRECTED = dict(loss__importance_sampling_mode="token_truncate")
ADAPTED = dict(policy__lora=LoRAConfig(rank=2, alpha=4.0))
SAME = dict(
    rewards={"same": lambda *, completions, **columns: [1.0 for _ in completions]},
    reward=RewardConfig(),
    guards__patience=1,
)
TWO_REWARDS = dict(advantages__scale="none")

CASES = {
    "task": case(dataclasses.replace(letters.task, train=letters.task.held_out), FROM_START - {"before"}),
    "rewards": case({"share_of_a": share_of_a, "length": share_of_a}, SCORES),
    "policy.dtype": case("bfloat16", LATER, may=FROM_START),
    "policy.perturbation": case(1e-2, LATER, may=FROM_START),
    "policy.lora": case(LoRAConfig(rank=2), LATER, may=FROM_START),
    "policy.lora.rank": case(3, LATER, **ADAPTED, may=FROM_START),
    "policy.lora.alpha": case(8.0, LATER, **ADAPTED, may=FROM_START),
    "policy.lora.targets": case(("q",), LATER, **ADAPTED, may=FROM_START),
    "policy.scratch": case(ScratchConfig("abcd", hidden_size=16, num_layers=2, num_heads=2), LATER, may=FROM_START),
    "policy.scratch.alphabet": case("abcde", LATER, may=FROM_START),
    "policy.scratch.hidden_size": case(24, LATER, may=FROM_START),
    "policy.scratch.num_layers": case(2, LATER, may=FROM_START),
    "policy.scratch.num_heads": case(4, LATER, may=FROM_START),
    "method": case("rft", {*LATER, "advantages"}),
    "steps": case(3, {"after"}, num_steps),
    "token_budget": case(20, {"after"}, num_steps),
    "prompts_per_step": case(2, FROM_START - {"before"}),
    "group_size": case(6, FROM_START - {"before"}),
    "num_iterations": case(2, LATER),
    "num_minibatches": case(2, LATER),
    "epochs": case(0.5, {"after"}, num_steps, also={"steps": None}),
    "dynamic_sampling_rounds": case(2, check=has_metric("dynamic_sampling/rounds"), may=LATER | {"samples", "rewards"}),
    "gradient_accumulation_steps": case(2, check=same_up_to_rounding, may=LATER),
    "gradient_checkpointing": case(True, check=same_up_to_rounding, may=LATER),
    "seed": case(2, FROM_START),
    "devices": case(2, check=same_up_to_rounding, may=LATER),
    "checkpoint_every": case(1, check=has("checkpoints/1")),
    "checkpoints.last": case(1, check=lacks("checkpoints/1"), checkpoint_every=1),
    "checkpoints.best": case(1, check=has("checkpoints/1"), evaluation__every=1),
    "checkpoints.every": case(1, check=has("checkpoints/1")),
    "sampling.temperature": case(0.5, FROM_START - {"before"}),
    "sampling.top_k": case(2, FROM_START),
    "sampling.top_p": case(0.4, FROM_START),
    "sampling.max_tokens": case(2, FROM_START),
    "sampling.max_logprob_difference": case(1e-12, fails="max_logprob_difference = 1e-12"),
    "reward.weights": case({"length": -1.0}, SCORES),
    "reward.combine": case("normalize_then_sum", {"advantages", *LATER}, **TWO_REWARDS),
    "reward.on_failure": case(
        RewardConfig().on_failure, rewards={"flaky": sometimes_nan}, reward=RewardConfig(on_failure="drop"),
        fails="returned nan",
    ),
    "reward.retries": case(0, rewards={"flaky": Flaky()}, reward=RETRIES, fails="the 3rd call"),
    "reward.max_failure_rate": case(
        0.0, rewards={"flaky": sometimes_nan}, reward=DROPS, fails="above reward.max_failure_rate = 0"
    ),
    "reward.time_limit": case(0.05, rewards={"slow": slow}, reward=RewardConfig(), fails="ran past its time limit"),
    "loss.beta": case(0.5, LATER, num_iterations=2),
    "loss.sync_ref_model": case(True, {"after"}, also={"loss.ref_model_sync_steps": 1}, **REFERENCE),
    "loss.ref_model_mixup_alpha": case(
        1.0, {"after"}, loss__sync_ref_model=True, loss__ref_model_sync_steps=1, **REFERENCE
    ),
    "loss.ref_model_sync_steps": case(1, {"after"}, loss__sync_ref_model=True, **REFERENCE),
    "loss.mask_truncated_completions": case(True, LATER),
    "loss.importance_sampling_mode": case(
        "token_truncate", check=has_metric("sampling/importance_sampling_ratio/mean"), may=LATER
    ),
    "sft.packing": case(True, check=has_metric("packing/efficiency"), may=LATER, also={"sft.max_length": 16}, **SFT),
    "sft.max_length": case(24, check=metric("packing/efficiency"), may=LATER, sft=SFTConfig(True, 16), **SFT),
    "sft.completion_only_loss": case(False, LATER, **SFT),
    "rft.select": case("threshold", LATER, also={"rft.threshold": 0.1}, **RFT),
    "rft.threshold": case(0.5, LATER, rft=RFTConfig("threshold", 0.1), **RFT),
    "rft.samples_from": case("start", {"after"}, steps=3, **RFT),
    "preferences.completions": case("demonstrations", {"samples", "rewards", *LATER}, **DPO),
    "preferences.label_noise": case("bradley_terry", {"samples", "rewards", *LATER}, **PREFERENCES),
    "preferences.noise_level": case(0.45, {"samples", "rewards", *LATER}, **DPO),
    "preferences.epoch_steps": case(1, {"after"}, **DPO),
    "optimizer.learning_rate": case(1e-3, {"after"}),
    "evaluation.splits": case(("train",), {"before"}),
    "evaluation.num_prompts": case(2, {"before"}),
    "evaluation.num_samples": case(3, {"before"}),
    "evaluation.temperature": case(0.0, {"before"}),
    "evaluation.every": case(1, check=num_rows),
    "evaluation.batch_size": case(2),
    "guards.min_entropy": case(9.0, check=warns("entropy was below"), also={"guards.patience": 1}),
    "guards.max_most_common_ratio": case(1e-6, check=warns("answers every prompt alike"), also={"guards.patience": 1}),
    "guards.watch_signal": case(
        False, check=lambda one, other: warns("no group")(other, one), guards__min_entropy=1e-9, **SAME
    ),
    "guards.patience": case(2, check=lambda one, other: warnings(one) != warnings(other), **SAME),
    "guards.on_collapse": case("stop", check=num_rows, **SAME),
    "warm_start": case({"method": "sft", "steps": 1}, FROM_START, check=has("warm_start/run.json")),
    "control": case({"method": "sft", "steps": 1}, check=has("control/run.json")),
}  # fmt: skip


def fields_of(config: Any, prefix: str = "") -> list[str]:
    """The dotted names of all fields, those of LoRA included, which is None by default."""
    names = []
    for f in dataclasses.fields(config):
        value = LoRAConfig() if f.name == "lora" else getattr(config, f.name)
        names.append(prefix + f.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, Task):
            names += fields_of(value, f"{prefix}{f.name}.")
    return names


ELSEWHERE = {
    "policy": ("algorithms/test_training_by_method.py and runs/test_hub.py", ["source", "revision"]),
    "loss": ("losses and test_update.py", [
        "loss_type", "epsilon", "epsilon_high", "delta", "importance_sampling_level", "kl_estimator",
        "use_bias_correction_kl", "entropy_coef", "top_entropy_quantile", "dr_grpo_length",
        "sapo_temperature_pos", "sapo_temperature_neg", "vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg",
        "vespo_lambda_neg", "importance_sampling_clip_max", "importance_sampling_clip_min"
    ]),
    "advantages": ("test_advantages.py, test_update.py and algorithms/test_minibatches.py", [
        "scale", "baseline", "ddof", "kl_coef", "kl_level",
    ]),
    "ppo": ("algorithms/test_objectives.py", [
        "gamma", "lam", "cliprange_value", "vf_coef", "kl_coef", "whiten_advantages",
    ]),
    "checkpoints": ("runs/test_retention.py", ["metric"]),
    "dpo": ("losses/test_preference.py and algorithms/test_objectives.py", ["beta", "loss_type", "label_smoothing"]),
    "reward_model": ("algorithms/test_objectives.py", ["center_rewards_coefficient"]),
    "guards": ("test_guards.py", ["spike_factor", "spike_metric", "spike_window", "on_spike"]),
    "optimizer": ("test_update.py", ["schedule", "warmup_steps", "weight_decay", "b1", "b2", "eps", "max_grad_norm",
        "max_skipped_updates",
    ]),
}  # fmt: skip
"""Fields whose effect other tests work out by hand, and where: a run for each would be compiled anew."""


def test_the_table_has_every_field():
    configs = {f.name for f in dataclasses.fields(Experiment) if dataclasses.is_dataclass(f.default)}
    elsewhere = {f"{config}.{name}" for config, (_, names) in ELSEWHERE.items() for name in names}
    assert set(CASES) == set(fields_of(BASE)) - configs - elsewhere


def completions(run_dir: Path) -> list[dict[str, Any]]:
    path = run_dir / "completions.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def parts_of(run_dir: Path, params: dict[str, Any]) -> dict[str, Any]:
    """What the parts of a run are compared by."""
    first = [row for row in completions(run_dir) if row["step"] == 0]
    steps = [row for row in rows(run_dir) if "grad_norm" in row]
    evaluations = [row for row in rows(run_dir) if row["step"] == 0 and "grad_norm" not in row]
    return {
        "before": evaluations,
        "samples": [row["completion"] for row in first],
        "rewards": [row["reward"] for row in first],
        "advantages": [row["advantage"] for row in first],
        "gradient": [(steps[0]["loss"], steps[0]["grad_norm"])],
        "after": {path: np.asarray(value).tobytes() for path, value in params.items()},
    }


RUNS: dict[str, tuple[Path, dict[str, Any]]] = {}


def run(overrides: tuple[tuple[str, Any], ...], directory: Path) -> tuple[Path, dict[str, Any]]:
    """The directory and the parts of a run, made once."""
    key = repr(overrides)
    if key not in RUNS:
        run_dir = directory / f"run-{len(list(directory.iterdir()))}"
        result = train(override(BASE, dict(overrides)), run_dir, quiet=True)
        RUNS[key] = run_dir, parts_of(run_dir, result.policy.params)
    return RUNS[key]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.mark.parametrize("field", CASES)
def test_a_field_has_its_effect_and_no_other(field: str, directory: Path) -> None:
    case = CASES[field]
    changed = (*case.given, (field, case.value), *case.also)
    if case.fails:
        with pytest.raises(RunError, match=case.fails):
            run(changed, directory)
        return
    (before, one), (after, other) = run(case.given, directory), run(changed, directory)
    found = {part for part in PARTS if one[part] != other[part]}
    assert case.differs <= found <= case.differs | case.may
    assert case.check is None or case.check(before, after)
    assert case.differs or case.check or field in NO_EFFECT


NO_EFFECT = ("gradient_accumulation_steps", "gradient_checkpointing", "devices", "evaluation.batch_size")
"""Fields that change how a run is computed, and its rounding, and nothing else."""
