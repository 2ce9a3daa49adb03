"""What a report shows of a run, as plain data for its page: curves, heat maps, completions, configs."""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from grpo_jax.experiment import Experiment, to_dict
from grpo_jax.report.completion_plots import Row, advantages_by_group, histogram_over_time
from grpo_jax.report.curves import metric_curves, seed_band
from grpo_jax.report.plots import Series, series, smooth
from grpo_jax.rewards import turns
from grpo_jax.runs.display import visible
from grpo_jax.runs.files import read_rows

COMPLETIONS, LONGEST = 3000, 2000  # completions of a page, and characters of one
GROUPS, MEMBERS, POINTS = 120, 24, 200  # of the advantage map, and of a curve in a report of many
SHARES = ("frac_reward_zero_std", "completions/unique_fraction", "completions/top_share", "completions/clipped_ratio")
RATES = (*SHARES, "success", "evaluation/success", "evaluation/train/success")
HIDDEN = ("num_prompts", "num_samples", "temperature", "_low", "_high", "pass_at_k")  # no curves to look at


def curve(name: str, found: Series, colour: int, style: str = "line", *, smoothed: bool = False) -> dict[str, Any]:
    """A curve as page.js draws it; bounds only where they differ from the values."""
    shown = {"name": name, "colour": colour, "style": style, "x": found.steps.tolist(), "y": digits(found.values)}
    if style == "points" or (found.low != found.high).any():
        shown |= {"low": digits(found.low), "high": digits(found.high)}
    if smoothed:
        shown["smooth"] = digits(smooth(found.values, max(1.0, len(found) / 50)))
    return shown


def run_charts(run: Path, references: Mapping[str, float]) -> tuple[list[dict[str, Any]], dict[str, list[Any]]]:
    """The plots of a run that always matter, and a curve for each of its other metrics by name."""
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
    charts = [
        {"title": "Success", "percent": True, "series": success, "rules": rules},
        {"title": "Training reward", "series": _lines(found, rewards)},
        {
            "title": "Signs of collapse",
            "percent": True,
            "series": _lines(found, {SHARES[0]: "groups without signal", SHARES[1]: "unique completions"}),
        },
        {"title": "Entropy (nats)", "series": _lines(found, {"entropy": "entropy"})},
    ]
    others = {
        name: [curve(name, each, 0, smoothed=not name.startswith("evaluation/"))]
        for name, each in found.items()
        if not any(part in name for part in HIDDEN)
    }
    return [chart for chart in charts if chart["series"]], others


def arm_charts(
    arms: Mapping[str, Sequence[Path]], metric: str
) -> tuple[list[dict[str, Any]], dict[str, list[dict[str, Any]]]]:
    """Each metric's mean over the seeds of every arm, with its interval: the important ones, and all by name."""
    names = {name for runs in arms.values() for run in runs for row in read_rows(run / "metrics.jsonl") for name in row}
    wanted = sorted(name for name in names - {"step"} if not any(part in name for part in HIDDEN))
    bands: dict[str, list[dict[str, Any]]] = {}
    for name in wanted:
        found = {arm: seed_band(metric_curves(runs, name)) for arm, runs in arms.items()}
        if name in RATES:  # Student's interval of a few seeds does not know that a rate stays in [0, 1]
            found = {arm: Series(b.steps, b.values, *np.clip((b.low, b.high), 0, 1)) for arm, b in found.items()}
        drawn = [curve(arm, _thinned(each), i) for i, (arm, each) in enumerate(found.items()) if len(each)]
        if drawn:
            bands[name] = drawn
    chosen = dict.fromkeys((metric, "reward", "success", "frac_reward_zero_std", "entropy"))
    charts = [
        {
            "title": name,
            "series": bands[name],
            "clip": True,
            "percent": name in RATES,
        }
        for name in chosen
        if name in bands
    ]
    return charts, bands


