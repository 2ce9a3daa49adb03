#!/usr/bin/env python
"""Kills runs of every method, and sweeps, at random moments, and says what was lost.

    python scripts/kill.py [--kills 104] [--output FILE.md]

The processes of `experiments/robustness/soak.py`, and of the sweep beside it, get SIGKILL at four moments: while they
start, between steps, while a checkpoint is being written, and when the last step is made. After each, the same command
is given again. At the end every run is compared with one that nobody disturbed, as `scripts/soak.py` does. The exit
status is 0 if nothing was lost.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import children
from children import EXPERIMENT, PATIENCE, Command
from rich.console import Console
from rich.progress import Progress

STEPS = 60
SMALL = (f"steps={STEPS}", "checkpoint_every=5", "evaluation.every=20")
TARGETS: dict[str, list[str]] = {
    **{name: [f"method={name}"] for name in ("grpo", "ppo", "sft", "rft", "dpo", "reward_model")},
    "warm start and control": ['warm_start={"method": "sft", "steps": 30}', 'control={"steps": 30}'],
    "sweep": ["--jobs", "2"],
    "sweep --vectorize": ["--vectorize"],
}
MOMENTS = ("at start-up", "between steps", "in the writer", "at the end")


def kills(directory: Path, targets: Sequence[str], count: int, seed: int) -> tuple[list[str], bool]:
    """Kills runs of every target. Returns the lines of the table, and whether every run came to the right end."""
    rng = random.Random(seed)
    found: dict[str, Counter[str]] = {target: Counter() for target in targets}
    problems: list[str] = []
    with Progress(console=Console(stderr=True)) as bar:
        shown = bar.add_task("kills", total=count)
        for index, target in enumerate(targets):
            undisturbed = directory / f"{target} undisturbed"
            command = _command(target, undisturbed)
            began = time.monotonic()
            if (status := command.start().wait(PATIENCE)) != 0:
                raise SystemExit(f"{target} fails undisturbed, with status {status}: {command.stderr()[-500:]}")
            seconds = time.monotonic() - began
            wanted = count // len(targets) + (index < count % len(targets))
            attempt = 0
            while (left := wanted - found[target].total()) > 0:
                command = _command(target, directory / f"{target} {attempt}")
                made = _kill_until_done(command, left, seconds, rng)
                found[target] += made
                bar.advance(shown, made.total())
                attempt += 1
                if command.processes():
                    problems.append(f"{target}: processes are left over")
                if "Traceback" in command.stderr():
                    problems.append(f"{target}: a traceback: {command.stderr()[-500:]}")
                if (first := children.difference(command.directory, undisturbed)) is not None:
                    problems.append(f"{target}: differs from the undisturbed run: {first}")
                shutil.rmtree(command.directory)
    lines = [
        f"| target | {' | '.join(MOMENTS)} | kills |",
        "|---|" + "---|" * (len(MOMENTS) + 1),
        *(
            f"| {target} | {' | '.join(str(made[moment]) for moment in MOMENTS)} | {made.total()} |"
            for target, made in found.items()
        ),
        "",
        f"{sum(made.total() for made in found.values())} kills, seed {seed}; runs that went wrong: {len(problems)}.",
        *(f"**{problem}**" for problem in problems),
    ]
    return lines, not problems


def _command(target: str, directory: Path) -> Command:
    if target.startswith("sweep"):
        ablation = EXPERIMENT.with_name("sweep.py")
        return Command(["sweep", str(ablation), "--dir", str(directory), *TARGETS[target]], directory)
    return children.train(directory, *SMALL, *TARGETS[target])


def _kill_until_done(command: Command, most: int, seconds: float, rng: random.Random) -> Counter[str]:
    """Starts a command until it ends with status 0, and kills its first `most` processes, each at another moment.

    A process that has ended before its moment came is not counted. Every second kill of a sweep spares its workers.
    """
    made: Counter[str] = Counter()
    moments = list(MOMENTS)
    rng.shuffle(moments)
    for moment in [*(moments * (most // len(moments) + 1))[:most], None]:
        process = command.start()
        if moment is not None and _reaches(moment, process, command, seconds, rng):
            if rng.random() < 0.5:
                process.kill()
            else:
                os.killpg(process.pid, signal.SIGKILL)
        status = process.wait(PATIENCE)
        if status == 0:
            return made
        if status != -signal.SIGKILL or moment is None:
            raise SystemExit(f"stuck with status {status}: {' '.join(command.arguments)}: {command.stderr()[-500:]}")
        made[moment] += 1
    raise AssertionError("the last process is not killed")


def _reaches(
    moment: str, process: subprocess.Popen[bytes], command: Command, seconds: float, rng: random.Random
) -> bool:
    """Waits for a moment of a process; false if the process ends before."""
    began, already = time.monotonic(), command.steps_made()
    delay, further = rng.uniform(0, 0.7 * seconds), rng.randint(1, 15)
    reached = {
        "at start-up": lambda: time.monotonic() - began > delay,
        "between steps": lambda: command.steps_made() >= already + further,
        "in the writer": command.writes_checkpoint,
        "at the end": lambda: command.steps_made() >= STEPS,
    }[moment]
    while process.poll() is None:
        if reached():
            time.sleep(rng.uniform(0, {"in the writer": 0.02, "at the end": 1}.get(moment, 0)))
            return process.poll() is None
        time.sleep(0.001 if moment == "in the writer" else 0.01)
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=104)
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    children.main(parser, lambda place, options: kills(place, options.targets, options.kills, options.seed))


if __name__ == "__main__":
    main()
