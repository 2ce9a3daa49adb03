"""`grpo-jax export`: writes a run's policy as a Hugging Face checkpoint."""

from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from grpo_jax.cli import common
from grpo_jax.cli.common import OptionalStep
from grpo_jax.errors import UserError
from grpo_jax.text import on_line


def export(
    run: Annotated[Positional[Path], arg(metavar="RUN", help="The directory of a run.")],
    directory: Annotated[Positional[Path], arg(metavar="DIR", help="A new directory.")],
    /,
    *,
    step: OptionalStep = None,
) -> None:
    """Write a run's tuned policy, adapters merged, as a Hugging Face checkpoint directory."""
    if not common.is_run(run):
        raise UserError(f"{str(run)!r} is not the directory of a run: there is no run.json in it.")
    common.prepare_jax()
    from grpo_jax import policy

    policy.export(common.tuned_policy(run, step), directory)
    print(on_line(str(directory)))
