"""Plots of a run's completions: rewards over time, the advantages of all groups, and the completions of one group."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from grpo_jax.errors import UserError
from grpo_jax.report.plots import BLUE, GREEN, GREY, ORANGE, STYLE
from grpo_jax.rewards import turns
from grpo_jax.runs.display import visible
from grpo_jax.runs.files import read_rows, writing

Row = Mapping[str, Any]  # a line of completions.jsonl
COLUMNS, LEVELS = 200, 24  # the most columns and rows of a heat map
SHOWN = 24  # the most completions of a group in its plot


def completion_rows(run_dir: Path) -> list[Row]:
    """The rows of `RUN/completions.jsonl`. Raises `UserError` if there is none."""
    rows: list[Row] = list(read_rows(run_dir / "completions.jsonl"))
    if not rows:
        raise UserError(f"{str(run_dir)!r} holds no completions.jsonl with a completion in it.")
    return rows


def reward_histograms(run_dir: Path, kind: str = "png") -> Path:
    """Draws `RUN/reward_histograms.KIND`: the share of each step's completions that earned each reward."""
    steps, levels, shares, mean = histogram_over_time(completion_rows(run_dir))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8, 3.6), layout="constrained")
        axes = figure.subplots()
        axes.grid(False)
        image = axes.pcolormesh(steps, levels, shares.T, cmap="Blues", vmin=0, vmax=1, shading="flat")
        axes.plot((steps[:-1] + steps[1:]) / 2, mean, color=ORANGE, linewidth=1.8, label="mean")
        axes.set_title("Rewards over time")
        axes.set_xlabel("updates")
        axes.set_ylabel("reward")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(frameon=False, loc="lower right")
        figure.colorbar(image, ax=axes, label="share of the step's completions")
        return _save(figure, run_dir / f"reward_histograms.{kind}")


def histogram_over_time(rows: Sequence[Row]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """A histogram of rewards for each span of steps.

    Returns the edges of K spans of steps [K + 1], the edges of L bins of rewards [L + 1], the share of each bin [K, L],
    and the mean rewards [K]. A bin holds one reward if at most `LEVELS` different ones occur; otherwise there are
    `LEVELS` bins of equal width. A span without any reward has shares of 0 and the mean nan.

    Raises `UserError` if no completion has a reward.
    """
    known = np.array([(row["step"], row["reward"]) for row in rows if row["reward"] is not None], float).reshape(-1, 2)
    if not len(known):
        raise UserError("no completion of the run has a reward, so there are no rewards to draw.")
    step, reward = known.T
    last = int(step.max()) + 1
    steps = np.unique(np.linspace(0, last, min(last, COLUMNS) + 1).round())
    values = np.unique(reward.round(6))
    if len(values) <= LEVELS:
        half = np.diff(values).min() / 2 if len(values) > 1 else 0.05
        levels = np.unique(np.concatenate([values - half, values + half]).round(9))
    else:
        levels = np.linspace(values[0], values[-1], LEVELS + 1)
    counts, *_ = np.histogram2d(step, reward, bins=(steps, levels))
    number = np.histogram(step, bins=steps)[0]
    total = np.histogram(step, bins=steps, weights=reward)[0]
    with np.errstate(invalid="ignore"):
        return steps, levels, counts / np.maximum(number, 1)[:, None], total / number


def advantage_map(run_dir: Path, kind: str = "png") -> Path:
    """Draws `RUN/advantage_map.KIND`: a column for each group, its completions sorted by advantage."""
    advantages = advantages_by_group(completion_rows(run_dir))
    largest = float(np.nanpercentile(np.abs(advantages), 99)) or 1.0  # of the maximum, all others could be too pale
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8, 3.6), layout="constrained")
        axes = figure.subplots()
        axes.grid(False)
        norm = TwoSlopeNorm(0.0, -largest, largest)
        image = axes.imshow(
            advantages.T, cmap="RdBu", norm=norm, aspect="auto", origin="lower", interpolation="nearest"
        )
        no_signal = float(np.mean(np.nanmax(np.abs(advantages), axis=1) == 0))
        axes.set_title(f"Advantages by group ({no_signal:.0%} without signal)")
        axes.set_xlabel("groups, in the order of training")
        axes.set_ylabel("completions, sorted")
        figure.colorbar(image, ax=axes, label="advantage")
        return _save(figure, run_dir / f"advantage_map.{kind}")


def advantages_by_group(rows: Sequence[Row]) -> np.ndarray:
    """The advantages of all N groups, [N, G] and sorted within each; nan where a group is smaller than the largest."""
    groups: dict[tuple[int, Any], list[float]] = {}
    for row in rows:
        groups.setdefault((row["step"], row["prompt_id"]), []).append(row["advantage"] or 0.0)
    array = np.full((len(groups), max(map(len, groups.values()))), np.nan)
    for place, members in zip(array, groups.values(), strict=True):
        place[: len(members)] = sorted(members)
    return array


def group_picture(run_dir: Path, step: int, prompt_id: int | None = None, kind: str = "png") -> Path:
    """Draws `RUN/group_STEP.KIND`: a group's completions with their rewards, coloured by advantage, the best on top.

    The group is that of `prompt_id`, or the first of the step. Raises `UserError` if the run has no such group.
    """
    rows = [row for row in completion_rows(run_dir) if row["step"] == step]
    wanted = rows[0]["prompt_id"] if rows and prompt_id is None else prompt_id
    rows = [row for row in rows if row["prompt_id"] == wanted]
    if not rows:
        raise UserError(f"{str(run_dir)!r} has no completions of step {step}, prompt {prompt_id}.")
    counted: dict[str, tuple[int, Row]] = {}
    for row in rows:
        text = visible("\n".join(turns(row["completion"]))).plain
        counted[text] = (counted.get(text, (0, row))[0] + 1, row)
    ranked = sorted(counted.items(), key=lambda item: -(item[1][1]["reward"] or 0.0))
    shown = ranked if len(ranked) <= SHOWN else [*ranked[: SHOWN // 2], *ranked[-SHOWN // 2 :]]
    names = [f"{text[:48]}{'…' * (len(text) > 48)}{f' ×{n}' if n > 1 else ''}" for text, (n, _) in shown]
    rewards = [row["reward"] or 0.0 for _, (_, row) in shown]
    advantages = [row["advantage"] or 0.0 for _, (_, row) in shown]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8, 0.27 * len(shown) + 1), layout="constrained")
        axes = figure.subplots()
        axes.grid(axis="y", visible=False)
        places = range(len(shown))
        axes.barh(
            places, rewards, height=0.7, color=[GREEN if a > 0 else ORANGE if a < 0 else GREY for a in advantages]
        )
        axes.set_yticks(places, names, fontfamily="monospace", fontsize=8)
        for place, reward, advantage in zip(places, rewards, advantages, strict=True):
            axes.annotate(f" {advantage:+.2f}", (reward, place), va="center", fontsize=8, color=GREY)
        axes.invert_yaxis()
        axes.margins(x=0.12, y=0.02)
        more = f", {len(counted)} different; the best and the worst {SHOWN // 2}" if len(counted) > len(shown) else ""
        axes.set_title(f"Step {step}: {len(rows)} completions{more}")
        axes.set_xlabel("reward; beside it the advantage")
        axes.axvline(0, color=BLUE, linewidth=0.8)
        return _save(figure, run_dir / f"group_{step}.{kind}")


def _save(figure: Figure, path: Path) -> Path:
    with writing(path):
        figure.savefig(path, dpi=150)
    return path
