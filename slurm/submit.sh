#!/usr/bin/env bash
# Checks a job's settings here and now, then submits it with what the site's file says.
#
#   slurm/submit.sh slurm/train_pangu7b.sh [sbatch's options]       as many nodes as the settings say
#   CHAIN=3 RUN_NAME=my_run slurm/submit.sh slurm/train_pangu7b.sh   three jobs, one after the other
#   HET=1 slurm/submit.sh slurm/train_pangu7b.sh                     a heterogeneous job
#
# HET_LEARNER and HET_ROLLOUT are sbatch's options of the two components (partition, gres).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

refuse() { echo "submit: $*" >&2; exit 2; }
[[ -e ${1:-} ]] || refuse "usage: slurm/submit.sh slurm/train_*.sh|evaluate.sh|convert.sh|table.sh [sbatch's options]"
job=$1
shift
command -v sbatch >/dev/null || refuse "sbatch: not found; submit from a login node"
CHAIN=${CHAIN:-1} HET=${HET:-0}
[[ $CHAIN =~ ^[1-9][0-9]?$ ]] || refuse "CHAIN=$CHAIN: must be an integer from 1 to 99"
[[ $HET == 0 || $HET == 1 ]] || refuse "HET=$HET: must be 0 or 1"
((CHAIN == 1)) || [[ -n ${RUN_NAME:-} ]] || refuse "RUN_NAME: must be set with CHAIN=$CHAIN, since all its jobs go on with one run"
((HET == 0)) || [[ $job == */train_* ]] || refuse "HET=1: must go with a training script"

site=${SITE:-slurm/site.sh}
if [[ -e $site ]]; then
    set -a # SBATCH_PARTITION and the like are read by sbatch
    # shellcheck source=/dev/null
    source "$site"
    set +a
fi
settings=$(bash "$job") # exits with 2 and says why where a setting is not valid
shown() { awk -v name="$1" '$1 == name {print $2}' <<<"$settings"; } # NAME of a setting

export R2VPO_HOME=$PWD
learner_nodes=$(shown LEARNER_NODES) rollout_nodes=$(shown ROLLOUT_NODES)
options=(--parsable)
if [[ -n $learner_nodes ]] && ((!HET)); then
    [[ $(shown GROUPS_ON) == separate ]] || rollout_nodes=0
    options+=(--nodes=$((learner_nodes + rollout_nodes)))
fi
options+=("$@")
if ((CHAIN > 1)); then
    # Of the jobs of one name and user only one runs at a time.
    options+=(--job-name="$RUN_NAME" --dependency=singleton)
fi
if ((HET)); then
    # The script's own headers count for the first component alone.
    read -ra learner <<<"${HET_LEARNER:---gres=npu:8}"
    read -ra rollout <<<"${HET_ROLLOUT:---gres=npu:8}"
    options+=(--nodes="$learner_nodes" "${learner[@]}" : --job-name="${RUN_NAME:-r2vpo}-rollout"
        --nodes="$rollout_nodes" --ntasks-per-node=1 --exclusive "${rollout[@]}")
fi
for ((i = 0; i < CHAIN; i++)); do sbatch "${options[@]}" "$job"; done
