"""The table of an ablation, from the files in its run directories; layouts.py makes text of it.

The same directories give the same table, byte for byte. Below it stand the command that makes it again, and the runs
that are missing or failed. Arms are comparable only if the same code trained them and they were evaluated on the same
questions, so other runs are refused unless the caller allows them.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_jax import statistics
from grpo_jax.errors import UserError
from grpo_jax.experiment import read_config, read_run
from grpo_jax.experiment.fingerprint import fingerprint
from grpo_jax.runs.files import read_json, read_rows
from grpo_jax.statistics import Arm, Difference, Estimate, Score
from grpo_jax.statistics.plans import Plan, Planned


@dataclass(frozen=True)
class Row:
    """An arm: how many seeds are finished, their mean and interquartile mean, and the difference to the baseline.

    The interquartile mean has no interval: none is known that covers it with a few seeds.

    `better` is the probability that a run of this arm beats a run of the baseline. It and `difference` are None for the
    baseline, and if the two arms have no seed in common. `tokens` is the mean number of tokens that a run sampled in
    training. Everything is None if no seed is finished.
    """

    arm: str
    seeds: int
    mean: Estimate | None
    iqm: float | None
    difference: Difference | None
    better: float | None
    tokens: float | None


@dataclass(frozen=True)
class Table:
    """Rows in the order of the arms, `notes` (name, text) on how they were made, and one line for each missing run.

    `margin` is the largest difference that counts as none, and `has_noise` whether the intervals include those of the
    runs' evaluations.
    """

    metric: str
    baseline: str
    rows: list[Row]
    notes: list[tuple[str, str]]
    missing: list[str]
    margin: float | None = None
    has_noise: bool = False


@dataclass(frozen=True)
class _Finished:
    """What the table needs of a finished run: its metric, the tokens it sampled, its code, and what it ran on."""

    score: Score
    tokens: float
    code: str
    machine: str


def collect(plan: Plan, directory: Path, *, allow_mixed: bool = False, margin: float | None = None) -> Table:
    """Reads every run of an ablation and compares its arms with the baseline, seed by seed.

    The value of a run is the last value of the plan's metric.

    Args:
      directory: where the runs' directories are.
      allow_mixed: also compare runs of different code, runs that were resumed with changes, or arms that are evaluated
        on different examples. A run that is missing may then be one of the same config that other code has made.
      margin: the largest difference that counts as none, in the unit of the metric; None: no arm is called the same.

    Raises:
      UserError: if no run is finished, if a finished run lacks the metric or was trained on other data than the
        ablation's file now describes, or if runs are mixed and `allow_mixed` is false.
    """
    if margin is not None and not margin > 0:
        raise UserError(f"the margin must be above 0, not {margin:g}.")
    planned = plan.runs
    finished: dict[str, _Finished] = {}
    others = _by_config(directory, {run.key for run in planned})
    missing = []
    for run in planned:
        status, place = _status(directory / run.key), directory / run.key
        if status == "not run" and others and run.config_key in others:
            if allow_mixed:
                status, place = "finished", others[run.config_key]
            else:
                status = "made by other code"
        if status == "finished":
            finished[run.key] = _read(place, run, plan.metric, allow_changes=allow_mixed)
        else:
            missing.append(f"{' = '.join(run.arms)} seed {run.seed} ({run.key}): {status}")
    if not finished:
        by_others = sum(run.config_key in others for run in planned) if others else 0
        old = f" (other code has made {by_others} of them, which --allow-mixed compares)" if by_others else ""
        raise UserError(
            f"none of the {len(planned)} runs in {str(directory)!r} is finished{old}: run `{plan.command}` first."
        )
    if not allow_mixed:
        _require_one([(run, finished[run.key].code) for run in planned if run.key in finished], "code")
        of_a_file = planned[0].task is not None  # a directory does not tell the held-out data from the others
        _require_one([(run, run.held_out) for run in planned], "held-out data" if of_a_file else "data")

    by_arm = {arm: {run.seed: finished[run.key] for run in planned if arm in run.arms and run.key in finished}
              for arm in plan.arms}  # fmt: skip
    scores = {arm: {seed: run.score for seed, run in runs.items()} for arm, runs in by_arm.items()}
    compared = statistics.compare_arms(scores, plan.baseline, statistics.bounds_of(plan.metric))
    base = [score.value for score in scores[plan.baseline].values()]
    rows = [_row(arm, list(runs.values()), compared[arm], base) for arm, runs in by_arm.items()]
    keys = {arm: [run.key for run in planned if arm in run.arms] for arm in plan.arms}
    notes = [
        ("command", plan.command),
        ("code", ", ".join(sorted({run.code for run in finished.values()}))),
        ("machine", "; ".join(sorted({run.machine for run in finished.values()}))),
        ("seeds", ", ".join(map(str, dict.fromkeys(run.seed for run in planned)))),
        *([("budget", f"equal {plan.budget}")] if plan.budget else []),
        ("config", fingerprint([run.key for run in planned])),
        *((f"runs of {arm}", " ".join(arm_keys)) for arm, arm_keys in keys.items()),
    ]
    has_noise = any(run.score.noise for run in finished.values())
    return Table(plan.metric, plan.baseline, rows, notes, missing, margin, has_noise)


def _row(arm: str, runs: Sequence[_Finished], compared: Arm, baseline: Sequence[float]) -> Row:
    """The row of an arm, from its finished runs, its comparison with the baseline, and the values of the baseline."""
    if not runs:
        return Row(arm, 0, None, None, None, None, None)
    values = [run.score.value for run in runs]
    better = None
    if compared.difference is not None:
        better = statistics.probability_of_improvement(values, baseline)
    tokens = sum(run.tokens for run in runs) / len(runs)
    iqm = float(statistics.interquartile_mean(values))
    return Row(arm, len(runs), compared.mean, iqm, compared.difference, better, tokens)


def _status(run_dir: Path) -> str:
    """The status in a run's run.json, for a failed run with its error."""
    info = read_json(run_dir / "run.json")
    if not info:
        return "damaged" if (run_dir / "run.json").exists() else "not run"
    status = info.get("status", "damaged")
    return f"failed: {info.get('error')}" if status == "failed" else status


