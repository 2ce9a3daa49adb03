"""The data of the HTML page, ready for page.js: curves, heat maps, completions, differences of configs."""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from grpo_jax.experiment import Experiment, to_dict
from grpo_jax.report.axes import fitted
from grpo_jax.report.completion_plots import Row, advantages_by_group, histogram_over_time
from grpo_jax.report.curves import metric_curves, seed_band
from grpo_jax.report.examples import Examples, board, said
from grpo_jax.report.plots import Series, series, smooth
from grpo_jax.runs.files import read_rows
from grpo_jax.statistics import SHARES, bounds_of

COMPLETIONS = 3000  # the most completions on a page
GROUPS, MEMBERS = 120, 24  # the most groups, and members of a group, in the advantage map
POINTS = 200  # the most points of a curve in a report of many runs
HIDDEN = ("num_prompts", "num_samples", "temperature", "_low", "_high", "pass_at_k")  # parts of names without a curve


def curve(name: str, found: Series, colour: int, style: str = "line", *, smoothed: bool = False) -> dict[str, Any]:
    """A curve as page.js expects it. It has bounds if it has points, or if the bounds differ from the values."""
    shown = {"name": name, "colour": colour, "style": style, "x": found.steps.tolist(), "y": digits(found.values)}
    if style == "points" or (found.low != found.high).any():
        shown |= {"low": digits(found.low), "high": digits(found.high)}
    if smoothed:
        shown["smooth"] = digits(smooth(found.values, max(1.0, len(found) / 50)))
    return shown


