#!/usr/bin/env python
"""Makes the pages of docs/results that stand on an ablation, and says which of them are stale.

    python scripts/results.py temperature            the sweep, the same sweep from perturbed weights, and the page
    python scripts/results.py --check                whether each page is what today's code would make
    python scripts/results.py temperature --repeat 2 two seeds of each arm with today's code: are they still the same?
    python scripts/results.py my_ablation.py --output DIR    a page about an ablation of your own

A page `NAME.md` has two parts. What stands above the line `<!-- made by scripts/results.py -->` is written by hand, and
stays. Below it, and in `NAME.json`, `NAME.csv` and `NAME.png`, stands what was measured: the table, the value of every
seed, and the processor, the versions and the code that it was measured with.

A task may be chaotic: the last digit of a sum decides whether a run succeeds. So every sweep is made again from weights
that are perturbed by 1e-6 (`policy.perturbation`), and the page says which verdicts stand in both. What is finished is
not run again, so the same command continues a sweep that was stopped.

`--repeat` is for code that has changed without changing a number: it trains some seeds of every arm anew and compares
what they came to with the page, to the last digit. Where they are the same, the page says so, and is current again.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

from grpo_jax.cli import common
from grpo_jax.errors import UserError, exit_status
from grpo_jax.experiment import Ablation, load_ablation, sources
from grpo_jax.runs.files import write_text

ROOT = Path(__file__).resolve().parents[1]
ABLATIONS = ROOT / "experiments" / "ablations"
PAGES = ROOT / "docs" / "results"
MARK = "<!-- made by scripts/results.py -->"
PERTURBATION = 1e-6
REPEATED = "Repeated"
KINDS: dict[str, list[str]] = {"as it is": [], "perturbed": [f"policy.perturbation={PERTURBATION}"]}
"""How the sweep of a page is made, and with which overrides of the ablation."""


@dataclass(frozen=True)
class Plan:
    """An ablation's file, where its runs go and where its page, and how they are made."""

    source: Path
    directory: Path
    output: Path
    jobs: int
    vectorize: bool

    @property
    def name(self) -> str:
        return self.source.stem

    def command(self) -> str:
        """The command that makes the page."""
        shown = self.name if self.source.parent == ABLATIONS else str(self.source)
        how = " --vectorize" if self.vectorize else f" --jobs {self.jobs}" if self.jobs > 1 else ""
        return f"python scripts/results.py {shown}{how}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("page", nargs="?", help="the name of a page, or an ablation's file")
    parser.add_argument("--check", action="store_true", help="say of each page (or of this one) whether it is stale")
    parser.add_argument(
        "--repeat", type=int, metavar="N", help="train N seeds of each arm of a page again, and compare"
    )
    parser.add_argument("--output", type=Path, default=PAGES, help="where the page goes (default: docs/results)")
    parser.add_argument("--dir", type=Path, help="where the runs go (default: runs/ABLATION)")
    parser.add_argument("--jobs", type=int, default=1, help="how many runs at the same time")
    parser.add_argument("--vectorize", action="store_true", help="train all seeds of an arm in one program")
    options = parser.parse_args()
    common.prepare_jax()
    if options.check:
        sys.exit(check(options.output, [options.page] if options.page else None))
    if options.page is None:
        parser.error("name a page, or say --check")
    source = Path(options.page) if options.page.endswith(".py") else ABLATIONS / f"{options.page}.py"
    directory = options.dir or Path("runs") / source.stem
    plan = Plan(source, directory, options.output, options.jobs, options.vectorize)
    if options.repeat is not None:
        sys.exit(repeat(plan, options.repeat))
    make(plan)


