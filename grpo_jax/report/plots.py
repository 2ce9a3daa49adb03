"""The learning curve of a run, drawn from the files in its directory. Also what all plots share: style and labels."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from scipy.signal import fftconvolve

from grpo_jax.errors import RunError, UserError
from grpo_jax.report.axes import fitted, percent
from grpo_jax.runs.files import read_json, read_rows

BLUE, ORANGE, GREEN, PURPLE, GREY = "#2563a8", "#d1661c", "#2e8b57", "#7b4fa3", "#6b7280"
# Metrics that show a collapse early: groups without signal, equal completions, low entropy.
COLLAPSE = {
    "frac_reward_zero_std": ("groups without signal", ORANGE),
    "completions/unique_fraction": ("unique completions", GREEN),
    "entropy": ("entropy (nats)", PURPLE),
}
STYLE: dict[Any, Any] = {
    "text.parse_math": False,  # names and completions may contain dollar signs
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "xtick.color": GREY,
    "ytick.color": GREY,
    "axes.grid": True,
    "grid.color": "#e5e7eb",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
}


@dataclass(frozen=True)
class Series:
    """Values [N] at steps [N], with the bounds `low` and `high` [N] of their 95 % intervals."""

    steps: np.ndarray
    values: np.ndarray
    low: np.ndarray
    high: np.ndarray

    def __len__(self) -> int:
        return len(self.steps)


def learning_curve(run_dir: str | Path, kind: str = "png") -> Path:
    """Draws `RUN/learning_curve.KIND` from the metrics of a run, its warm start and its control, and returns its path.

    The upper panel has the training reward of each step with a smoothed line; the held-out success with 95 % intervals,
    and the success on training prompts (hollow points) if it was evaluated; the warm start left of step 0; the control
    right of the last step; and a line for each of the summary's `references` (e.g. the success rates of a blind and a
    perfect player). A reward outside [0, 1] has its own panel. The lower panel has the signs of collapse.

    Raises:
      UserError: if the directory holds no metrics.
      RunError: if the picture cannot be written.
    """
    run_dir = Path(run_dir)
    rows = list(read_rows(run_dir / "metrics.jsonl"))
    if not rows:
        raise UserError(f"{str(run_dir)!r} holds no metrics.jsonl with a step in it, so there is no curve to draw.")
    reward, success = series(rows, "reward"), series(rows, "evaluation/success")
    train = series(rows, "evaluation/train/success")
    warm_start, control = (
        series(read_rows(run_dir / name / "metrics.jsonl"), "evaluation/success") for name in ("warm_start", "control")
    )
    collapse = {name: found for name in COLLAPSE if len(found := series(rows, name))}
    shared = not len(reward) or (reward.values.min() >= 0 and reward.values.max() <= 1)
    panels = ["success"] + ["reward"] * (not shared) + ["collapse"] * bool(collapse)

    with matplotlib.rc_context(STYLE):
        heights = [1.1 if panel == "collapse" else 2.6 for panel in panels]
        figure = Figure(figsize=(8, sum(heights) + 0.9), layout="constrained")
        grid = figure.subplots(len(panels), sharex=True, height_ratios=heights, squeeze=False)
        axes = dict(zip(panels, grid[:, 0], strict=True))
        top = _draw_success(axes["success"], success, train, warm_start, control, _references(run_dir))
        drawn = [success, train, warm_start, control, *([reward] if shared else [])]
        values = [*_references(run_dir).values(), *(x for s in drawn for x in (*s.values, *s.low, *s.high))]
        axes["success"].set_ylim(*fitted(values, is_share=True))
        if shared:
            top += _draw_reward(axes["success"], reward)
            axes["success"].set_title("Held-out success and training reward" if len(reward) else "Held-out success")
        else:
            axes["success"].set_title("Held-out success")
            axes["reward"].set_title("Training reward")
            label_right(axes["reward"], _draw_reward(axes["reward"], reward))
        label_right(axes["success"], top)
        if collapse:
            axes["collapse"].set_title("Signs of collapse")
            label_right(axes["collapse"], _draw_collapse(axes["collapse"], collapse))
        axes[panels[-1]].set_xlabel("updates")
        axes[panels[-1]].xaxis.set_major_locator(MaxNLocator(integer=True))
        path = run_dir / f"learning_curve.{kind}"
        try:
            figure.savefig(path, dpi=150)
        except OSError as error:
            raise RunError(f"cannot write {path}: {error.strerror or error}.") from error
    return path


def series(rows: Iterable[Mapping[str, Any]], name: str) -> Series:
    """The values of the metric `name` that are not None; steps without one are left out.

    The bounds are `{name}_low` and `{name}_high`, or the value itself if a row lacks them.
    """
    found = [(row["step"], row[name], row.get(f"{name}_low"), row.get(f"{name}_high")) for row in rows if name in row]
    bounded = [
        (s, v, v if low is None else low, v if high is None else high) for s, v, low, high in found if v is not None
    ]
    return Series(*np.array(bounded, float).reshape(-1, 4).T)


def smooth(values: np.ndarray, width: float) -> np.ndarray:
    """The Gaussian-weighted mean around each of `values` [N], over about `width` neighbours on either side."""
    reach = min(len(values) - 1, math.ceil(8 * width))  # further away a weight is less than rounding
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / width) ** 2)
    # Not a matrix of all weights: that of a run of 100,000 steps has 80 GB.
    sums, weights = (fftconvolve(x, kernel, mode="same") for x in (values, np.ones(len(values))))
    return np.asarray(sums / weights)


def _references(run_dir: Path) -> dict[str, float]:
    """The success rates in a run's summary that its own is compared with, by name."""
    return read_json(run_dir / "summary.json").get("references", {})


