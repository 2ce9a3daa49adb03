"""Which runs a table compares: those that an ablation's file declares, or those that a sweep noted in its directory."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_jax.errors import UserError
from grpo_jax.experiment import Ablation, records, to_dict
from grpo_jax.experiment.fingerprint import fingerprint
from grpo_jax.runs.files import assigned, read_json


@dataclass(frozen=True)
class Planned:
    """A run of an ablation, as a table needs it.

    Attributes:
      arms, seed, key: which it is, and the name of its directory.
      held_out: a digest of what it is evaluated on; of a stored plan, of all its data.
      config_key: its name without its code, by which a run of other code is found; None where that is not known.
      task: what its config.json must say of its data; None where nothing else tells.
    """

    arms: Sequence[str]
    seed: int
    key: str
    held_out: str
    config_key: str | None = None
    task: Any = None


@dataclass(frozen=True)
class Plan:
    """The runs of an ablation, seed by seed, how they are compared, and the command that makes them."""

    arms: Sequence[str]
    baseline: str
    metric: str
    runs: Sequence[Planned]
    budget: str | None
    command: str


def declared_plan(ablation: Ablation, command: str) -> Plan:
    """The plan of an ablation that a file declares."""
    runs = []
    for run in ablation.runs():
        task = run.config.task
        recorded = json.loads(json.dumps(to_dict(task)))
        runs.append(Planned(run.arms, run.seed, run.key, fingerprint(list(task.held_out)), run.config_key, recorded))
    return Plan(list(ablation.arms), ablation.baseline_arm, ablation.metric, runs, ablation.budget, command)


def stored_plan(directory: Path) -> Plan:
    """The plan that a sweep noted in its directory. No file of the user is executed for it.

    Raises `UserError` if there is none, or if none of its runs has begun.
    """
    try:
        stored = records.read(directory / "sweep.json")
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{str(directory)!r} is not the directory of a sweep: there is no sweep.json in it.") from None
    begun = {run["key"]: info for run in stored["runs"] if (info := read_json(directory / run["key"] / "run.json"))}
    if not begun:
        raise UserError(f"no run of the sweep in {str(directory)!r} has begun.")
    data = {key: fingerprint(read_json(directory / key / "config.json").get("task")) for key in begun}
    some = next(iter(data.values()))  # a run that has not begun does not differ
    runs = [Planned(run["arms"], run["seed"], run["key"], data.get(run["key"], some)) for run in stored["runs"]]
    info = next(iter(begun.values()))
    given = assigned(info)
    overrides = [f"{name}={value}" for name, value in given.items() if name not in ("arm", "budget", "seed")]
    command = ["grpo-jax", "sweep", str(info.get("source")), "--dir", str(directory)]
    command += ["--budget", given["budget"]] if "budget" in given else []
    command += ["--set", *overrides] if overrides else []
    how = stored["arms"], stored["baseline"], stored["metric"]
    return Plan(*how, runs, given.get("budget"), shlex.join(command))
