"""The HTML page about a run or an ablation: one file that loads nothing from anywhere.

The text of a model may be hostile. So the template escapes everything that is written into it, `<` is escaped in the
JSON that holds the data, the script only makes text nodes, and the content security policy forbids other scripts.
"""

import base64
import hashlib
import importlib.resources
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from grpo_jax import statistics
from grpo_jax.errors import UserError
from grpo_jax.experiment import load_ablation
from grpo_jax.experiment.records import needed
from grpo_jax.report.axes import fitted
from grpo_jax.report.completion_plots import advantage_map, group_picture, reward_histograms
from grpo_jax.report.curves import metric_curves, seed_curves
from grpo_jax.report.data import arm_charts, completions, defaults, differences, flat, heat_maps, run_charts
from grpo_jax.report.diagnosis import diagnose
from grpo_jax.report.examples import read_completions
from grpo_jax.report.plots import learning_curve, series
from grpo_jax.runs.files import assigned, jsonable, read_json, read_rows, write_text
from grpo_jax.sweep.processes import plan_of

MINUS = "−"


@dataclass(frozen=True)
class Sweep:
    """The runs of a sweep.

    Attributes:
      arms: the directories of each arm's runs, in the order of the seeds.
      metric, baseline: the ablation's metric and its baseline arm.
      seeds: the seed of each directory.
      missing: a sentence on each planned run that has no directory.
    """

    arms: dict[str, list[Path]]
    metric: str
    baseline: str
    seeds: dict[Path, int] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)


def report(directory: Path, output: Path | None = None) -> Path:
    """Writes the page about the run or the sweep in `directory` and returns the path of the page.

    `output` is a file, or a directory for a file report.html.
    Raises `UserError` if the directory holds neither.
    """
    if not directory.is_dir():
        raise UserError(f"there is no directory {str(directory)!r} with a run or with the runs of a sweep.")
    if (directory / "run.json").is_file():
        page = run_page(directory)
    else:
        page = ablation_page(directory, read_sweep(directory))
    output = output or directory / "report.html"
    if output.is_dir():
        output /= "report.html"
    write_text(output, render(page))
    return output


def draw(directory: Path, kind: str = "png") -> list[Path]:
    """Draws the plots of the run or the sweep in `directory` as files (png, pdf or svg) there; returns their paths."""
    if (directory / "run.json").is_file():
        pictures = [learning_curve(directory, kind)]
        if rows := list(read_rows(directory / "completions.jsonl")):
            pictures += [reward_histograms(directory, kind), advantage_map(directory, kind)]
            steps = sorted({rows[0]["step"], rows[-1]["step"]})
            pictures += [group_picture(directory, step, kind=kind) for step in steps]
        return pictures
    sweep = read_sweep(directory)
    metrics = dict.fromkeys([sweep.metric, "reward"])
    return [
        seed_curves(sweep.arms, metric, directory / f"{metric.replace('/', '_')}.{kind}")
        for metric in metrics
        if any(metric_curves(runs, metric) for runs in sweep.arms.values())
    ]


def render(page: Mapping[str, Any]) -> str:
    """The page as HTML, from what `run_page` or `ablation_page` returned."""
    files = importlib.resources.files("grpo_jax.report")
    html, style, script = ((files / f"page.{kind}").read_text("utf-8") for kind in ("html", "css", "js"))
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    values = {"style": style, "script": script, "script_hash": f"sha256-{digest}"}
    return environment.from_string(html).render(jsonable(page), **values)


def run_page(run: Path) -> dict[str, Any]:
    """The data of the page about a run, finished or not."""
    info, config, summary = (read_json(run / f"{name}.json") for name in ("run", "config", "summary"))
    rows = _completions(run)
    charts, metrics = run_charts(run, summary.get("references", {}))
    shown, note = completions({run.resolve().name: rows})
    return {
        "title": run.resolve().name,
        "facts": _facts(info, config),
        "warnings": [*_unfinished(info), *_changes(info), *diagnose(run)],
        "command": info.get("command"),
        "scores": [table for split in ("held_out", "train") if (table := _score_table(run, split))],
        "data": {"charts": charts, "metrics": metrics, "heat": heat_maps(rows), "completions": shown},
        "completions_note": note,
        "difference": {
            "title": "Config: what differs from the defaults",
            "columns": ["default", "this run"],
            "rows": differences({"default": defaults(), "this run": flat(config)}),
        },
        "configs": {
            "the whole config": json.dumps(config, indent=2, ensure_ascii=False),
            "versions and machine": json.dumps(info, indent=2, ensure_ascii=False),
        },
    }


