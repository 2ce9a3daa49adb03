"""The list of all commands, and `main`, which runs one and returns the exit status.

JAX is imported inside the commands, so that `--help` and mistakes in a config take no time.
"""

import sys
from collections.abc import Sequence

import tyro

from grpo_jax.cli.evaluate import evaluate
from grpo_jax.cli.export import export
from grpo_jax.cli.report import report
from grpo_jax.cli.rewards import rewards
from grpo_jax.cli.sample import sample
from grpo_jax.cli.sweep import sweep
from grpo_jax.cli.table import table
from grpo_jax.cli.train import train
from grpo_jax.cli.which_method import advise
from grpo_jax.errors import exit_status

COMMANDS = (train, evaluate, sample, export, rewards, sweep, table, report, advise)
"""In the order in which `--help` lists them. The name of a function is the name of the command."""

app = tyro.extras.SubcommandApp()
for command in COMMANDS:
    app.command(command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line (default: that of this process) and returns its exit status.

    0 for success, 1 for a run that failed, 2 for a mistake in the usage or a config, 130 for Ctrl-C. A `UserError` is
    printed as one sentence on stderr, without a traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal without some character must not end a run
    return exit_status(
        lambda: app.cli(
            prog="grpo-jax",
            description="Fine-tune language models with GRPO in pure JAX.",
            args=arguments,
            config=(tyro.conf.FlagCreatePairsOff,),
        )
    )
