"""`grpo-jax table`: compares the arms of an ablation."""

import dataclasses
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from grpo_jax.cli import common
from grpo_jax.cli.common import (
    Assignments,
    Flag,
    Inline,
    OptionalBudget,
    OptionalFloat,
    OptionalPath,
    OptionalText,
)
from grpo_jax.errors import UserError
from grpo_jax.experiment import load_ablation


@dataclass(frozen=True)
class Options:
    """The options of the command.

    Attributes:
        directory: Of an ablation's file, where the runs' directories are. Default: runs/ABLATION.
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


def table(
    source: Annotated[
        Positional[Path], arg(metavar="ABLATION", help="A file that defines `ablation`, or the directory of a sweep.")
    ],
    /,
    *,
    options: Annotated[Options, Inline],
) -> None:
    """Compare the arms of an ablation, seed by seed, from the runs that `grpo-jax sweep` made.

    Of a sweep's directory, the arms and the runs are those that the sweep noted there, and no file is executed.
    """
    from grpo_jax.statistics import layouts, tables

    directory = source if source.is_dir() else options.directory or Path("runs") / source.stem
    plan = _stored(source, options) if source.is_dir() else _declared(source, directory, options)
    if options.metric is not None:
        plan = dataclasses.replace(plan, metric=options.metric)
    found = tables.collect(plan, directory, allow_mixed=options.allow_mixed, margin=options.margin)
    style = layouts.Style(options.columns or layouts.COLUMNS, options.percent)
    print(layouts.render(found, options.layout, style), end="")


def _stored(directory: Path, options: Options) -> Any:
    """The plan that a sweep noted in its directory."""
    from grpo_jax.statistics.plans import stored_plan

    if options.directory is not None or options.budget is not None or options.assignments:
        raise UserError(f"--dir, --budget and --set are for an ablation's file, and {str(directory)!r} is a directory.")
    return stored_plan(directory)


def _declared(ablation: Path, directory: Path, options: Options) -> Any:
    """The plan that an ablation's file declares."""
    from grpo_jax.statistics.plans import declared_plan

    overrides = common.join(options.assignments)
    command = ["grpo-jax", "sweep", str(ablation), "--dir", str(directory)]
    command += ["--budget", options.budget] if options.budget else []
    command += ["--set", *overrides] if overrides else []
    return declared_plan(load_ablation(ablation, options.budget, overrides), shlex.join(command))
