"""NVIDIA GPUs with NCCL."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor

from r2vpo_megatron.device.base import Platform, SequenceLayout, attention_per_sequence
from r2vpo_megatron.device.transfer_group import TransferGroup

_FLASH_DTYPES = (torch.float16, torch.bfloat16)
_DEVICE_ARGUMENT = 6  # of rebuild_cuda_tensor: storage_device, an index


class CudaPlatform(Platform):
    """CUDA needs no stand-ins; only kernels are chosen here.

    Rotary embedding and SwiGLU stay what they are everywhere: torch has no kernel of its own for
    them, and their gradients keep less than autograd would.
    """

    name = "cuda"
    collective_backend = "nccl"

    def prepare(self) -> None:
        """Check that there is a device."""
        if not torch.cuda.is_available():
            raise RuntimeError(
                "platform cuda: no CUDA device or a torch built without CUDA; "
                "use --runtime.device cpu, or install a CUDA build of torch"
            )

    def torch_device(self, local_rank: int) -> torch.device:
        """cuda:local_rank, made current."""
        self.prepare()
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        return device

    def transformer_config_overrides(self) -> dict[str, Any]:
        """Fused gradient accumulation needs Apex's extension; take it only where it is."""
        has_apex_kernel = importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None
        return {
            "use_cpu_initialization": False,
            "gradient_accumulation_fusion": has_apex_kernel,
            "masked_softmax_fusion": False,
        }

    def packed_attention(
        self, query: Tensor, key: Tensor, value: Tensor, layout: SequenceLayout
    ) -> Tensor:
        """flash-attn's varlen kernel if installed, else torch's, else one sdpa a sequence.

        Neither varlen kernel takes float32; the last way exists for parity tests in it.
        """
        if query.dtype not in _FLASH_DTYPES:
            return attention_per_sequence(query, key, value, layout)
        if importlib.util.find_spec("flash_attn") is not None:
            return _flash_attention(query, key, value, layout)
        if importlib.util.find_spec("torch.nn.attention.varlen") is not None:
            return _torch_varlen_attention(query, key, value, layout)
        return attention_per_sequence(query, key, value, layout)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Torch's kernel: one pass each way, rounded once, after the weight."""
        return torch.nn.functional.rms_norm(x, weight.shape, weight, eps)

    def accelerator_resource(self) -> str | None:
        """GPU."""
        return "GPU"

    def memory_allocated_bytes(self) -> int:
        """Bytes in live tensors on the current device."""
        return torch.cuda.memory_allocated()

    def peak_memory_bytes(self) -> int:
        """Most bytes in live tensors since the last reset."""
        return torch.cuda.max_memory_allocated()

    def reset_peak_memory(self) -> None:
        """Start a new peak measurement."""
        torch.cuda.reset_peak_memory_stats()

    def synchronize(self) -> None:
        """Wait for the current device."""
        torch.cuda.synchronize()

    def empty_cache(self) -> None:
        """Free cached blocks."""
        torch.cuda.empty_cache()

    def current_device(self) -> torch.device:
        """The current CUDA device."""
        return torch.device("cuda", torch.cuda.current_device())

    def transfer_group(
        self, store: dist.Store, rank: int, size: int, timeout_seconds: float
    ) -> TransferGroup:
        """NCCL; a failed broadcast is the caller's to handle, not NCCL's watchdog's."""
        backend_class: Any = dist.ProcessGroupNCCL
        options = backend_class.Options()
        options._timeout = timedelta(seconds=10 * timeout_seconds)
        with _nccl_errors_left_to_the_caller():
            backend = backend_class(store, rank, size, options)
        group = TransferGroup(backend, timeout_seconds)
        group.check(self.current_device())
        return group

    def export_memory(self, tensor: Tensor) -> Any:
        """A CUDA IPC handle; torch keeps the memory until its readers have let go."""
        rebuild, arguments = reduce_tensor(tensor)
        if rebuild is not rebuild_cuda_tensor:
            raise RuntimeError(f"platform cuda: a tensor on {tensor.device} has no IPC handle")
        return arguments

    def open_memory(self, exported: Any) -> Tensor:
        """Map the memory; a device other than the exporter's needs peer access to it."""
        arguments = list(exported)
        # The exporter's index means nothing here: each worker sees its own devices alone.
        arguments[_DEVICE_ARGUMENT] = torch.cuda.current_device()
        tensor: Tensor = rebuild_cuda_tensor(*arguments)
        return tensor

    @property
    def fuses_adamw(self) -> bool:
        """Torch has one for every floating point type."""
        return True

    def seed(self, seed: int) -> None:
        """Host and every CUDA device."""
        torch.manual_seed(seed)
        torch.cuda.manual_seed_all(seed)


@contextmanager
def _nccl_errors_left_to_the_caller() -> Iterator[None]:
    """Groups made in this block do not end the process when a peer is lost, as is the default.

    ProcessGroupNCCL reads the variable once, when it is made.
    """
    name = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
    before = os.environ.get(name)
    os.environ[name] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _flash_attention(query: Tensor, key: Tensor, value: Tensor, layout: SequenceLayout) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    output: Tensor = flash_attn_varlen_func(
        query,
        key,
        value,
        cu_seqlens_q=layout.query_offsets_device,
        cu_seqlens_k=layout.key_offsets_device,
        max_seqlen_q=layout.longest_query,
        max_seqlen_k=layout.longest_key,
        causal=True,  # aligned at the last query and key, since flash-attn 2.1
    )
    return output


def _torch_varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: SequenceLayout
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    arguments = _varlen_arguments()
    if "enable_gqa" in arguments:
        arguments["enable_gqa"] = query.shape[1] != key.shape[1]
    else:  # torch 2.10 has no GQA: repeat each KV head for its group of query heads
        group = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    output = varlen_attn(
        query,
        key,
        value,
        layout.query_offsets_device,
        layout.key_offsets_device,
        layout.longest_query,
        layout.longest_key,
        **arguments,
    )
    assert isinstance(output, Tensor)
    return output


@functools.cache
def _signature_of_varlen_attn() -> frozenset[str]:
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(inspect.signature(varlen_attn).parameters)


def _varlen_arguments() -> dict[str, Any]:
    """Causal masking as this torch spells it: is_causal at first, later a window of (-1, 0)."""
    parameters = _signature_of_varlen_attn()
    arguments: dict[str, Any] = (
        {"window_size": (-1, 0)} if "window_size" in parameters else {"is_causal": True}
    )
    if "enable_gqa" in parameters:
        arguments["enable_gqa"] = False
    return arguments
