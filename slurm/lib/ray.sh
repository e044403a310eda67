# shellcheck shell=bash
# A Ray cluster over the nodes of the job: a step on each node, which lives as long as the job's
# script holds a pipe open. So nothing is left behind by a script that dies, either.

export RAY_NUM_PORTS=64 # of a job, on each node: 10 of the daemons, the others of workers
LEASE=''        # file descriptor of the pipe's writing end
SILENT_STEPS=() # those that did not end when they should have: their nodes are lost
NODE_STEPS=()   # process ids of the sruns, in the order of HOSTS

prepare_ray() { # sets RAY_ADDRESS and the token; for the job's own steps and nobody else
    local port
    port=${RAY_PORT:-$((10000 + SLURM_JOB_ID % 350 * RAY_NUM_PORTS))}
    HEAD_ADDRESS=$(own_address) || {
        say "this node has no IPv4 address${INTERFACE:+ on INTERFACE=$INTERFACE}"
        return "$EXIT_BAD_INPUT"
    }
    export RAY_FIRST_PORT=$port HEAD_ADDRESS
    export RAY_JOIN_ADDRESS=$HEAD_ADDRESS:$port
    export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$ATTEMPT/ray_token
    unset RAY_AUTH_TOKEN RAY_ADDRESS # whose values would go before those
    (umask 077 && "${PYTHON_WORDS[@]}" -c 'import secrets; print(secrets.token_hex(32), end="")' >"$RAY_AUTH_TOKEN_PATH")
}

start_nodes() {
    local index host fifo folder reader
    local -a devices options
    folder=$(mktemp -d)
    fifo=$folder/lease
    mkfifo -m 600 "$fifo"
    # shellcheck disable=SC2094 # nothing is ever written
    exec {LEASE}<>"$fifo" {reader}<"$fifo"
    rm -rf "$folder" # the pipe goes with the last that has it open
    export CONTAINER PYTHON DEVICE DEVICES_PER_NODE INTERFACE STOP_SECONDS SCRATCH_DIR ATTEMPT
    for index in "${!HOSTS[@]}"; do
        host=${HOSTS[index]}
        devices=() options=()
        if [[ $DEVICE == npu && -z ${ASCEND_RT_VISIBLE_DEVICES:-} ]]; then
            mapfile -t devices < <(granted_npus "$host")
        fi
        mapfile -t options < <(component_of "$host")
        srun "${options[@]}" --overlap --export=ALL --nodes=1 --ntasks=1 --nodelist="$host" \
            --job-name="ray-$host" --mem=0 --output="$ATTEMPT/$host.log" --open-mode=append \
            bash "$LIB/node.sh" "$host" "$index" "$(resources_of "$index")" "${devices[0]:-}" \
            <&"$reader" {LEASE}>&- &
        NODE_STEPS+=($!)
    done
    exec {reader}<&-
}

wait_for_nodes() { # until Ray itself says that all have joined; fails as soon as a step has ended
    say "waits for ${#HOSTS[@]} nodes to join Ray (at most JOIN_SECONDS=$JOIN_SECONDS)"
    run_stage "${PYTHON_WORDS[@]}" "$LIB/ray_ready.py" --address "$RAY_JOIN_ADDRESS" \
        --nodes "${#HOSTS[@]}" --seconds "$JOIN_SECONDS" --watch "${NODE_STEPS[@]}"
}

stop_nodes() { # gives up the lease and waits for the steps to end; sets SILENT_STEPS
    local deadline step
    [[ -n $LEASE ]] || return 0
    exec {LEASE}>&-
    LEASE=''
    deadline=$((SECONDS + STOP_SECONDS))
    for step in "${NODE_STEPS[@]}"; do
        while kill -0 "$step" 2>/dev/null && ((SECONDS < deadline)); do sleep 0.2; done
        # A node that lives has killed its Ray by now. Slurm ends its step with the job.
        if kill -0 "$step" 2>/dev/null; then SILENT_STEPS+=("$step"); fi
    done
    NODE_STEPS=()
    rm -f "${RAY_AUTH_TOKEN_PATH:-}"
}
