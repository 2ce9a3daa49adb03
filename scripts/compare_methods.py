#!/usr/bin/env python
"""Trains one policy by every method, over seeds, and prints what each scored and what it cost as a Markdown table.

    python scripts/compare_methods.py [EXPERIMENT.py] [--seeds 5] [--methods grpo ppo …] [--runs DIR] [--output FILE.md]

`rlhf` is PPO against a reward model that was trained on the same pairs as `dpo`'s. `sft` imitates right answers, one
for each prompt: those that the file's `answered`, a task, demonstrates; a file without it has no `sft`. Every run has a
process of its own, whose peak memory is measured. A run that is there is not run again, and one that was interrupted
goes on.

What is counted, without the warm start that all have in common:

    labels     rewards that the method was given, pairs that were labelled for it, or answers that it was shown
    rollouts   completions that were sampled
    tokens     of these completions and their prompts, each prompt once for each completion
    seconds    of the steps alone, without compilation and evaluations
    FLOPs      2 x parameters for each token and forward pass; a backward pass counts as two (Kaplan et al. 2020)
"""

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from grpo_jax import statistics
from grpo_jax.errors import RunError, exit_status
from grpo_jax.experiment import Experiment, load, run_file
from grpo_jax.runs.files import read_rows

FILE = Path(__file__).parents[1] / "experiments" / "methods" / "backwards.py"
METHODS = ("grpo", "ppo", "rft", "dpo", "rlhf", "sft")
OPTIONS = {
    "dpo": ["preferences.noise_level=0.1"],
    "reward_model": ["preferences.noise_level=0.1"],
    "sft": ["group_size=1"],  # copies of the one right answer have the gradient of one copy
}
PASSES = {
    "grpo": 4,  # sampling, and the update's forward and backward
    "ppo": 6,  # and the critic and the reference beforehand
    "rft": 4,
    "dpo": 5,  # and the reference
    "reward_model": 4,
    "rlhf": 7,  # PPO, and the reward model's judgement
    "sft": 3,  # nothing is sampled
}
"""Forward passes that a token costs, a backward pass being two."""


def assignments_of(method: str, seed: int, further: Sequence[str]) -> list[str]:
    """The overrides that make the file's experiment one of a method."""
    return [f"method={'ppo' if method == 'rlhf' else method}", f"seed={seed}", *OPTIONS.get(method, ()), *further]


def experiment_of(method: str, source: Path, assignments: list[str], runs: Path, seed: int) -> Experiment:
    """The file's experiment, trained by a method."""
    config = load(source, assignments)
    if method == "sft":
        warm_start = {"task": config.task, **config.warm_start} if config.warm_start else None
        return replace(config, task=run_file(source).answered, warm_start=warm_start)
    if method == "rlhf":
        from grpo_jax.reward_model import learned_reward

        return replace(config, rewards={"learned": learned_reward(runs / f"reward_model-{seed}")})
    return config