def ablation_page(directory: Path, sweep: Sweep) -> dict[str, Any]:
    """The data of the page about an ablation: its arms against the baseline."""
    first = {arm: runs[0] for arm, runs in sweep.arms.items()}
    configs = {arm: read_json(run / "config.json") for arm, run in first.items()}
    charts, metrics = arm_charts(sweep.arms, sweep.metric)
    runs = {
        f"{arm}, seed {sweep.seeds[run]}": _completions(run)
        for arm, directories in sweep.arms.items()
        for run in directories
    }
    shown, note = completions({name: rows for name, rows in runs.items() if rows})
    unfinished = [
        f"{arm}, seed {sweep.seeds[run]} is {status}."
        for arm, directories in sweep.arms.items()
        for run in directories
        if (status := read_json(run / "run.json").get("status", "missing")) != "finished"
    ]
    baseline = sweep.baseline
    columns = {baseline: flat(configs[baseline])} | {arm: flat(config) for arm, config in configs.items()}
    return {
        "title": f"Ablation {directory.resolve().name}",
        "facts": [
            f"{len(sweep.arms)} arms, {sum(map(len, sweep.arms.values()))} runs, compared by {sweep.metric}",
            *_facts(read_json(first[baseline] / "run.json"), configs[baseline])[1:],
        ],
        "warnings": [*unfinished, *sweep.missing],
        "command": None,
        "scores": [_arm_table(sweep)],
        "data": {"charts": charts, "metrics": metrics, "heat": [], "completions": shown},
        "completions_note": note,
        "difference": {
            "title": f"Config: what differs from the baseline ({baseline})",
            "columns": list(columns),
            "rows": differences(columns, ignore=["seed"]),
        },
        "configs": {f"the config of {arm}": json.dumps(config, indent=2) for arm, config in configs.items()},
    }


def read_sweep(directory: Path) -> Sweep:
    """The runs in a sweep's directory, from what the sweep wrote there (`grpo_jax.sweep.processes.write_plan`).

    Of a sweep of the first versions, the ablation is read from the copy of its file that each run has.
    Raises `UserError` if the directory holds no run of a sweep.
    """
    plan = read_json(directory / "sweep.json") or _plan_of_first_versions(directory)
    arms: dict[str, list[Path]] = {arm: [] for arm in plan["arms"]}
    seeds, missing = {}, []
    for run in plan["runs"]:
        place = directory / run["key"]
        if not (place / "run.json").is_file():
            missing.append(f"{' = '.join(run['arms'])}, seed {run['seed']} has not begun.")
            continue
        seeds[place] = run["seed"]
        for arm in run["arms"]:
            arms[arm].append(place)
    begun = {arm: runs for arm, runs in arms.items() if runs}
    if not begun:
        raise UserError("no run of this sweep has begun.")
    baseline = plan["baseline"] if plan["baseline"] in begun else next(iter(begun))
    return Sweep(begun, plan["metric"], baseline, seeds, missing)


def _plan_of_first_versions(directory: Path) -> dict[str, Any]:
    """The plan of a sweep that wrote none, with the names of the directories that its runs have.

    Raises `UserError` if the directory holds no run of a sweep.
    """
    found: dict[tuple[str, int], Path] = {}
    for path in sorted(directory.glob("*/run.json")):
        info = read_json(path)
        given = assigned(info)
        if "arm" in given:
            found[given["arm"], needed(info, "seed", path)] = path.parent
            example, source, budget = path.parent, info.get("source"), given.get("budget")
    if not found:
        raise UserError(
            f"{str(directory)!r} is the directory of neither a run nor a sweep: no run.json says that it is."
        )
    plan = plan_of(load_ablation(example / "experiment.py", budget, home=Path(source) if source else None))
    for run in plan["runs"]:
        # Functions defined in the copy have another module name, so a key may differ; the arm and the seed do not.
        others = [found[arm, run["seed"]].name for arm in run["arms"] if (arm, run["seed"]) in found]
        if others and not (directory / run["key"] / "run.json").is_file():
            run["key"] = others[0]
    return plan


