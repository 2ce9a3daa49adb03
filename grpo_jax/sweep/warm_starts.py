"""One warm start for all runs that would make the same: it often takes longer than what an ablation varies."""

import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from grpo_jax.errors import UserError
from grpo_jax.experiment import (
    EvaluationConfig,
    Experiment,
    RewardConfig,
    SamplingConfig,
    load_run,
    method_of,
    read_run,
    variant_of,
)
from grpo_jax.experiment.fingerprint import fingerprint
from grpo_jax.experiment.sources import package_digest
from grpo_jax.sweep.processes import is_finished


def adopt_warm_start(run_dir: Path, config: Experiment, others: Iterable[tuple[Path, Experiment]]) -> None:
    """Gives a run that has not begun the warm start that another run has finished, where theirs are alike.

    Args:
      run_dir, config: the run; `training.train` then goes on with it, by `resume`.
      others: the directories and configs of runs that may have one. One that other code has made is left alone.
    """
    if config.warm_start is None or run_dir.exists():
        return
    wanted = warm_start_fingerprint(config)
    for other_dir, other in others:
        finished = other_dir / "warm_start"
        if is_finished(finished) and _is_of_this_code(finished) and warm_start_fingerprint(other) == wanted:
            beginning = run_dir.with_name(f".{run_dir.name}.warm_start")
            shutil.rmtree(beginning, ignore_errors=True)
            shutil.copytree(finished, beginning / "warm_start")
            beginning.rename(run_dir)  # so that a copy that is broken off is no run
            return


def find_warm_start(config: Experiment, directory: Path) -> Path:
    """The finished warm start that an experiment would make itself, in the directory of a run or of a sweep.

    How the experiment is evaluated does not matter.

    Raises:
      UserError: if there is none, or if other code has made it.
    """
    plain = EvaluationConfig()
    wanted = warm_start_fingerprint(replace(config, evaluation=plain))
    finished = [each for each in sorted(directory.glob("**/warm_start")) if is_finished(each)]
    for each in [directory, *finished] if directory.name == "warm_start" else finished:
        own = read_run(each.parent) if (each.parent / "run.json").is_file() else None
        if own is None or not _is_of_this_code(each):
            continue
        if warm_start_fingerprint(replace(load_run(each.parent), evaluation=plain)) == wanted:
            return each
    raise UserError(
        f"{str(directory)!r} holds no finished warm start that this experiment would make itself with this version of "
        f"grpo_jax: of {len(finished)} that it holds, each differs in its seed, its config or its code. Without "
        "--warm-start it is trained."
    )


def _is_of_this_code(run_dir: Path) -> bool:
    """Whether this version of the package made a run; the user's own code is part of the fingerprint."""
    return (read_run(run_dir).get("package") or {}).get("digest") == package_digest()


def warm_start_fingerprint(config: Experiment) -> str | None:
    """A name for what a run's warm start depends on; an offline method depends on neither rewards nor sampling."""
    if config.warm_start is None:
        return None
    variant = variant_of(config, config.warm_start)
    if method_of(variant.method).is_offline:
        sampling = SamplingConfig(max_tokens=variant.sampling.max_tokens)
        variant = replace(variant, rewards={}, reward=RewardConfig(), sampling=sampling, evaluation=EvaluationConfig())
    return fingerprint(variant)
