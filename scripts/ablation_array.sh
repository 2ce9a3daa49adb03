#!/usr/bin/env bash
# One run of an ablation per task of a SLURM array. Arguments: ABLATION.py and options of run_ablation.py.
#
#   n=$(.venv/bin/python scripts/run_ablation.py ABLATION.py --count)
#   sbatch --array=0-$((n - 1)) --gpus=1 --time=1:00:00 scripts/ablation_array.sh ABLATION.py
#
# SLURM warns a task a minute before its time is up (B: without it, only what srun starts would hear). The run then
# stops after the step under way, saved, and the same command goes on with what is not finished. Nothing here is a
# launcher: a run across hosts finds them by itself.
#SBATCH --job-name=ablation
#SBATCH --output=ablation-%A_%a.log
#SBATCH --signal=B:TERM@60
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$PWD}"

number=${SLURM_ARRAY_TASK_ID:?this script is a task of an array job: sbatch --array=0-N}
exec .venv/bin/python scripts/run_ablation.py "$@" "$number"
