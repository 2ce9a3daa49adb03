"""`grpo-jax sweep`: makes all runs of an ablation."""

import os
import shlex
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from grpo_jax.cli import common
from grpo_jax.cli.common import AblationFile, Assignments, Flag, OptionalBudget, OptionalPath, Trackers
from grpo_jax.errors import UserError
from grpo_jax.experiment import load_ablation
from grpo_jax.text import on_line


def sweep(
    ablation: AblationFile,
    /,
    *,
    assignments: Assignments = (),
    jobs: int = 1,
    directory: Annotated[OptionalPath, arg(name="dir")] = None,
    budget: OptionalBudget = None,
    vectorize: Flag = False,
    track: Trackers = (),
) -> None:
    """Run every arm of an ablation at every seed. The same command again continues what is not finished.

    Args:
        jobs: How many runs at the same time, each in its own process.
        directory: Where the runs' directories go. Default: runs/ABLATION.
        budget: Give all arms equal steps or equal sampled tokens, instead of what the file says.
        vectorize: Train all seeds of an arm in one compiled program (policies from scratch, rewards with a JAX form).
        track: Log every run to Trackio or to Weights & Biases too.
    """
    overrides = common.join(assignments)
    planned = load_ablation(ablation, budget, overrides)
    if track and vectorize:
        raise UserError("--track logs runs that have a process of their own: leave out --vectorize.")
    common.prepare_jax(computes=False)
    from grpo_jax import sweep

    if common.callbacks(track):  # so that a package that is missing is found here
        os.environ[sweep.TRACK] = " ".join(track)

    directory = directory or Path("runs") / ablation.stem
    sweep.sweep(ablation, planned, directory, jobs=jobs, vectorize=vectorize, overrides=overrides)
    compare = [common.command(), "table", str(ablation), "--dir", str(directory)]
    compare += ["--budget", budget] if budget else []
    compare += ["--set", *overrides] if overrides else []
    print(on_line(f"compare the arms  {shlex.join(compare)}"))
