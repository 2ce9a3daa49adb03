"""Runs the methods of `experiments/methods/pound.py` over seeds, and prints what each cost and scored as a table.

    python scripts/compare_methods.py [--seeds 5] [--methods grpo ppo rft dpo rlhf] [--runs DIR] [--set steps=20]

`rlhf` is PPO against a reward model that was trained on the same pairs as `dpo`'s. A run that is there is not run
again, and one that was interrupted goes on. Labels are the rewards that a method was given, or the pairs that were
labelled for it; rollouts are sampled completions; tokens count a completion's prompt. The warm start, the same for all,
is in none of these.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from grpo_jax.experiment import Experiment, load
from grpo_jax.logs import read_rows
from grpo_jax.reward_model import learned_reward
from grpo_jax.training import train

FILE = Path(__file__).parents[1] / "experiments" / "methods" / "pound.py"
METHODS = ("grpo", "ppo", "rft", "dpo", "rlhf")
OPTIONS = {"dpo": ["preferences.noise_level=0.1"], "reward_model": ["preferences.noise_level=0.1"]}


def run(method: str, seed: int, runs: Path, further: list[str]) -> list[Path]:
    """Trains with a method unless that was done before; the directories of all the runs that it took."""
    before = run("reward_model", seed, runs, further) if method == "rlhf" else []
    run_dir = runs / f"{method}-{seed}"
    trained_by = "ppo" if method == "rlhf" else method
    assignments = [f"method={trained_by}", f"seed={seed}", *OPTIONS.get(method, ()), *further]
    if not (run_dir / "summary.json").is_file():
        print(f"{method}, seed {seed}", flush=True)
        config: Experiment = load(FILE, assignments)
        if method == "rlhf":
            config = replace(config, rewards={"learned": learned_reward(before[-1])})
        begun = (run_dir / "run.json").is_file()
        train(config, run_dir, source=FILE, overrides=assignments, resume=begun, quiet=True)
    return [*before, run_dir]


def costs(run_dirs: list[Path]) -> dict[str, float]:
    """What the runs cost together, and what the last of them scored."""
    summaries = [json.loads((run_dir / "summary.json").read_text()) for run_dir in run_dirs]
    found: dict[str, float] = {"success": summaries[-1]["after"]["held_out"]["success"], "labels": 0.0, "rollouts": 0.0}
    found |= {"seconds": sum(s["seconds"] for s in summaries), "tokens": 0.0}
    for run_dir in run_dirs:
        config = json.loads((run_dir / "config.json").read_text())
        steps = [row for row in read_rows(run_dir / "metrics.jsonl") if "grad_norm" in row]
        rollouts = len(steps) * config["prompts_per_step"] * config["group_size"]
        pairs = sum(row.get("preferences/pairs", 0) for row in steps)
        judged_by_a_model = "learned" in config["rewards"]
        found["labels"] += 0 if judged_by_a_model else pairs or rollouts
        found["rollouts"] += rollouts
        found["tokens"] += steps[-1]["num_tokens"] if steps else 0
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--runs", type=Path, default=Path("runs/methods"))
    parser.add_argument("--set", nargs="+", default=[], metavar="FIELD=VALUE")
    options = parser.parse_args()
    rows: list[str] = []
    for method in options.methods:
        seeds: list[dict[str, Any]] = [
            costs(run(method, seed, options.runs, options.set)) for seed in range(options.seeds)
        ]
        success = np.array([s["success"] for s in seeds])
        mean = {name: np.mean([s[name] for s in seeds]) for name in ("labels", "rollouts", "tokens", "seconds")}
        rows.append(
            f"| {method} | {success.mean():.1%} | {success.min():.1%} – {success.max():.1%} | {mean['labels']:,.0f} | "
            f"{mean['rollouts']:,.0f} | {mean['tokens']:,.0f} | {mean['seconds']:.0f} |"
        )
    print("| method | success | lowest – highest seed | labels | rollouts | tokens | seconds |")
    print("|---|---|---|---|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