def chart(
    title: str,
    series: Sequence[Mapping[str, Any]],
    *,
    is_share: bool = False,
    is_band: bool = False,
    rules: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """A plot of curves as page.js expects it, with the range of its axis.

    Args:
      is_share: the values are shares, which are written in percent.
      is_band: the range is that of the curves alone: the intervals of few seeds are so wide that they would flatten
        every curve, and are cut where the plot ends.
      rules: horizontal lines, each with a name and a value.
    """
    values = [value for each in series for value in each["y"]] + [rule["value"] for rule in rules]
    if not is_band:
        values += [value for each in series for value in (*each.get("low", ()), *each.get("high", ()))]
    shown = fitted(values, is_share=is_share, room=0.3 if is_band else 0.0)
    found = {"title": title, "percent": is_share, "series": list(series), "range": list(shown)}
    return found | ({"rules": list(rules)} if rules else {})


def run_charts(run: Path, references: Mapping[str, float]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The main plots of a run, and a plot of each of its metrics by name."""
    rows = list(read_rows(run / "metrics.jsonl"))
    names = sorted({name for row in rows for name in row} - {"step"})
    found = {name: each for name in names if len(each := series(rows, name))}
    success = [
        curve(label, each, colour, "points")
        for label, each, colour in (
            ("held-out success", found.get("evaluation/success"), 0),
            ("on training prompts", found.get("evaluation/train/success"), 4),
            ("warm start", _before(series(read_rows(run / "warm_start" / "metrics.jsonl"), "evaluation/success")), 5),
            ("control", _last(series(read_rows(run / "control" / "metrics.jsonl"), "evaluation/success")), 1),
        )
        if each is not None and len(each)
    ]
    if "success" in found:
        success.append(curve("of the training samples", found["success"], 2, smoothed=True))
    rewards = {"reward": "reward"} | {
        name: name.split("/")[1] for name in names if name.startswith("rewards/") and name.endswith("/mean")
    }
    if len(rewards) == 2:
        rewards = {"reward": "reward"}  # a single reward is the total
    rules = [{"name": name, "value": value} for name, value in references.items()]
    charts: list[dict[str, Any]] = [
        chart("Success", success, is_share=True, rules=rules),
        chart("Training reward", _lines(found, rewards)),
        chart(
            "Signs of collapse",
            _lines(found, {SHARES[0]: "groups without signal", SHARES[1]: "unique completions"}),
            is_share=True,
        ),
        chart("Entropy (nats)", _lines(found, {"entropy": "entropy"})),
    ]
    others = {
        name: chart(name, [curve(name, each, 0, smoothed=not name.startswith("evaluation/"))], is_band=True)
        for name, each in found.items()
        if not any(part in name for part in HIDDEN)
    }
    return [chart for chart in charts if chart["series"]], others


def arm_charts(
    arms: Mapping[str, Sequence[Path]], metric: str
) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]:
    """The main plots of an ablation (metrics with mean and interval over the seeds of each arm), and all by name."""
    names = {name for runs in arms.values() for run in runs for row in read_rows(run / "metrics.jsonl") for name in row}
    wanted = sorted(name for name in names - {"step"} if not any(part in name for part in HIDDEN))
    bands: dict[str, dict[str, Any]] = {}
    for name in wanted:
        bounds = bounds_of(name)
        found = {arm: seed_band(metric_curves(runs, name), bounds) for arm, runs in arms.items()}
        drawn = [curve(arm, _thinned(each), i) for i, (arm, each) in enumerate(found.items()) if len(each)]
        if drawn:
            bands[name] = chart(name, drawn, is_share=bounds == (0, 1), is_band=True)
    chosen = dict.fromkeys((metric, "reward", "success", "frac_reward_zero_std", "entropy"))
    return [bands[name] for name in chosen if name in bands], bands


def heat_maps(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The heat maps of rewards over time and of advantages by group; an empty list if no completion has a reward."""
    if not any(row["reward"] is not None for row in rows):
        return []
    steps, levels, shares, mean = histogram_over_time(rows)
    centres = (levels[:-1] + levels[1:]) / 2
    rewards = {
        "title": "Rewards over time",
        "note": "How many of a step's completions earned each reward.",
        "columns": steps.tolist(),
        "rows": digits(levels),
        "cells": [digits(np.sqrt(column)) for column in shares],  # so that a few per cent can be seen
        "labels": {
            "columns": [f"step {a:.0f}: mean {m:.3f}" for a, m in zip(steps[:-1], mean, strict=True)],
            "rows": [f"reward {centre:.3g}" for centre in centres],
            "cells": [[f"{share:.1%}" for share in column] for column in shares],
        },
    }
    advantages = advantages_by_group(rows)
    places = np.unique(np.linspace(0, len(advantages) - 1, min(len(advantages), GROUPS)).round().astype(int))
    ranks = np.unique(np.linspace(0, advantages.shape[1] - 1, min(advantages.shape[1], MEMBERS)).round().astype(int))
    shown = np.nan_to_num(advantages[places][:, ranks])
    largest = float(np.percentile(np.abs(advantages[~np.isnan(advantages)]), 99)) or 1.0
    no_signal = float(np.mean(np.nanmax(np.abs(advantages), axis=1) == 0))
    groups = {
        "title": "Advantages by group",
        "note": f"A column is a group, its completions sorted; blue is pushed up, orange down; {no_signal:.1%} of "
        f"{len(advantages)} groups have no signal.",
        "columns": list(range(len(places) + 1)),
        "rows": list(range(len(ranks) + 1)),
        "cells": [digits(np.clip(column / largest, -1, 1)) for column in shown],
        "labels": {
            "columns": [f"group {place + 1}" for place in places],
            "rows": [f"completion {rank + 1} of {advantages.shape[1]}" for rank in ranks],
            "cells": [[f"advantage {value:+.2f}" for value in column] for column in shown],
        },
    }
    return [rewards, groups]


def completions(runs: Mapping[str, Sequence[Row]]) -> tuple[dict[str, Any], str]:
    """The completions of some runs, by the run's name, as page.js expects them; and a sentence on which these are.

    If there are more than `COMPLETIONS`, those of evenly spaced steps are taken, with the first and the last step.
    """
    allowance = COMPLETIONS // max(len(runs), 1)
    examples = Examples()
    rewards = list(dict.fromkeys(name for rows in runs.values() for row in rows for name in row["rewards"]))
    shown, num_chosen, num_steps = [], 0, 0
    for index, rows in enumerate(runs.values()):
        steps = sorted({row["step"] for row in rows})
        wanted = max(allowance * len(steps) // max(len(rows), 1), 2)
        chosen = {steps[round(i)] for i in np.linspace(0, len(steps) - 1, min(wanted, len(steps)))} if steps else set()
        num_chosen, num_steps = num_chosen + len(chosen), num_steps + len(steps)
        for row in rows:
            if row["step"] in chosen:
                earned = [row["rewards"].get(name) for name in rewards]
                paid = [row["reward"], row["advantage"], earned]
                shown.append([index, row["step"], examples.number(row), said(row), *paid, board(row)])
    which = f"all {num_steps}" if num_chosen == num_steps else f"{num_chosen} of {num_steps}"
    note = f"Completions of {which} steps{f' of {len(runs)} runs' if len(runs) > 1 else ''}."
    return {"runs": list(runs), "examples": examples.shown(), "rewards": rewards, "rows": shown}, note


def defaults() -> dict[str, Any]:
    """The defaults of an experiment's fields, with dotted names; fields without a default are None."""
    fields = [field for field in dataclasses.fields(Experiment) if field.name not in ("task", "rewards")]
    return flat(
        {field.name: to_dict(field.default if field.default is not dataclasses.MISSING else None) for field in fields}
    )


def differences(columns: Mapping[str, Mapping[str, Any]], ignore: Iterable[str] = ()) -> list[list[str]]:
    """The fields that differ between flat configs: rows of the field's name and its value in each of them."""
    names = list(dict.fromkeys(name for column in columns.values() for name in column))
    return [
        [name, *("–" if name not in column else json.dumps(column[name]) for column in columns.values())]
        for name in names
        if name not in ignore and len({json.dumps(column.get(name)) for column in columns.values()}) > 1
    ]


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested config with dotted names, as `--set` takes them."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) and value else {f"{prefix}{name}": value}
    return found


def digits(values: np.ndarray) -> list[float]:
    """The numbers rounded to five significant digits, to keep the page small."""
    return [float(f"{value:.5g}") for value in values.tolist()]


def _lines(found: Mapping[str, Series], names: Mapping[str, str]) -> list[dict[str, Any]]:
    """A smoothed curve for each metric in `names` (metric: label) that the run has."""
    return [
        curve(label, found[name], colour + 2, smoothed=True)
        for colour, (name, label) in enumerate(names.items())
        if name in found
    ]


def _before(found: Series) -> Series:
    """The curve of a warm start, moved so that its last step is 0, where the run begins."""
    return dataclasses.replace(found, steps=found.steps - found.steps.max()) if len(found) else found


def _last(found: Series) -> Series:
    """The last point of a curve."""
    return Series(*(column[-1:] for column in (found.steps, found.values, found.low, found.high)))


def _thinned(found: Series) -> Series:
    """At most `POINTS` of a curve's points, evenly spaced, with the first and the last."""
    chosen = np.unique(np.linspace(0, len(found) - 1, min(len(found), POINTS)).round().astype(int))
    return Series(*(column[chosen] for column in (found.steps, found.values, found.low, found.high)))
