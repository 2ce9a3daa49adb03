"""A run's policy: the one that it starts from, and the one at a checkpoint, by default its newest."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from grpo_jax.algorithms.forward import HEAD, new_head
from grpo_jax.errors import UserError
from grpo_jax.experiment import Experiment, PolicyConfig, SamplingConfig, read_config, read_run
from grpo_jax.experiment.configs import HUB_NAME
from grpo_jax.experiment.recorded import config_from
from grpo_jax.experiment.records import needed
from grpo_jax.policy import Policy, fresh_adapters, load, merge, perturb
from grpo_jax.policy.lora import split
from grpo_jax.policy.transformer import Params
from grpo_jax.rollout import model_of
from grpo_jax.runs import checkpoints
from grpo_jax.update import State

OPTIONAL_LEAVES = ("tokens_sampled", "skipped_in_a_row")  # not in the checkpoints of earlier versions


def restore_policy(run_dir: str | Path, step: int | None = None) -> Policy:
    """The policy at a checkpoint of a run, by default its newest.

    None of the user's code is needed for it, and none is run.
    Raises `UserError` if the directory holds no run, or if the run has no such checkpoint.
    """
    return restore_with_head(run_dir, step)[0]


def restore_with_head(run_dir: str | Path, step: int | None = None) -> tuple[Policy, Params]:
    """The same, and the parameters of the head that PPO or a reward model trained on the policy (or none)."""
    run_dir = Path(run_dir)
    read_run(run_dir)  # it says so if this is no run
    directory = run_dir / "checkpoints"
    step = _kept_step(run_dir, step)
    config, seed = _policy_of(run_dir)
    policy = _load(config, seed)
    trainable, frozen = split(policy.params, policy.lora)
    saved = checkpoints.saved_leaves(directory, step)
    if any(f"trainable/{name}" in saved for name in HEAD):
        trainable |= new_head(policy.config.hidden_size)
    _, state = checkpoints.restore(directory, {"trainable": trainable}, step=step, partial=True)
    trained = jax.tree.map(jnp.asarray, state["trainable"])
    head = {name: trained.pop(name) for name in HEAD if name in trained}
    return replace(policy, params=model_of(policy).params(trained, frozen)), head


def _kept_step(run_dir: Path, step: int | None) -> int:
    """The step of the checkpoint that is wanted, by default the newest; `UserError` if the run does not keep it."""
    kept = checkpoints.kept_steps(run_dir / "checkpoints")
    if not kept:
        raise UserError(f"the run {str(run_dir)!r} has no checkpoint yet, so there is no tuned policy in it.")
    if step is not None and step not in kept:
        raise UserError(
            f"the run {str(run_dir)!r} keeps no checkpoint of step {step}: it keeps those of step "
            f"{' and '.join(map(str, kept))}."
        )
    return kept[-1] if step is None else step


def sampling_of(run_dir: str | Path) -> SamplingConfig:
    """How a run sampled completions when it began; run.json has what has changed since."""
    return config_from(SamplingConfig, _recorded(run_dir, "sampling"))


def method_of_run(run_dir: str | Path) -> str:
    """The name of the method that a run was trained with."""
    method = _recorded(run_dir, "method")
    return method if isinstance(method, str) else method["name"]


def source_policy(experiment: Experiment, commit: str | None = None) -> Policy:
    """The policy that `experiment.policy` names: that of another run, or what `grpo_jax.policy.load` knows.

    Of a model on the hub, `commit` is the one that the run has begun with, if it has begun.
    """
    return _load(_at_commit(experiment.policy, commit), experiment.seed)


def _load(config: PolicyConfig, seed: int) -> Policy:
    if (Path(config.source) / "run.json").is_file():
        other, _ = restore_with_head(config.source)
        params = {path: x.astype(config.dtype) for path, x in merge(other.params, other.lora).items()}
        if config.lora is not None:
            params |= fresh_adapters(other.config, config.lora, seed)
        policy = replace(other, params=params, lora=config.lora)
    else:
        revision = config.revision
        policy = load(
            config.source, dtype=config.dtype, seed=seed, lora=config.lora, scratch=config.scratch, revision=revision
        )
    return perturb(policy, config.perturbation, seed) if config.perturbation else policy


def _policy_of(run_dir: Path) -> tuple[PolicyConfig, int]:
    """Where a run's policy came from, and its seed, from config.json: the experiment's file is not needed for that."""
    config = config_from(PolicyConfig, _recorded(run_dir, "policy"))
    return _at_commit(config, read_run(run_dir).get("policy_commit")), _recorded(run_dir, "seed")


def _at_commit(config: PolicyConfig, commit: str | None) -> PolicyConfig:
    """The same policy of the hub at a commit, whatever its branch is now."""
    on_hub = HUB_NAME.fullmatch(config.source) and not (Path(config.source) / "run.json").is_file()
    return replace(config, revision=commit) if commit is not None and on_hub else config


def _recorded(run_dir: str | Path, name: str) -> Any:
    """A field of a run's config, as its config.json has it."""
    run_dir = Path(run_dir)
    return needed(read_config(run_dir), name, run_dir / "config.json")


def checkpoint(state: State, reference: Any | None, **counts: int) -> dict[str, Any]:
    """Everything that a step depends on, as the pytree that is saved and restored.

    Args:
      counts: `tokens_seen`, `tokens_sampled` and `skipped_in_a_row`.
    """
    return {**state._asdict(), "reference": reference, **counts}
