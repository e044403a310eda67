"""Stand-ins for the vendors' kernels that run on the host and hold their contracts to the letter.

A call that the real kernel would refuse fails, and one that it would take with another meaning
than ours gets that meaning: attention without a mask is full attention. Written from the
documentation of torch_npu (op-plugin), HCCL, flash-attn and torch.
"""

from __future__ import annotations

import itertools
import sys
import types
from collections import Counter
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_NPU_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_FLASH_DTYPES = (torch.float16, torch.bfloat16)
# Reductions in HCCL on Atlas A2; gathering and sending know all types.
_HCCL_REDUCED = (
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_offsets: Sequence[int],
    key_offsets: Sequence[int],
    *,
    scale: float | None = None,
    mask: str = "lower right",
) -> Tensor:
    """Softmax over an explicit mask of each piece, in float64.

    Args:
        query: [T, heads, head_dim].
        key: [K, kv_heads, head_dim].
        value: [K, kv_heads, head_dim].
        query_offsets: [P + 1], 0 first.
        key_offsets: [P + 1].
        scale: of the scores; None for head_dim ** -0.5.
        mask: "lower right", "upper left" or "none".
    """
    group = query.shape[1] // key.shape[1]
    q, k, v = (x.double().transpose(0, 1) for x in (query, key, value))
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    scores = q * (query.shape[-1] ** -0.5 if scale is None else scale)
    outputs = []
    for (start, end), (first, last) in zip(
        itertools.pairwise(query_offsets), itertools.pairwise(key_offsets), strict=True
    ):
        seen = torch.ones(end - start, last - first, dtype=torch.bool)
        if mask != "none":
            seen = seen.tril((last - first) - (end - start) if mask == "lower right" else 0)
        weights = scores[:, start:end] @ k[:, first:last].transpose(1, 2)
        outputs.append(weights.masked_fill(~seen, -torch.inf).softmax(-1) @ v[:, first:last])
    return torch.cat(outputs, dim=1).transpose(0, 1).to(query.dtype)


class FakeTorchNpu(types.ModuleType):
    """The module torch_npu, as far as the project calls it."""

    def __init__(self) -> None:
        super().__init__("torch_npu")
        self.calls: Counter[str] = Counter()
        self.npu = types.SimpleNamespace(
            is_available=lambda: True,
            manual_seed_all=lambda seed: None,
            current_device=lambda: 0,
            default_generators=[torch.default_generator],
        )

    def npu_fusion_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        head_num: int,
        input_layout: str,
        pse: None = None,
        padding_mask: None = None,
        atten_mask: Tensor | None = None,
        scale: float = 1.0,
        keep_prob: float = 1.0,
        pre_tockens: int = 2147483647,
        next_tockens: int = 2147483647,
        inner_precise: int = 0,
        prefix: None = None,
        actual_seq_qlen: list[int] | None = None,
        actual_seq_kvlen: list[int] | None = None,
        sparse_mode: int = 0,
        gen_mask_parallel: bool = True,
        sync: bool = False,
    ) -> tuple[Any, ...]:
        """TND alone; the three causal or full ways of sparse_mode that are used with it."""
        self.calls["npu_fusion_attention"] += 1
        assert input_layout == "TND" and keep_prob == 1.0
        assert query.dtype in _NPU_DTYPES and query.dtype == key.dtype == value.dtype
        assert all(x.dim() == 3 and x.is_contiguous() for x in (query, key, value))
        assert key.shape == value.shape and query.shape[2] == key.shape[2] <= 768
        assert head_num == query.shape[1] <= 256 and head_num % key.shape[1] == 0
        assert max(len(query), len(key)) <= 1024**2
        for ends, tokens in ((actual_seq_qlen, query), (actual_seq_kvlen, key)):
            assert isinstance(ends, list) and all(type(end) is int for end in ends)
            assert 1 <= len(ends) <= 1024  # of a pack; 2,048 are taken otherwise
            assert ends[0] > 0 and ends[-1] == len(tokens)  # cumulative, without a leading 0
            assert all(first <= second for first, second in itertools.pairwise(ends))
        assert actual_seq_qlen is not None and actual_seq_kvlen is not None
        mask = "none"  # without atten_mask sparse_mode has no effect
        if atten_mask is not None:
            mask = {2: "upper left", 3: "lower right"}[sparse_mode]
            # Compressed: 2,048 x 2,048, True where a key is not seen.
            assert torch.equal(atten_mask, torch.ones(2048, 2048, dtype=torch.bool).triu(1))
        offsets = [0, *actual_seq_qlen], [0, *actual_seq_kvlen]
        output = attend(query, key, value, *offsets, scale=scale, mask=mask)
        statistics = query.new_zeros(len(query), head_num, 8, dtype=torch.float32)
        return output, statistics, statistics, query.new_zeros(0), 0, 0, 0

    def npu_rms_norm(
        self, input: Tensor, gamma: Tensor, epsilon: float = 1e-06
    ) -> tuple[Tensor, Tensor]:
        """The normalised and the reciprocal of the root mean square, fp32."""
        self.calls["npu_rms_norm"] += 1
        assert input.dtype in _NPU_DTYPES and gamma.dtype == input.dtype
        assert gamma.shape == input.shape[-1:] and input.dim() <= 8
        wide = input.float()
        rstd = (wide.square().mean(dim=-1, keepdim=True) + epsilon).rsqrt()
        return (wide * rstd).to(input.dtype) * gamma, rstd

    def npu_rotary_mul(
        self, input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half"
    ) -> Tensor:
        """input x r1 + rotated input x r2, in the layouts BSND and SBND."""
        self.calls["npu_rotary_mul"] += 1
        assert rotary_mode == "half"
        assert input.dim() == r1.dim() == 4 and r1.shape == r2.shape and input.is_contiguous()
        assert input.dtype in _NPU_DTYPES and input.dtype == r1.dtype == r2.dtype
        first, second, heads, head_dim = input.shape
        assert head_dim % 2 == 0 and head_dim < 896 and heads < 1000
        is_bsnd = first < 1000 and tuple(r1.shape) == (1, second, 1, head_dim)
        is_sbnd = second < 1000 and tuple(r1.shape) == (first, 1, 1, head_dim)
        assert is_bsnd or is_sbnd
        assert max(r1.abs().max(), r2.abs().max()) <= 1
        assert not (r1.requires_grad or r2.requires_grad)
        front, back = input.chunk(2, dim=-1)
        return input * r1 + torch.cat((-back, front), dim=-1) * r2

    def npu_swiglu(self, input: Tensor, dim: int = -1) -> Tensor:
        """silu(first half) x second half."""
        self.calls["npu_swiglu"] += 1
        assert input.dtype in _NPU_DTYPES and input.shape[dim] % 2 == 0
        front, back = input.chunk(2, dim=dim)
        return torch.nn.functional.silu(front) * back


