"""`grpo-jax diff`: what two runs differ in."""

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from grpo_jax.cli import common
from grpo_jax.cli.common import Flag
from grpo_jax.experiment import code_of
from grpo_jax.runs import difference
from grpo_jax.runs.code_difference import FileDifference, code_differences
from grpo_jax.runs.difference import Parting
from grpo_jax.runs.files import assigned, is_evaluation, read_rows
from grpo_jax.runs.run import Run

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = ("A", "B")
MOST_LINES = 60  # of a file's unified diff
PARTS = {"warm_start": "warm start", "": "training", "control": "control"}  # of a run, in the order they are made


def diff(
    one: Annotated[Positional[Path], arg(metavar="RUN_A", help="The directory of a run.")],
    other: Annotated[Positional[Path], arg(metavar="RUN_B", help="The directory of another.")],
    /,
    *,
    code: Flag = False,
) -> None:
    """Say what two runs differ in: config, files, versions and processor, and where their numbers part.

    Times are not compared, and no code of the runs is executed. The exit status is 0 if nothing differs, and 1 if
    something does.

    Args:
        code: Show the lines of the files that differ.
    """
    from rich.console import Console

    from grpo_jax.runs.display import visible

    runs = (Run(one), Run(other))
    files = _files(*runs)
    found = dict(_subjects(runs, files))
    console = Console(highlight=False)
    for name, run in zip(COLUMNS, runs, strict=True):
        console.print(visible(f"{name}  {_described(run)}"), soft_wrap=True)
    for table in filter(None, found.values()):
        console.print(table)
    for file in files or () if code else ():
        _show_lines(console, file)
    same = [subject for subject, table in found.items() if table is None]
    console.print(f"the same  {', '.join(same) or 'nothing'}", soft_wrap=True, markup=False)
    if files is None:
        print("Files are not compared: a run of a notebook, or of an early version, keeps no copy of them.")
    if "last evaluations" in found and found["last evaluations"] is not None:
        paired = [common.command(), "evaluate", str(one), "--against", str(other)]
        print(f"prompt by prompt  {shlex.join(paired)}")
    if any(found.values()):
        raise SystemExit(1)


def _described(run: Run) -> str:
    """A run in one line: where it is, its arm and its seed."""
    arm = assigned(run.info).get("arm")
    known = [f"arm {arm}"] * (arm is not None) + [f"seed {run.info.get('seed')}"] * ("seed" in run.info)
    return ", ".join([str(run.run_dir), *known])


def _subjects(runs: tuple[Run, Run], files: list[FileDifference] | None) -> Iterator[tuple[str, "Table | None"]]:
    """What is compared, in its order, each with a table of what differs; None if nothing does."""
    (a, b), infos = runs, [run.info for run in runs]
    pairs = {
        "config": difference.config_differences(a.config, b.config),
        "versions, processor and training code": difference.condition_differences(*infos),
        "resumptions": difference.visit_differences(*infos),
        "how far they are": difference.differences(_progress(a), _progress(b)),
    }
    for subject, differing in pairs.items():
        yield subject, common.pair_table(subject, differing, COLUMNS) if differing else None
    if files is not None:
        yield "files", _file_table(files) if files else None
    for part, title in PARTS.items():
        yield from _numbers(runs, part, title)
    evaluations = [difference.last_evaluations(run.evaluations) for run in runs]
    if all(evaluations):
        yield "last evaluations", _evaluation_table(*evaluations) if evaluations[0] != evaluations[1] else None


def _progress(run: Run) -> dict[str, Any]:
    return {"status": run.status, "steps": len(run.metrics), "evaluations": len(run.evaluations)}


def _files(one: Run, other: Run) -> list[FileDifference] | None:
    """The files that differ; None where a run keeps no copies of them."""
    if code_of(one.info) is None or code_of(other.info) is None:
        return None
    return code_differences(one, other)


def _file_table(files: list[FileDifference]) -> "Table":
    from rich.table import Table

    table = Table("", "what differs in it", title="files", title_justify="left", box=None, header_style="dim")
    for file in files:
        table.add_row(common.value_text(file.name), common.value_text(", ".join(file.where)))
    return table


def _show_lines(console: Any, file: FileDifference) -> None:
    """Prints the unified diff of a file, cut."""
    from grpo_jax.runs.display import visible

    console.print()
    for line in file.diff[:MOST_LINES]:
        console.print(visible(line), style={"+": "green", "-": "red"}.get(line[:1]), soft_wrap=True)
    if len(file.diff) > MOST_LINES:
        console.print(f"and {len(file.diff) - MOST_LINES} more lines", style="dim")


def _numbers(runs: tuple[Run, Run], part: str, title: str) -> Iterator[tuple[str, "Table | None"]]:
    """The numbers of a part of both runs, where both have it."""
    places = [run.run_dir / part for run in runs]
    one, other = ([dict(row) for row in read_rows(place / "metrics.jsonl")] for place in places)
    steps = [{row["step"] for row in rows if not is_evaluation(row)} for rows in (one, other)]
    common_steps = len(steps[0] & steps[1])
    if not common_steps:
        return
    partings = difference.completion_partings(*(place / "completions.jsonl" for place in places))
    partings += difference.metric_partings(one, other)
    subject = f"numbers of the {title} ({common_steps} steps)"
    yield subject, _parting_table(subject, difference.in_order(partings)) if partings else None


def _parting_table(title: str, partings: list[Parting]) -> "Table":
    """A table of where numbers part, the first on top."""
    from rich.table import Table

    title = f"{title}: where each begins to differ"
    table = Table(title=title, title_justify="left", box=None, header_style="dim", min_width=len(title))
    table.add_column("step", justify="right")
    table.add_column("", no_wrap=True)
    for column in (*COLUMNS, "relative", "differ"):
        table.add_column(column, justify="right" if column == "relative" else "left", overflow="fold")
    for parting in partings:
        table.add_row(
            str(parting.step), *common.pair_cells(parting.pair), f"{parting.num_differ}/{parting.num_compared}"
        )
    return table


def _evaluation_table(one: Mapping[str, Any], other: Mapping[str, Any]) -> "Table":
    """The last evaluations of both runs on each split, and their difference."""
    from rich.table import Table

    table = Table(title="last evaluations", title_justify="left", box=None, header_style="dim")
    for column in ("", "after step", "success", "95 % interval", "reward"):
        table.add_column(column, justify="right" if column else "left")
    for split in dict.fromkeys([*one, *other]):
        found = [evaluations.get(split) for evaluations in (one, other)]
        for name, values in zip(COLUMNS, found, strict=True):
            if values is not None:
                table.add_row(f"{name}, {split.replace('_', '-')}", *_evaluation_cells(values))
        successes = [None if values is None else values.get("success") for values in found]
        if successes[0] is not None and successes[1] is not None:
            table.add_row("B − A", "", f"{100 * (successes[1] - successes[0]):+.1f} points", "", "")
    return table


def _evaluation_cells(values: Mapping[str, Any]) -> list[str]:
    def share(name: str) -> str:
        return "–" if values.get(name) is None else f"{100 * values[name]:.1f}"

    reward = "–" if values.get("reward") is None else f"{values['reward']:.3f}"
    interval = f"{share('success_low')} – {share('success_high')} %"
    return [str(values["step"]), f"{share('success')} %", interval, reward]
