"""`grpo-jax table`: compares the arms of an ablation."""

import dataclasses
import shlex
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from grpo_jax.cli import common
from grpo_jax.cli.common import (
    AblationFile,
    Assignments,
    Flag,
    OptionalBudget,
    OptionalFloat,
    OptionalPath,
    OptionalText,
)
from grpo_jax.experiment import load_ablation


def table(
    ablation: AblationFile,
    /,
    *,
    directory: Annotated[OptionalPath, arg(name="dir")] = None,
    assignments: Assignments = (),
    budget: OptionalBudget = None,
    metric: OptionalText = None,
    layout: Annotated[Literal["md", "csv", "latex"], arg(name="format")] = "md",
    columns: tuple[str, ...] = (),
    percent: Flag = False,
    margin: OptionalFloat = None,
    allow_mixed: Flag = False,
) -> None:
    """Compare the arms of an ablation, seed by seed, from the runs that `grpo-jax sweep` made.

    Args:
        directory: Where the runs' directories are. Default: runs/ABLATION.
        budget: The --budget of the sweep, if it had one.
        metric: Which metric of metrics.jsonl. Default: the ablation's.
        layout: Markdown, comma-separated values, or LaTeX for the package booktabs.
        columns: Which columns, in this order: arm, seeds, mean, iqm, difference, better, p, tokens, verdict. CSV has all.
        percent: Show shares, such as success, as percent, and their differences as points.
        margin: The largest difference that counts as none; arms that are shown to be within it are called the same.
        allow_mixed: Compare runs even if their commits or their held-out data differ.
    """
    from grpo_jax.statistics import layouts, tables

    planned = load_ablation(ablation, budget, common.join(assignments))
    if metric is not None:
        planned = dataclasses.replace(planned, metric=metric)
    directory = directory or Path("runs") / ablation.stem
    command = ["grpo-jax", "sweep", str(ablation), "--dir", str(directory), *(["--budget", budget] if budget else [])]
    command += ["--set", *common.join(assignments)] if assignments else []
    found = tables.collect(planned, directory, command=shlex.join(command), allow_mixed=allow_mixed, margin=margin)
    style = layouts.Style(columns or layouts.COLUMNS, percent)
    print(layouts.render(found, layout, style), end="")
