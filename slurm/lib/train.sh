# shellcheck shell=bash
# A training job: settings -> Ray over the nodes -> driver -> end. RECIPE_FILE names the recipes.

train_settings() { # what the job's script has set before goes before these defaults
    local name
    common_settings npu
    setting OBJECTIVE r2vpo
    setting POLICY off
    setting VARIANT
    setting SEED 0
    setting ITERATIONS
    setting MODEL_PATH
    setting TRAIN_PROMPTS
    setting HELD_OUT_PROMPTS
    setting LEARNER_NODES 2
    setting ROLLOUT_NODES 2
    setting GROUPS_ON separate
    setting LEARNER_DEVICES_PER_NODE 4
    setting TENSOR_PARALLEL 8
    setting PIPELINE_PARALLEL 1
    setting CONTEXT_PARALLEL 1
    setting ENGINE_TENSOR_PARALLEL 1
    setting WEIGHT_SYNC "$(weight_sync_of_device)"
    setting JOIN_SECONDS 300
    setting RAY_PORT
    setting DOCTOR 1
    require_choice OBJECTIVE r2vpo grpo grpo_clip_high gppo topr
    require_choice POLICY off on
    require_choice VARIANT "" dual paper_dual async
    require_integer SEED 0 || true
    [[ -z $ITERATIONS ]] || require_integer ITERATIONS 1 || true
    require_integer LEARNER_NODES 1 || true
    require_integer JOIN_SECONDS 1 || true
    require_choice GROUPS_ON separate same
    require_choice DOCTOR 0 1
    [[ -z $RAY_PORT ]] || require_integer RAY_PORT 1024 65000 || true
    if [[ $GROUPS_ON == same ]]; then
        require_integer LEARNER_DEVICES_PER_NODE 1 $((DEVICES_PER_NODE - 1)) || true
    else
        require_integer ROLLOUT_NODES 1 || true
    fi
    layout_settings
    for name in MODEL_PATH TRAIN_PROMPTS HELD_OUT_PROMPTS; do require_path "$name"; done
    require_choice WEIGHT_SYNC hccl nccl cuda_ipc gloo shared_memory
    if [[ $WEIGHT_SYNC == cuda_ipc || $WEIGHT_SYNC == shared_memory ]] && ! [[ $GROUPS_ON == same && $LEARNER_NODES == 1 ]]; then
        problem "WEIGHT_SYNC=$WEIGHT_SYNC: needs learner and engines on one node (GROUPS_ON=same, LEARNER_NODES=1); between nodes: hccl, nccl or gloo"
    fi
}
layout_settings() { # what is left to decide: how many replicas and engines fill the devices
    local name model engine=$ENGINE_TENSOR_PARALLEL
    for name in TENSOR_PARALLEL PIPELINE_PARALLEL CONTEXT_PARALLEL ENGINE_TENSOR_PARALLEL; do
        require_integer "$name" 1 1024 || true
    done
    setting DATA_PARALLEL
    setting NUM_ENGINES
    ((${#PROBLEMS[@]} == 0)) || return 0 # no numbers to reckon with
    LEARNER_DEVICES=$((LEARNER_NODES * DEVICES_PER_NODE))
    ROLLOUT_DEVICES=$((ROLLOUT_NODES * DEVICES_PER_NODE))
    if [[ $GROUPS_ON == same ]]; then
        LEARNER_DEVICES=$((LEARNER_NODES * LEARNER_DEVICES_PER_NODE))
        ROLLOUT_DEVICES=$((LEARNER_NODES * (DEVICES_PER_NODE - LEARNER_DEVICES_PER_NODE)))
    fi
    model=$((TENSOR_PARALLEL * PIPELINE_PARALLEL * CONTEXT_PARALLEL))
    : "${DATA_PARALLEL:=$((LEARNER_DEVICES / model))}" "${NUM_ENGINES:=$((ROLLOUT_DEVICES / engine))}"
    require_integer DATA_PARALLEL 1 1000000 || true
    require_integer NUM_ENGINES 1 1000000 || true
    ((${#PROBLEMS[@]} == 0)) || return 0
    ((model * DATA_PARALLEL == LEARNER_DEVICES)) ||
        problem "TENSOR_PARALLEL x PIPELINE_PARALLEL x CONTEXT_PARALLEL x DATA_PARALLEL = $TENSOR_PARALLEL x $PIPELINE_PARALLEL x $CONTEXT_PARALLEL x $DATA_PARALLEL: must be the $LEARNER_DEVICES devices of the learner"
    ((engine * NUM_ENGINES == ROLLOUT_DEVICES)) ||
        problem "ENGINE_TENSOR_PARALLEL x NUM_ENGINES = $engine x $NUM_ENGINES: must be the $ROLLOUT_DEVICES devices of the rollout"
    ((engine <= DEVICES_PER_NODE)) ||
        problem "ENGINE_TENSOR_PARALLEL=$engine: must be at most DEVICES_PER_NODE=$DEVICES_PER_NODE, since an engine is on one node"
}
weight_sync_of_device() {
    case $DEVICE in npu) echo hccl ;; cuda) echo nccl ;; *) echo gloo ;; esac
}

make_command() { # sets COMMAND: the recipe, and what it is overridden by
    local name=${OBJECTIVE}_${POLICY}_policy${VARIANT:+_$VARIANT}
    if [[ $DEVICE == cuda ]]; then name+=${GPU_SUFFIX:-}; fi # recompute and the like for its memory
    COMMAND=("$RECIPE_FILE:$name")
    override --output.dir "$OUTPUT_DIR"
    override --output.run-name "$RUN_NAME"
    override --runtime.device "$DEVICE"
    override --train.seed "$SEED"
    override --train.num-iterations "$ITERATIONS"
    override --model.path "$MODEL_PATH"
    override --data.train-prompts "$TRAIN_PROMPTS"
    override --data.held-out-prompts "$HELD_OUT_PROMPTS"
    override --parallel.tensor "$TENSOR_PARALLEL"
    override --parallel.pipeline "$PIPELINE_PARALLEL"
    override --parallel.context "$CONTEXT_PARALLEL"
    override --parallel.data "$DATA_PARALLEL"
    override --rollout.num-engines "$NUM_ENGINES"
    override --rollout.tensor-parallel "$ENGINE_TENSOR_PARALLEL"
    override --weight-sync.backend "$WEIGHT_SYNC"
    override --checkpoint.grace-seconds "$GRACE_SECONDS"
    override --checkpoint.resume auto
    COMMAND+=("${EXTRA_WORDS[@]}")
}
override() { [[ -z $2 ]] || COMMAND+=("$1" "$2"); } # FIELD VALUE; empty: the recipe's

check_recipe() { # the recipe with all overrides, as the driver reads them, against the devices
    # What is wrong already would only be complained of twice.
    ((${#PROBLEMS[@]} == 0)) || return 0
    RECIPE_CHECK=$(cd "$REPO" && "${PYTHON_WORDS[@]}" "$LIB/check_recipe.py" \
        "$LEARNER_DEVICES" "$ROLLOUT_DEVICES" "${COMMAND[@]}" 2>&1) || problem "$RECIPE_CHECK"
}

train_main() {
    train_settings
    make_command
    if ((IS_JOB && ${#PROBLEMS[@]} == 0)); then split_nodes; fi
    check_recipe
    refuse_problems
    say "settings of ${COMMAND[0]}:"
    print_settings
    echo "$RECIPE_CHECK"
    if ! ((IS_JOB)); then
        say "all settings are valid; submit with: slurm/submit.sh $0 [sbatch's options]"
        exit 0
    fi
    begin_run_records
    leave_if_requeued_too_often
    leave_if_finished
    watch_signals
    trap stop_nodes EXIT
    set_platform
    say "environment of $DEVICE on ${HOSTS[*]}:"
    print_environment
    say "logs of the nodes: $ATTEMPT"
    cd "$REPO" || exit
    local status=0
    run_everything || status=$?
    stop_nodes
    end_job "$status"
}

run_everything() {
    local -a words
    prepare_ray || return
    words=("${COMMAND[@]}" --runtime.ray-address "$RAY_JOIN_ADDRESS" --runtime.node-groups true)
    start_nodes
    wait_for_nodes || return
    if ((DOCTOR)); then # all nodes, before hours are spent on them
        say "doctor:"
        # What it finds is for a person to mend: the job is not queued again.
        run_stage "${PYTHON_WORDS[@]}" -m r2vpo_megatron.cli.doctor "${words[@]}" ||
            return "$(($? == 1 ? EXIT_BAD_INPUT : $?))"
    fi
    say "driver: ${COMMAND[*]}"
    run_stage "${PYTHON_WORDS[@]}" -m r2vpo_megatron.cli.train "${words[@]}"
}
