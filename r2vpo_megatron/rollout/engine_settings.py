"""How vLLM is started: environment and arguments, by platform. Imports neither vllm nor torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from r2vpo_megatron.rollout.weight_transfer import BACKEND_NAME

# vLLM's own choice on a CPU for models with a short context.
MIN_TOKENS_PER_STEP = 4096
PLUGINS = ("openpangu", "r2vpo_weight_transfer")  # this package's entry points, see setup.cfg
WORKER_EXTENSION = "r2vpo_megatron.rollout.worker_extension.WeightPushExtension"


def engine_environment(device_name: str, num_threads: int = 1) -> dict[str, str]:
    """Environment variables of a process that is to hold an engine.

    Set them before the process loads torch: OpenMP reads its own only once.

    Args:
        device_name: "cpu", "cuda" or "npu".
        num_threads: OpenMP threads of the engine on a CPU.

    Raises:
        ValueError: the device name is unknown.
    """
    environment = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine core lives in this very process
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",  # its warnings speak of tokenizers and preloads unused here
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if "VLLM_PLUGINS" in os.environ:  # a list leaves out all others, in TP workers too
        listed = os.environ["VLLM_PLUGINS"].split(",")
        environment["VLLM_PLUGINS"] = ",".join(dict.fromkeys([*filter(None, listed), *PLUGINS]))
    by_device = {
        # Without PASSIVE, idle OpenMP threads spin and starve the other processes of a busy
        # machine (ten times slower). Without nobind, vLLM claims cores that learners use.
        "cpu": {
            "OMP_NUM_THREADS": str(num_threads),
            "OMP_WAIT_POLICY": "PASSIVE",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            # vLLM compiles a sampler function even in eager mode (batched_count_greater_than).
            # On a CPU that takes a C++ compiler, and one that finds its headers in a path
            # with a space.
            "TORCHDYNAMO_DISABLE": "1",
            # Tensor-parallel workers killed at the end of their grace leave files in /dev/shm.
            "VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS": "60",
        },
        "cuda": {},
        # The NZ layout of vllm-ascend would have to be converted back at every weight push; 0.23
        # refuses a push where this variable does not switch it off.
        "npu": {"VLLM_ASCEND_ENABLE_NZ": "0"},
    }
    return environment | _for_device(by_device, device_name)


def _for_device(by_device: Mapping[str, dict[str, Any]], device_name: str) -> dict[str, Any]:
    if device_name not in by_device:
        raise ValueError(f"device_name={device_name!r}: must be one of {', '.join(by_device)}")
    return by_device[device_name]


def _platform_arguments(device_name: str, max_model_len: int, max_num_seqs: int) -> dict[str, Any]:
    """Arguments of `vllm.LLM` that depend on the platform."""
    by_device: dict[str, dict[str, Any]] = {
        "cpu": {
            # Compiling costs tens of seconds at start-up and gains nothing on a CPU.
            "enforce_eager": True,
            # For a prompt cut in chunks vLLM winds the request's generator back
            # (GPUModelRunner._bookkeeping_sync), which CPU generators cannot do.
            "enable_chunked_prefill": False,
            # So a step must have room for the longest prompt, that of a response recomputed just
            # before its end, beside one token of each response that goes on.
            "max_num_batched_tokens": max(max_model_len + max_num_seqs, MIN_TOKENS_PER_STEP),
        },
        "cuda": {"enforce_eager": False},
        # The NZ layout again, as versions of vllm-ascend spell it that no longer read the variable.
        "npu": {"enforce_eager": True, "additional_config": {"weight_nz_mode": 0}},
    }
    return _for_device(by_device, device_name)


def engine_arguments(
    model_dir: Path,
    *,
    dtype: str,
    max_model_len: int,
    kv_cache_bytes: int,
    memory_fraction: float | None,
    max_num_seqs: int,
    tensor_parallel: int,
    seed: int,
    device_name: str,
) -> dict[str, Any]:
    """Arguments of `vllm.LLM`; those of `VLLMEngine` have the same meaning here.

    Raises:
        ValueError: the device name is unknown.
    """
    if device_name == "cpu":
        memory: dict[str, Any] = {"kv_cache_memory_bytes": kv_cache_bytes}
    else:
        # A fixed KV cache would make vLLM ignore the fraction.
        memory = {} if memory_fraction is None else {"gpu_memory_utilization": memory_fraction}
    return {
        "model": str(model_dir),
        "skip_tokenizer_init": True,
        "generation_config": "vllm",  # ignore sampling defaults and stop ids of the checkpoint
        "tensor_parallel_size": tensor_parallel,
        "dtype": dtype,
        "seed": seed,
        "max_model_len": max_model_len,
        "max_num_seqs": max_num_seqs,
        "use_tqdm_on_load": False,
        "enable_prefix_caching": True,  # the responses of a group share their prompt
        "logprobs_mode": "processed_logprobs",  # the default is before temperature
        # Else a step's tokens become known during the next one: between two steps, where weights
        # are pushed, the engine could not tell which version sampled them.
        "async_scheduling": False,
        "weight_transfer_config": {"backend": BACKEND_NAME},
        "worker_extension_cls": WORKER_EXTENSION,
        **memory,
        **_platform_arguments(device_name, max_model_len, max_num_seqs),
    }