def _arm_table(sweep: Sweep) -> dict[str, Any]:
    """A row for each arm: the mean over its seeds of the metric's last value, and the paired difference."""
    values = {arm: _final(runs, sweep) for arm, runs in sweep.arms.items()}
    bounds = statistics.bounds_of(sweep.metric)
    compared = statistics.compare_arms(values, sweep.baseline, bounds)
    means = [each.mean for each in compared.values() if each.mean is not None]
    is_share = bounds == (0, 1)
    low, high = fitted((x for mean in means for x in (mean.value, mean.low, mean.high)), is_share=is_share)
    rows: list[dict[str, Any]] = []
    for arm, known in values.items():
        mean, paired = compared[arm].mean, compared[arm].difference
        if mean is None:
            rows.append({"name": arm, "note": "no seed is finished", "cells": ["0", "–", "–", "–"], "place": None})
            continue
        difference, verdict = "–", "no seed in common with the baseline"
        if arm == sweep.baseline:
            verdict = "the baseline"
        if paired is not None:
            difference, verdict = _interval(paired, signed=True), statistics.verdict(paired)
        cells = [str(len(known)), f"{mean.value:.3f}", _interval(mean, bounds=True), difference]
        place = _place(mean.value, mean.low, mean.high, low, high)
        rows.append({"name": arm, "note": verdict, "cells": cells, "place": place})
    return {
        "title": f"{sweep.metric} at the end",
        "columns": ["seeds", "mean", "95 % interval", "paired difference"],
        "rows": rows,
        "ends": _ends(low, high, is_share),
        "note": statistics.explanation(bounds, has_noise=any(s.noise for k in values.values() for s in k.values())),
    }


def _final(runs: Sequence[Path], sweep: Sweep) -> dict[int, statistics.Score]:
    """The last value of the metric of each finished run, by seed, with its evaluation's own interval."""
    finals = {}
    for run in runs:
        found = series(read_rows(run / "metrics.jsonl"), sweep.metric)
        if len(found) and read_json(run / "run.json").get("status") == "finished":
            half = float(found.high[-1] - found.low[-1]) / 2
            finals[sweep.seeds[run]] = statistics.Score(float(found.values[-1]), half)
    return finals


def _completions(run: Path) -> list[dict[str, Any]]:
    """The rows of a run's completions. Raises `UserError` for one that lacks what the page shows."""
    rows = read_completions(run)
    for row in rows:
        for name in ("step", "prompt", "completion", "rewards", "reward", "advantage"):
            needed(row, name, run / "completions.jsonl")
    return rows


def _evaluated(run: Path, prefix: str) -> list[dict[str, Any]]:
    """The rows of a run's evaluations on a split. Raises `UserError` for one that lacks what the page shows."""
    rows = [row for row in read_rows(run / "metrics.jsonl") if row.get(f"{prefix}/success") is not None]
    for row in rows:
        for name in ("success_low", "success_high", "temperature", "num_prompts", "num_samples", "mean_length"):
            if needed(row, f"{prefix}/{name}", run / "metrics.jsonl") is None:
                raise UserError(f"{run / 'metrics.jsonl'} is damaged, or was edited: {prefix}/{name} is null.")
    return rows


def _score_table(run: Path, split: str) -> dict[str, Any] | None:
    """The evaluations of a split before and after training, and the control's; None if there are none."""
    prefix = "evaluation" if split == "held_out" else f"evaluation/{split}"
    rows = _evaluated(run, prefix)
    if not rows:
        return None
    control = _evaluated(run / "control", prefix)
    shown = {"before": rows[0]}
    if len(rows) > 1:
        shown[f"after {rows[-1]['step']} updates"] = rows[-1]
    if control:
        shown["control"] = control[-1]
    ends = [row[f"{prefix}/success{end}"] for row in shown.values() for end in ("_low", "_high")]
    low, high = fitted(ends, is_share=True)
    first = rows[0]
    how = "greedy" if first[f"{prefix}/temperature"] == 0 else f"temperature {first[f'{prefix}/temperature']:g}"
    num_prompts, num_samples = first[f"{prefix}/num_prompts"], first[f"{prefix}/num_samples"]
    asked = f"{num_prompts} prompt{'s' * (num_prompts > 1)} × {num_samples} sample{'s' * (num_samples > 1)}, {how}."
    about = "The intervals treat the prompts as a random sample, and each prompt's samples as a cluster."
    if num_prompts == 1:
        about = "The intervals are about further samples of this prompt, not about other prompts."
    return {
        "title": f"Evaluation on {split.replace('_', '-')} prompts",
        "columns": ["success", "95 % interval", "reward", "tokens"],
        "rows": [_score_row(name, row, prefix, (low, high)) for name, row in shown.items()],
        "ends": _ends(low, high, True),
        "note": f"{asked} {about}",
    }


