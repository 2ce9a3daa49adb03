"""`grpo-jax table`: compares the arms of an ablation."""

import shlex
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from grpo_jax.cli.common import AblationFile, Flag, OptionalBudget, OptionalFloat, OptionalPath
from grpo_jax.experiment import load_ablation


def table(
    ablation: AblationFile,
    /,
    *,
    directory: Annotated[OptionalPath, arg(name="dir")] = None,
    budget: OptionalBudget = None,
    layout: Annotated[Literal["md", "csv", "latex"], arg(name="format")] = "md",
    margin: OptionalFloat = None,
    allow_mixed: Flag = False,
) -> None:
    """Compare the arms of an ablation, seed by seed, from the runs that `grpo-jax sweep` made.

    Args:
        directory: Where the runs' directories are. Default: runs/ABLATION.
        budget: The --budget of the sweep, if it had one.
        layout: Markdown, comma-separated values, or LaTeX for the package booktabs.
        margin: The largest difference that counts as none; arms that are shown to be within it are called the same.
        allow_mixed: Compare runs even if their commits or their held-out data differ.
    """
    from grpo_jax.statistics import tables

    planned = load_ablation(ablation, budget)
    directory = directory or Path("runs") / ablation.stem
    command = ["grpo-jax", "sweep", str(ablation), "--dir", str(directory), *(["--budget", budget] if budget else [])]
    found = tables.collect(planned, directory, command=shlex.join(command), allow_mixed=allow_mixed, margin=margin)
    print(tables.render(found, layout), end="")
