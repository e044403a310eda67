# shellcheck shell=bash
# Jobs of one node without a Ray of their own: evaluation and conversion.

single_main() { # COMMAND holds Python's arguments; $1 says what is done, for a person
    refuse_problems
    say "settings: $1"
    print_settings
    if ! ((IS_JOB)); then
        say "all settings are valid; submit with: slurm/submit.sh $0 [sbatch's options]"
        exit 0
    fi
    begin_run_records
    leave_if_requeued_too_often
    leave_if_finished
    watch_signals
    set_platform
    say "environment of $DEVICE on $(hostname):"
    print_environment
    cd "$REPO" || exit
    local status=0
    say "${COMMAND[*]}"
    run_stage "${PYTHON_WORDS[@]}" "${COMMAND[@]}" || status=$?
    end_job "$status"
}

evaluate_main() {
    common_settings npu
    setting MODEL
    setting BENCHMARKS
    setting ENGINE_TENSOR_PARALLEL 1
    require_integer ENGINE_TENSOR_PARALLEL 1 "$DEVICES_PER_NODE" || true
    setting NUM_ENGINES
    if ((${#PROBLEMS[@]} == 0)); then
        : "${NUM_ENGINES:=$((DEVICES_PER_NODE / ENGINE_TENSOR_PARALLEL))}"
        require_integer NUM_ENGINES 1 $((DEVICES_PER_NODE / ENGINE_TENSOR_PARALLEL)) || true
    fi
    [[ -n $MODEL ]] || problem "MODEL=: must be a model's folder, or that of a training run"
    require_path MODEL
    COMMAND=(-m r2vpo_megatron.cli.evaluate --model "$MODEL" --output "$OUTPUT_DIR/$RUN_NAME" --resume
        --device "$DEVICE" --engines "$NUM_ENGINES" --tensor-parallel "$ENGINE_TENSOR_PARALLEL")
    [[ -z $BENCHMARKS ]] || COMMAND+=(--benchmarks "$BENCHMARKS")
    COMMAND+=("${EXTRA_WORDS[@]}")
    single_main "evaluates $MODEL"
}

convert_main() {
    common_settings cpu
    setting DIRECTION to_megatron
    setting INPUT
    setting OUTPUT "$OUTPUT_DIR/$RUN_NAME"
    setting TENSOR_PARALLEL 1
    setting PIPELINE_PARALLEL 1
    setting VERIFY 1
    require_choice DIRECTION to_megatron to_hf
    require_choice VERIFY 0 1
    require_integer TENSOR_PARALLEL 1 1024 || true
    require_integer PIPELINE_PARALLEL 1 1024 || true
    [[ -n $INPUT ]] || problem "INPUT=: must be the folder of the checkpoint to convert"
    require_path INPUT
    if [[ $DIRECTION == to_megatron ]]; then
        COMMAND=(tools/convert_hf_to_megatron.py --hf "$INPUT"
            --tensor-parallel "$TENSOR_PARALLEL" --pipeline-parallel "$PIPELINE_PARALLEL")
    else
        COMMAND=(tools/convert_megatron_to_hf.py --megatron "$INPUT")
    fi
    COMMAND+=(--output "$OUTPUT" --resume)
    if [[ $VERIFY == 1 ]]; then COMMAND+=(--verify); fi
    COMMAND+=("${EXTRA_WORDS[@]}")
    single_main "converts $INPUT"
}
