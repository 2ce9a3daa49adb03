"""What the commands have in common: the app, the types of their options, and what they say to the terminal."""

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional, UseAppendAction, arg

from grpo_jax.errors import UserError

Assignments = Annotated[
    UseAppendAction[tuple[tuple[str, ...], ...]],
    arg(
        name="set",
        metavar="FIELD=VALUE …",
        help="Overrides of the experiment's fields, e.g. loss.beta=0.04.",
        help_behavior_hint="",
    ),
]
Run = Annotated[Positional[Path], arg(metavar="RUN", help="The directory of a run.")]
OptionalPath = Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="")]
OptionalInt = Annotated[int | None, arg(metavar="N", help_behavior_hint="")]
OptionalFloat = Annotated[float | None, arg(metavar="T", help_behavior_hint="")]
OptionalText = Annotated[str | None, arg(metavar="TEXT", help_behavior_hint="")]
Flag = Annotated[bool, arg(help_behavior_hint="")]

app = tyro.extras.SubcommandApp()


def command() -> str:
    """How to call this command again: in an environment that is not activated, by its path."""
    return "grpo-jax" if shutil.which("grpo-jax") else os.path.relpath(sys.argv[0])


def join(assignments: Sequence[Sequence[str]]) -> list[str]:
    """The assignments of every `--set`, in their order."""
    return [assignment for group in assignments for assignment in group]


def prepare_jax() -> None:
    """Sets what JAX and transformers read when they are imported; what the user has set stays.

    JAX's persistent compilation cache is on, so that a second run starts in seconds.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(cache, "grpo_jax", "xla"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # that there is no PyTorch is as it should be
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # it would warn at every process that a reward starts


def require_run(directory: Path) -> None:
    """Raises `UserError` for a directory that is not that of a run."""
    if not (directory / "run.json").is_file():
        raise UserError(f"{str(directory)!r} is not the directory of a run: there is no run.json in it.")


def read_line() -> str:
    """A line from the terminal; nothing at its end."""
    try:
        return input("> ").strip()
    except EOFError:
        return ""