def _by_config(directory: Path, keys: Collection[str]) -> dict[str, Path]:
    """The finished runs in a directory that other code has made, by the name of their config alone."""
    found = {}
    for path in sorted(directory.glob("*/run.json")):
        if path.parent.name not in keys and _status(path.parent) == "finished":
            # The first versions named a run by its config alone.
            found[read_json(path).get("config_key") or path.parent.name] = path.parent
    return found


def last_value(run_dir: Path, metric: str) -> float:
    """The last value of a metric in a run. Raises `UserError` if the run lacks it."""
    return float(_last_row(run_dir, list(read_rows(run_dir / "metrics.jsonl")), metric)[metric])


def _last_row(run_dir: Path, rows: Sequence[dict[str, Any]], metric: str) -> dict[str, Any]:
    """The last of a run's rows that has the metric. Raises `UserError` if none has."""
    last = next((row for row in reversed(rows) if row.get(metric) is not None), None)
    if last is None:
        known = sorted({name for row in rows for name in row} - {"step"})
        raise UserError(f"{str(run_dir)!r} has no metric {metric!r}; it has {', '.join(known)}.")
    return last


def _read(run_dir: Path, run: Planned, metric: str, *, allow_changes: bool) -> _Finished:
    """A finished run.

    Raises `UserError` if its data differ from the ablation's, if it lacks the metric, or was resumed with changes.
    """
    info = read_run(run_dir)
    changed = [visit for visit in info.get("resumed", ()) if visit.get("changes") or visit.get("code")]
    if changed and not allow_changes:
        raise UserError(
            f"{str(run_dir)!r} was resumed with another config or other files at step {changed[0].get('step')}: it is "
            "compared only with --allow-mixed."
        )
    if run.task is not None and read_config(run_dir).get("task") != run.task:
        raise UserError(f"{str(run_dir)!r} was trained on other data than its ablation's file now describes.")
    rows = list(read_rows(run_dir / "metrics.jsonl"))
    last = _last_row(run_dir, rows, metric)
    tokens = [row["num_sampled_tokens"] for row in rows if "num_sampled_tokens" in row]
    return _Finished(
        score=Score(
            float(last[metric]), ((last.get(f"{metric}_high") or 0.0) - (last.get(f"{metric}_low") or 0.0)) / 2
        ),
        tokens=float(tokens[-1]) if tokens else math.nan,  # runs of earlier versions did not count their tokens
        code=_code(info),
        machine=_machine(info),
    )


def _code(info: Mapping[str, Any]) -> str:
    """The code of this package that a run was made with: its digest, or for the first versions their commit."""
    if info.get("package"):
        return info["package"]["digest"]
    git = info.get("git")
    if git is None:
        return "none (outside of a git repository)"
    return git["commit"] + (" with uncommitted changes" if git.get("dirty") else "")


def _machine(info: Mapping[str, Any]) -> str:
    processor, kind = info.get("processor"), info.get("device", {}).get("kind", "unknown")
    if kind != "cpu" or not processor:
        return kind
    return f"{processor['name']} ({', '.join(processor['instructions'])}), {processor['cores']} cores"


def _require_one(found: Sequence[tuple[Planned, str]], what: str) -> None:
    """Raises `UserError` unless all runs have the same value."""
    (first, expected), *others = found
    for run, value in others:
        if value != expected:
            raise UserError(
                f"the {what} of {run.arms[0]} seed {run.seed} is {value}, that of {first.arms[0]} seed {first.seed} "
                f"{expected}: they are compared only with --allow-mixed."
            )


def verdict_of(row: Row, table: Table, *, points: bool = False) -> str:
    """The last column: what an arm's difference to the baseline shows, where asked for in points."""
    if row.mean is None:
        return "no finished run"
    if row.arm == table.baseline:
        return "baseline"
    if row.difference is None:
        return "no pair with the baseline"
    return statistics.verdict(row.difference, table.margin, points=points)
