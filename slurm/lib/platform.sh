# shellcheck shell=bash
# The environment of each platform, for the driver and, through Ray's daemons, for all workers.
# What is set already, in the site's file or by the user, stays.

ENVIRONMENT=() # names, to be printed

give() { # NAME VALUE
    ENVIRONMENT+=("$1")
    export "$1=${!1-$2}"
}

set_platform() {
    give RAY_USAGE_STATS_ENABLED 0  # nothing is reported to anyone
    give VLLM_NO_USAGE_STATS 1
    give HF_HUB_OFFLINE 1           # compute nodes have no way out; models and data are files
    give TOKENIZERS_PARALLELISM false # its threads do not survive the forks of data workers
    if [[ -n $INTERFACE ]]; then
        give GLOO_SOCKET_IFNAME "$INTERFACE" # gloo else takes the interface of the host's name
    fi
    "set_$DEVICE"
}

set_npu() {
    if [[ -n $INTERFACE ]]; then
        give HCCL_SOCKET_IFNAME "$INTERFACE" # where ranks meet; HCCL_IF_IP is set on each node
        give TP_SOCKET_IFNAME "$INTERFACE"   # torch's tensorpipe
    fi
    # HCCL waits 120 s for all ranks by default; loading weights from a shared folder takes longer.
    give HCCL_CONNECT_TIMEOUT 1800
    # Above the longest that one rank waits for another between collectives: an uneven micro-batch.
    give HCCL_EXEC_TIMEOUT 1836
    give HCCL_OP_EXPANSION_MODE AIV   # collectives on the vector cores: shorter launches
    # MB per communicator, two buffers each; a run has a communicator per parallel dimension.
    give HCCL_BUFFSIZE 200
    give TASK_QUEUE_ENABLE 1          # operators are queued by a second thread
    give CPU_AFFINITY_CONF 1          # each rank's threads on the cores near its NPU
    # Packs differ in length from one to the next, which fragments fixed segments.
    give PYTORCH_NPU_ALLOC_CONF expandable_segments:True
    if ((DETERMINISTIC)); then
        give HCCL_DETERMINISTIC true
        give LCCL_DETERMINISTIC 1
        give CLOSE_MATMUL_K_SHIFT 1
        give ATB_MATMUL_SHUFFLE_K_ENABLE 0
    fi
}

set_cuda() {
    if [[ -n $INTERFACE ]]; then
        give NCCL_SOCKET_IFNAME "$INTERFACE" # where ranks meet; data goes by InfiniBand if there is
    fi
    give NCCL_DEBUG WARN
    # Megatron's order of kernels under tensor and sequence parallelism needs one queue.
    give CUDA_DEVICE_MAX_CONNECTIONS 1
    give NCCL_CUMEM_ENABLE 0 # its memory cannot be shared with the engines' processes, as vLLM says
    # PYTORCH_CUDA_ALLOC_CONF stays as it is: expandable segments cannot be sent by CUDA IPC.
    if ((DETERMINISTIC)); then
        give CUBLAS_WORKSPACE_CONFIG :4096:8
        give NCCL_ALGO Ring
    fi
}

set_cpu() {
    # Threads that spin while they wait starve the others on a busy node.
    give OMP_WAIT_POLICY PASSIVE
    give OMP_NUM_THREADS 1
    give VLLM_CPU_OMP_THREADS_BIND nobind # several engines on a node would be bound to one core
}

print_environment() {
    local name
    for name in "${ENVIRONMENT[@]}"; do printf '  %-26s %s\n' "$name" "${!name}"; done
}
