# shellcheck shell=bash
# How a job ends: done, queued again to go on, or given up.

EXIT_BAD_INPUT=2

begin_run_records() { # sets RUN_DIR, RECORDS and ATTEMPT; COMMAND is what the driver is told to do
    RUN_DIR=$OUTPUT_DIR/$RUN_NAME
    RECORDS=$OUTPUT_DIR/$RUN_NAME.slurm # beside the run's folder, which the driver makes
    ATTEMPT=$RECORDS/$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}
    mkdir -p "$ATTEMPT"
}
leave_if_finished() { # a link of a chain finds nothing to do where an earlier one has finished
    if [[ -e $RECORDS/finished && $(<"$RECORDS/finished") == "$(command_record)" ]]; then
        say "$RUN_NAME has finished already with the same settings: nothing to do"
        exit 0
    fi
}
command_record() { printf '%s\n' "${COMMAND[@]}"; }
leave_if_requeued_too_often() {
    # Slurm itself queues a job again when a node fails, so the bound is looked at here too.
    if ((${SLURM_RESTART_COUNT:-0} > MAX_REQUEUES)); then
        say "was started again $SLURM_RESTART_COUNT times (MAX_REQUEUES=$MAX_REQUEUES): given up"
        exit 1
    fi
}

end_job() { # STATUS of the driver, or of what failed before it; does not return
    local status=$1
    if ((status == 0)); then
        command_record >"$RECORDS/finished"
        rm -f "$RECORDS/failures"
        say "finished: $RUN_DIR"
        exit 0
    fi
    case $STOP_REASON in
        cancel) say "cancelled; RUN_NAME=$RUN_NAME goes on from the last checkpoint"; exit 143 ;;
        requeue) queue_again "$status" "the signal" ;;
    esac
    case $status in
        "$EXIT_BAD_INPUT") say "refused: see the error above"; exit 2 ;;
        130 | 143) say "stopped by a signal to the driver: not queued again"; exit "$status" ;;
    esac
    count_failure
    ((FAILURES <= MAX_FAILURES)) || {
        say "failed $FAILURES times since the last checkpoint (MAX_FAILURES=$MAX_FAILURES): given up"
        exit "$status"
    }
    queue_again "$status" "failure $FAILURES since the last checkpoint (exit code $status)"
}
count_failure() { # sets FAILURES: how many there were since the run last came to a new checkpoint
    local newest count=0 at=''
    newest=$(cat "$RUN_DIR/checkpoints/latest" 2>/dev/null || true)
    { read -r count at <"$RECORDS/failures"; } 2>/dev/null || true
    [[ $at == "$newest" ]] || count=0
    FAILURES=$((${count:-0} + 1))
    echo "$FAILURES $newest" >"$RECORDS/failures"
}
queue_again() { # STATUS REASON
    if ((${SLURM_RESTART_COUNT:-0} >= MAX_REQUEUES)); then
        say "$2: not queued again (MAX_REQUEUES=$MAX_REQUEUES); RUN_NAME=$RUN_NAME goes on from the last checkpoint"
        exit "$1"
    fi
    let_slurm_notice
    say "$2: queued again, to go on from the last checkpoint"
    if ! scontrol requeue "$SLURM_JOB_ID"; then
        say "scontrol requeue failed (does the cluster allow it?); RUN_NAME=$RUN_NAME goes on when submitted again"
    fi
    exit "$1"
}
let_slurm_notice() { # that a node is lost, which ends this script and queues the job again
    # A job that is queued again while a step of it hangs on a lost node is started without its gres
    # by Slurm 22.05 ("Invalid generic resource"); one that Slurm itself queues again is sound.
    local step deadline=$((SECONDS + NODE_SECONDS))
    for step in "${SILENT_STEPS[@]}"; do
        kill -0 "$step" 2>/dev/null || continue
        say "a node does not answer: Slurm has NODE_SECONDS=$NODE_SECONDS to notice it and queue the job again"
        while kill -0 "$step" 2>/dev/null && ((SECONDS < deadline)); do sleep 1; done
    done
    # It has (or the job was cancelled meanwhile): Slurm ends the script, whose part is done.
    [[ $STOP_REASON != cancel ]] || exit 143
}
