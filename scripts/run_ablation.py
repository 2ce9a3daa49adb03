#!/usr/bin/env python
"""Makes one run of an ablation, chosen by its number: for array jobs, one process per run, in any order.

    python scripts/run_ablation.py ABLATION.py --count              how many runs there are
    python scripts/run_ablation.py ABLATION.py 3                    the fourth of them
    sbatch --array=0-$((N - 1)) scripts/ablation_array.sh ABLATION.py

A run that was stopped continues from its checkpoint. A finished run is not run again. `grpo-jax table` compares the
runs as if `grpo-jax sweep` had made them. The exit status is that of `grpo-jax`.
"""

import argparse
import sys
from pathlib import Path

from grpo_jax.cli import common
from grpo_jax.errors import UserError, exit_status
from grpo_jax.experiment import load_ablation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ablation", type=Path)
    parser.add_argument("number", type=int, nargs="?", help="which run, from 0")
    parser.add_argument("--count", action="store_true", help="print how many runs there are")
    parser.add_argument("--dir", type=Path, help="where the runs' directories are (default: runs/ABLATION)")
    parser.add_argument("--budget", choices=("steps", "tokens"), help="instead of what the file says")
    options = parser.parse_intermixed_args()  # ablation_array.sh puts the number after the options
    ablation = load_ablation(options.ablation, options.budget)
    runs = ablation.runs()
    if options.count:
        print(len(runs))
        return
    if options.number is None or not 0 <= options.number < len(runs):
        raise UserError(f"the number of a run must be between 0 and {len(runs) - 1}, not {options.number}.")
    common.prepare_jax()
    from grpo_jax.sweep import worker

    run = runs[options.number]
    directory = options.dir or Path("runs") / options.ablation.stem
    worker.run(options.ablation, run.arms[0], [run.seed], directory, budget=ablation.budget)


if __name__ == "__main__":
    sys.exit(exit_status(main))
