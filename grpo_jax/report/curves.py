"""Learning curves of an ablation: the mean over seeds of each arm, with its 95 % interval."""

from collections.abc import Mapping, Sequence
from itertools import cycle, product
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from grpo_jax import statistics
from grpo_jax.errors import UserError
from grpo_jax.report.axes import fitted
from grpo_jax.report.plots import BLUE, GREEN, GREY, ORANGE, PURPLE, STYLE, Series, label_right, series, smooth
from grpo_jax.runs.files import read_rows, writing
from grpo_jax.text import on_line

COLOURS = (BLUE, ORANGE, GREEN, PURPLE, "#b83280", "#0e7c86", GREY)
DASHES = {"-": "", "--": "╌ ", ":": "┈ "}  # dashed lines follow the last colour; their labels begin so


def seed_curves(arms: Mapping[str, Sequence[Path]], metric: str, path: Path) -> Path:
    """Draws the mean of `metric` over each arm's runs, with its 95 % interval, against the updates; returns `path`.

    If there are more arms than colours, no intervals are drawn: they would hide one another, and the table has them.

    Raises `UserError` if no run has the metric.
    """
    bounds = statistics.bounds_of(metric)
    bands = {name: found for name, runs in arms.items() if len(found := seed_band(metric_curves(runs, metric), bounds))}
    if not bands:
        raise UserError(f"none of the runs has a metric {metric!r}, so there is no curve to draw.")
    banded = len(bands) <= len(COLOURS)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8, max(4, len(bands) / 4)), layout="constrained")  # a label takes a quarter of an inch
        axes, labels = figure.subplots(), []
        looks = cycle(product(DASHES, COLOURS))
        for (name, found), (dash, colour) in zip(bands.items(), looks, strict=False):
            if banded:
                axes.fill_between(found.steps, found.low, found.high, color=colour, alpha=0.18, linewidth=0)
            axes.plot(
                found.steps,
                found.values,
                color=colour,
                linewidth=2,
                linestyle=dash,
                marker="o" if len(found) < 12 else None,
            )
            num = len(arms[name])
            labels.append(
                (found.values[-1], f"{DASHES[dash]}{on_line(name)} {found.values[-1]:.3g} (n = {num})", colour)
            )
        shown = np.concatenate([found.values for found in bands.values()])
        # Of the curves alone: the interval of two seeds is so wide that it would flatten every curve.
        axes.set_ylim(*fitted(shown, is_share=bounds == (0, 1), room=0.5))
        axes.set_title(f"{on_line(metric)}: mean over seeds{', 95 % interval' if banded else ''}")
        axes.set_xlabel("updates")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        label_right(axes, labels)
        with writing(path):
            figure.savefig(path, dpi=150)
    return path


def seed_band(curves: Sequence[Series], bounds: statistics.Bounds | None = None) -> Series:
    """The mean of several seeds' curves at the steps that all have, with the 95 % interval of `statistics.mean`.

    It includes the intervals of the seeds' own evaluations, as in the table of an ablation. Each step has its own
    interval. Where it is infinite, and for a single seed, low and high are the value itself.
    """
    if not curves:
        return Series(*np.zeros((4, 0)))
    steps = curves[0].steps
    for curve in curves[1:]:
        steps = np.intersect1d(steps, curve.steps)
    chosen = [np.isin(curve.steps, steps) for curve in curves]
    values = np.stack([curve.values[at] for curve, at in zip(curves, chosen, strict=True)])
    if len(curves) == 1:
        return Series(steps, values[0], values[0], values[0])
    halves = np.stack([(curve.high - curve.low)[at] / 2 for curve, at in zip(curves, chosen, strict=True)])
    middle, low, high = statistics.interval(values.T, bounds, halves.mean(0))
    return Series(steps, middle, *(np.where(np.isfinite(limit), limit, middle) for limit in (low, high)))


def metric_curves(runs: Sequence[Path], metric: str) -> list[Series]:
    """The metric of every run that has it. Metrics of training steps, which are noisy, are smoothed."""
    found = [each for run in runs if len(each := series(read_rows(run / "metrics.jsonl"), metric))]
    if metric.startswith("evaluation/"):
        return found
    return [Series(c.steps, smooth(c.values, max(1.0, len(c) / 50)), c.low, c.high) for c in found]
