#!/usr/bin/env python
"""Trains a tiny policy for 10,000 steps while its processes are broken from outside, and says what was lost.

    python scripts/soak.py [--steps 10000] [--faults 24] [--output FILE.md]

The experiment is `experiments/robustness/soak.py`, whose reward fails by itself now and then. At random steps a process
is killed, told to stop, left without room on the disk, stopped for a second, or given a rival on the same run.
Whatever ends it, the same command is given again, as a scheduler would.

At the end the run is compared with one that nobody disturbed: every row of metrics.jsonl without its times, every byte
of completions.jsonl, and every array of the last checkpoint. No process may be left. A line is fitted to the memory and
to the open files of the processes, over their steps. The exit status is 0 if nothing was lost.
"""

import argparse
import math
import os
import random
import resource
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count, cycle, islice
from pathlib import Path

import children
import numpy as np
from children import PATIENCE, Command
from rich.console import Console
from rich.progress import Progress
from scipy import stats

WARM_UP = 200  # steps of a process that the fit of its memory leaves out


@dataclass(frozen=True)
class Sample:
    """What a process needed at a step."""

    process: str
    step: int
    memory: float
    files: float


@dataclass(frozen=True)
class Fault:
    """What is done to a process from outside, and the exit statuses that may follow; empty if it goes on."""

    do: Callable[[subprocess.Popen[bytes], Command], None]
    statuses: tuple[int, ...] = ()


def _signal(number: int) -> Callable[[subprocess.Popen[bytes], Command], None]:
    return lambda process, command: process.send_signal(number)


def _fill_disk(process: subprocess.Popen[bytes], command: Command) -> None:
    """From now on no file of the process can grow, as on a disk that is full."""
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))


def _stall(process: subprocess.Popen[bytes], command: Command) -> None:
    process.send_signal(signal.SIGSTOP)
    time.sleep(1)
    process.send_signal(signal.SIGCONT)


def _second_process(process: subprocess.Popen[bytes], command: Command) -> None:
    """A second process with the same command is refused while the first one writes."""
    second = command.start()
    if second.wait(PATIENCE) != 2 and process.poll() is None:
        raise SystemExit("two processes wrote the same run")


FAULTS = {
    "killed (SIGKILL)": Fault(_signal(signal.SIGKILL), (-signal.SIGKILL,)),
    "terminated (SIGTERM)": Fault(_signal(signal.SIGTERM), (143,)),
    "interrupted (SIGINT)": Fault(_signal(signal.SIGINT), (130,)),
    "disk full": Fault(_fill_disk, (1,)),
    "stopped for a second (SIGSTOP)": Fault(_stall),
    "a second process on the same run": Fault(_second_process),
}


def soak(directory: Path, steps: int, num_faults: int, seed: int) -> tuple[list[str], bool]:
    """One run with faults at random steps, and one without. Returns the lines of a page, and whether all is well."""
    rng = random.Random(seed)
    kinds = list(islice(cycle(sorted(FAULTS)), num_faults))
    rng.shuffle(kinds)
    due = list(zip(sorted(rng.sample(range(1, steps), num_faults)), kinds, strict=True))
    run, undisturbed = directory / "run", directory / "undisturbed"
    with Progress(console=Console(stderr=True)) as bar:
        samples, problems = [], []
        for path, faults in ((undisturbed, []), (run, due)):
            task = bar.add_task(path.name, total=steps)
            command = children.train(path, f"steps={steps}")
            more, wrong = go_on_until_done(command, faults, partial(bar.update, task))
            problems += wrong
            samples += [replace(sample, process=f"{path.name} {sample.process}") for sample in more]
    rows = [row for row in children.rows_of(run) if "num_tokens" in row]
    lost = abs(len(rows) - steps) + len(set(range(steps)) - {row["step"] for row in rows})
    if (first := children.difference(run, undisturbed)) is not None:
        problems.append(f"differs from the undisturbed run: {first}")
    while_training = [sample for sample in samples if sample.step < steps]  # not while the report is drawn
    counts = Counter(kinds)
    lines = [
        f"{steps:,} steps, and as many undisturbed, in {len({sample.process for sample in samples})} processes. "
        f"Faults (seed {seed}): {', '.join(f'{kind} ({counts[kind]})' for kind in sorted(counts))}. "
        f"In {sum(row['frac_dropped'] > 0 for row in rows):,} steps the reward failed by itself.",
        "",
        f"| of a process | after {WARM_UP} steps | growth per 10,000 steps | 95 % interval |",
        "|---|---|---|---|",
        *(_growth(name, unit, while_training) for name, unit in (("memory", "MiB"), ("files", "open files"))),
        "",
        f"Steps that are missing or double: {lost}. Other problems: {len(problems)}.",
        *(f"- {problem}" for problem in problems),
    ]
    return lines, not problems and not lost