def make(plan: Plan) -> None:
    """Makes the runs that are not finished, the perturbed ones too, and writes the page."""
    from grpo_jax.report.curves import seed_curves
    from grpo_jax.statistics import layouts, tables
    from grpo_jax.statistics.plans import declared_plan
    from grpo_jax.sweep import sweep
    from grpo_jax.sweep.processes import write_plan

    found: dict[str, tables.Table] = {}
    measured: dict[str, Any] = {}
    ablations = {kind: load_ablation(plan.source, None, overrides) for kind, overrides in KINDS.items()}
    for kind, ablation in ablations.items():
        overrides = KINDS[kind]
        how = {"jobs": plan.jobs, "vectorize": plan.vectorize, "overrides": overrides}
        sweep(plan.source, ablation, plan.directory, **how)
        found[kind] = tables.collect(declared_plan(ablation, plan.command()), plan.directory)
        measured[kind] = values(ablation, plan.directory)
    ablation = ablations["as it is"]
    write_plan(plan.directory, ablation)  # a report on the directory is about the sweep as it is
    record = {
        "page": plan.name,
        "ablation": relative(plan.source),
        "command": plan.command(),
        "made": date.today().isoformat(),
        **made_by(ablation, plan.directory),
        "metric": ablation.metric,
        "runs": measured,
        "verdicts": {kind: {row.arm: tables.verdict_of(row, t) for row in t.rows} for kind, t in found.items()},
    }
    plan.output.mkdir(parents=True, exist_ok=True)
    write_text(plan.output / f"{plan.name}.json", json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    write_text(plan.output / f"{plan.name}.csv", layouts.render(found["as it is"], "csv"))
    runs = {arm: [plan.directory / run.key for run in ablation.runs() if arm in run.arms] for arm in ablation.arms}
    seed_curves(runs, drawn(ablation.metric), plan.output / f"{plan.name}.png")
    page = plan.output / f"{plan.name}.md"
    above = page.read_text().split(MARK)[0].rstrip() if page.is_file() else f"# {plan.name}"
    write_text(page, f"{above}\n\n{MARK}\n\n{below(record, found)}")
    print(page)


def repeat(plan: Plan, num_seeds: int) -> int:
    """Trains the first seeds of every arm of a page again, and says whether they come to what the page has.

    Returns:
      0 if all are the same to the last digit; the page's record then names today's code too. Else 1.

    Raises:
      UserError: if there is no such page, or if its runs have other names now, so that they are other runs.
    """
    from grpo_jax.sweep import sweep

    path = plan.output / f"{plan.name}.json"
    if other := [reason for reason in why_stale(path) if not reason.startswith("made by earlier")]:
        raise UserError(f"{plan.name} cannot be repeated: {other[0]}.")
    record, differ, count = json.loads(path.read_text()), [], 0
    vectorize = record["command"].endswith("--vectorize")
    with tempfile.TemporaryDirectory() as place:
        for kind, overrides in KINDS.items():
            ablation = load_ablation(plan.source, None, overrides)
            ablation = replace(ablation, seeds=tuple(ablation.seeds)[:num_seeds])
            how: dict[str, Any] = {"jobs": plan.jobs, "vectorize": vectorize, "overrides": overrides}
            sweep(plan.source, ablation, Path(place), **how)
            for arm, by_seed in values(ablation, Path(place)).items():
                for seed, run in by_seed.items():
                    was, count = record["runs"][kind][arm][seed]["value"], count + 1
                    if run["value"] != was:
                        differ.append(f"{arm}, seed {seed}, {kind}: {was} on the page, {run['value']} now")
    print("\n".join([*differ, f"{count - len(differ)} of {count} runs of {plan.name} are the same to the last digit."]))
    if differ:
        return 1
    record["repeated"] = {"package": sources.package_digest(), "date": date.today().isoformat(), "runs": count}
    write_text(path, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    page = path.with_suffix(".md")
    kept = page.read_text().split(REPEATED)[0].rstrip()
    write_text(page, f"{kept}\n\n{repeated(record)}\n")
    return 0


def repeated(record: Mapping[str, Any]) -> str:
    """What a page says of the runs that were made again."""
    again = record["repeated"]
    return (
        f"{REPEATED} on {again['date']} by training code `{again['package']}`: {again['runs']} of the runs above, the "
        "first seeds of every arm in both sweeps, came to the same to the last digit."
    )


def drawn(metric: str) -> str:
    """The metric whose curve shows best how a metric came about: held-out success is measured only now and then."""
    return "success" if metric == "evaluation/success" else metric


def values(ablation: Ablation, directory: Path) -> dict[str, dict[str, Any]]:
    """For each arm and seed, the run's name and what it came to."""
    from grpo_jax.statistics import tables

    named: dict[str, dict[str, Any]] = {arm: {} for arm in ablation.arms}
    for run in ablation.runs():
        value = tables.last_value(directory / run.key, ablation.metric)
        for arm in run.arms:
            named[arm][str(run.seed)] = {"run": run.key, "value": value}
    return named


def made_by(ablation: Ablation, directory: Path) -> dict[str, Any]:
    """The training code of the runs, which `tables.collect` requires to be one, and their machines and versions."""
    infos = [json.loads((directory / run.key / "run.json").read_text()) for run in ablation.runs()]
    machines = []
    for info in infos:
        one = {"processor": info["processor"], "device": info["device"]["kind"], "versions": info["versions"]}
        if one not in machines:
            machines.append(one)
    return {"package": infos[0]["package"]["digest"], "machines": machines}


def below(record: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """The part of a page that is measured, as Markdown."""
    from grpo_jax.statistics import layouts

    seeds = list(dict.fromkeys(seed for arm in record["runs"]["as it is"].values() for seed in arm))
    picture = f"![{drawn(record['metric'])} over the steps of training]({record['page']}.png)"
    lines = [f"    {record['command']}", "", picture, ""]
    lines += [layouts.render(found["as it is"], "md").rstrip(), "", "## Do the verdicts hang on rounding?", ""]
    lines += [
        f"The same runs from weights that are perturbed by {PERTURBATION:g} of their size:",
        "",
        "| arm | mean as it is | perturbed | verdict as it is | perturbed |",
        "|---|---|---|---|---|",
    ]
    for row, other in zip(found["as it is"].rows, found["perturbed"].rows, strict=True):
        means = [f"{r.mean.value:.3f}" if r.mean else "–" for r in (row, other)]
        verdicts = [by_arm[row.arm] for by_arm in record["verdicts"].values()]
        lines.append(f"| {' | '.join([row.arm, *means, *verdicts])} |")
    for kind, runs in record["runs"].items():
        lines += ["", f"Every seed, {kind}:", "", f"| arm | {' | '.join(seeds)} |", "|---" * (len(seeds) + 1) + "|"]
        for arm, by_seed in runs.items():
            lines.append(f"| {arm} | {' | '.join(format(by_seed[seed]['value'], '.3f') for seed in seeds)} |")
    lines += ["", f"Made on {record['made']} by training code `{record['package']}`, on", ""]
    for machine in record["machines"]:
        processor, versions = machine["processor"], machine["versions"]
        lines.append(
            f"- {processor['name']} ({', '.join(processor['instructions'])}), {processor['cores']} cores for a run; "
            f"Python {versions['python']}, jax {versions['jax']}, jaxlib {versions['jaxlib']}."
        )
    return "\n".join([*lines, ""])


def check(output: Path, names: Sequence[str] | None) -> int:
    """Prints for each page whether it is what today's code would make; returns 1 if one is not."""
    pages = sorted(output.glob("*.json")) if names is None else [output / f"{name}.json" for name in names]
    stale = 0
    for path in pages:
        reasons = why_stale(path)
        print(f"{path.stem}: {'; '.join(reasons) if reasons else 'current'}")
        stale += bool(reasons)
    return 1 if stale else 0


def why_stale(path: Path) -> list[str]:
    """Why a page, from its record, is not what today's code would make; an empty list if it is."""
    if not path.is_file():
        raise UserError(f"there is no page {path.stem!r} with a record in {str(path.parent)!r}.")
    record = json.loads(path.read_text())
    made = {".".join(machine["versions"]["python"].split(".")[:2]) for machine in record["machines"]}
    if made != {f"{sys.version_info.major}.{sys.version_info.minor}"}:
        return [f"can be checked with Python {', '.join(made)} only: a run's name counts compiled functions"]
    reasons = []
    for kind, overrides in KINDS.items():
        ablation = load_ablation(ROOT / record["ablation"], None, overrides)
        recorded = record["runs"][kind]
        now = {arm: {str(run.seed): run.key for run in ablation.runs() if arm in run.arms} for arm in ablation.arms}
        then = {arm: {seed: run["run"] for seed, run in runs.items()} for arm, runs in recorded.items()}
        changed = [arm for arm in now.keys() | then.keys() if now.get(arm) != then.get(arm)]
        if changed:
            reasons.append(f"stale, the runs of {', '.join(sorted(changed))} ({kind}) have other names now")
    known = {record["package"], record.get("repeated", {}).get("package")}
    if sources.package_digest() not in known:
        reasons.append(f"made by earlier training code ({record['package']}, now {sources.package_digest()})")
    return reasons


def relative(path: Path) -> str:
    """A path as seen from the project, if it is in it."""
    path = path.resolve()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


if __name__ == "__main__":
    sys.exit(exit_status(main))
