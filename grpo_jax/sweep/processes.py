"""Runs an ablation: every arm at every seed, each in a process of its own, and again only what is not finished.

A run's directory is named by the hash of its resolved config, so nothing runs twice, and the same command continues a
sweep that was stopped, killed or partly failed. Each run resumes from its own checkpoint.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from grpo_jax.errors import RunError, UserError
from grpo_jax.experiment import Ablation, Budget, PlannedRun
from grpo_jax.runs.display import visible
from grpo_jax.runs.files import jsonable, read_json, write_json
from grpo_jax.sweep.progress import SweepProgress, name_of
from grpo_jax.text import on_line

WORKER = (sys.executable, "-m", "grpo_jax.sweep.worker")
TRACK = "GRPO_JAX_TRACK"  # the environment variable that names the trackers of every run of a sweep
POLL = 0.2  # s between two looks at the processes


@dataclass
class _Job:
    """One process and the runs that it makes: one, or with `vectorize` all seeds of an arm."""

    runs: list[PlannedRun]
    cores: list[int] | None
    process: subprocess.Popen


@dataclass(frozen=True)
class _Launch:
    """What all processes of a sweep have in common."""

    source: Path
    budget: Budget
    overrides: Sequence[str]
    directory: Path
    jobs: int
    vectorize: bool


def sweep(
    source: Path,
    ablation: Ablation,
    directory: Path,
    *,
    jobs: int = 1,
    vectorize: bool = False,
    overrides: Sequence[str] = (),
    console: Console | None = None,
) -> None:
    """Makes every run of an ablation that is not finished yet, `jobs` at a time.

    Args:
      source: the ablation's file; each process loads it again.
      directory: where the runs' directories are; `KEY.log` beside each holds what its process printed.
      vectorize: train all seeds of an arm in one compiled program (see `grpo_jax.sweep.vectorized`).
      overrides: the assignments with which `ablation` was loaded from the file.

    Raises:
      UserError: for what cannot be vectorised, before anything runs.
      RunError: at the end, if runs have failed, with what each of them said.
      KeyboardInterrupt: on Ctrl-C, after the runs in flight have saved what they learned.
    """
    if jobs < 1:
        raise UserError(f"--jobs {jobs} is out of range: it must be positive.")
    runs = ablation.runs()
    if vectorize:
        from grpo_jax.sweep.vectorized import require_vectorizable

        for run in runs:
            require_vectorizable(run.config)
    console = console or Console(highlight=False)
    write_plan(directory, ablation)
    waiting = _batches([run for run in runs if not is_finished(directory / run.key)], vectorize)
    if not waiting:
        console.print(f"all {len(runs)} runs are finished: there is nothing to do", markup=False)
        return
    # Each process has cores of its own, since each would otherwise start as many threads as there are cores.
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    free = [None if cores is None else cores[i::jobs] or cores for i in range(jobs)]
    under_way: list[_Job] = []
    failed: dict[str, str] = {}  # a run's key -> why
    launch = _Launch(source, ablation.budget, overrides, directory, jobs, vectorize)
    with ExitStack() as stack:
        progress = stack.enter_context(
            SweepProgress(
                runs, directory, ablation.metric, console, jobs=jobs, together=_batches(list(runs), vectorize)
            )
        )
        stack.callback(_stop, under_way)  # before the progress closes, so that it shows how they ended
        while waiting or under_way:
            while waiting and len(under_way) < jobs:
                under_way.append(_start(launch, waiting.pop(0), free.pop(0)))
            for job in [job for job in under_way if job.process.poll() is not None]:
                _stop([job])
                under_way.remove(job)
                free.append(job.cores)
                failed |= {run.key: _reason(job, directory) for run in job.runs if not is_finished(directory / run.key)}
            progress.show({run.key for job in under_way for run in job.runs}, set(failed))
            if waiting or under_way:
                time.sleep(POLL)
    if failed:
        which = ", ".join(on_line(f"{name_of(run)} seed {run.seed}") for run in runs if run.key in failed)
        for key, reason in failed.items():
            console.print(visible(f"{key} failed: {reason}"), soft_wrap=True)
        raise RunError(
            f"{len(failed)} of {len(runs)} runs failed ({which}) and the others are finished: the same command tries "
            "the failed ones again."
        )


def plan_of(ablation: Ablation) -> dict[str, Any]:
    """What a report needs to know of an ablation, as JSON: its arms, baseline, metric and runs."""
    runs = [{"arms": run.arms, "seed": run.seed, "key": run.key} for run in ablation.runs()]
    return {"arms": list(ablation.arms), "baseline": ablation.baseline_arm, "metric": ablation.metric, "runs": runs}


def write_plan(directory: Path, ablation: Ablation) -> None:
    """Writes sweep.json to a sweep's directory, so that a report on it needs none of the user's files.

    The runs of an earlier plan stay in the directory, though another code or config has another plan.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if read_json(directory / "sweep.json") != (plan := jsonable(plan_of(ablation))):
        write_json(directory / "sweep.json", plan)


