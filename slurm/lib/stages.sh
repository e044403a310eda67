# shellcheck shell=bash
# Stages of a job: commands that run while signals can come, and are told of the first one.

STOP_REASON=''  # requeue (time limit, pre-emption) or cancel; empty: none
STAGE_PID=''

watch_signals() {
    trap 'stop_for requeue' USR1 # sbatch --signal=B:USR1@SECONDS, and pre-emption where it is told
    trap 'stop_for cancel' TERM  # scancel
    trap 'stop_for cancel' INT
}
stop_for() { # REASON: the stage's command is told once; SIGTERM makes the driver write a checkpoint
    if [[ -z $STOP_REASON ]]; then
        STOP_REASON=$1
        say "signalled ($1): the job stops what it is doing"
        tell_stage
        if [[ $1 == cancel && -n $STAGE_PID ]]; then end_stage_without_nodes "$STAGE_PID" & fi
    elif [[ $1 == cancel ]]; then
        # Time is short now: Slurm kills what is left. A second signal ends the driver at once.
        STOP_REASON=cancel
        tell_stage
    fi
}
end_stage_without_nodes() { # PID: scancel ends Ray's steps as well, and then the driver can do no more
    local step
    ((${#NODE_STEPS[@]})) || return 0
    for step in "${NODE_STEPS[@]}"; do
        while kill -0 "$step" 2>/dev/null; do kill -0 "$1" 2>/dev/null || return 0; sleep 0.2; done
    done
    # Without its cluster Ray takes long to leave, and Slurm's patience (KillWait) is short.
    sleep 3
    kill -KILL "$1" 2>/dev/null || true
}
tell_stage() { [[ -z $STAGE_PID ]] || kill -TERM "$STAGE_PID" 2>/dev/null || true; }

run_stage() { # COMMAND...: its exit status, or 143 if the job is to stop and it does not begin
    local status=0
    [[ -z $STOP_REASON ]] || return 143
    if [[ -n ${LEASE:-} ]]; then
        "$@" {LEASE}>&- &
    else
        "$@" &
    fi
    STAGE_PID=$!
    # A signal may have come before the process id was known.
    [[ -z $STOP_REASON ]] || tell_stage
    await "$STAGE_PID" || status=$?
    STAGE_PID=''
    return "$status"
}
await() { # PID: its exit status, also where signals interrupt the waiting
    while kill -0 "$1" 2>/dev/null; do wait "$1" || true; done
    wait "$1" # bash has kept the status
}
