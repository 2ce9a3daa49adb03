"""The command `grpo-jax`. JAX is imported inside the commands, so that help and mistakes in a config cost no time.

Exit status: 0 for success, 1 for a run that failed, 2 for a mistake in the usage or a config, 130 for Ctrl-C.
"""

import sys
from collections.abc import Sequence

import tyro

from grpo_jax.cli import common, lab, runs, which_method
from grpo_jax.cli.common import app
from grpo_jax.errors import exit_status

__all__ = ["common", "lab", "main", "runs", "which_method"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status; a `UserError` is one sentence on stderr, never a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal that lacks a character must not end a run
    options = {"prog": "grpo-jax", "description": "Fine-tune language models with GRPO in pure JAX."}
    return exit_status(lambda: app.cli(**options, args=arguments, config=(tyro.conf.FlagCreatePairsOff,)))
