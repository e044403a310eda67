#!/usr/bin/env bash
# The paper's table: an array of runs, one for each objective, policy and seed.
#
#   JOB=train_qwen1p5b slurm/submit.sh slurm/table.sh [--array=0-9 for the first seed]
#
# slurm/README.md explains every variable.
#SBATCH --job-name=table
#SBATCH --array=0-29%2
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --gres=npu:8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@900
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.log
set -euo pipefail

# The index counts policies fastest, then objectives, then seeds: 10 runs a seed.
TABLE_OBJECTIVES=(r2vpo grpo grpo_clip_high gppo topr)
TABLE_POLICIES=(off on)
index=${SLURM_ARRAY_TASK_ID:-0}
POLICY=${TABLE_POLICIES[index % 2]}
OBJECTIVE=${TABLE_OBJECTIVES[index / 2 % 5]}
SEED=$((index / 10))
JOB=${JOB:-train_qwen1p5b}
# One name for each run, so that the same words submitted again go on with all of them.
RUN_NAME=${TABLE_NAME:-$JOB}-${OBJECTIVE}-${POLICY}-seed$SEED

# Slurm runs a copy of this file, so the repository is where the job was submitted from.
folder=${R2VPO_HOME:-${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/..}}/slurm
if ! [[ -e $folder/$JOB.sh && $JOB == train_* ]]; then
    echo "slurm: JOB=$JOB: must be a script $folder/train_*.sh, without the .sh" >&2
    exit 2
fi
export R2VPO_HOME=$folder/..
# shellcheck source=slurm/train_qwen1p5b.sh
source "$folder/$JOB.sh"
