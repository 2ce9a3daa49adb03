"""`grpo-jax doctor`: what an experiment relies on, proved or refuted before it is trained."""

from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from grpo_jax.cli import common
from grpo_jax.cli.common import Assignments, OptionalPath
from grpo_jax.errors import RunError
from grpo_jax.experiment import load


def doctor(
    experiment: Annotated[Positional[Path], arg(metavar="EXPERIMENT.py", help="A file that defines `config`.")],
    /,
    *,
    assignments: Assignments = (),
    run_dir: OptionalPath = None,
    warm_start: OptionalPath = None,
) -> None:
    """Prove or refute what an experiment relies on, on its own task, policy and hardware, before it is trained.

    Nothing is trained. The exit status is 1 if a check is refuted.

    Args:
        run_dir: Where certificate.json goes: the directory of the run to come, or of one that is there.
        warm_start: A run or a sweep that has finished the experiment's warm start. Without it the policy before its
            warm start is examined.
    """
    overrides = common.join(assignments)
    config = load(experiment, overrides)

    common.prepare_jax()
    from rich.console import Console

    from grpo_jax import api
    from grpo_jax.doctor import Subject, examine, save, sentences, table
    from grpo_jax.runs import record
    from grpo_jax.runs.restore import source_policy

    if run_dir is not None:
        record.require_place(run_dir, resume=True)
    untrained = config.warm_start is not None and warm_start is None
    if untrained:
        policy, start = source_policy(config), "the policy before its warm start"
    else:
        policy, start = api.start_of(config, warm_start=warm_start)
    console = Console(highlight=False)
    with console.status("") as status:
        certificate = examine(Subject(config, policy, untrained), tell=status.update)
    console.print(table(certificate.checks))
    for sentence in sentences(certificate.checks):
        console.print(sentence, soft_wrap=True)
    if run_dir is not None:
        run_dir.mkdir(parents=True, exist_ok=True)
        print(save(certificate, run_dir, {"experiment": experiment.resolve(), "overrides": overrides, "policy": start}))
    total, refuted = len(certificate.checks), len(certificate.refuted)
    if refuted:
        raise RunError(f"{refuted} of {total} checks are refuted ({certificate.seconds:.0f} s, {start}).")
    print(f"{certificate.verdict}: none of {total} checks is refuted ({certificate.seconds:.0f} s, {start})")
