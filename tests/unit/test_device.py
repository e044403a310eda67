"""The platform contract: choice by name, attention, lazy imports, CPU stand-ins."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import types

import numpy as np
import pytest
import torch

from r2vpo_megatron.device import PLATFORMS, get_platform
from r2vpo_megatron.device.base import (
    SequenceLayout,
    attention_per_sequence,
    tensor_types_named_cuda,
)

CPU = torch.device("cpu")


def run_python(code: str) -> str:
    """Run code in a fresh interpreter: preparing a platform changes the process for good."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("name", "backend", "resource"),
    [("cpu", "gloo", None), ("cuda", "nccl", "GPU"), ("npu", "hccl", "NPU")],
)
def test_every_platform_opens_without_its_packages(
    name: str, backend: str, resource: str | None
) -> None:
    platform = get_platform(name)
    assert platform.name == name
    assert platform.collective_backend == backend
    assert platform.accelerator_resource() == resource


def test_unknown_platform_lists_the_valid_ones() -> None:
    with pytest.raises(ValueError, match="platform = 'tpu': must be one of auto, cpu, cuda, npu"):
        get_platform("tpu")


def test_auto_takes_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert get_platform("auto").name == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert get_platform("auto").name == "cuda"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_without_a_device_says_so_in_one_line() -> None:
    with pytest.raises(RuntimeError, match="^platform cuda: no CUDA device.*$") as refusal:
        get_platform("cuda").prepare()
    assert "\n" not in str(refusal.value)
    assert "use --runtime.device cpu" in str(refusal.value)


def test_cpu_where_a_gpu_is_visible_says_how_to_hide_it() -> None:
    output = run_python(
        "import torch\n"
        "from r2vpo_megatron.device import get_platform\n"
        "torch.cuda.is_available = lambda: True\n"
        "try: get_platform('cpu').prepare()\n"
        "except RuntimeError as error: print(error)\n"
    )
    assert output == (
        "platform cpu: this process sees a CUDA device, which Megatron-core would take; start it "
        "with CUDA_VISIBLE_DEVICES set to nothing, or use --runtime.device cuda"
    )


@pytest.mark.skipif(
    importlib.util.find_spec("torch_npu") is not None, reason="needs a machine without torch_npu"
)
def test_npu_without_torch_npu_says_so_in_one_line() -> None:
    query = torch.zeros(2, 1, 4)
    platform = get_platform("npu")
    with pytest.raises(RuntimeError, match="^platform npu: torch_npu does not import"):
        platform.prepare()
    with pytest.raises(RuntimeError, match="^platform npu: torch_npu does not import"):
        platform.packed_attention(query, query, query, SequenceLayout.of([0, 2], CPU))


def documented_npu_fusion_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    head_num: int,
    input_layout: str,
    *,
    atten_mask: torch.Tensor | None = None,
    scale: float = 1.0,
    keep_prob: float = 1.0,
    sparse_mode: int = 0,
    actual_seq_qlen: list[int],
    actual_seq_kvlen: list[int],
) -> tuple[torch.Tensor]:
    """What torch_npu documents of the TND layout; masks other than the compressed causal fail."""
    assert input_layout == "TND" and head_num == query.shape[1] and keep_prob == 1.0
    for ends, tokens in ((actual_seq_qlen, query), (actual_seq_kvlen, key)):
        assert isinstance(ends, list) and all(isinstance(end, int) for end in ends)
        assert ends[0] > 0 and ends[-1] == len(tokens)  # cumulative, without a leading 0
    assert atten_mask is not None  # without it sparse_mode has no effect
    assert torch.equal(atten_mask, torch.ones(2048, 2048, dtype=torch.bool).triu(1))
    is_lower_right = {2: False, 3: True}[sparse_mode]
    query_offsets, key_offsets = [0, *actual_seq_qlen], [0, *actual_seq_kvlen]
    return (dense(query, key, value, query_offsets, key_offsets, scale, is_lower_right),)


def test_npu_kernel_is_called_as_documented(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = types.SimpleNamespace(npu_fusion_attention=documented_npu_fusion_attention)
    monkeypatch.setitem(sys.modules, "torch_npu", fake)  # type: ignore[arg-type]
    for query_offsets, key_offsets in PACKS:
        query, key, value = pack_of(query_offsets, key_offsets or query_offsets, torch.bfloat16)
        layout = SequenceLayout.of(query_offsets, CPU, key_offsets)
        output = get_platform("npu").packed_attention(query, key, value, layout)
        expected = dense(query, key, value, query_offsets, key_offsets or query_offsets)
        torch.testing.assert_close(output, expected, atol=1e-12, rtol=0)
    with pytest.raises(ValueError, match="1025 sequences .* at most 1024"):
        get_platform("npu").packed_attention(query, key, key, SequenceLayout.of(range(1026), CPU))


def documented_flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
) -> torch.Tensor:
    """What flash-attn 2.1 and later document; KV heads are grouped, causal is bottom-right."""
    assert causal and dropout_p == 0.0 and softmax_scale is None
    return varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)


