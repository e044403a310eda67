#!/usr/bin/env bash
# Evaluates a model on one node: Pass@1 of the benchmarks; goes on where it was stopped.
#
#   MODEL=outputs/my_run slurm/submit.sh slurm/evaluate.sh [sbatch's options]
#
# slurm/README.md explains every variable.
#SBATCH --job-name=evaluate
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --gres=npu:8
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

# Slurm runs a copy of this file, so the repository is where the job was submitted from.
# shellcheck source=slurm/lib/job.sh
source "${R2VPO_HOME:-${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/..}}/slurm/lib/job.sh" || {
    echo "slurm: submit from the repository's root, or set R2VPO_HOME to it" >&2
    exit 2
}
evaluate_main
