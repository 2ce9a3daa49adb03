"""The list of all commands, and `main`, which runs one and returns the exit status.

JAX is imported inside the commands, so that `--help` and mistakes in a config take no time.
"""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from importlib.metadata import version

import tyro

from grpo_jax.cli.diff import diff
from grpo_jax.cli.doctor import doctor
from grpo_jax.cli.evaluate import evaluate
from grpo_jax.cli.export import export
from grpo_jax.cli.fields import fields
from grpo_jax.cli.init import init
from grpo_jax.cli.list_runs import list_runs
from grpo_jax.cli.replay import replay
from grpo_jax.cli.report import report
from grpo_jax.cli.rewards import rewards
from grpo_jax.cli.sample import Options as SampleOptions
from grpo_jax.cli.sample import sample
from grpo_jax.cli.sweep import sweep
from grpo_jax.cli.table import table
from grpo_jax.cli.train import train
from grpo_jax.cli.which_method import advise
from grpo_jax.errors import UserError, exit_status
from grpo_jax.experiment.files import without_code
from grpo_jax.experiment.overrides import nearest
from grpo_jax.runs.signals import terminable

COMMANDS: dict[str, Callable[..., None]] = {
    "init": init,
    "doctor": doctor,
    "train": train,
    "evaluate": evaluate,
    "sample": sample,
    "export": export,
    "rewards": rewards,
    "sweep": sweep,
    "table": table,
    "report": report,
    "list": list_runs,
    "diff": diff,
    "replay": replay,
    "fields": fields,
    "advise": advise,
}
"""In the order in which `--help` lists them."""

NO_CODE = "--no-code"
DESCRIPTION = (
    "Fine-tune language models with GRPO in pure JAX. --version says which version this is. With --no-code, no command "
    "executes a Python file, such as those that the run of somebody else holds."
)

app = tyro.extras.SubcommandApp()
for name, command in COMMANDS.items():
    app.command(name=name)(command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line (default: that of this process) and returns its exit status.

    0 for success, 1 for a run that failed, 2 for a mistake in the usage or a config, 130 for Ctrl-C, 143 for SIGTERM.
    A `UserError` is printed as one sentence on stderr, without a traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal without some character must not end a run
    with terminable():
        return exit_status(lambda: _run(sys.argv[1:] if arguments is None else list(arguments)))


def _joined_prompt(arguments: Sequence[str]) -> list[str]:
    """The arguments with `--prompt TEXT` as `--prompt=TEXT`, so that a prompt such as "-3 + 5?" is no option.

    What is an option of `sample` stays one: then the prompt is missing, and the usage error says so.
    """
    options = {"-h", "--help", *(f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(SampleOptions))}
    joined: list[str] = []
    for argument in arguments:
        if joined and joined[-1] == "--prompt" and argument.startswith("-") and argument not in options:
            joined[-1] = f"--prompt={argument}"
        else:
            joined.append(argument)
    return joined


def _run(arguments: list[str]) -> None:
    first = next((argument for argument in arguments if argument != NO_CODE), "")
    if first == "--version":
        print(f"grpo_jax {version('grpo_jax')}")
        return
    if first and not first.startswith("-") and first not in COMMANDS:
        raise UserError(f"grpo-jax has no command {first!r}{nearest(first, list(COMMANDS))}")
    if first == "sample":
        arguments = _joined_prompt(arguments)
    with without_code() if NO_CODE in arguments else nullcontext():
        app.cli(
            prog="grpo-jax",
            description=DESCRIPTION,
            args=[argument for argument in arguments if argument != NO_CODE],
            config=(tyro.conf.FlagCreatePairsOff,),
        )
