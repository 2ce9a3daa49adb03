"""Going back to a checkpoint after a spike (`GuardConfig.on_spike = "rollback"`).

The run goes back to the policy of its last *regular* checkpoint, one of those every `checkpoint_every` steps, and goes
on with the next step. So the prompts since that checkpoint are left out, and no step is made twice. A run that is
interrupted also saves other steps. It must not go back to these, or it would differ from the uninterrupted run.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from grpo_jax.experiment import Experiment
from grpo_jax.runs import checkpoints
from grpo_jax.runs.restore import OPTIONAL_LEAVES


def rolls_back(experiment: Experiment) -> bool:
    """Whether a spike takes the run back to a checkpoint."""
    return experiment.guards.spike_factor is not None and experiment.guards.on_spike == "rollback"


def needed(experiment: Experiment, step: int) -> set[int]:
    """The checkpoints that must remain when step `step` is saved, so that the run can go back: the last regular one."""
    return {_regular(experiment, step)} if rolls_back(experiment) else set()


def restore(
    directory: Path, like: Any, experiment: Experiment, step: int, place: Callable[[np.ndarray], Any]
) -> tuple[int, dict[str, Any]]:
    """The step of the last regular checkpoint before step `step` was made, and what it holds.

    Where it was removed by hand, this is the newest checkpoint. `like` and `place` are those of `checkpoints.restore`.
    """
    regular = _regular(experiment, step)
    chosen = regular if regular in checkpoints.kept_steps(directory) else None
    return checkpoints.restore(directory, like, step=chosen, optional_leaves=OPTIONAL_LEAVES, place=place)


def is_regular(experiment: Experiment, step: int) -> bool:
    """Whether the checkpoint of a step is one of those every `checkpoint_every` steps."""
    return _regular(experiment, step) == step


def _regular(experiment: Experiment, step: int) -> int:
    return step // experiment.checkpoint_every * experiment.checkpoint_every