def go_on_until_done(
    command: Command, due: Sequence[tuple[int, str]], tell: Callable[..., None]
) -> tuple[list[Sample], list[str]]:
    """Starts a command until its run is finished.

    Args:
      due: faults, each with the step from which it is due.
      tell: is called with `completed`, the number of steps.

    Returns:
      What its processes needed, and what went wrong, as sentences.
    """
    samples: list[Sample] = []
    problems: list[str] = []
    pending, status = list(due), None
    for number in count():
        process, expected = command.start(), (0,)
        for sample in _watch(process, command, str(number)):
            tell(completed=sample.step)
            samples.append(sample)
            if pending and sample.step >= pending[0][0] and expected == (0,):
                fault = FAULTS[pending.pop(0)[1]]
                fault.do(process, command)
                expected = fault.statuses or expected
        status = process.wait()
        if status not in (0, *expected):
            problems.append(f"exit status {status}, where {expected} was expected: {command.stderr()[-300:]}")
        if status == 0 or problems:
            break
    if "Traceback" in command.stderr():
        problems.append(f"a traceback: {command.stderr()[-300:]}")
    if left := command.processes():
        problems.append(f"{len(left)} processes are left over")
    return samples, problems


def _watch(process: subprocess.Popen[bytes], command: Command, number: str) -> Iterator[Sample]:
    """Looks at a process four times a second until it ends; raises SystemExit if it makes no steps for too long."""
    last, since = -1, time.monotonic()
    while process.poll() is None:
        step = command.steps_made()
        if step != last:
            last, since = step, time.monotonic()
        if time.monotonic() - since > PATIENCE:
            process.kill()
            raise SystemExit(f"stuck: no step in {PATIENCE} s: {' '.join(command.arguments)}")
        yield Sample(number, step, resident(process.pid), open_files(process.pid))
        time.sleep(0.25)


def slope(samples: Sequence[Sample], quantity: str) -> tuple[float, float, float]:
    """The growth of a quantity over one step: least squares with an intercept for each process, and a 95 % interval.

    The interval takes processes as independent, and the samples of one process as not (Liang and Zeger 1986).
    """
    tops: list[float] = []
    bottoms: list[float] = []
    for process in sorted({sample.process for sample in samples}):
        own = [sample for sample in samples if sample.process == process and not math.isnan(sample.memory)]
        own = [sample for sample in own if sample.step >= own[0].step + WARM_UP]
        x = np.array([sample.step for sample in own], float)
        y = np.array([getattr(sample, quantity) for sample in own], float)
        if len(own) >= 3 and np.ptp(x) > 0:
            x -= x.mean()
            tops.append(float(x @ y))
            bottoms.append(float(x @ x))
    if not bottoms:
        return (math.nan,) * 3
    found = sum(tops) / sum(bottoms)
    residuals = [top - found * bottom for top, bottom in zip(tops, bottoms, strict=True)]
    num = len(bottoms)
    if num == 1:
        return found, -math.inf, math.inf
    noise = math.sqrt(sum(each * each for each in residuals) * num / (num - 1)) / sum(bottoms)
    margin = float(stats.t.ppf(0.975, num - 1)) * noise
    return found, found - margin, found + margin


def _growth(quantity: str, unit: str, samples: Sequence[Sample]) -> str:
    values = [getattr(sample, quantity) for sample in samples if sample.step >= WARM_UP]
    value, low, high = (10_000 * each for each in slope(samples, quantity))
    start = values[0] if values else math.nan
    return f"| {unit} | {start:,.0f} | {value:+.2f} | [{low:+.2f}, {high:+.2f}] |"


def resident(pid: int) -> float:
    """The memory of a process in MiB; NaN if it has ended."""
    pages = children.read(f"/proc/{pid}/statm").split()
    return int(pages[1]) * resource.getpagesize() / 2**20 if pages else math.nan


def open_files(pid: int) -> float:
    try:
        return len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return math.nan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--faults", type=int, default=24, help="how many from outside")
    children.main(parser, lambda place, options: soak(place, options.steps, options.faults, options.seed))


if __name__ == "__main__":
    main()
