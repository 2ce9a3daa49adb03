"""Going back to a checkpoint after a spike (`GuardConfig.on_spike = "rollback"`).

The run goes back to the policy of its last *regular* checkpoint, one of those every `checkpoint_every` steps, and goes
on with the next step. So the prompts since that checkpoint are left out, and no step is made twice. A run that is
interrupted also saves other steps. It must not go back to these, or it would differ from the uninterrupted run.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from grpo_jax.experiment import Experiment
from grpo_jax.runs import checkpoints
from grpo_jax.runs.restore import OPTIONAL_LEAVES


def rolls_back(experiment: Experiment) -> bool:
    """Whether a spike takes the run back to a checkpoint."""
    return experiment.guards.spike_factor is not None and experiment.guards.on_spike == "rollback"


def num_kept(directory: Path, experiment: Experiment, step: int) -> int:
    """How many checkpoints to keep when step `step` is saved: two, and with rollbacks the last regular one."""
    if not rolls_back(experiment):
        return 2
    return 2 + sum(kept > _regular(experiment, step) for kept in checkpoints.kept_steps(directory))


def restore(directory: Path, like: Any, experiment: Experiment, step: int) -> tuple[int, dict[str, Any]]:
    """The step of the last regular checkpoint before step `step` was made, and what it holds besides counts.

    Where it was removed by hand, this is the newest checkpoint.
    """
    regular = _regular(experiment, step)
    place = regular if regular in checkpoints.kept_steps(directory) else None
    done, saved = checkpoints.restore(directory, like, step=place, optional_leaves=OPTIONAL_LEAVES)
    return done, jax.tree.map(jnp.asarray, {name: saved[name] for name in ("trainable", "optimizer", "reference")})


def _regular(experiment: Experiment, step: int) -> int:
    return step // experiment.checkpoint_every * experiment.checkpoint_every
