"""`grpo-jax init`: writes a starter experiment."""

import importlib.resources
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from grpo_jax.cli import common
from grpo_jax.errors import UserError
from grpo_jax.runs.files import write_text

FILES = ("rewards.py", "experiment.py", "ablation.py")


def init(
    directory: Annotated[Positional[Path], arg(metavar="DIR", help="Where the files go; made if it is not there.")],
    /,
) -> None:
    """Write a starter: a reward function, an experiment and an ablation to change into your own."""
    for name in FILES:
        if (directory / name).exists():
            raise UserError(
                f"{str(directory / name)!r} is there already, and is not overwritten: name another directory."
            )
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the directory {str(directory)!r}: {error.strerror}.") from error
    starter = importlib.resources.files("grpo_jax") / "data" / "starter"
    for name in FILES:
        write_text(directory / name, (starter / f"{name}.txt").read_text("utf-8"))
        print(directory / name)
    command = common.command()
    print(
        f"train it          {command} train {directory / 'experiment.py'}\n"
        f"compare rewards   {command} sweep {directory / 'ablation.py'} --jobs 2\n"
        f"then              {command} table {directory / 'ablation.py'} --format latex"
    )
