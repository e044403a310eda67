#!/usr/bin/env bash
# Converts a checkpoint on one node, without accelerators; goes on where it was stopped.
#
#   DIRECTION=to_megatron INPUT=FOLDER slurm/submit.sh slurm/convert.sh [sbatch's options]
#
# slurm/README.md explains every variable.
#SBATCH --job-name=convert
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

DEVICE=cpu # whatever the site's file says
# Slurm runs a copy of this file, so the repository is where the job was submitted from.
# shellcheck source=slurm/lib/job.sh
source "${R2VPO_HOME:-${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/..}}/slurm/lib/job.sh" || {
    echo "slurm: submit from the repository's root, or set R2VPO_HOME to it" >&2
    exit 2
}
convert_main
