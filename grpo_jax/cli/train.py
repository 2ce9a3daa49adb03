"""`grpo-jax train`: trains a policy as an experiment says."""

import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from grpo_jax.cli import common
from grpo_jax.cli.common import Assignments, Flag, OptionalPath, Trackers
from grpo_jax.errors import UserError
from grpo_jax.experiment import Experiment, all_overrides, code_of, load, load_by_config, read_run, sources
from grpo_jax.runs.run import Run


def train(
    experiment: Annotated[Positional[Path], arg(metavar="EXPERIMENT.py", help="A file that defines `config`.")],
    /,
    *,
    assignments: Assignments = (),
    run_dir: OptionalPath = None,
    resume: Flag = False,
    accept_changes: Flag = False,
    quiet: Flag = False,
    track: Trackers = (),
) -> None:
    """Train a policy as an experiment says, and show the result.

    Args:
        run_dir: Where the run's files go. Default: runs/EXPERIMENT-DATE-TIME.
        resume: Continue the run in --run-dir from its last checkpoint, with the config that it has; --set changes it
            from there on, and the run records that. Begin the run if there is none; do nothing if it is finished.
        accept_changes: With --resume, use the experiment's files as they are now, though they have changed since.
        quiet: Show no progress and no tables, only the run directory.
        track: Log the run to Trackio or to Weights & Biases too.
    """
    overrides = common.join(assignments)
    if resume and run_dir is None:
        raise UserError("--resume needs the directory of the run to go on with, or to begin: --run-dir DIR.")
    if accept_changes and not resume:
        raise UserError("--accept-changes is for --resume.")
    if resume and run_dir is not None and common.is_run(run_dir):
        config = _resumed(experiment, run_dir, overrides, accept_changes=accept_changes)
        if Run(run_dir).is_done(config):
            print(f"{run_dir} is finished: there is nothing to do. See it with: {common.command()} report {run_dir}")
            return
    else:
        config = load(experiment, overrides)
    run_dir = run_dir or Path("runs") / f"{experiment.stem}-{datetime.now():%Y%m%d-%H%M%S}"

    common.prepare_jax()
    from grpo_jax import training
    from grpo_jax.report.plots import learning_curve
    from grpo_jax.runs.log import RunLog, display_of

    log = RunLog(
        run_dir,
        config,
        source=experiment,
        overrides=overrides,
        resume=resume,
        display=display_of(config, quiet=quiet),
        callbacks=common.callbacks(track),
    )
    try:
        result = training.run(config, log)
    except KeyboardInterrupt:
        if (run_dir / "run.json").is_file():
            again = shlex.join([common.command(), "train", str(experiment), "--run-dir", str(run_dir), "--resume"])
            saved = "The policy is" if (run_dir / "checkpoints").is_dir() else "What has begun is"
            print(f"{saved} saved in {run_dir}; go on with: {again}", file=sys.stderr)
        raise
    picture = learning_curve(run_dir)
    if quiet:
        print(run_dir)
    else:
        _show_result(config, result, picture)


def _resumed(experiment: Path, run_dir: Path, overrides: Sequence[str], *, accept_changes: bool) -> Experiment:
    """The experiment that a run goes on with: its file, the assignments that the run has had, and then new ones.

    Raises:
      UserError: if the file, or a file that it uses, is not what the run was made with, unless that is accepted.
    """
    info = read_run(run_dir)
    if info.get("by_program"):
        config = load_by_config(experiment, run_dir, overrides)
    else:
        config = load(experiment, [*all_overrides(info), *overrides])
    kept = code_of(info)
    if kept is None:  # a run of the first versions has a copy of the experiment's file alone
        copy = run_dir / "experiment.py"
        changed = [] if not copy.exists() or copy.read_bytes() == experiment.read_bytes() else [experiment.name]
    else:
        changed = sources.changed(kept, sources.describe(experiment))
    if changed and not accept_changes:
        own = run_dir / (kept["directory"] if kept else "") / (kept["entry"] if kept else "experiment.py")
        raise UserError(
            f"{', '.join(changed)} changed since {str(run_dir)!r} was made. To go on with the run's own copy, name it: "
            f"train {shlex.quote(str(own))} …; to go on with the files as they are now, add --accept-changes."
        )
    return config


def _show_result(config: Experiment, result: Any, picture: Path) -> None:
    """Prints the results of a training run, and the commands to continue with."""
    from rich.console import Console

    from grpo_jax.report.diagnosis import diagnose
    from grpo_jax.runs.display import group_table, summary_table

    console = Console(highlight=False)
    console.print()
    if result.group_after:
        console.print(group_table({"before": result.group_before, "after": result.group_after}))
    control = f"control ({(config.control or {}).get('method', 'variant')})"
    for split, after in result.after.items():
        console.print(
            summary_table({"before": result.before[split], "after": after, control: result.control.get(split)})
        )
    run = shlex.quote(str(result.run_dir))
    tokenizer = result.policy.tokenizer
    for sign in diagnose(result.run_dir, has_chat_template=tokenizer is not None and tokenizer.has_chat_template):
        console.print(f"! {sign}", style="yellow", markup=False)
    print(f"trained in      {result.seconds:.0f} s")
    print(f"run directory   {run}")
    print(f"learning curve  {shlex.quote(str(picture))}")
    print(f"evaluate it     {common.command()} evaluate {run}")
    print(f"talk to it      {common.command()} sample {run} --prompt {_example_prompt(config.task.train[0]['prompt'])}")


def _example_prompt(prompt: str | Sequence[Mapping[str, str]]) -> str:
    """A prompt of the task, quoted for a shell; an ellipsis where it is long or has control characters."""
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    return shlex.quote(text) if len(text) < 60 and text.isprintable() else '"…"'
