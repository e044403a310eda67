"""Ascend NPUs with HCCL, through torch_npu.

Written from the documentation of torch_npu and CANN; the README says what has run where.
"""

from __future__ import annotations

import functools
import importlib
import uuid
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from r2vpo_megatron.device.base import Platform, SequenceLayout, tensor_types_named_cuda
from r2vpo_megatron.device.transfer_group import TransferGroup

_MASK_SIDE = 2048  # the size npu_fusion_attention wants of a compressed causal mask
_RIGHT_DOWN_CAUSAL = 3  # its sparse_mode that is aligned at the last query and key
_MAX_SEQUENCES = 1024  # entries that actual_seq_qlen may have


class NpuPlatform(Platform):
    """torch_npu maps CUDA names to NPU ones; attention is the fused kernel in TND layout."""

    name = "npu"
    collective_backend = "hccl"

    def prepare(self) -> None:
        """Let torch_npu translate torch.cuda and nccl, then mend what it leaves of Megatron."""
        _torch_npu()
        importlib.import_module("torch_npu.contrib.transfer_to_npu")
        # No Triton for NPUs in the supported set: leave Megatron's small fusions uncompiled.
        importlib.import_module("megatron.core.jit").disable_jit_fuser()
        random: Any = importlib.import_module("megatron.core.tensor_parallel.random")
        # transfer_to_npu does not reach torch._C._cuda_setRNGState, which Megatron prefers.
        random._set_cuda_rng_state = _set_npu_rng_state

    def torch_device(self, local_rank: int) -> torch.device:
        """npu:local_rank, made current."""
        npu = _torch_npu().npu
        npu.set_device(local_rank)
        return torch.device("npu", local_rank)

    def transformer_config_overrides(self) -> dict[str, Any]:
        """No CUDA extensions."""
        return {
            "use_cpu_initialization": False,
            "gradient_accumulation_fusion": False,
            "bias_activation_fusion": False,
            "masked_softmax_fusion": False,
        }

    def packed_attention(
        self, query: Tensor, key: Tensor, value: Tensor, layout: SequenceLayout
    ) -> Tensor:
        """npu_fusion_attention in TND; it knows grouped KV heads.

        Raises:
            ValueError: more sequences in one micro-batch than the kernel takes.
        """
        num_pieces = len(layout.query_offsets) - 1
        if num_pieces > _MAX_SEQUENCES:
            raise ValueError(
                f"{num_pieces} sequences in one micro-batch: npu_fusion_attention takes at most "
                f"{_MAX_SEQUENCES}; lower the tokens per micro-batch"
            )
        # Without a mask sparse_mode has no effect and attention is silently full.
        output: Tensor = _torch_npu().npu_fusion_attention(
            query,
            key,
            value,
            query.shape[1],
            "TND",
            atten_mask=_compressed_causal_mask(query.device),
            scale=query.shape[-1] ** -0.5,
            keep_prob=1.0,
            sparse_mode=_RIGHT_DOWN_CAUSAL,
            # TND offsets come without the leading 0.
            actual_seq_qlen=list(layout.query_offsets[1:]),
            actual_seq_kvlen=list(layout.key_offsets[1:]),
        )[0]
        return output

    def accelerator_resource(self) -> str | None:
        """NPU."""
        return "NPU"

    def memory_allocated_bytes(self) -> int:
        """Bytes in live tensors on the current device."""
        return int(_torch_npu().npu.memory_allocated())

    def peak_memory_bytes(self) -> int:
        """Most bytes in live tensors since the last reset."""
        return int(_torch_npu().npu.max_memory_allocated())

    def reset_peak_memory(self) -> None:
        """Start a new peak measurement."""
        _torch_npu().npu.reset_peak_memory_stats()

    def synchronize(self) -> None:
        """Wait for the current device."""
        _torch_npu().npu.synchronize()

    def empty_cache(self) -> None:
        """Free cached blocks."""
        _torch_npu().npu.empty_cache()

    def current_device(self) -> torch.device:
        """The current NPU."""
        return torch.device("npu", _torch_npu().npu.current_device())

    def transfer_group(
        self, store: dist.Store, rank: int, size: int, timeout_seconds: float
    ) -> TransferGroup:
        """HCCL. Bytes travel as int32, which every HCCL broadcast takes.

        HCCL_CONNECT_TIMEOUT and HCCL_EXEC_TIMEOUT bound what HCCL itself waits for.
        """
        _torch_npu()
        module: Any = importlib.import_module("torch_npu._C._distributed_c10d")
        backend_class = module.ProcessGroupHCCL
        options = backend_class.Options()
        options._timeout = timedelta(seconds=10 * timeout_seconds)
        options.global_ranks_in_group = []  # not a part of a world
        # HCCL knows communicators by name, and another group of this process may have the same
        # ranks. All members must use one name.
        if rank == 0:
            store.set("group_id", f"r2vpo-weights-{uuid.uuid4().hex}")
        options.group_id = store.get("group_id").decode()
        group = TransferGroup(backend_class(store, rank, size, options), timeout_seconds)
        group.check(self.current_device())
        return group

    def seed(self, seed: int) -> None:
        """Host and every NPU."""
        torch.manual_seed(seed)
        _torch_npu().npu.manual_seed_all(seed)

    def optimizer_context(self) -> AbstractContextManager[None]:
        """Megatron's optimizers know CUDA's tensor type names only."""
        return tensor_types_named_cuda()


def npu_is_available() -> bool:
    """Whether torch_npu imports and sees a device."""
    try:
        return bool(_torch_npu().npu.is_available())
    except RuntimeError:
        return False


def _torch_npu() -> Any:
    try:
        return importlib.import_module("torch_npu")
    except (ImportError, OSError) as error:  # OSError: CANN's shared libraries are missing
        raise RuntimeError(
            f"platform npu: torch_npu does not import ({error}); install torch_npu for torch "
            f"{torch.__version__} and CANN, and source CANN's set_env.sh"
        ) from error


@functools.cache
def _compressed_causal_mask(device: torch.device) -> Tensor:
    """[2048, 2048] bool, True where masked; the kernel extends it to any length."""
    ones = torch.ones(_MASK_SIDE, _MASK_SIDE, dtype=torch.bool, device=device)
    return torch.triu(ones, diagonal=1)


def _set_npu_rng_state(new_state: Tensor, device: object = -1, graph_safe: bool = False) -> None:
    """Counterpart of megatron/core/tensor_parallel/random.py `_set_cuda_rng_state`."""
    npu = _torch_npu().npu
    npu.default_generators[npu.current_device()].set_state(new_state)
