#!/usr/bin/env bash
# Ray's daemons on one node, as a step of the job: node.sh HOST INDEX RESOURCES [NPUS]
#
# Ends when its standard input does (the job's script has closed it, or is no more), when Ray ends,
# or on SIGTERM. Its own output is the node's log.
set -euo pipefail

host=$1 index=$2 resources=$3 npus=${4:-}
LIB=$(dirname "${BASH_SOURCE[0]}")
# shellcheck source=slurm/lib/nodes.sh
source "$LIB/nodes.sh"
# shellcheck disable=SC2153 # ray.sh exports it
read -ra container <<<"$CONTAINER"
address=$(own_address) || { echo "$host: no IPv4 address${INTERFACE:+ on $INTERFACE}" >&2; exit 1; }

# Of this job alone, and short: Ray's sockets in it may have 107 characters.
scratch=$SCRATCH_DIR/r2vpo-$SLURM_JOB_ID-$index
rm -rf "$scratch"
(umask 077 && mkdir "$scratch")
# Ray would let others know for half a minute that the node leaves; the driver has gone already.
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0
export TMPDIR=$scratch # engines leave files there when they are killed
export VLLM_HOST_IP=$address # engines would take the address of the default route
if [[ $DEVICE == npu ]]; then export HCCL_IF_IP=${HCCL_IF_IP:-$address}; fi
if [[ -n $npus ]]; then export ASCEND_RT_VISIBLE_DEVICES=$npus; fi
# What others may write into the run's files is nothing.
umask "$(printf '%04o' $((8#$(umask) | 8#022)))"

port=$RAY_FIRST_PORT
arguments=(
    --block --disable-usage-stats --node-ip-address="$address" --node-name="$host"
    --resources="$resources" --num-cpus="$((DEVICES_PER_NODE + 2))"
    --num-gpus="$([[ $DEVICE == cuda ]] && echo "$DEVICES_PER_NODE" || echo 0)"
    --object-store-memory="${OBJECT_STORE_BYTES:-2147483648}"
    --node-manager-port=$((port + 1)) --object-manager-port=$((port + 2))
    --runtime-env-agent-port=$((port + 3)) --dashboard-agent-grpc-port=$((port + 4))
    --dashboard-agent-listen-port=$((port + 5)) --metrics-export-port=$((port + 6))
    --min-worker-port=$((port + 10)) --max-worker-port=$((port + RAY_NUM_PORTS - 1))
    --temp-dir="$scratch"
)
if ((index == 0)); then
    arguments+=(--head --port="$port" --ray-client-server-port=$((port + 7)) --include-dashboard=false)
else
    arguments+=(--address="$RAY_JOIN_ADDRESS")
fi

seconds=$(((STOP_SECONDS + 1) / 2)) # for Ray to end by itself
finish() {
    trap '' TERM
    kill -TERM "$ray" 2>/dev/null || true
    for ((i = 0; i < 5 * seconds; i++)); do
        kill -0 "$ray" 2>/dev/null || break
        sleep 0.2
    done
    kill -KILL "$ray" 2>/dev/null || true
    kill "$lease" 2>/dev/null || true
    keep_logs
    rm -rf "$scratch"
}
keep_logs() { # the end of each of Ray's logs that says anything
    local file to=$ATTEMPT/$host-ray
    mkdir -p "$to"
    find -L "$scratch/session_latest/logs" -type f -size +0 2>/dev/null | while IFS= read -r file; do
        tail -c 500000 "$file" >"$to/${file##*/}" 2>/dev/null || true
    done
}

echo "$host ($address): Ray with $resources${npus:+, NPUs $npus}"
"${container[@]}" "$PYTHON" -m ray.scripts.scripts start "${arguments[@]}" </dev/null &
ray=$!
cat >/dev/null <&0 & # ends with the lease
lease=$!
trap finish EXIT
trap 'seconds=3; exit 143' TERM # scancel: Slurm kills what is there when its KillWait is over
wait -n "$ray" "$lease" || true
kill -0 "$ray" 2>/dev/null || { echo "$host: Ray has ended by itself" >&2; exit 1; }
