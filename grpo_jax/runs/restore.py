"""A run's policy: the one that it starts from, and the one at its newest checkpoint."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from grpo_jax.algorithms import algorithm_of
from grpo_jax.algorithms.forward import HEAD, new_head
from grpo_jax.errors import UserError
from grpo_jax.experiment import Experiment, load_run
from grpo_jax.policy import Policy, fresh_adapters, load, merge
from grpo_jax.policy.lora import split
from grpo_jax.policy.transformer import Params
from grpo_jax.rollout import model_of
from grpo_jax.runs import checkpoints
from grpo_jax.update import State, make_optimizer

OPTIONAL_LEAVES = ("tokens_sampled",)  # not in the checkpoints of the first versions


def restore(run_dir: str | Path) -> tuple[Experiment, Policy]:
    """The experiment of a run, a warm start or a control, and the policy at its newest checkpoint.

    Raises:
      UserError: if the directory holds no run, or a run without a checkpoint.
    """
    experiment, policy, _ = restore_with_head(run_dir)
    return experiment, policy


def restore_with_head(run_dir: str | Path) -> tuple[Experiment, Policy, Params]:
    """The same, and the parameters of the head that PPO or a reward model trained on the policy (or none)."""
    run_dir, experiment = Path(run_dir), load_run(run_dir)
    if checkpoints.latest_step(run_dir / "checkpoints") is None:
        raise UserError(f"the run {str(run_dir)!r} has no checkpoint yet, so there is no tuned policy in it.")
    policy = source_policy(experiment)
    trainable, frozen = split(policy.params, policy.lora)
    if algorithm_of(experiment).has_head:
        trainable |= new_head(policy.config.hidden_size)
    optimizer, _ = make_optimizer(experiment.optimizer, experiment.steps * experiment.num_iterations)
    reference = trainable if experiment.loss_config.sync_ref_model else None
    like = checkpoint(State(trainable, jax.eval_shape(optimizer.init, trainable), jnp.int32(0)), reference)
    _, state = checkpoints.restore(run_dir / "checkpoints", like, optional_leaves=OPTIONAL_LEAVES)
    trained = jax.tree.map(jnp.asarray, state["trainable"])
    head = {name: trained.pop(name) for name in HEAD if name in trained}
    return experiment, replace(policy, params=model_of(policy).params(trained, frozen)), head


def source_policy(experiment: Experiment) -> Policy:
    """The policy that `experiment.policy` names: that of another run, or what `grpo_jax.policy.load` knows."""
    config = experiment.policy
    if not (Path(config.source) / "run.json").is_file():
        return load(config.source, dtype=config.dtype, seed=experiment.seed, lora=config.lora, scratch=config.scratch)
    _, other = restore(config.source)
    params = {path: x.astype(config.dtype) for path, x in merge(other.params, other.lora).items()}
    if config.lora is not None:
        params |= fresh_adapters(other.config, config.lora, experiment.seed)
    return replace(other, params=params, lora=config.lora)


def checkpoint(state: State, reference: Any | None, tokens_seen: int = 0, tokens_sampled: int = 0) -> dict[str, Any]:
    """Everything that a step depends on, as the pytree that is saved and restored."""
    tokens = {"tokens_seen": tokens_seen, "tokens_sampled": tokens_sampled}
    return {**state._asdict(), "reference": reference, **tokens}