def _score_row(name: str, row: Mapping[str, Any], prefix: str, ends: tuple[float, float]) -> dict[str, Any]:
    value, low, high = (row[f"{prefix}/success{end}"] for end in ("", "_low", "_high"))
    reward, length = row.get(f"{prefix}/reward"), row[f"{prefix}/mean_length"]
    cells = [
        f"{100 * value:.1f} %",
        f"{100 * low:.1f} – {100 * high:.1f} %",
        "–" if reward is None else f"{reward:.3f}",
        f"{length:.1f}",
    ]
    return {"name": name, "note": "", "cells": cells, "place": _place(value, low, high, *ends)}


def _place(value: float, low: float, high: float, start: float, end: float) -> dict[str, float]:
    """The position of an interval and its value between start and end, in percent."""
    left, middle, right = (100 * float(np.clip((x - start) / (end - start or 1), 0, 1)) for x in (low, value, high))
    return {"low": round(left, 2), "width": round(right - left, 2), "value": round(middle, 2)}


def _ends(low: float, high: float, is_share: bool) -> list[str]:
    """What stands above the two ends of the intervals' axis; the edge beyond 0 and 100 % is not named."""
    if is_share:
        return [f"{100 * min(max(end, 0.0), 1.0):.3g} %" for end in (low, high)]
    return [f"{end:.3g}".replace("-", MINUS) for end in (low, high)]


def _interval(found: statistics.Estimate, *, signed: bool = False, bounds: bool = False) -> str:
    low, high = (f"{x:+.3f}" if signed else f"{x:.3f}" for x in (found.low, found.high))
    if not np.isfinite(found.low):
        return "–" if bounds else f"{found.value:+.3f}"
    text = f"{low} – {high}" if bounds else f"{found.value:+.3f} [{low}, {high}]"
    return text.replace("-", MINUS)


def _facts(info: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """Two lines on the run: its status, time and seed; its task, method, devices, JAX version and commit."""
    git, device, task = info.get("git") or {}, info.get("device") or {}, config.get("task") or {}
    commit = f"commit {git['commit'][:12]}{' with changes' if git.get('dirty') else ''}" if git else "no commit known"
    begun = [info.get("status"), f"started {info['started']}" if info.get("started") else None]
    where = f"{device.get('count', '?')} × {device.get('kind', 'unknown device')}"
    what = [
        f"task {task.get('name')}" if task.get("name") else None,
        f"method {config['method']}" if "method" in config else None,
    ]
    seed = f"seed {info['seed']}" if "seed" in info else None
    return [
        " · ".join(filter(None, [*begun, seed])),
        " · ".join(
            filter(None, [*what, where, f"jax {info['versions'].get('jax')}" if "versions" in info else None, commit])
        ),
    ]


def _unfinished(info: Mapping[str, Any]) -> list[str]:
    """A sentence on why a run is not finished, unless it is."""
    status, stop = info.get("status", "unknown"), info.get("stop")
    if status == "stopped" and stop:
        reason = f": {stop['reason'].removesuffix('.')}" if stop["reason"] else ""
        who = stop["by"] if "." in stop["by"] else f"The callback {stop['by']}"  # or a field, such as guards.on_spike
        return [f"{who} stopped the run after {stop['steps']} steps{reason}."]
    return [] if status == "finished" else [" ".join(filter(None, [f"The run is {status}.", info.get("error")]))]


def _changes(info: Mapping[str, Any]) -> list[str]:
    """A sentence for each field or set of files that a run was resumed with in another form."""
    sentences = []
    for visit in info.get("resumed", ()):
        since = f"Since step {visit.get('step')}"
        sentences += [f"{since}, {name} was {a}, and is {b}." for name, (a, b) in visit.get("changes", {}).items()]
        if visit.get("code"):
            sentences.append(f"{since}, the run uses edited files: they are in {visit['code']['directory']}/.")
    return sentences
