"""The platform contract: choice by name, attention, lazy imports, CPU stand-ins."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import types
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from r2vpo_megatron.device import PLATFORMS, get_platform
from r2vpo_megatron.device.base import (
    SequenceLayout,
    attention_per_sequence,
    tensor_types_named_cuda,
)
from r2vpo_megatron.models.rotary import inverse_frequencies, rotary_table
from tests.device_fakes import (
    FakeFlashAttn,
    FakeTorchNpu,
    flagged_varlen_attn,
    windowed_varlen_attn,
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


def test_npu_kernel_is_called_as_documented(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeTorchNpu()
    monkeypatch.setitem(sys.modules, "torch_npu", fake)
    for query_offsets, key_offsets in PACKS:
        inputs = pack_of(query_offsets, key_offsets or query_offsets, torch.float32)
        layout = SequenceLayout.of(query_offsets, CPU, key_offsets)
        assert_same_values_and_gradients(
            lambda *qkv, layout=layout: get_platform("npu").packed_attention(*qkv, layout),
            lambda *qkv, layout=layout: attention_per_sequence(*qkv, layout),
            inputs,
        )
    assert fake.calls["npu_fusion_attention"] == len(PACKS)


@pytest.mark.parametrize(("num_pieces", "num_calls"), [(1024, 1), (1025, 2), (2100, 3)])
def test_npu_takes_packs_of_more_sequences_than_a_call(
    num_pieces: int, num_calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeTorchNpu()
    monkeypatch.setitem(sys.modules, "torch_npu", fake)
    random = np.random.default_rng(num_pieces)
    query_lengths = random.integers(1, 3, num_pieces)
    key_lengths = query_lengths + random.integers(0, 2, num_pieces)
    query_offsets, key_offsets = (
        [0, *lengths.cumsum().tolist()] for lengths in (query_lengths, key_lengths)
    )
    layout = SequenceLayout.of(query_offsets, CPU, key_offsets)
    assert_same_values_and_gradients(
        lambda *qkv: get_platform("npu").packed_attention(*qkv, layout),
        lambda *qkv: attention_per_sequence(*qkv, layout),
        pack_of(query_offsets, key_offsets, torch.float32),
    )
    assert fake.calls["npu_fusion_attention"] == num_calls


@pytest.mark.parametrize("name", ["npu", "cuda"])
def test_kernels_of_the_layers_equal_plain_torch(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeTorchNpu()
    monkeypatch.setitem(sys.modules, "torch_npu", fake)
    platform, cpu = get_platform(name), get_platform("cpu")
    torch.manual_seed(0)
    x, weight, gate_up = torch.randn(5, 1, 16), torch.randn(16), 3 * torch.randn(5, 1, 24)
    assert_same_values_and_gradients(
        lambda x, w: platform.rms_norm(x, w, 1e-3),
        lambda x, w: cpu.rms_norm(x, w, 1e-3),
        [x, weight],
    )
    assert_same_values_and_gradients(platform.swiglu, cpu.swiglu, [gate_up])
    table = rotary_table(torch.tensor([0, 1, 2, 0, 700]), inverse_frequencies(8, 1e4), x.dtype)
    # As Megatron gives them: heads cut out of one projection.
    heads = torch.randn(5, 6, 24)
    assert_same_values_and_gradients(
        lambda x: platform.apply_rotary(x[..., 8:16], *table),
        lambda x: cpu.apply_rotary(x[..., 8:16], *table),
        [heads],
    )
    used = {"npu_rms_norm": 1, "npu_swiglu": 1, "npu_rotary_mul": 2}  # the last one turns back
    assert fake.calls == (used if name == "npu" else {})


def assert_same_values_and_gradients(one: Any, other: Any, inputs: Sequence[torch.Tensor]) -> None:
    results = []
    for function in (one, other):
        leaves = [x.clone().requires_grad_() for x in inputs]
        value = function(*leaves)
        probe = torch.cos(torch.arange(value.numel(), dtype=value.dtype)).view_as(value)
        results.append([value.detach(), *torch.autograd.grad((value * probe).sum(), leaves)])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("kernel", ["flash_attn", "window", "flag"])
def test_cuda_kernels_are_called_as_documented(
    kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from r2vpo_megatron.device import cuda

    flash = FakeFlashAttn()
    varlen_attn = windowed_varlen_attn if kernel == "window" else flagged_varlen_attn
    torch_varlen = types.SimpleNamespace(varlen_attn=varlen_attn)
    installed: dict[str, Any] = {"flash_attn": flash} if kernel == "flash_attn" else {}
    installed["torch.nn.attention.varlen"] = torch_varlen
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: installed.get(name))
    for name, module in installed.items():
        monkeypatch.setitem(sys.modules, name, module)
    cuda._signature_of_varlen_attn.cache_clear()
    try:
        for query_offsets, key_offsets in PACKS:
            query, key, value = pack_of(query_offsets, key_offsets or query_offsets, torch.bfloat16)
            layout = SequenceLayout.of(query_offsets, CPU, key_offsets)
            output = get_platform("cuda").packed_attention(query, key, value, layout)
            expected = dense(query, key, value, query_offsets, key_offsets or query_offsets)
            assert torch.equal(output, expected.bfloat16())
    finally:
        cuda._signature_of_varlen_attn.cache_clear()
    assert flash.calls["flash_attn_varlen_func"] == (len(PACKS) if kernel == "flash_attn" else 0)


class _SeenCalls(TorchDispatchMode):
    """Arguments of torch's operators by name, and beside them what comes back."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, dict[str, Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        names = [argument.name for argument in func._schema.arguments]
        seen = dict(zip(names, args, strict=False)) | (kwargs or {})
        self.calls[func._schema.name] = seen
        return func(*args, **(kwargs or {}))


def test_this_torchs_varlen_attention_takes_the_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    with FakeTensorMode(), _SeenCalls() as seen, torch.no_grad():
        query, key = (torch.empty(9, n, 8, dtype=torch.bfloat16, device=device) for n in (6, 2))
        layout = SequenceLayout.of([0, 4, 9], device)
        output = get_platform("cuda").packed_attention(query, key, key, layout)
    assert output.device == device and output.shape == query.shape
    call = seen.calls["torch_attn::_varlen_attn"]
    assert call["is_causal"] and call["enable_gqa"] and list(call["window_size"]) == [-1, 0]
    assert (call["max_q"], call["max_k"]) == (5, 5) and call["cu_seq_q"].device == device


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


def dense(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_offsets: list[int],
    key_offsets: list[int],
) -> torch.Tensor:
    """Softmax over an explicit causal mask of each piece, in float64."""
    group = query.shape[1] // key.shape[1]
    q, k, v = (x.double().transpose(0, 1) for x in (query, key, value))
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    blocks = []
    for queries, keys in zip(np.diff(query_offsets), np.diff(key_offsets), strict=True):
        block = torch.ones(int(queries), int(keys), dtype=torch.bool)
        blocks.append(block.tril(int(keys - queries)))
    scores = (q @ k.transpose(1, 2) * 8**-0.5).masked_fill(
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
