# shellcheck shell=bash
# Which nodes an allocation has, which group each belongs to, and what it lends.

hosts_of() { scontrol show hostnames "$1"; } # NODELIST

split_nodes() { # sets LEARNER_HOSTS, ROLLOUT_HOSTS and HOSTS, the head first
    local -a all
    if ((${SLURM_HET_SIZE:-1} > 1)); then
        mapfile -t LEARNER_HOSTS < <(hosts_of "$SLURM_JOB_NODELIST_HET_GROUP_0")
        mapfile -t ROLLOUT_HOSTS < <(hosts_of "$SLURM_JOB_NODELIST_HET_GROUP_1")
        require_num_nodes "${#LEARNER_HOSTS[@]}" LEARNER_NODES "the first component"
        require_num_nodes "${#ROLLOUT_HOSTS[@]}" ROLLOUT_NODES "the second component"
    else
        mapfile -t all < <(hosts_of "$SLURM_JOB_NODELIST")
        if [[ $GROUPS_ON == same ]]; then
            LEARNER_HOSTS=("${all[@]}") ROLLOUT_HOSTS=()
            require_num_nodes "${#all[@]}" LEARNER_NODES "the job"
        else
            LEARNER_HOSTS=("${all[@]:0:LEARNER_NODES}") ROLLOUT_HOSTS=("${all[@]:LEARNER_NODES}")
            ((${#all[@]} == LEARNER_NODES + ROLLOUT_NODES)) ||
                problem "LEARNER_NODES=$LEARNER_NODES and ROLLOUT_NODES=$ROLLOUT_NODES: must add up to the job's ${#all[@]} nodes (sbatch --nodes)"
        fi
    fi
    # shellcheck disable=SC2034 # ray.sh takes it
    HOSTS=("${LEARNER_HOSTS[@]}" "${ROLLOUT_HOSTS[@]}")
}
require_num_nodes() { # NUMBER NAME WHERE
    (($1 == ${!2})) || problem "$2=${!2}: must be the $1 nodes that $3 has (sbatch --nodes)"
}

component_of() { # HOST: srun's option for the component of a heterogeneous job it is in
    local host
    ((${SLURM_HET_SIZE:-1} > 1)) || return 0
    for host in "${ROLLOUT_HOSTS[@]}"; do
        if [[ $host == "$1" ]]; then echo --het-group=1; return; fi
    done
    echo --het-group=0
}

resources_of() { # INDEX in HOSTS: Ray's resources of that node, as JSON
    local learner=$DEVICES_PER_NODE rollout=0
    if [[ $GROUPS_ON == same ]]; then
        learner=$LEARNER_DEVICES_PER_NODE rollout=$((DEVICES_PER_NODE - LEARNER_DEVICES_PER_NODE))
    elif (($1 >= ${#LEARNER_HOSTS[@]})); then
        learner=0 rollout=$DEVICES_PER_NODE
    fi
    local json
    json="\"learner\": $learner, \"rollout\": $rollout"
    [[ $DEVICE != npu ]] || json+=", \"NPU\": $DEVICES_PER_NODE"
    echo "{$json}"
}

granted_npus() { # HOST: "0,1,...", the NPUs that Slurm gave this job there; empty if it does not say
    # Slurm sets no variable for NPUs, and on a node that is shared the others' must not be taken.
    local line index nodes
    while read -r line; do
        [[ $line =~ npu[^\ ,\(]*\(IDX:([0-9,-]+)\) ]] || continue
        index=${BASH_REMATCH[1]}
        [[ $line =~ Nodes=([^ ]+) ]] && nodes=$(hosts_of "${BASH_REMATCH[1]}")
        if grep -qxF "$1" <<<"$nodes"; then expand_ranges "$index"; return; fi
    done < <(scontrol show job -d "$SLURM_JOB_ID")
}
expand_ranges() { # 0-2,5 -> 0,1,2,5
    local part number out=''
    for part in ${1//,/ }; do
        for ((number = ${part%-*}; number <= ${part#*-}; number++)); do out+=,$number; done
    done
    echo "${out#,}"
}

own_address() { # this host's IPv4 address on INTERFACE, or the one that its name stands for
    local address
    if [[ -n $INTERFACE ]]; then
        address=$(ip -4 -o addr show dev "$INTERFACE" 2>/dev/null | awk '{split($4, part, "/"); print part[1]; exit}')
    else
        address=$(getent ahostsv4 "$(hostname)" | awk '$1 !~ /^127\./ {print $1; exit}')
    fi
    [[ -n $address ]] || return 1
    echo "$address"
}