def windowed_varlen_attn(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> torch.Tensor:
    """torch.nn.attention.varlen.varlen_attn as later torch has it."""
    assert window_size == (-1, 0) and scale is None
    assert enable_gqa == (query.shape[1] != key.shape[1])
    return varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k)


def flagged_varlen_attn(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool = False,
) -> torch.Tensor:
    """The same in torch 2.10, which knows no grouped KV heads."""
    assert is_causal and query.shape[1] == key.shape[1]
    return varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k)


@pytest.mark.parametrize("kernel", ["flash_attn", "window", "flag"])
def test_cuda_kernels_are_called_as_documented(
    kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from r2vpo_megatron.device import cuda

    flash = types.SimpleNamespace(flash_attn_varlen_func=documented_flash_attn_varlen_func)
    varlen_attn = windowed_varlen_attn if kernel == "window" else flagged_varlen_attn
    torch_varlen = types.SimpleNamespace(varlen_attn=varlen_attn)
    installed = {"flash_attn": flash} if kernel == "flash_attn" else {}
    installed["torch.nn.attention.varlen"] = torch_varlen
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: installed.get(name))
    for name, module in installed.items():
        monkeypatch.setitem(sys.modules, name, module)  # type: ignore[arg-type]
    cuda._signature_of_varlen_attn.cache_clear()
    try:
        for query_offsets, key_offsets in PACKS:
            query, key, value = pack_of(query_offsets, key_offsets or query_offsets, torch.bfloat16)
            layout = SequenceLayout.of(query_offsets, CPU, key_offsets)
            output = get_platform("cuda").packed_attention(query, key, value, layout)
            expected = dense(query, key, value, query_offsets, key_offsets or query_offsets)
            torch.testing.assert_close(output, expected, atol=1e-12, rtol=0)
    finally:
        cuda._signature_of_varlen_attn.cache_clear()


# Offsets of queries and, where they differ, of keys: whole sequences, and pieces of some.
PACKS: list[tuple[list[int], list[int] | None]] = [
    ([0, 9], None),
    ([0, 1, 5, 6, 9], None),
    ([0, 4], [0, 9]),
    ([0, 2, 3, 7], [0, 5, 6, 16]),
]


def pack_of(
    query_offsets: list[int], key_offsets: list[int], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random query [T, 6, 8], key and value [K, 2, 8]."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(tokens, heads, 8, generator=generator).to(dtype)
        for tokens, heads in ((query_offsets[-1], 6), (key_offsets[-1], 2), (key_offsets[-1], 2))
    )
    return query, key, value


def varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_offsets: torch.Tensor,
    key_offsets: torch.Tensor,
    longest_query: int,
    longest_key: int,
) -> torch.Tensor:
    """The contract of CUDA's kernels for packs: int32 offsets on the device, true maxima."""
    assert query.dtype in (torch.float16, torch.bfloat16)
    assert query_offsets.dtype == key_offsets.dtype == torch.int32
    assert longest_query == query_offsets.diff().max() and longest_key == key_offsets.diff().max()
    return dense(query, key, value, query_offsets.tolist(), key_offsets.tolist())


def dense(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_offsets: list[int],
    key_offsets: list[int],
    scale: float = 8**-0.5,
    is_lower_right: bool = True,
) -> torch.Tensor:
    """Softmax over an explicit causal mask of each piece, in float64."""
    group = query.shape[1] // key.shape[1]
    q, k, v = (x.double().transpose(0, 1) for x in (query, key, value))
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    blocks = []
    for queries, keys in zip(np.diff(query_offsets), np.diff(key_offsets), strict=True):
        block = torch.ones(int(queries), int(keys), dtype=torch.bool)
        blocks.append(block.tril(int(keys - queries) if is_lower_right else 0))
    scores = (q @ k.transpose(1, 2) * scale).masked_fill(
        ~torch.block_diag(*blocks).bool(), float("-inf")
    )
    return (scores.softmax(-1) @ v).transpose(0, 1)


@pytest.mark.parametrize(("query_offsets", "key_offsets"), PACKS)
def test_packed_attention_equals_a_dense_float64_softmax(
    query_offsets: list[int], key_offsets: list[int] | None
) -> None:
    torch.manual_seed(0)
    inputs = pack_of(query_offsets, key_offsets or query_offsets, torch.float32)
    query, key, value = (x.requires_grad_() for x in inputs)
    layout = SequenceLayout.of(query_offsets, CPU, key_offsets)
    output = get_platform("cpu").packed_attention(query, key, value, layout)
    expected = dense(query, key, value, query_offsets, key_offsets or query_offsets)
    torch.testing.assert_close(output.double(), expected, atol=1e-6, rtol=0)
    weights = torch.randn(output.shape)
    gradients = torch.autograd.grad((output * weights).sum(), inputs)
    expected_gradients = torch.autograd.grad((expected * weights).sum(), inputs)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, wanted, atol=1e-5, rtol=0)


