#!/usr/bin/env bash
# Trains DeepSeek-R1-Distill-Qwen-1.5B: a node of learner, one of rollout, 8 NPUs each.
#
#   slurm/submit.sh slurm/train_qwen1p5b.sh [sbatch's options]
#
# slurm/README.md explains every variable.
#SBATCH --job-name=qwen1p5b
#SBATCH --nodes=2
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

RECIPE_FILE=recipes/qwen_1p5b.py
# shellcheck disable=SC2034 # train.sh takes it
GPU_SUFFIX=_gpu80

# Slurm runs a copy of this file, so the repository is where the job was submitted from.
# shellcheck source=slurm/lib/job.sh
source "${R2VPO_HOME:-${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/..}}/slurm/lib/job.sh" || {
    echo "slurm: submit from the repository's root, or set R2VPO_HOME to it" >&2
    exit 2
}
# After the site's file, which goes before these, as the environment goes before both.
: "${LEARNER_NODES:=1}" "${ROLLOUT_NODES:=1}" "${DEVICES_PER_NODE:=8}"
: "${TENSOR_PARALLEL:=2}" "${ENGINE_TENSOR_PARALLEL:=1}" # the model has 2 KV heads: 1 or 2
train_main
