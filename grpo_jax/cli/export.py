"""`grpo-jax export`: writes a run's policy as a Hugging Face checkpoint."""

from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from grpo_jax.cli import common
from grpo_jax.errors import UserError


def export(
    run: Annotated[Positional[Path], arg(metavar="RUN", help="The directory of a run.")],
    directory: Annotated[Positional[Path], arg(metavar="DIR", help="A new directory.")],
    /,
) -> None:
    """Write a run's tuned policy, adapters merged, as a Hugging Face checkpoint directory."""
    if not (run / "run.json").is_file():
        raise UserError(f"{str(run)!r} is not the directory of a run: there is no run.json in it.")
    common.prepare_jax()
    from grpo_jax import policy
    from grpo_jax.runs.restore import restore_policy

    tuned = restore_policy(run)
    policy.export(tuned, directory)
    print(directory)
