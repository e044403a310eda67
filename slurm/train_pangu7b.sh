#!/usr/bin/env bash
# Trains openPangu-Embedded-7B: 2 nodes of learner, 2 of rollout, 8 NPUs each.
#
#   slurm/submit.sh slurm/train_pangu7b.sh [sbatch's options]
#
# slurm/README.md explains every variable.
#SBATCH --job-name=pangu7b
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --gres=npu:8
# On a GPU cluster: sbatch --gres=gpu:8, or SBATCH_GRES=gpu:8 in the site file, with DEVICE=cuda.
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@900
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

RECIPE_FILE=recipes/pangu_7b.py
# shellcheck disable=SC2034 # train.sh takes it
GPU_SUFFIX=_gpu80

# Slurm runs a copy of this file, so the repository is where the job was submitted from.
# shellcheck source=slurm/lib/job.sh
source "${R2VPO_HOME:-${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/..}}/slurm/lib/job.sh" || {
    echo "slurm: submit from the repository's root, or set R2VPO_HOME to it" >&2
    exit 2
}
# After the site's file, which goes before these, as the environment goes before both.
: "${LEARNER_NODES:=2}" "${ROLLOUT_NODES:=2}" "${DEVICES_PER_NODE:=8}"
: "${TENSOR_PARALLEL:=8}" "${ENGINE_TENSOR_PARALLEL:=1}"
train_main
