"""The process of one run of a sweep: `python -m grpo_jax.sweep.worker ORDER`, with an order as `sweep` writes it."""

import fcntl
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from grpo_jax.errors import exit_status
from grpo_jax.experiment import Budget, load_ablation
from grpo_jax.runs.signals import terminable


def run(
    source: Path,
    arm: str,
    seeds: Sequence[int],
    directory: Path,
    *,
    budget: Budget,
    vectorize: bool = False,
    overrides: Sequence[str] = (),
) -> None:
    """Makes the runs of an arm at some seeds, or continues them; what is finished is left as it is.

    Waits while another process makes the same run, such as one that a killed sweep has left behind.
    """
    from grpo_jax import training
    from grpo_jax.runs.log import RunLog, display_of
    from grpo_jax.runs.trackers import trackers
    from grpo_jax.sweep.processes import TRACK, is_finished, name_events, write_plan
    from grpo_jax.sweep.warm_starts import adopt_warm_start

    ablation = load_ablation(source, budget, overrides)
    if not (directory / "sweep.json").is_file():  # an array job has no sweep that wrote it
        write_plan(directory, ablation)
    planned = [run for run in ablation.runs() if arm in run.arms and run.seed in seeds]
    with ExitStack() as locks:
        for one in planned:
            locks.enter_context(_lock(directory / f".{one.key}.lock"))
        planned = [one for one in planned if not is_finished(directory / one.key)]
        given = {one.key: [f"arm={arm}", f"budget={budget}", f"seed={one.seed}", *overrides] for one in planned}
        for one in planned:
            name_events(directory, one)
        if vectorize:
            from grpo_jax.sweep.vectorized import train_seeds

            train_seeds({directory / one.key: (one.config, given[one.key]) for one in planned}, source=source)
            return
        for one in planned:
            others = [(directory / run.key, run.config) for run in ablation.runs() if run.seed == one.seed]
            adopt_warm_start(directory / one.key, one.config, others)
            log = RunLog(
                directory / one.key,
                one.config,
                source=source,
                overrides=given[one.key],
                resume=(directory / one.key).is_dir(),
                display=display_of(one.config, quiet=True),
                callbacks=trackers(os.environ.get(TRACK, "").split()),
            )
            training.run(one.config, log)


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Holds an advisory lock, which the system lets go of however this process ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _stop_with_the_sweep() -> None:
    """Stops this run after its step, its state saved, once the sweep has closed the pipe to it or is no more."""

    def watch() -> None:
        os.read(sys.stdin.fileno(), 1)  # not sys.stdin.read, whose lock a thread must not hold when Python ends
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=watch, daemon=True).start()


def main(order: str) -> int:
    """Carries out an order and returns the exit status; the last line that it prints says what went wrong."""
    asked = json.loads(order)
    if asked["cores"] is not None:
        os.sched_setaffinity(0, asked["cores"])  # before JAX counts them to size its thread pools
    _stop_with_the_sweep()
    options = {name: asked[name] for name in ("budget", "vectorize", "overrides")}
    source, directory = Path(asked["source"]), Path(asked["directory"])
    with terminable():
        return exit_status(lambda: run(source, asked["arm"], asked["seeds"], directory, **options))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