def test_cuda_in_float32_takes_the_reference_way() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 2, 8)
    layout = SequenceLayout.of([0, 1, 4], CPU)
    output = get_platform("cuda").packed_attention(x, x, x, layout)
    assert torch.equal(output, attention_per_sequence(x, x, x, layout))


@pytest.mark.parametrize("offsets", [[], [0], [1, 3], [0, 2, 2], [0, 3, 2]])
def test_offsets_that_are_no_offsets_are_refused(offsets: list[int]) -> None:
    with pytest.raises(ValueError, match="query_offsets = "):
        SequenceLayout.of(offsets, CPU)
    with pytest.raises(ValueError, match="key_offsets = "):
        SequenceLayout.of([0, 2], CPU, offsets)


@pytest.mark.parametrize("key_offsets", [[0, 2], [0, 2, 4], [0, 2, 5, 6]])
def test_a_piece_without_a_key_for_each_query_is_refused(key_offsets: list[int]) -> None:
    with pytest.raises(ValueError, match="at least as many keys as queries"):
        SequenceLayout.of([0, 2, 5], CPU, key_offsets)


def test_layout_keeps_the_longest_piece_and_device_copies() -> None:
    layout = SequenceLayout.of(torch.tensor([0, 2, 7, 8]).numpy(), CPU, [0, 9, 14, 15])
    assert layout.query_offsets == (0, 2, 7, 8) and layout.longest_query == 5
    assert layout.key_offsets == (0, 9, 14, 15) and layout.longest_key == 9
    assert layout.query_offsets_device.dtype == layout.key_offsets_device.dtype == torch.int32
    assert layout.query_offsets_device.tolist() == [0, 2, 7, 8]
    assert layout.key_offsets_device.tolist() == [0, 9, 14, 15]
    whole = SequenceLayout.of([0, 2, 7], CPU)
    assert whole.key_offsets == (0, 2, 7) and whole.longest_key == 5
    assert whole.key_offsets_device.tolist() == [0, 2, 7]


def test_type_names_are_cuda_only_inside_the_optimizer_context() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    with tensor_types_named_cuda():
        assert parameter.type() == "torch.cuda.FloatTensor"
        assert parameter.bfloat16().type() == "torch.cuda.BFloat16Tensor"
        assert torch.zeros(1, dtype=torch.int64).type() == "torch.LongTensor"
        assert parameter.type(torch.float64).dtype == torch.float64
    assert parameter.type() == "torch.FloatTensor"


@pytest.mark.skipif(torch.cuda.is_available(), reason="stand-ins refuse a machine with CUDA")
def test_stand_ins_leave_torch_itself_alone() -> None:
    out = run_python(
        "import torch\n"
        "from r2vpo_megatron.device import get_platform\n"
        "platform = get_platform('cpu')\n"
        "platform.prepare(); platform.prepare()\n"
        "import megatron.core.pipeline_parallel.schedules as schedules\n"
        "print(schedules.torch.zeros(1, device='cuda').device)\n"
        "print(torch.zeros(1, device='meta').device)\n"
        "print(schedules.torch.Tensor is torch.Tensor, torch.cuda.is_available())\n"
        "torch.manual_seed(1); a = torch.rand(1)\n"
        "torch.cuda.manual_seed(1); print(bool(a == torch.rand(1)))\n"
        "try: torch.zeros(1, device='cuda'); print('hidden')\n"
        "except (AssertionError, RuntimeError): print('torch itself still refuses cuda')\n"
    )
    assert out.splitlines() == [
        "cpu",
        "meta",
        "True False",
        "True",
        "torch itself still refuses cuda",
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="stand-ins refuse a machine with CUDA")
def test_prepare_after_megatron_is_refused() -> None:
    out = run_python(
        "import warnings; warnings.simplefilter('ignore')\n"
        "import megatron.core.tensor_parallel\n"
        "from r2vpo_megatron.device import get_platform\n"
        "try: get_platform('cpu').prepare()\n"
        "except RuntimeError as error: print(error)\n"
    )
    assert out == "platform cpu: prepare() must run before megatron is imported"


def test_peak_memory_is_at_least_what_is_held() -> None:
    platform = get_platform("cpu")
    held = torch.ones(4 * 1024**2)  # 16 MiB, touched
    allocated = platform.memory_allocated_bytes()
    assert platform.peak_memory_bytes() >= allocated > held.nbytes


def test_the_registry_is_complete() -> None:
    assert set(PLATFORMS) == {"cpu", "cuda", "npu"}
