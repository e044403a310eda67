"""The platform contract: choice by name, attention, lazy imports, CPU stand-ins."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

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


def test_npu_kernel_gets_offsets_without_the_zero_and_a_right_down_causal_mask(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []

    class FakeTorchNpu:
        @staticmethod
        def npu_fusion_attention(*args: object, **kwargs: object) -> tuple[torch.Tensor]:
            calls.append((args, kwargs))
            return (torch.ones(5, 4, 16),)

    monkeypatch.setitem(sys.modules, "torch_npu", FakeTorchNpu)  # type: ignore[arg-type]
    query, key = torch.zeros(5, 4, 16), torch.zeros(5, 2, 16)
    output = get_platform("npu").packed_attention(
        query, key, key, SequenceLayout.of([0, 2, 5], CPU)
    )
    assert output.shape == query.shape
    ((args, kwargs),) = calls
    assert args[3:] == (4, "TND")
    assert kwargs["actual_seq_qlen"] == kwargs["actual_seq_kvlen"] == [2, 5]
    assert kwargs["scale"] == 0.25 and kwargs["sparse_mode"] == 3 and kwargs["keep_prob"] == 1.0
    mask = kwargs["atten_mask"]
    assert isinstance(mask, torch.Tensor) and mask.shape == (2048, 2048)
    assert mask[:3, :3].tolist() == [
        [False, True, True],
        [False, False, True],
        [False, False, False],
    ]
    with pytest.raises(ValueError, match="1025 sequences .* at most 1024"):
        get_platform("npu").packed_attention(query, key, key, SequenceLayout.of(range(1026), CPU))


def dense_reference(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: list[int]
) -> torch.Tensor:
    """Softmax over an explicit block-diagonal causal mask, in float64."""
    group = query.shape[1] // key.shape[1]
    q, k, v = (x.double().transpose(0, 1) for x in (query, key, value))
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    blocks = [torch.ones(n, n, dtype=torch.bool).tril() for n in lengths]
    scores = q @ k.transpose(1, 2) * query.shape[-1] ** -0.5
    scores = scores.masked_fill(~torch.block_diag(*blocks).bool(), float("-inf"))
    return (scores.softmax(-1) @ v).transpose(0, 1)


@pytest.mark.parametrize("lengths", [[9], [1, 4, 1, 3]])
def test_packed_attention_equals_a_dense_float64_softmax(lengths: list[int]) -> None:
    torch.manual_seed(0)
    total = sum(lengths)
    query = torch.randn(total, 6, 8, requires_grad=True)
    key = torch.randn(total, 2, 8, requires_grad=True)
    value = torch.randn(total, 2, 8, requires_grad=True)
    offsets = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    output = get_platform("cpu").packed_attention(
        query, key, value, SequenceLayout.of(offsets, CPU)
    )
    expected = dense_reference(query, key, value, lengths)
    torch.testing.assert_close(output.double(), expected, atol=1e-6, rtol=0)
    weights = torch.randn(output.shape)
    inputs = (query, key, value)
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
    with pytest.raises(ValueError, match="cumulative_lengths = "):
        SequenceLayout.of(offsets, CPU)


def test_layout_keeps_the_longest_sequence_and_a_device_copy() -> None:
    layout = SequenceLayout.of(torch.tensor([0, 2, 7, 8]).numpy(), CPU)
    assert layout.cumulative_lengths == (0, 2, 7, 8) and layout.longest == 5
    assert layout.cumulative_lengths_device.dtype == torch.int32
    assert layout.cumulative_lengths_device.tolist() == [0, 2, 7, 8]


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
