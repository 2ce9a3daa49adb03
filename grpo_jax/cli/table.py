"""`grpo-jax table`: compares the arms of an ablation."""

import dataclasses
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from grpo_jax.cli import common
from grpo_jax.cli.common import (
    AblationFile,
    Assignments,
    Flag,
    Inline,
    OptionalBudget,
    OptionalFloat,
    OptionalPath,
    OptionalText,
)
from grpo_jax.experiment import load_ablation


@dataclass(frozen=True)
class Options:
    """The options of the command.

    Attributes:
        directory: Where the runs' directories are. Default: runs/ABLATION.
        assignments: The --set of the sweep, if it had one.
        budget: The --budget of the sweep, if it had one.
        metric: Which metric of metrics.jsonl. Default: the ablation's.
        layout: Markdown, comma-separated values, or LaTeX for the package booktabs.
        columns: Which of arm, seeds, mean, iqm, difference, better, p, tokens, verdict. Default: all, as CSV has.
        percent: Show shares, such as success, as percent, and their differences as points.
        margin: The largest difference that counts as none; arms that are shown to be within it are called the same.
        allow_mixed: Compare runs even if their code or their held-out data differ.
    """

    directory: Annotated[OptionalPath, arg(name="dir")] = None
    assignments: Assignments = ()
    budget: OptionalBudget = None
    metric: OptionalText = None
    layout: Annotated[Literal["md", "csv", "latex"], arg(name="format")] = "md"
    columns: tuple[str, ...] = ()
    percent: Flag = False
    margin: OptionalFloat = None
    allow_mixed: Flag = False


def table(ablation: AblationFile, /, *, options: Annotated[Options, Inline]) -> None:
    """Compare the arms of an ablation, seed by seed, from the runs that `grpo-jax sweep` made."""
    from grpo_jax.statistics import layouts, tables

    overrides = common.join(options.assignments)
    planned = load_ablation(ablation, options.budget, overrides)
    if options.metric is not None:
        planned = dataclasses.replace(planned, metric=options.metric)
    directory = options.directory or Path("runs") / ablation.stem
    command = ["grpo-jax", "sweep", str(ablation), "--dir", str(directory)]
    command += ["--budget", options.budget] if options.budget else []
    command += ["--set", *overrides] if overrides else []
    found = tables.collect(
        planned, directory, command=shlex.join(command), allow_mixed=options.allow_mixed, margin=options.margin
    )
    style = layouts.Style(options.columns or layouts.COLUMNS, options.percent)
    print(layouts.render(found, options.layout, style), end="")
