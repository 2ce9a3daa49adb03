"""Pictures of a run, drawn from the files in its directory alone, so that they can be drawn again at any time."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from grpo_jax.errors import RunError, UserError
from grpo_jax.logs import read_rows

BLUE, ORANGE, GREEN, PURPLE, GREY = "#2563a8", "#d1661c", "#2e8b57", "#7b4fa3", "#6b7280"
# Metrics by which a collapse shows first: no signal in the groups, no doubt in the policy, no variety in its answers.
COLLAPSE = {
    "frac_reward_zero_std": ("groups without signal", ORANGE),
    "completions/unique_fraction": ("unique completions", GREEN),
    "entropy": ("entropy (nats)", PURPLE),
}
STYLE = {
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
    """Values [N] at updates [N]; steps without a value are left out. `low`, `high` [N] bound a 95 % interval."""

    steps: np.ndarray
    values: np.ndarray
    low: np.ndarray
    high: np.ndarray

    def __len__(self) -> int:
        return len(self.steps)


def learning_curve(run_dir: str | Path) -> Path:
    """Draws `RUN/learning_curve.png` from the metrics of a run, its warm start and its control, and returns its path.

    Above: the training reward of each step with a smoothed line, the held-out success with 95 % intervals, the
    warm start left of step 0, the control beside the last step, and a line for each of the summary's `references`
    (success rates of, say, a blind and a perfect player). A reward that leaves [0, 1] gets a panel of its own.
    Below: the signs of collapse. Raises `UserError` if the directory holds no metrics.
    """
    run_dir = Path(run_dir)
    rows = list(read_rows(run_dir / "metrics.jsonl"))
    if not rows:
        raise UserError(f"{str(run_dir)!r} holds no metrics.jsonl with a step in it, so there is no curve to draw.")
    reward, success = series(rows, "reward"), series(rows, "evaluation/success")
    warm_start = series(read_rows(run_dir / "warm_start" / "metrics.jsonl"), "evaluation/success")
    control = series(read_rows(run_dir / "control" / "metrics.jsonl"), "evaluation/success")
    collapse = {name: found for name in COLLAPSE if len(found := series(rows, name))}
    shared = not len(reward) or (reward.values.min() >= 0 and reward.values.max() <= 1)
    panels = ["success"] + ["reward"] * (not shared) + ["collapse"] * bool(collapse)

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8, 1.4 + 2.2 * len(panels) + 0.6), layout="constrained")
        axes = figure.subplots(len(panels), sharex=True, height_ratios=[1 if p == "collapse" else 2 for p in panels])
        axes = dict(zip(panels, np.atleast_1d(axes), strict=True))
        _draw_success(axes["success"], success, warm_start, control, _references(run_dir))
        if len(reward):
            _draw_reward(axes["success" if shared else "reward"], reward, shared)
        if collapse:
            _draw_collapse(axes["collapse"], collapse)
        axes[panels[-1]].set_xlabel("updates")
        axes[panels[-1]].xaxis.set_major_locator(MaxNLocator(integer=True))
        path = run_dir / "learning_curve.png"
        try:
            figure.savefig(path, dpi=150)
        except OSError as error:
            raise RunError(f"cannot write {path}: {error.strerror or error}.") from error
    return path


def series(rows: Sequence[Mapping[str, object]], name: str) -> Series:
    """Returns the finite values of metric `name` with the bounds `{name}_low` and `{name}_high` (the value itself)."""
    found = [(row["step"], row[name], row.get(f"{name}_low"), row.get(f"{name}_high")) for row in rows if name in row]
    found = [(step, v, v if low is None else low, v if high is None else high) for step, v, low, high in found if v is not None]
    return Series(*np.array(found, float).reshape(-1, 4).T)


def smooth(values: np.ndarray, width: float) -> np.ndarray:
    """Returns the Gaussian-weighted mean around each of `values` [N], over about `width` neighbours on either side."""
    index = np.arange(len(values))
    weights = np.exp(-0.5 * ((index[:, None] - index[None, :]) / width) ** 2)
    return weights @ values / weights.sum(axis=1)


def _references(run_dir: Path) -> dict[str, float]:
    path = run_dir / "summary.json"
    return json.loads(path.read_text()).get("references", {}) if path.is_file() else {}


def _draw_success(
    axes: Axes, success: Series, warm_start: Series, control: Series, references: Mapping[str, float]
) -> None:
    axes.set_title("Held-out success, 95 % intervals")
    axes.set_ylim(-0.03, 1.03)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    for name, value in references.items():
        axes.axhline(value, color=GREY, linewidth=1, linestyle=(0, (4, 3)))
        _label(axes, 0.01, value, f"{name} {value:.0%}", GREY, transform=axes.get_yaxis_transform(), above=value < 0.9)
    if len(warm_start):
        shifted = warm_start.steps - warm_start.steps.max()
        _points(axes, shifted, warm_start, GREY)
        axes.axvspan(shifted.min(), 0, color=GREY, alpha=0.08, linewidth=0)
        _label(axes, shifted.min() / 2, 0.0, "warm start", GREY, ha="center")
    if len(success):
        _points(axes, success.steps, success, BLUE)
        _label(axes, success.steps[-1], success.values[-1], f"  {success.values[-1]:.0%}", BLUE, ha="left", va="center")
    if len(control):
        end = success.steps[-1] if len(success) else control.steps[-1]
        beside = Series(*(getattr(control, part)[-1:] for part in ("steps", "values", "low", "high")))
        place = np.array([end * 1.08 + 0.5])
        _points(axes, place, beside, ORANGE)
        _label(axes, place[0], beside.values[0], f"  control {beside.values[0]:.0%}", ORANGE, ha="left", va="center")