def heat_maps(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rewards over time, and the advantages of each group; empty where no completion has a reward."""
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
    dead = float(np.mean(np.nanmax(np.abs(advantages), axis=1) == 0))
    groups = {
        "title": "Advantages by group",
        "note": f"A column is a group, its completions sorted; blue is pushed up, orange down; {dead:.1%} of "
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
    """The completions of some runs as page.js filters them, and a sentence on which of them these are.

    Of many, those of evenly spaced steps are taken, always with the first and the last.
    """
    allowance = COMPLETIONS // max(len(runs), 1)
    prompts: dict[str, int] = {}
    rewards = list(dict.fromkeys(name for rows in runs.values() for row in rows for name in row["rewards"]))
    shown, num_chosen, num_steps = [], 0, 0
    for index, rows in enumerate(runs.values()):
        steps = sorted({row["step"] for row in rows})
        wanted = max(allowance * len(steps) // max(len(rows), 1), 2)
        chosen = {steps[round(i)] for i in np.linspace(0, len(steps) - 1, min(wanted, len(steps)))} if steps else set()
        num_chosen, num_steps = num_chosen + len(chosen), num_steps + len(steps)
        for row in rows:
            if row["step"] in chosen:
                prompt = prompts.setdefault(_text(row["prompt"]), len(prompts))
                earned = [row["rewards"].get(name) for name in rewards]
                shown.append(
                    [index, row["step"], prompt, _said(row["completion"]), row["reward"], row["advantage"], earned]
                )
    which = f"all {num_steps}" if num_chosen == num_steps else f"{num_chosen} of {num_steps}"
    note = f"Completions of {which} steps{f' of {len(runs)} runs' if len(runs) > 1 else ''}."
    return {"runs": list(runs), "prompts": list(prompts), "rewards": rewards, "rows": shown}, note


def defaults() -> dict[str, Any]:
    """What an experiment's fields are unless it says otherwise, flat; a field without a default is not there."""
    fields = [field for field in dataclasses.fields(Experiment) if field.name not in ("task", "rewards")]
    return flat(
        {field.name: to_dict(field.default if field.default is not dataclasses.MISSING else None) for field in fields}
    )


def differences(columns: Mapping[str, Mapping[str, Any]], ignore: Iterable[str] = ()) -> list[list[str]]:
    """The fields in which flat configs differ: rows of the field's name and its value in each of the columns."""
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
    """The numbers to five digits: a page need not carry more."""
    return [float(f"{value:.5g}") for value in values.tolist()]


def _lines(found: Mapping[str, Series], names: Mapping[str, str]) -> list[dict[str, Any]]:
    return [
        curve(label, found[name], colour + 2, smoothed=True)
        for colour, (name, label) in enumerate(names.items())
        if name in found
    ]


def _before(found: Series) -> Series:
    """A warm start's curve, which ends where the run begins."""
    return dataclasses.replace(found, steps=found.steps - found.steps.max()) if len(found) else found


def _last(found: Series) -> Series:
    return Series(*(column[-1:] for column in (found.steps, found.values, found.low, found.high)))


def _thinned(found: Series) -> Series:
    """At most `POINTS` of the points, with the first and the last."""
    chosen = np.unique(np.linspace(0, len(found) - 1, min(len(found), POINTS)).round().astype(int))
    return Series(*(column[chosen] for column in (found.steps, found.values, found.low, found.high)))


def _said(completion: Any) -> str:
    text = "\n⋯\n".join(_printable(turn) for turn in turns(completion))
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}… ({len(text)} characters)"


def _text(prompt: Any) -> str:
    """The prompt, of a chat its last message, cut to what a choice can show."""
    return _printable(prompt if isinstance(prompt, str) else prompt[-1]["content"])[:300]


def _printable(text: str) -> str:
    """With control and invisible characters spelled out, which could make a line look like another; newlines stay."""
    return "\n".join(visible(line).plain for line in text.split("\n"))
