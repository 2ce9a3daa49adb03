#!/usr/bin/env bash
# One run of an ablation for each task of a SLURM array. Arguments: ABLATION.py and options of run_ablation.py.
#
#   n=$(.venv/bin/python scripts/run_ablation.py ABLATION.py --count)
#   sbatch --array=0-$((n - 1)) --gpus=1 --time=1:00:00 scripts/ablation_array.sh ABLATION.py
#
# Each run has one process on one machine and uses the GPUs that SLURM gives to its task.
#
# SLURM sends SIGTERM one minute before the time limit. "B:" sends it to this script; without it only processes that srun
# started would get it. The run then finishes its step, saves a checkpoint and ends. To continue, submit the same command
# again: it skips the runs that are finished.
#SBATCH --job-name=ablation
#SBATCH --output=ablation-%A_%a.log
#SBATCH --signal=B:TERM@60
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$PWD}"

number=${SLURM_ARRAY_TASK_ID:?this script is a task of an array job: sbatch --array=0-N}
exec .venv/bin/python scripts/run_ablation.py "$@" "$number"
