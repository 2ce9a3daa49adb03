"""How far a run is in each of its parts, and how long it and a whole sweep still take, from the runs' files alone.

A run's work is its steps times the seconds that a step takes, so that a warm start of many quick steps does not count
as most of the run. What no run of the sweep has done yet, nobody can say, and then there is no estimate.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

from grpo_jax.errors import UserError
from grpo_jax.experiment import Experiment, records, variant_of
from grpo_jax.runs.files import read_json

TAIL = 1 << 14  # bytes at the end of metrics.jsonl that are read
WARM_START, TRAINING, CONTROL = "warm start", "training", "control"
FOLDERS = {WARM_START: "warm_start", TRAINING: "", CONTROL: "control"}


@dataclass(frozen=True)
class Stage:
    """A part of a run.

    Attributes:
      name: the warm start, the training itself, or the control.
      done, total: in steps, or in tokens where a budget of tokens ends the run.
      seconds_each: what one of them takes; None while none is done.
    """

    name: str
    done: int
    total: int
    seconds_each: float | None = None


def stages_of(run_dir: Path, config: Experiment) -> list[Stage]:
    """The parts of a run in the order in which they are made."""
    found = []
    for name, overrides in ((WARM_START, config.warm_start), (TRAINING, {}), (CONTROL, config.control)):
        if overrides is not None:
            of_stage = config if name == TRAINING else variant_of(config, overrides)
            found.append(_stage(name, run_dir / FOLDERS[name], of_stage))
    return found


def current(stages: Sequence[Stage]) -> Stage:
    """The part that is under way: the first that is not done, or the last."""
    return next((stage for stage in stages if stage.done < stage.total), stages[-1])


def _stage(name: str, directory: Path, config: Experiment) -> Stage:
    rows = tail_rows(directory)
    steps = [row for row in rows if row.get("step_time") is not None]
    each = median(row["step_time"] for row in steps) if steps else None
    done = max((row["step"] + 1 for row in steps), default=0)
    total: int = config.num_steps
    if config.token_budget is not None and steps:
        speed = [row["tokens_per_second"] for row in steps if row.get("tokens_per_second")]
        if not speed or steps[-1].get("num_sampled_tokens") is None:
            return Stage(name, done, total, each)
        done, total, each = int(steps[-1]["num_sampled_tokens"]), config.token_budget, 1 / median(speed)
    if read_json(directory / "run.json").get("status") == "finished":
        done = total
    return Stage(name, min(done, total), total, each)


def tail_rows(run_dir: Path) -> list[dict[str, Any]]:
    """The last rows of a run's metrics.jsonl, but for those that are damaged; none if there is no such file."""
    try:
        with (run_dir / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - TAIL))
            lines = file.read().decode(errors="replace").split("\n")
    except OSError:
        return []
    rows = []
    for line in lines[:-1]:  # what follows the last newline is still being written
        with suppress(ValueError, UserError):  # the first line may be the end of a longer one
            row = records.parse(line)
            records.require_metrics(row, "metrics.jsonl")
            rows.append(row)
    return rows


def latest_metrics(run_dir: Path) -> dict[str, Any]:
    """The newest value of each metric among the last rows of a run's metrics.jsonl."""
    latest: dict[str, Any] = {}
    for row in tail_rows(run_dir):
        latest |= row
    return latest


def seconds_left(
    stages: Sequence[Stage], pace: Mapping[str, float], duration: float | None, overhead: float = 0.0
) -> float | None:
    """How long a run still takes; None if that cannot be said yet.

    Args:
      stages: its parts.
      pace: for each part the seconds that one of its steps takes in this sweep, for parts that have not begun.
      duration: how long a finished run like this took in all, with compilation and evaluations; None if none is.
      overhead: what a run that has not begun needs beside its steps, such as for compilation; it counts while no run is
        finished.
    """
    each = [stage.seconds_each or pace.get(stage.name) for stage in stages]
    ahead = [stage.total - stage.done for stage in stages]
    if any(left and seconds is None for left, seconds in zip(ahead, each, strict=True)):
        # Nothing is known of a part that is ahead. If nothing at all has been done, a finished run says what it takes.
        return duration if not any(stage.done for stage in stages) else None
    work = sum(left * (seconds or 0.0) for left, seconds in zip(ahead, each, strict=True))
    whole = sum(stage.total * (seconds or 0.0) for stage, seconds in zip(stages, each, strict=True))
    if duration is None or not whole:
        return work + (overhead if not any(stage.done for stage in stages) else 0.0)
    return duration * work / whole


def overhead_of(run_dir: Path, stages: Sequence[Stage], now: datetime) -> float | None:
    """The seconds since a run began that were not spent in its steps; None if it is not known, as of a resumed run."""
    info = read_json(run_dir / "run.json")
    if "started" not in info or info.get("resumed") or not any(stage.done for stage in stages):
        return None
    spent = sum(stage.done * (stage.seconds_each or 0.0) for stage in stages)
    try:
        return max((now - datetime.fromisoformat(info["started"])).total_seconds() - spent, 0.0)
    except (TypeError, ValueError):  # it was edited
        return None


def pace_of(runs: Iterable[Sequence[Stage]]) -> dict[str, float]:
    """For each part the seconds that one of its steps takes: the median of the runs that have made one."""
    found: dict[str, list[float]] = {}
    for stages in runs:
        for stage in stages:
            if stage.seconds_each is not None:
                found.setdefault(stage.name, []).append(stage.seconds_each)
    return {name: median(values) for name, values in found.items()}


def sweep_seconds_left(left: Sequence[float | None], jobs: int) -> float | None:
    """How long processes that still take `left` seconds each take together, `jobs` at a time; None if unknown.

    They cannot take less than the longest of them, nor less than their sum over `jobs`.
    """
    known = [seconds for seconds in left if seconds is not None]
    if len(known) < len(left):
        return None
    return max([sum(known) / jobs, *known], default=0.0)


def time_text(seconds: float) -> str:
    """A duration in two units at most: 40 s, 12 min, 3 h 20 min."""
    if seconds < 90:
        return f"{max(round(seconds), 1)} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min" if minutes < 24 * 60 else f"{round(minutes / 60)} h"
