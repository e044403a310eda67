#!/usr/bin/env bash
# Trains the tiny openPangu-shaped model on two CPU nodes: one rank and one engine.
#
#   slurm/submit.sh slurm/train_tiny.sh [sbatch's options]
#
# slurm/README.md explains every variable.
#SBATCH --job-name=tiny
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --time=02:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

RECIPE_FILE=recipes/tiny_cpu.py
# Before the site's file, which is about accelerators.
: "${DEVICE:=cpu}" "${LEARNER_NODES:=1}" "${ROLLOUT_NODES:=1}" "${DEVICES_PER_NODE:=1}"
: "${TENSOR_PARALLEL:=1}" "${ENGINE_TENSOR_PARALLEL:=1}"

# Slurm runs a copy of this file, so the repository is where the job was submitted from.
# shellcheck source=slurm/lib/job.sh
source "${R2VPO_HOME:-${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/..}}/slurm/lib/job.sh" || {
    echo "slurm: submit from the repository's root, or set R2VPO_HOME to it" >&2
    exit 2
}
train_main
