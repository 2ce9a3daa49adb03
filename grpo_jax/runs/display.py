"""What a run prints: its live progress, and tables of groups and evaluations.

The text of a model may be hostile: it is printed with its control characters escaped, never as markup.
"""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console, Group
from rich.jupyter import JupyterMixin
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from grpo_jax.text import in_markdown, on_line

# What the live line shows, from the widest terminal to the narrowest: the width of the bar (0 for none), how many of
# the figures, and whether the time so far stands beside the time left.
LAYOUTS = ((20, 4, True), (20, 3, True), (10, 3, True), (10, 2, True), (0, 2, True), (0, 2, False), (0, 1, False))
TIME_WIDTH = 8  # of hours, minutes and seconds
LONGEST_SHOWN = 160  # characters of a prompt or a column above a table


class Display:
    """The live progress of a run.

    On a terminal and in a notebook it is a bar with the latest group above it; elsewhere it is a plain line every
    `every` seconds. It starts with the first step and ends with the last, so that a run inside another one (a warm
    start, a control) can have its own.

    Args:
      total: the number of steps.
      token_budget: the number of tokens that ends the run; None if the steps do.
      title: the name of a run inside another one.
      quiet: print nothing.
      clock: returns the time in seconds.
    """

    def __init__(
        self,
        total: int,
        token_budget: int | None = None,
        *,
        title: str = "",
        quiet: bool = False,
        console: Console | None = None,
        every: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total, self.token_budget, self.title, self.quiet = total, token_budget, title, quiet
        self.console = console or Console(highlight=False)
        self._every, self._clock = every, clock
        self._rewards: list[float] = []
        self._success: float | None = None
        self._started, self._last_line = clock(), -math.inf
        self._live: Live | _Cell | None = None
        self._progress = Progress(console=self.console)  # its columns are those that fit: see `_columns`
        self._task = self._progress.add_task(title or "training", total=token_budget or total, figures="")

    def update(self, step: int, metrics: Mapping[str, Any], group: Sequence[Mapping[str, Any]] = ()) -> None:
        """Shows that step `step` (counted from 0) is done, with its metrics and one of its groups."""
        if self.quiet:
            return
        self._rewards.append(float(metrics.get("reward", math.nan)))
        # With a token budget, progress is counted in tokens.
        done = step + 1 if self.token_budget is None else int(metrics["num_sampled_tokens"])
        over = step + 1 >= self.total or done >= (self.token_budget or self.total)
        if self.console.is_interactive or self.console.is_jupyter:
            self._draw(done, metrics, group)
            if over:
                self.close()
        elif over or self._clock() - self._last_line >= self._every:
            self._last_line = self._clock()
            name, seconds = self.title or "training", self._last_line - self._started
            place = f"{step + 1}/{self.total}"
            if self.token_budget is not None:
                place = f"{step + 1} ({done:,} of {self.token_budget:,} tokens)"
            self._print(f"{name} step {place}  {'  '.join(self._figures(metrics))}  {seconds:.0f} s")

    def evaluation(self, step: int, evaluation: Any) -> None:
        """Prints an evaluation of the policy after `step` updates."""
        self._success = evaluation.success
        interval = f"[{100 * evaluation.success_low:.1f}, {100 * evaluation.success_high:.1f}]"
        split = evaluation.split.replace("_", "-")
        self.note(f"after {step} steps: {split} success {100 * evaluation.success:.1f} % {interval}")

    def note(self, message: str) -> None:
        """Prints one line (above the bar, where there is one)."""
        if not self.quiet:
            self._print(f"{self.title}: {message}" if self.title else message)

    def close(self) -> None:
        """Leaves the last state on the screen and stops redrawing it."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _draw(self, done: int, metrics: Mapping[str, Any], group: Sequence[Mapping[str, Any]]) -> None:
        if self._live is None:
            # rich's own display in a notebook needs a widget that may not be installed.
            on_screen = Live(console=self.console, refresh_per_second=4)
            self._live = _Cell() if self.console.is_jupyter else on_screen
            self._live.start()
        columns, figures = self._columns(metrics)
        self._progress.columns = columns
        self._progress.update(self._task, completed=done, figures=figures)
        self._live.update(Group(group_table({"": group}), self._progress) if group else self._progress)

    def _print(self, line: str) -> None:
        self.console.print(visible(line), soft_wrap=True)

    def _columns(self, metrics: Mapping[str, Any]) -> tuple[tuple[ProgressColumn, ...], str]:
        """The columns of the live line and its figures: the fullest layout that fits the terminal."""
        count = 2 * len(str(self.token_budget or self.total)) + 1  # what is done is padded to the width of the total
        for bar, num_figures, has_elapsed in LAYOUTS:
            figures = "  ".join(self._figures(metrics, num_figures))
            parts = [len(self.title or "training"), count, len(figures), len("left"), TIME_WIDTH]
            parts += [bar] * bool(bar) + [TIME_WIDTH] * has_elapsed
            if sum(parts) + len(parts) - 1 <= self.console.width:
                break
        columns: list[ProgressColumn] = [TextColumn("[bold]{task.description}")]
        columns += [BarColumn(bar_width=bar)] * bool(bar)
        columns += [MofNCompleteColumn(), TextColumn("{task.fields[figures]}", markup=False)]
        columns += [TimeElapsedColumn()] * has_elapsed
        return (*columns, TextColumn("[dim]left"), TimeRemainingColumn()), figures

    def _figures(self, metrics: Mapping[str, Any], most: int = 4) -> list[str]:
        """The reward or the loss, the success, how the reward has changed, and the speed: `most` of these four."""
        parts = []
        if math.isfinite(self._rewards[-1]):
            recent, before = self._rewards[-5:], self._rewards[-10:-5]
            change = f" ({np.mean(recent) - np.mean(before):+.2f})" if before and most > 2 else ""
            parts.append(f"reward {self._rewards[-1]:.2f}{change}")
        elif "loss" in metrics:
            parts.append(f"loss {metrics['loss']:.3f}")
        success = metrics.get("success", self._success)
        if success is not None and most > 1:
            parts.append(f"success {success:.0%}")
        if "tokens_per_second" in metrics and most > 3:
            parts.append(f"{metrics['tokens_per_second']:,.0f} tokens/s")
        return parts


class _Cell:
    """What a notebook's cell shows, drawn over at most four times a second, with the methods of rich's `Live`."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._last, self._handle = clock, -math.inf, None
        self._shown: _Renderable | None = None

    def start(self) -> None:
        """Shows nothing yet."""

    def update(self, renderable: Any) -> None:
        """Shows something instead of what was shown before."""
        self._shown = _Renderable(renderable)
        if self._clock() - self._last >= 0.25:
            self._draw()

    def stop(self) -> None:
        """Shows the last state."""
        self._draw()

    def _draw(self) -> None:
        from IPython.display import display

        self._last = self._clock()
        if self._handle is None:
            self._handle = display(self._shown, display_id=True)
        else:
            self._handle.update(self._shown)


class _Renderable(JupyterMixin):
    """Something of rich's, as it is now, with the form that a notebook shows."""

    def __init__(self, renderable: Any) -> None:
        self._renderable = renderable

    def __rich__(self) -> Any:
        return self._renderable


def visible(text: str) -> Text:
    """A model's text, safe for a terminal: no markup, newlines as ⏎, control and invisible characters escaped."""
    return Text(on_line(text))


def group_table(groups: Mapping[str, Sequence[Mapping[str, Any]]], *, limit: int = 8) -> Table:
    """A table of completions of one example with rewards and advantages, e.g. of `{"before": rows, "after": rows}`.

    Rows are those of completions.jsonl. Of each group at most `limit` rows are shown.
    """
    first: Mapping[str, Any] = next((rows[0] for rows in groups.values() if rows), {"prompt": ""})
    table = Table(title=example_title(first["prompt"], first.get("columns", {})), title_justify="left")
    named = any(groups)
    if named:
        table.add_column("")
    table.add_column("completion", overflow="fold" if named else "ellipsis", no_wrap=not named)
    table.add_column("reward", justify="right")
    table.add_column("advantage", justify="right")
    for name, rows in groups.items():
        for index, row in enumerate(rows[:limit]):
            label = [name if index == 0 else ""] if named else []
            text = visible(_completion_text(row["completion"]))
            table.add_row(*label, text, _number(row["reward"]), _signed(row["advantage"]))
        if len(rows) > limit:
            table.add_row(*[""] * named, Text(f"and {len(rows) - limit} more", style="dim"), "", "")
        table.add_section()
    return table


def example_title(prompt: str | Sequence[Mapping[str, str]], columns: Mapping[str, Any]) -> Text | None:
    """A prompt and its columns, such as the right answer, a line each and cut; None if both are empty."""
    lines = []
    for name, text in {"prompt": _prompt_text(prompt), **column_texts(columns)}.items():
        shown = visible(text)
        shown.truncate(LONGEST_SHOWN, overflow="ellipsis")
        if shown or name != "prompt":
            lines.append(Text.assemble(visible(name), ": ", shown))
    return Text("\n").join(lines) if lines else None


def column_texts(columns: Mapping[str, Any]) -> dict[str, str]:
    """Each column's value as a text: a string as it is, anything else as JSON."""
    return {
        name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=repr)
        for name, value in columns.items()
    }