def name_events(directory: Path, run: PlannedRun) -> None:
    """Gives a run's directory a name, by which TensorBoard shows its events: `tensorboard/ARM seed SEED`, a link.

    Where links cannot be made there is none, and TensorBoard shows the run by its directory.
    """
    name = on_line(f"{name_of(run)} seed {run.seed}").replace("/", "∕")  # a division sign, since a name has no slash
    link = directory / "tensorboard" / name
    with suppress(OSError):
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(Path("..") / run.key, target_is_directory=True)


def is_finished(run_dir: Path) -> bool:
    """Whether the directory holds a run that came to its end."""
    return read_json(run_dir / "run.json").get("status") == "finished"


def _batches(runs: Sequence[PlannedRun], vectorize: bool) -> list[list[PlannedRun]]:
    if not vectorize:
        return [[run] for run in runs]
    arms: dict[tuple[str, ...], list[PlannedRun]] = {}
    for run in runs:
        arms.setdefault(run.arms, []).append(run)
    return list(arms.values())


def _start(launch: _Launch, runs: list[PlannedRun], cores: list[int] | None) -> _Job:
    """Starts the process of some runs on some cores."""
    directory, jobs, vectorize = launch.directory, launch.jobs, launch.vectorize
    order = {
        "source": str(launch.source),
        "arm": runs[0].arms[0],
        "seeds": [run.seed for run in runs],
        "budget": launch.budget,
        "overrides": list(launch.overrides),
        "directory": str(directory),
        "cores": cores,
        "vectorize": vectorize,
    }
    environment = dict(os.environ)
    if jobs > 1:  # processes that share an accelerator must not each claim nearly all of its memory
        environment.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", f"{0.9 / jobs:.3f}")
    if vectorize:  # on a CPU, each core takes its share of the seeds
        num = min(len(runs), len(cores or ()) or os.cpu_count() or 1)
        flags = environment.get("XLA_FLAGS", "")
        environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={num} {flags}".strip()
    with (directory / f"{runs[0].key}.log").open("wb") as log:
        process = subprocess.Popen(
            [*WORKER, json.dumps(order)],
            stdin=subprocess.PIPE,  # never written to: its end tells the worker that this process is gone
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # so that Ctrl-C reaches it once, through the pipe
        )
    return _Job(runs, cores, process)


def _stop(jobs: Sequence[_Job]) -> None:
    """Asks the runs in flight to stop after their step, and waits until they have."""
    for job in jobs:
        assert job.process.stdin is not None
        job.process.stdin.close()
    for job in jobs:
        job.process.wait()


def _reason(job: _Job, directory: Path) -> str:
    """Why a process ended before its runs were finished: the signal that killed it, or the last line of its log."""
    log = directory / f"{job.runs[0].key}.log"
    if job.process.returncode < 0:
        return f"killed by {signal.Signals(-job.process.returncode).name}, see {log}"
    if job.process.returncode == 0:
        return "its process made a run of another name: was a file that the ablation uses edited meanwhile?"
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1].removeprefix("error: ") if lines else f"it ended with status {job.process.returncode}"
