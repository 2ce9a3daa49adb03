"""What several commands share: the types of their options, reading an experiment, and the environment of JAX."""

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, UseAppendAction, arg

from grpo_jax.errors import UserError
from grpo_jax.experiment import Budget, Experiment, load, load_run
from grpo_jax.runs.difference import Absent, Pair

Assignments = Annotated[
    UseAppendAction[tuple[tuple[str, ...], ...]],
    arg(
        name="set",
        metavar="FIELD=VALUE …",
        help="Overrides of the experiment's fields, e.g. loss.beta=0.04.",
        help_behavior_hint="",
    ),
]
AblationFile = Annotated[Positional[Path], arg(metavar="ABLATION.py", help="A file that defines `ablation`.")]
OptionalBudget = Annotated[Budget | None, arg(help_behavior_hint="")]
OptionalPath = Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="")]
OptionalFile = Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")]
OptionalInt = Annotated[int | None, arg(metavar="N", help_behavior_hint="")]
OptionalFloat = Annotated[float | None, arg(metavar="T", help_behavior_hint="")]
OptionalText = Annotated[str | None, arg(metavar="TEXT", help_behavior_hint="")]
OptionalStep = Annotated[
    int | None,
    arg(
        name="step",
        metavar="N",
        help="The run's checkpoint of this step. Default: the newest. A run keeps its newest two, or those that the "
        "experiment's fields `checkpoints` ask for.",
        help_behavior_hint="",
    ),
]
Trackers = Annotated[
    UseAppendAction[tuple[Literal["trackio", "wandb"], ...]], arg(metavar="trackio|wandb", help_behavior_hint="")
]
Flag = Annotated[bool, arg(help_behavior_hint="")]
LONGEST_CELL = 80  # characters of a value in a table of differences
Inline = arg(name="")  # the fields of a dataclass become options of the command itself


def command() -> str:
    """How the user can call this command again: by its path in an environment that is not activated."""
    return "grpo-jax" if shutil.which("grpo-jax") else os.path.relpath(sys.argv[0])


def join(assignments: Sequence[Sequence[str]]) -> list[str]:
    """The assignments of every `--set`, in their order."""
    return [assignment for group in assignments for assignment in group]


def load_source(source: Path, overrides: Sequence[str] = ()) -> Experiment:
    """The experiment of a run's directory or of an experiment file."""
    return load_run(source, overrides) if source.is_dir() else load(source, overrides)


def tuned_policy(run_dir: Path, step: int | None) -> Any:
    """The policy at a checkpoint of a run. Call `prepare_jax` before."""
    from grpo_jax.runs.restore import restore_policy

    return restore_policy(run_dir, step)


def is_run(source: str | Path) -> bool:
    """Whether a source is the directory of a run."""
    return (Path(source) / "run.json").is_file()


def require_run_for_step(source: str | Path, step: int | None) -> None:
    """Raises `UserError` if a step is asked for, and the source has no checkpoints."""
    if step is not None and not is_run(source):
        raise UserError(f"--step {step} is for a run, and {str(source)!r} is not the directory of one.")


def callbacks(track: Sequence[Literal["trackio", "wandb"]]) -> list[Any]:
    """The trackers that --track names."""
    if not track:
        return []
    from grpo_jax.runs.trackers import trackers

    return list(trackers(track))


def pair_table(
    title: str, pairs: Sequence[Pair], columns: tuple[str, str], *, relative: bool = False, most: int | None = None
) -> Any:
    """A table of values that differ; of many, the first `most`.

    Args:
      columns: what the two values are of.
      relative: whether to show the relative differences of numbers.
    """
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, header_style="dim", min_width=len(title))
    table.add_column("", no_wrap=True)
    for column in (*columns, *["relative"] * relative):
        table.add_column(column, overflow="fold", justify="right" if column == "relative" else "left")
    for pair in pairs[:most]:
        table.add_row(*pair_cells(pair)[: 3 + relative])
    if most is not None and len(pairs) > most:
        table.add_row(f"and {len(pairs) - most} more")
    return table


def pair_cells(pair: Pair) -> tuple[Any, Any, Any, str]:
    """The cells of a pair: its name, its values, and their relative difference; numbers with the digits that differ."""
    values: tuple[Any, Any] = pair.one, pair.other
    if pair.relative is not None:
        texts = (tuple(f"{value:.{digits}g}" for value in values) for digits in (6, 9))
        values = next(((one, other) for one, other in texts if one != other), (repr(pair.one), repr(pair.other)))
    size = "" if pair.relative is None else f"{pair.relative:.2g}"
    return value_text(pair.name), value_text(values[0]), value_text(values[1]), size


def value_text(value: Any) -> Any:
    """A value for a cell of a table, on one line and cut: a text as it is, anything else as JSON; what is not, as –."""
    from rich.text import Text

    from grpo_jax.runs.display import column_texts, visible

    if isinstance(value, Absent):
        return Text("–", style="dim")
    shown = visible(column_texts({"": value})[""])
    shown.truncate(LONGEST_CELL, overflow="ellipsis")
    return shown


def prepare_jax(*, computes: bool = True) -> None:
    """Sets the environment variables that JAX and transformers read when they are imported.

    Variables that the user has set are not changed. JAX's persistent compilation cache is on, so that a second run
    starts in seconds.

    Args:
      computes: whether this process itself does; one that only starts others leaves every device to them.

    Raises `UserError` if it computes, and JAX_PLATFORMS names what this machine does not have.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(cache, "grpo_jax", "xla"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
    os.environ.setdefault(
        "TRANSFORMERS_VERBOSITY", "error"
    )  # transformers warns that PyTorch is missing: it is not used
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # or it warns at every process that a reward starts
    if computes and os.environ.get("JAX_PLATFORMS"):
        from grpo_jax.sharding import require_devices

        require_devices()
