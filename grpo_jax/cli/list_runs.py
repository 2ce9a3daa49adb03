"""`grpo-jax list`: the runs in a directory."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from grpo_jax.cli.common import Flag
from grpo_jax.errors import UserError
from grpo_jax.experiment.recorded import current_config
from grpo_jax.runs.files import assigned, read_json, read_rows
from grpo_jax.text import on_line

WIDE = 110  # columns of a terminal from which the method and the time are shown too
DEPTH = 2  # runs/RUN and, of a sweep, runs/SWEEP/RUN


def list_runs(
    directory: Annotated[Positional[Path], arg(metavar="DIR", help="Where the runs are.")] = Path("runs"),
    /,
    *,
    as_json: Annotated[Flag, arg(name="json")] = False,
) -> None:
    """List the runs in a directory, and in its sweeps: arm, seed, steps, last held-out success, status.

    Args:
        as_json: Print one JSON object for each run and nothing else.
    """
    if not directory.is_dir():
        raise UserError(f"there is no directory {str(directory)!r} with runs.")
    found = [describe(path.parent) for path in sorted(run_files(directory), key=lambda path: path.stat().st_mtime)]
    if as_json:
        for run in found:
            print(json.dumps(run))
        return
    if not found:
        print(on_line(f"no runs in {directory}"))
        return

    from rich.console import Console
    from rich.table import Table

    from grpo_jax.runs.display import visible

    console = Console(highlight=False, markup=False)
    shown = ["run", "arm", "seed", "steps", "success", "status"]
    shown += ["method", "started"] if console.width >= WIDE else []
    table = Table(box=None, header_style="dim")
    for column in shown:
        numeric = column in ("seed", "steps", "success")
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for run in found:
        cells = run | {
            "run": os.path.relpath(run["run"], directory),
            "arm": run["arm"] or "–",
            "steps": f"{run['steps']}/{run['planned_steps']}",
            "success": "–" if run["success"] is None else f"{run['success']:.1%}",
            "started": (run["started"] or "")[:16].replace("T", " "),
        }
        table.add_row(*(visible(str(cells[column])) for column in shown))
    console.print(table)


def run_files(directory: Path) -> Iterator[Path]:
    """The run.json files of a directory, of its folders, and of the folders of sweeps in it."""
    found: dict[Path, Path] = {}  # by where they are, since the folder `tensorboard` of a sweep links to its runs
    for depth in range(DEPTH + 1):
        for path in directory.glob("/".join(["*"] * depth + ["run.json"])):
            if not _is_part(path):
                found.setdefault(path.resolve(), path)
    yield from found.values()


def _is_part(path: Path) -> bool:
    """Whether this is the warm start or the control of a run."""
    return path.parent.name in ("warm_start", "control") and (path.parents[1] / "run.json").is_file()


def describe(run_dir: Path) -> dict[str, Any]:
    """What is known of a run from its files."""
    info, config = read_json(run_dir / "run.json"), read_json(run_dir / "config.json")
    rows, damaged = [], False
    try:
        config = current_config(config, info) if config else {}
        rows = list(read_rows(run_dir / "metrics.jsonl"))
    except UserError:  # one run that was edited does not hide the others
        damaged = True
    method = config.get("method", "?")
    return {
        "run": str(run_dir),
        "arm": assigned(info).get("arm"),
        "seed": info.get("seed"),
        "method": method["name"] if isinstance(method, dict) else method,
        "steps": sum("step_time" in row for row in rows),
        "planned_steps": config.get("steps"),
        "success": next((r["evaluation/success"] for r in reversed(rows) if "evaluation/success" in r), None),
        "status": "damaged" if damaged else info.get("status", "?"),
        "started": info.get("started"),
    }