def summary_table(evaluations: Mapping[str, Any]) -> Table:
    """A table of the success of several policies with 95 % intervals; policies that are None are left out."""
    known = {name: evaluation for name, evaluation in evaluations.items() if evaluation is not None}
    first = next(iter(known.values()))
    how = "greedy" if first.temperature == 0 else f"temperature {first.temperature:g}"
    samples = "" if first.num_samples == 1 else f" × {first.num_samples} samples"
    prompts = f"{first.split.replace('_', '-')} prompt{'s' * (first.num_prompts > 1)}"
    table = Table(title=f"{first.num_prompts} {prompts}{samples}, {how}", title_justify="left")
    several_turns = any(e.mean_turns > 1 for e in known.values())
    for column in ("", "success", "95 % interval", "reward", "tokens", *["turns"] * several_turns):
        table.add_column(column, justify="right" if column else "left")
    for name, e in known.items():
        interval = f"{100 * e.success_low:.1f} – {100 * e.success_high:.1f} %"
        turns = [f"{e.mean_turns:.2f}"] * several_turns
        table.add_row(
            visible(name), f"{100 * e.success:.1f} %", interval, _number(e.reward), f"{e.mean_length:.1f}", *turns
        )
    return table


def markdown_table(group: Sequence[Mapping[str, Any]]) -> str:
    """A group of completions as a Markdown table, under its prompt and columns. Markdown and HTML are escaped."""

    columns = [f"{in_markdown(k)}: {in_markdown(v)}  " for k, v in column_texts(group[0].get("columns", {})).items()]
    lines = [
        in_markdown(_prompt_text(group[0]["prompt"])),
        "",
        *columns,
        *[""] * bool(columns),
        "| completion | reward | advantage |",
        "|---|---|---|",
    ]
    for row in group:
        text = in_markdown(_completion_text(row["completion"]))
        lines.append(f"| {text} | {_number(row['reward'])} | {_signed(row['advantage'])} |")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.3f}"


def _signed(value: float | None) -> Text:
    if value is None or not math.isfinite(value):
        return Text("–")
    return Text(f"{value:+.2f}", style="green" if value > 0 else "red" if value < 0 else "dim")


def _prompt_text(prompt: str | Sequence[Mapping[str, str]]) -> str:
    """The text of a prompt; of a chat, its last message."""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def _completion_text(completion: str | Sequence[Mapping[str, str]]) -> str:
    """The text of a completion; of several messages, all of them."""
    return completion if isinstance(completion, str) else "\n".join(message["content"] for message in completion)
