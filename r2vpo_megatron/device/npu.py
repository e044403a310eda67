"""Ascend NPUs with HCCL, through torch_npu.

Written from the documentation of torch_npu and CANN; the README says what has run where.
"""

from __future__ import annotations

import functools
import importlib
import types
import uuid
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from r2vpo_megatron.device import layer_functions
from r2vpo_megatron.device.base import Platform, SequenceLayout, tensor_types_named_cuda
from r2vpo_megatron.device.transfer_group import TransferGroup

_MASK_SIDE = 2048  # the size npu_fusion_attention wants of a compressed causal mask
_RIGHT_DOWN_CAUSAL = 3  # its sparse_mode that is aligned at the last query and key
_MAX_SEQUENCES = 1024  # entries that actual_seq_qlen may have


class NpuPlatform(Platform):
    """torch_npu maps CUDA names to NPU ones; the layers' kernels are torch_npu's."""

    name = "npu"
    collective_backend = "hccl"

    def prepare(self) -> None:
        """Let torch_npu translate torch.cuda and nccl, then mend what it leaves of Megatron.

        MindSpeed's kernel for gradients of weights is put where Megatron looks for Apex's.
        """
        _torch_npu()
        importlib.import_module("torch_npu.contrib.transfer_to_npu")
        # No Triton for NPUs in the supported set: leave Megatron's small fusions uncompiled.
        importlib.import_module("megatron.core.jit").disable_jit_fuser()
        random: Any = importlib.import_module("megatron.core.tensor_parallel.random")
        # transfer_to_npu does not reach torch._C._cuda_setRNGState, which Megatron prefers.
        random._set_cuda_rng_state = _set_npu_rng_state
        if _mindspeed_matmul_add() is not None:
            layers: Any = importlib.import_module("megatron.core.tensor_parallel.layers")
            layers.fused_weight_gradient_mlp_cuda = types.SimpleNamespace(
                wgrad_gemm_accum_fp32=_accumulate_weight_gradient
            )
            layers._grad_accum_fusion_available = True

    def torch_device(self, local_rank: int) -> torch.device:
        """npu:local_rank, made current."""
        npu = _torch_npu().npu
        npu.set_device(local_rank)
        return torch.device("npu", local_rank)

    def transformer_config_overrides(self) -> dict[str, Any]:
        """No CUDA extensions; MindSpeed's counterpart of Apex's, where MindSpeed is installed."""
        return {
            "use_cpu_initialization": False,
            "gradient_accumulation_fusion": _mindspeed_matmul_add() is not None,
            "bias_activation_fusion": False,
            "masked_softmax_fusion": False,
        }

    def packed_attention(
        self, query: Tensor, key: Tensor, value: Tensor, layout: SequenceLayout
    ) -> Tensor:
        """npu_fusion_attention in TND; it knows grouped KV heads.

        A pack of more sequences than the kernel takes costs several calls.
        """
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        num_pieces = len(layout.query_offsets) - 1
        if num_pieces <= _MAX_SEQUENCES:
            return _fused_attention(query, key, value, layout.query_offsets, layout.key_offsets)
        starts = range(0, num_pieces, _MAX_SEQUENCES)
        query_parts, key_parts = (
            [offsets[start : start + _MAX_SEQUENCES + 1] for start in starts]
            for offsets in (layout.query_offsets, layout.key_offsets)
        )
        # Splitting has one gradient for all parts; slices would each have one of the whole's size.
        queries = query.split([part[-1] - part[0] for part in query_parts])
        keys, values = (
            whole.split([part[-1] - part[0] for part in key_parts]) for whole in (key, value)
        )
        return torch.cat(
            [
                _fused_attention(*part)
                for part in zip(queries, keys, values, query_parts, key_parts, strict=True)
            ]
        )

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """npu_rms_norm."""
        normalized: Tensor = _torch_npu().npu_rms_norm(x, weight, epsilon=eps)[0]
        return normalized

    def apply_rotary(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """npu_rotary_mul both ways: its own gradient would keep x, which a rotation can spare."""
        return layer_functions.apply_rotary(x, cos, sin, _rotate)

    def swiglu(self, gate_up: Tensor) -> Tensor:
        """npu_swiglu."""
        activated: Tensor = _torch_npu().npu_swiglu(gate_up, dim=-1)
        return activated

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


def _fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_offsets: Sequence[int],
    key_offsets: Sequence[int],
) -> Tensor:
    """Attention in up to 1,024 pieces; offsets [P + 1] may begin anywhere."""
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
        actual_seq_qlen=[end - query_offsets[0] for end in query_offsets[1:]],
        actual_seq_kvlen=[end - key_offsets[0] for end in key_offsets[1:]],
    )[0]
    return output


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, direction: float) -> Tensor:
    """The kernel takes four dimensions: here batch, sequence, heads, head_dim."""
    rotated: Tensor = _torch_npu().npu_rotary_mul(
        x.contiguous().unsqueeze(0),
        cos.unsqueeze(0),
        (sin if direction > 0 else -sin).unsqueeze(0),
        rotary_mode="half",
    )
    return rotated.squeeze(0)


@functools.cache
def _mindspeed_matmul_add() -> Callable[[Tensor, Tensor, Tensor], None] | None:
    """MindSpeed's kernel that adds a product of bf16 or fp16 matrices to fp32, or None.

    Nothing else of MindSpeed is wanted: what its megatron_adaptor replaces by name, guided by
    sys.argv, are parts of Megatron that this project does not use. The public registry's package
    of that name is empty.
    """
    try:
        module = importlib.import_module("mindspeed.ops.npu_matmul_add")
    except ImportError:
        return None
    kernel: Callable[[Tensor, Tensor, Tensor], None] = module.npu_matmul_add_fp32
    return kernel


def _accumulate_weight_gradient(inputs: Tensor, grad: Tensor, main_grad: Tensor) -> None:
    """Counterpart of Apex's fused_weight_gradient_mlp_cuda.wgrad_gemm_accum_fp32.

    Args:
        inputs: [T, in] of a linear layer.
        grad: [T, out] of its outputs.
        main_grad: [out, in] fp32, to be added to.
    """
    kernel = _mindspeed_matmul_add()
    if kernel is None or inputs.dtype == torch.float32:
        main_grad.addmm_(grad.t().to(main_grad.dtype), inputs.to(main_grad.dtype))
    else:
        kernel(inputs, grad, main_grad)


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
