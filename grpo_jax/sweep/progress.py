"""The live table of all runs of a sweep, made from the files in their directories alone."""

import time
from collections.abc import Mapping, Sequence, Set
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean, median
from types import TracebackType
from typing import Any, NamedTuple, Self

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from grpo_jax.experiment import PlannedRun
from grpo_jax.runs.display import visible
from grpo_jax.runs.files import read_json
from grpo_jax.sweep.stages import (
    CONTROL,
    TRAINING,
    WARM_START,
    Stage,
    current,
    latest_metrics,
    overhead_of,
    pace_of,
    seconds_left,
    stages_of,
    sweep_seconds_left,
    time_text,
)

STYLES = {
    "finished": "green",
    "failed": "red",
    "running": "bold",
    WARM_START: "bold",
    CONTROL: "bold",
    "waiting": "dim",
}


class _Seen(NamedTuple):
    """A run as its files were: its parts, and its status."""

    stages: list[Stage]
    status: str


class SweepProgress:
    """Shows how far each run is: a live table on a terminal, a line whenever a run's status changes elsewhere.

    Args:
      jobs: how many processes run at the same time.
      together: the runs that one process makes: itself, or all seeds of its arms.
    """

    def __init__(
        self,
        runs: Sequence[PlannedRun],
        directory: Path,
        metric: str,
        console: Console,
        *,
        jobs: int = 1,
        together: Sequence[Sequence[PlannedRun]] | None = None,
    ) -> None:
        self.runs, self.directory, self.metric, self.console = runs, directory, metric, console
        self.jobs, self.together = jobs, [[run] for run in runs] if together is None else together
        self._live = Live(console=console, auto_refresh=False) if console.is_interactive else None
        self._shown: dict[str, str] = {}
        self._drawn = 0.0

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._live:
            self._live.update(self.table(set(), set()), refresh=True)
            self._live.stop()

    def show(self, under_way: Set[str], failed: Set[str]) -> None:
        """Shows the runs as their files are now; `under_way` and `failed` are keys of this sweep's."""
        if self._live is None:
            seen = self._look(under_way, failed)
            for run in self.runs:
                status = seen[run.key].status
                if status != self._shown.get(run.key, "waiting"):
                    self._shown[run.key] = status
                    far = f"  ({self._far(seen, under_way)})" if status == "finished" else ""
                    line = f"{name_of(run)}  seed {run.seed}  {run.key}  {status}{far}"
                    self.console.print(visible(line), soft_wrap=True)
        elif time.monotonic() - self._drawn > 1:  # reading every file of a large sweep takes a while
            self._live.update(self.table(under_way, failed), refresh=True)
            self._drawn = time.monotonic()

    def table(self, under_way: Set[str], failed: Set[str]) -> Table:
        """Returns the table: one row for each run."""
        seen = self._look(under_way, failed)
        table = Table(title=self._far(seen, under_way, "runs finished"), title_justify="left")
        for column in ("arm", "seed", "run", "status"):
            table.add_column(column, justify="right" if column == "seed" else "left")
        for column in ("step", "reward", self.metric.removeprefix("evaluation/")):
            table.add_column(visible(column), justify="right")
        for run in self.runs:
            status, latest = seen[run.key].status, latest_metrics(self.directory / run.key)
            steps = self._steps(run, seen[run.key], latest)
            figures = [_figure(latest.get(name)) for name in ("reward", self.metric)]
            style = STYLES.get(status, "")
            table.add_row(visible(name_of(run)), str(run.seed), run.key, Text(status, style=style), steps, *figures)
        return table

    def time_left(self, under_way: Set[str], failed: Set[str]) -> float | None:
        """The seconds that the sweep still takes, from the runs that are finished and the steps that are made.

        None if there is no step to go by, or if nothing is under way.
        """
        return self._time_left(self._look(under_way, failed), under_way)

    def _look(self, under_way: Set[str], failed: Set[str]) -> dict[str, _Seen]:
        """Each run as its files are now, which are read once for all that is shown."""
        seen = {}
        for run in self.runs:
            stages = stages_of(self.directory / run.key, run.config)
            seen[run.key] = _Seen(stages, self._status(run, stages, under_way, failed))
        return seen

    def _time_left(self, seen: Mapping[str, _Seen], under_way: Set[str]) -> float | None:
        if not under_way:
            return None
        took = {
            run.key: seconds
            for run in self.runs
            if seen[run.key].status == "finished"
            and (seconds := read_json(self.directory / run.key / "summary.json").get("seconds")) is not None
        }
        now = datetime.now(UTC)
        begun = (overhead_of(self.directory / key, seen[key].stages, now) for key in under_way)
        overhead = median([seconds for seconds in begun if seconds is not None] or [0.0])
        pace, left = pace_of(each.stages for each in seen.values()), []
        for batch in self.together:
            open_runs = [run for run in batch if seen[run.key].status not in ("finished", "failed")]
            if open_runs:  # of runs in one program, the slowest one counts
                each = [
                    seconds_left(seen[run.key].stages, pace, self._duration(run, took), overhead) for run in open_runs
                ]
                known = [seconds for seconds in each if seconds is not None]
                left.append(max(known) if len(known) == len(each) else None)
        return sweep_seconds_left(left, self.jobs)

    def _duration(self, run: PlannedRun, took: dict[str, float]) -> float | None:
        """How long finished runs of the same arm took, or else of any arm: their mean in seconds."""
        same = [took[other.key] for other in self.runs if other.key in took and other.arms == run.arms]
        return fmean(same or took.values()) if took else None

    def _far(self, seen: Mapping[str, _Seen], under_way: Set[str], what: str = "runs") -> str:
        """How many runs are finished, and about how long the others still take."""
        done = sum(each.status == "finished" for each in seen.values())
        left = self._time_left(seen, under_way)
        return f"{done} of {len(self.runs)} {what}" + (f", about {time_text(left)} left" if left else "")

    def _steps(self, run: PlannedRun, seen: _Seen, latest: dict[str, Any]) -> str:
        """How many steps of how many: of the warm start or the control while they are under way."""
        if seen.status in (WARM_START, CONTROL):
            [stage] = [each for each in seen.stages if each.name == seen.status]
            return f"{stage.done}/{stage.total}"
        # Step s is the one after s updates; evaluations carry the number of updates itself.
        steps = latest["step"] + ("reward" in latest or "loss" in latest) if latest else 0
        steps = str(min(steps, run.config.num_steps))
        return steps if run.config.token_budget is not None else f"{steps}/{run.config.num_steps}"

    def _status(self, run: PlannedRun, stages: Sequence[Stage], under_way: Set[str], failed: Set[str]) -> str:
        if run.key in failed:
            return "failed"
        if run.key in under_way:
            stage = current(stages).name
            return "running" if stage == TRAINING else stage
        status = read_json(self.directory / run.key / "run.json").get("status", "waiting")
        return "interrupted" if status == "running" else status  # no process of this sweep's is making it


def name_of(run: PlannedRun) -> str:
    """The arms that a run stands for, as a user reads them."""
    return " = ".join(run.arms)


def _figure(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, (int, float)) else "–"
