# shellcheck shell=bash
# Settings: variables with a default, checked all together before anything starts.

SETTINGS=() # names, in the order in which they are printed
PROBLEMS=()

setting() { # NAME [DEFAULT]: gives it the default where it is not set
    printf -v "$1" '%s' "${!1-${2-}}"
    SETTINGS+=("$1")
}
problem() { PROBLEMS+=("$*"); }
require_choice() { # NAME VALID...
    local name=$1 valid
    shift
    for valid in "$@"; do [[ ${!name} != "$valid" ]] || return 0; done
    problem "$name=${!name}: must be one of: $*"
}
require_integer() { # NAME MINIMUM [MAXIMUM]
    local value=${!1}
    if ! [[ $value =~ ^(0|[1-9][0-9]{0,8})$ ]] || ((value < $2 || value > ${3:-999999999})); then
        if [[ -n ${3:-} ]]; then problem "$1=$value: must be an integer from $2 to $3"; fi
        if [[ -z ${3:-} ]]; then problem "$1=$value: must be an integer, at least $2"; fi
        return 1
    fi
}
require_path() { # NAME: a file or folder that is there, or empty
    [[ -z ${!1} || -e ${!1} ]] || problem "$1=${!1}: no such file or folder"
}
refuse_problems() { # ends the script with 2 if there are any
    ((${#PROBLEMS[@]})) || return 0
    printf 'slurm: %s\n' "${PROBLEMS[@]}" "nothing was started (slurm/README.md explains the variables)" >&2
    exit 2
}
print_settings() {
    local name
    for name in "${SETTINGS[@]}"; do printf '  %-26s %s\n' "$name" "${!name}"; done
}

common_settings() { # of every script; $1 is the default device
    local python=$REPO/.venv/bin/python
    [[ -x $python ]] || python=$(command -v python3 || true)
    setting PYTHON "$python"
    setting CONTAINER
    setting DEVICE "$1"
    setting DEVICES_PER_NODE 8
    setting INTERFACE
    setting OUTPUT_DIR "$REPO/outputs"
    setting SCRATCH_DIR /tmp
    setting RUN_NAME "${SLURM_JOB_NAME:-check}-${SLURM_ARRAY_JOB_ID:-${SLURM_JOB_ID:-0}}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"
    setting GRACE_SECONDS 600
    setting STOP_SECONDS 20
    setting NODE_SECONDS 600
    setting MAX_REQUEUES 50
    setting MAX_FAILURES 3
    setting DETERMINISTIC 0
    setting ARGS
    require_choice DEVICE npu cuda cpu
    require_integer DEVICES_PER_NODE 1 128 || true
    require_integer GRACE_SECONDS 1 || true
    require_integer STOP_SECONDS 1 600 || true
    require_integer NODE_SECONDS 0 86400 || true
    require_integer MAX_REQUEUES 0 1000 || true
    require_integer MAX_FAILURES 0 1000 || true
    require_choice DETERMINISTIC 0 1
    [[ $RUN_NAME =~ ^[A-Za-z0-9][A-Za-z0-9._-]*$ ]] ||
        problem "RUN_NAME=$RUN_NAME: must be letters, digits, '.', '_' and '-', the first a letter or digit"
    [[ $SCRATCH_DIR == /* && ${#SCRATCH_DIR} -le 30 ]] ||
        problem "SCRATCH_DIR=$SCRATCH_DIR: must be an absolute path of at most 30 characters, since Ray's sockets lie there"
    [[ $OUTPUT_DIR == /* ]] || OUTPUT_DIR=$PWD/$OUTPUT_DIR
    read -ra PYTHON_WORDS <<<"$CONTAINER"
    PYTHON_WORDS+=("$PYTHON") # what starts a Python: a stage must be the process itself, no function
    # shellcheck disable=SC2034 # train.sh and single.sh take it
    read -ra EXTRA_WORDS <<<"$ARGS"
    if ! "${PYTHON_WORDS[@]}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        problem "PYTHON=$PYTHON: must be a Python from 3.11 on with this project's packages (make setup)${CONTAINER:+ in CONTAINER}"
    fi
    if ((IS_JOB)) && ! { mkdir -p "$OUTPUT_DIR" && [[ -w $OUTPUT_DIR ]]; } 2>/dev/null; then
        problem "OUTPUT_DIR=$OUTPUT_DIR: cannot be written; it must be a folder that all nodes share"
    fi
}
