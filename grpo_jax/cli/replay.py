"""`grpo-jax replay`: makes a step of a run again and compares it with what the run logged."""

from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from grpo_jax.cli import common

if TYPE_CHECKING:
    from rich.table import Table

    from grpo_jax.replay import Replay

MOST = 20  # differences of completions that are listed


def replay(
    run: Annotated[Positional[Path], arg(metavar="RUN", help="A run, or the warm start or the control of one.")],
    /,
    *,
    step: Annotated[int, arg(metavar="N", help="Which step, as metrics.jsonl counts them: from 0.")],
    prompts: Annotated[int, arg(metavar="K", help="How many of the step's prompts are shown.")] = 2,
) -> None:
    """Make a step of a run again, show it, and say whether it has the numbers that the run logged.

    Nothing is written to the run, which may be under way. The exit status is 0 if the numbers are the same, to the last
    digit or up to rounding, and 1 if they differ.
    """
    common.prepare_jax()
    from rich.console import Console

    from grpo_jax import replay as replays
    from grpo_jax.runs.display import visible

    found = replays.replay(run, step, quiet=False)
    console = Console(highlight=False)
    show_completions(console, found.completions, prompts)
    if found.conditions:
        console.print(common.pair_table("not as when the run began", found.conditions, ("run", "now")))
    if found.pairs:
        console.print(_difference_table(found))
    console.print(visible(f"{run}: {verdict(found)}"), soft_wrap=True)
    if not found.is_same:
        raise SystemExit(1)


def show_completions(console: Any, rows: list[dict[str, Any]], num_prompts: int) -> None:
    """Prints the completions of a step by prompt, those of the first prompts."""
    from grpo_jax.runs.display import group_table

    groups = [list(group) for _, group in groupby(rows, lambda row: (row["prompt_id"], row["prompt"]))]
    for group in groups[:num_prompts]:
        console.print(group_table({"": group}))
    if len(groups) > num_prompts:
        console.print(f"and {len(groups) - num_prompts} more prompts (all with --prompts {len(groups)})", style="dim")


def verdict(found: "Replay") -> str:
    """Whether a step that was made again is the same, in one sentence."""
    begun = f"the checkpoint of step {found.first_step}" if found.first_step else "the start"
    compared = f"{found.num_metrics} metrics"
    if found.completions:
        compared += f" and {len(found.completions)} completions"
    made = f"step {found.step}, made again from {begun}, is"
    if not found.pairs:
        return f"{made} the same to the last digit ({compared})."
    if not found.is_same:
        first = next(pair for pair in found.pairs if not pair.is_rounding)
        return f"{made} not the same: {len(found.pairs)} values differ, such as {first.name}."
    sized = [pair for pair in found.pairs if not pair.is_near_zero]
    largest = max(sized or found.pairs, key=lambda pair: pair.relative or 0.0)
    said = f"largest relative difference {largest.relative:.2g} in {largest.name}"
    if not sized:
        said = "only numbers near 0 differ"
    return f"{made} the same up to rounding ({said}; {compared})."


def _difference_table(found: "Replay") -> "Table":
    """The values that differ: all metrics, and the first of the completions."""
    pairs = list(found.metrics)
    for place, differing in found.completion_differences.items():
        pairs += [pair._replace(name=f"completion {place}: {pair.name}") for pair in differing]
    return common.pair_table("what differs", pairs, ("run", "replay"), relative=True, most=len(found.metrics) + MOST)