def train_one(method: str, seed: int, source: Path, runs: Path, further: list[str]) -> None:
    """Trains with a method, and notes what this process needed."""
    from grpo_jax.cli import common

    common.prepare_jax()
    from grpo_jax.sweep.warm_starts import adopt_warm_start
    from grpo_jax.training import train

    run_dir = runs / f"{method}-{seed}"
    assignments = assignments_of(method, seed, further)
    config = experiment_of(method, source, assignments, runs, seed)
    if (first := run_dir.with_name(f"grpo-{seed}")).is_dir() and first != run_dir:
        adopt_warm_start(run_dir, config, [(first, load(source, assignments_of("grpo", seed, further)))])
    result = train(config, run_dir, source=source, overrides=assignments, resume=run_dir.is_dir(), quiet=True)
    cost = {
        "parameters": sum(x.size for x in result.policy.params.values()),
        "peak_memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    (run_dir / "cost.json").write_text(json.dumps(cost))


def costs(method: str, run_dir: Path) -> dict[str, float]:
    """What one run cost and scored."""
    summary, config, own = (
        json.loads((run_dir / name).read_text()) for name in ("summary.json", "config.json", "cost.json")
    )
    after = summary["after"]["held_out"]
    steps = [row for row in read_rows(run_dir / "metrics.jsonl") if "grad_norm" in row]
    completions = len(steps) * config["prompts_per_step"] * config["group_size"]
    tokens = steps[-1]["num_tokens"]
    return {
        "success": after["success"],
        "noise": (after["success_high"] - after["success_low"]) / 2,
        # Pairs that are equally good have no label; a learned reward needs none.
        "labels": 0 if method == "rlhf" else sum(row.get("preferences/pairs", 0) for row in steps) or completions,
        "rollouts": 0 if method == "sft" else completions,
        "tokens": tokens,
        "flops": 2 * own["parameters"] * tokens * PASSES[method],
        "peak_memory": own["peak_memory"],
        "seconds": len(steps) * statistics.interquartile_mean([row["step_time"] for row in steps]),
    }


def together(stages: list[dict[str, float]]) -> dict[str, float]:
    """The costs of runs that follow each other: sums, the highest memory, the last one's success and its interval."""
    total = {name: sum(stage[name] for stage in stages) for name in stages[0]}
    last = {name: stages[-1][name] for name in ("success", "noise")}
    return total | last | {"peak_memory": max(stage["peak_memory"] for stage in stages)}


def table(found: Mapping[str, list[dict[str, float]]]) -> str:
    """Markdown: methods against their means over seeds; success has an interval and is paired with the first's."""
    heads = ["method", "success", "against the first, in points", "labels", "rollouts", "tokens", "TFLOPs", "peak MiB",
             "seconds"]  # fmt: skip
    lines = [" | ".join(["", *heads, ""]).strip(), "|" + "---|" * len(heads)]
    bounds = statistics.bounds_of("success")
    arms = {
        method: {i: statistics.Score(seed["success"], seed["noise"]) for i, seed in enumerate(seeds)}
        for method, seeds in found.items()
    }
    compared = statistics.compare_arms(arms, next(iter(found)), bounds)
    for method, seeds in found.items():
        score, paired = compared[method].mean, compared[method].difference
        cells = [method, f"{score.value:.1%} [{score.low:.1%}, {score.high:.1%}]"]
        if paired is None:
            cells.append("")
        else:
            value, low, high = (f"{100 * x:+.1f}" for x in (paired.value, paired.low, paired.high))
            cells.append(f"{value} [{low}, {high}], p = {paired.adjusted_p:.3f}: {statistics.verdict(paired)}")
        mean = {name: fmean(seed[name] for seed in seeds) for name in seeds[0]}
        cells += [f"{mean[name]:,.0f}" for name in ("labels", "rollouts", "tokens")]
        cells += [f"{mean['flops'] / 1e12:.2f}", f"{mean['peak_memory'] / 2**20:,.0f}", f"{mean['seconds']:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", statistics.explanation(bounds, has_noise=True)]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", type=Path, nargs="?", default=FILE)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--runs", type=Path, help="default: runs/methods-EXPERIMENT")
    parser.add_argument("--output", type=Path, help="also write the table here")
    parser.add_argument("--set", nargs="+", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--one", nargs=2, metavar=("METHOD", "SEED"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    runs = options.runs or Path("runs") / f"methods-{options.experiment.stem}"
    if options.one:
        train_one(options.one[0], int(options.one[1]), options.experiment, runs, options.set)
        return
    has_answers = hasattr(run_file(options.experiment), "answered")
    methods = [method for method in options.methods if method != "sft" or has_answers]
    found: dict[str, list[dict[str, float]]] = {method: [] for method in methods}
    for seed in range(options.seeds):
        for method in methods:
            stages = ["reward_model", "rlhf"] if method == "rlhf" else [method]
            for stage in stages:
                if not (runs / f"{stage}-{seed}" / "cost.json").is_file():
                    print(f"{stage}, seed {seed}", file=sys.stderr, flush=True)
                    arguments = [str(options.experiment), "--runs", str(runs), "--one", stage, str(seed)]
                    further = ["--set", *options.set] if options.set else []
                    done = subprocess.run([sys.executable, __file__, *arguments, *further])
                    if done.returncode:
                        raise RunError(f"{stage}, seed {seed} ended with exit status {done.returncode}.")
            found[method].append(together([costs(stage, runs / f"{stage}-{seed}") for stage in stages]))
    text = table(found)
    print(text, end="")
    if options.output:
        run = json.loads((runs / f"{methods[0]}-0" / "run.json").read_text())
        commit = f"commit {run['git']['commit']}" if run["git"] else "outside of a git repository"
        notes = f"Made by `python {' '.join(sys.argv)}`, {options.seeds} seeds, {commit}.\n"
        options.output.write_text(f"{text}\n{notes}")


if __name__ == "__main__":
    sys.exit(exit_status(main))