class FakeMindSpeed(types.ModuleType):
    """The module mindspeed.ops.npu_matmul_add."""

    def __init__(self) -> None:
        super().__init__("mindspeed.ops.npu_matmul_add")
        self.calls: Counter[str] = Counter()

    def npu_matmul_add_fp32(self, total_input: Tensor, grad_output: Tensor, grad: Tensor) -> None:
        """Add grad_output^T total_input, half precision both, to fp32 in place."""
        self.calls["npu_matmul_add_fp32"] += 1
        assert total_input.dtype == grad_output.dtype in (torch.float16, torch.bfloat16)
        assert grad.dtype == torch.float32 and total_input.dim() == grad_output.dim() == 2
        assert grad.shape == (grad_output.shape[1], total_input.shape[1])
        grad.add_(grad_output.float().t() @ total_input.float())


class FakeFlashAttn(types.ModuleType):
    """The module flash_attn; its kernels know half precision alone.

    Args:
        dtypes: that are taken; float32 lets a test compare more closely than half precision does.
    """

    def __init__(self, dtypes: Sequence[torch.dtype] = _FLASH_DTYPES) -> None:
        super().__init__("flash_attn")
        self.__spec__ = ModuleSpec("flash_attn", None)  # or find_spec takes it for broken
        self.calls: Counter[str] = Counter()
        self._dtypes = dtypes

    def flash_attn_varlen_func(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
    ) -> Tensor:
        """From flash-attn 2.1 on: KV heads are grouped, causal is aligned at the lower right."""
        self.calls["flash_attn_varlen_func"] += 1
        assert dropout_p == 0.0 and window_size == (-1, -1) and q.shape[-1] <= 256
        _check_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, self._dtypes)
        offsets = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
        mask = "lower right" if causal else "none"
        return attend(q, k, v, *offsets, scale=softmax_scale, mask=mask)


def windowed_varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    """torch.nn.attention.varlen.varlen_attn as later torch has it."""
    assert window_size in ((-1, -1), (-1, 0))
    assert enable_gqa or query.shape[1] == key.shape[1]
    _check_varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, _FLASH_DTYPES)
    mask = "lower right" if window_size == (-1, 0) else "none"
    offsets = cu_seq_q.tolist(), cu_seq_k.tolist()
    return attend(query, key, value, *offsets, scale=scale, mask=mask)


def flagged_varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool = False,
) -> Tensor:
    """The same in torch 2.10, which knows no grouped KV heads."""
    assert query.shape[1] == key.shape[1]
    _check_varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, _FLASH_DTYPES)
    mask = "lower right" if is_causal else "none"
    return attend(query, key, value, cu_seq_q.tolist(), cu_seq_k.tolist(), mask=mask)


def _check_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_offsets: Tensor,
    key_offsets: Tensor,
    longest_query: int,
    longest_key: int,
    dtypes: Sequence[torch.dtype],
) -> None:
    """What CUDA's kernels for packs share: int32 offsets on the device, true maxima."""
    assert query.dtype in dtypes and query.dtype == key.dtype == value.dtype
    assert key.shape == value.shape and query.shape[1] % key.shape[1] == 0
    assert all(x.stride(-1) == 1 for x in (query, key, value))
    assert query_offsets.dtype == key_offsets.dtype == torch.int32
    assert query_offsets.device == key_offsets.device == query.device
    assert query_offsets[0] == key_offsets[0] == 0
    assert query_offsets[-1] == len(query) and key_offsets[-1] == len(key)
    assert type(longest_query) is type(longest_key) is int
    assert longest_query == query_offsets.diff().max() and longest_key == key_offsets.diff().max()


class HcclRules(TorchDispatchMode):
    """Inside, a collective of this thread that HCCL does not know fails.

    It reduces no fp64. (Nor does it know averages; neither does gloo, which tests run on.)
    """

    def __init__(self) -> None:
        super().__init__()
        self.num_reductions = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "c10d" and "reduce" in func._schema.name:
            self.num_reductions += 1
            for leaf in tree_leaves(args):
                if isinstance(leaf, Tensor) and leaf.dtype not in _HCCL_REDUCED:
                    raise AssertionError(f"{func._schema.name} of {leaf.dtype}")
        return func(*args, **(kwargs or {}))


def install(module: types.ModuleType) -> None:
    """Let imports find it, for the rest of this process; torch_npu's with what lies in it."""
    sys.modules[module.__name__] = module
    if module.__name__ == "torch_npu":
        for name in ("contrib", "contrib.transfer_to_npu"):
            sys.modules[f"torch_npu.{name}"] = types.ModuleType(f"torch_npu.{name}")
