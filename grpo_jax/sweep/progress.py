"""The live table of all runs of a sweep, made from the files in their directories alone."""

import json
import time
from collections.abc import Sequence, Set
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from grpo_jax.experiment import PlannedRun

TAIL = 1 << 14  # bytes at the end of metrics.jsonl that are read for the table
STYLES = {"finished": "green", "failed": "red", "running": "bold", "waiting": "dim"}


class SweepProgress:
    """Shows how far each run is: a live table on a terminal, a line whenever a run's status changes elsewhere."""

    def __init__(self, runs: Sequence[PlannedRun], directory: Path, metric: str, console: Console) -> None:
        self.runs, self.directory, self.metric, self.console = runs, directory, metric, console
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
            for run in self.runs:
                status = self._status(run, under_way, failed)
                if status != self._shown.get(run.key, "waiting"):
                    self._shown[run.key] = status
                    self.console.print(Text(f"{_name(run)}  seed {run.seed}  {run.key}  {status}"), soft_wrap=True)
        elif time.monotonic() - self._drawn > 1:  # reading every file of a large sweep takes a while
            self._live.update(self.table(under_way, failed), refresh=True)
            self._drawn = time.monotonic()

    def table(self, under_way: Set[str], failed: Set[str]) -> Table:
        """Returns the table: one row for each run."""
        done = sum(self._status(run, under_way, failed) == "finished" for run in self.runs)
        table = Table(title=f"{done} of {len(self.runs)} runs finished", title_justify="left")
        for column in ("arm", "seed", "run", "status", "step", "reward", self.metric):
            table.add_column(column, justify="right" if column in ("seed", "step", "reward", self.metric) else "left")
        for run in self.runs:
            status, latest = self._status(run, under_way, failed), latest_metrics(self.directory / run.key)
            # Step s is the one after s updates; evaluations carry the number of updates itself.
            steps = latest["step"] + ("reward" in latest or "loss" in latest) if latest else 0
            steps = str(min(steps, run.config.num_steps))
            if run.config.token_budget is None:
                steps += f"/{run.config.num_steps}"
            figures = [_figure(latest.get(name)) for name in ("reward", self.metric)]
            style = STYLES.get(status, "")
            table.add_row(_name(run), str(run.seed), run.key, Text(status, style=style), steps, *figures)
        return table

    def _status(self, run: PlannedRun, under_way: Set[str], failed: Set[str]) -> str:
        if run.key in failed:
            return "failed"
        if run.key in under_way:
            return "running"
        try:
            status = json.loads((self.directory / run.key / "run.json").read_text())["status"]
        except (OSError, ValueError, KeyError):
            return "waiting"
        return "interrupted" if status == "running" else status  # no process of this sweep's is making it


def latest_metrics(run_dir: Path) -> dict[str, Any]:
    """Returns the newest value of each metric among the last rows of a run's metrics.jsonl."""
    try:
        with (run_dir / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - TAIL))
            lines = file.read().decode(errors="replace").split("\n")
    except OSError:
        return {}
    latest: dict[str, Any] = {}
    for line in lines[:-1]:  # what follows the last newline is still being written
        try:
            latest |= json.loads(line)
        except ValueError:
            continue  # the first line may be the end of a longer one
    return latest


def _name(run: PlannedRun) -> str:
    return " = ".join(run.arms)


def _figure(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, (int, float)) else "–"