Labels = list[tuple[float, str, str]]  # (height, text, colour)


def _draw_success(
    axes: Axes,
    success: Series,
    train: Series,
    warm_start: Series,
    control: Series,
    references: Mapping[str, float],
) -> Labels:
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    labels = [(value, f"{name} {percent(value)}", GREY) for name, value in references.items()]
    for value in references.values():
        axes.axhline(value, color=GREY, linewidth=1, linestyle=(0, (4, 3)))
    if len(warm_start):
        place = warm_start.steps - warm_start.steps.max()
        axes.axvspan(place.min(), 0, color=GREY, alpha=0.1, linewidth=0)
        middle = place.min() / 2
        axes.text(middle, 0.98, "warm start", ha="center", va="top", color=GREY, transform=axes.get_xaxis_transform())
        _points(axes, place, warm_start, GREY)
    if len(train):
        _points(axes, train.steps, train, BLUE, markerfacecolor="white")
        labels.append((train.values[-1], f"on training prompts {percent(train.values[-1])}", BLUE))
    if len(success):
        _points(axes, success.steps, success, BLUE)
        labels.append((success.values[-1], f"success {percent(success.values[-1])}", BLUE))
    if len(control):
        end = max([*success.steps, *control.steps])
        last = Series(control.steps[-1:], control.values[-1:], control.low[-1:], control.high[-1:])
        _points(axes, np.array([end + max(0.3, 0.02 * end)]), last, ORANGE)  # beside the last point, not on it
        labels.append((control.values[-1], f"control {percent(control.values[-1])}", ORANGE))
    return labels


def _points(axes: Axes, place: np.ndarray, points: Series, colour: str, **style: Any) -> None:
    spread = np.abs(np.stack([points.values - points.low, points.high - points.values]))
    axes.errorbar(place, points.values, spread, fmt="o", color=colour, ms=5, linewidth=1.8, zorder=3, **style)


def _draw_reward(axes: Axes, reward: Series) -> Labels:
    if not len(reward):
        return []
    line = smooth(reward.values, width=max(1.0, len(reward) / 50))
    axes.plot(reward.steps, reward.values, color=GREEN, linewidth=1, alpha=0.35)
    axes.plot(reward.steps, line, color=GREEN, linewidth=2)
    return [(line[-1], f"reward {line[-1]:.2f}", GREEN)]


def _draw_collapse(axes: Axes, collapse: Mapping[str, Series]) -> Labels:
    labels = []
    for name, found in collapse.items():
        text, colour = COLLAPSE[name]
        line = smooth(found.values, width=max(1.0, len(found) / 50))
        axes.plot(found.steps, line, color=colour, linewidth=1.6)
        labels.append((line[-1], f"{text} {line[-1]:.2f}", colour))
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_locator(MaxNLocator(3))
    return labels


def label_right(axes: Axes, labels: Labels) -> None:
    """Writes each label right of the axes at its height; labels that would overlap are moved apart."""
    low, high = axes.get_ylim()
    assert isinstance(axes.figure, Figure)
    inches = axes.get_position().height * axes.figure.get_figheight()
    gap = 0.19 / inches * (high - low)
    labels = sorted(labels)
    places = [height for height, *_ in labels]
    for _ in range(100):  # each overlap moves its two labels apart, until there is none
        for i in range(len(places) - 1):
            overlap = max(0.0, gap - (places[i + 1] - places[i]))
            places[i], places[i + 1] = places[i] - overlap / 2, places[i + 1] + overlap / 2
    for place, (_, text, colour) in zip(places, labels, strict=True):
        axes.text(1.02, place, text, color=colour, va="center", transform=axes.get_yaxis_transform())
