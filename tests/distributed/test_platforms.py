"""The learner on the paths of an NPU and of a GPU: their kernels are stand-ins that hold the
contracts and compute on the host. What comes out must be what the CPU's path makes.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from r2vpo_megatron.config import ParallelConfig
from r2vpo_megatron.device import Platform, get_platform
from r2vpo_megatron.device.base import tensor_types_named_cuda
from r2vpo_megatron.device.cuda import CudaPlatform
from r2vpo_megatron.device.npu import NpuPlatform
from r2vpo_megatron.parallel.state import destroy_parallel
from r2vpo_megatron.records import FloatArray, Trajectory
from tests.device_fakes import (
    FakeFlashAttn,
    FakeMindSpeed,
    FakeTorchNpu,
    HcclRules,
    install,
    windowed_varlen_attn,
)
from tests.distributed.learner_runs import (
    learn,
    make_actor,
    rank_batches,
    run_config,
    start_state,
)
from tests.distributed.ranks import run_ranks
from tests.distributed.reference_update import (
    Learned,
    as_vector,
    reference_updates,
    relative_error,
)
from tests.distributed.update_problem import make_mini_batches, save_well_conditioned

LAYOUTS = {
    "one": ParallelConfig(),
    "tp2_sp": ParallelConfig(tensor=2, sequence_parallel=True, recompute="full"),
    "pp2_vpp2": ParallelConfig(pipeline=2, virtual_pipeline=2, recompute="mlp"),
    "cp2": ParallelConfig(context=2, recompute="core_attn"),
}
NPU_KERNELS = {"npu_fusion_attention", "npu_rms_norm", "npu_rotary_mul", "npu_swiglu"}


class OnHost:
    """What lies on a device lies on the host instead."""

    def torch_device(self, local_rank: int) -> torch.device:
        return torch.device("cpu")

    def current_device(self) -> torch.device:
        return torch.device("cpu")

    def transformer_config_overrides(self) -> dict[str, Any]:
        # A send of gloo may still read the storage that would be freed.
        overrides: dict[str, Any] = super().transformer_config_overrides()  # type: ignore[misc]
        return overrides | {"deallocate_pipeline_outputs": False}


class NpuOnHost(OnHost, NpuPlatform):
    """Its collectives go over a back end of HCCL's name, which is gloo."""


class CudaOnHost(OnHost, CudaPlatform):
    collective_backend = "gloo"

    def prepare(self) -> None:
        """There is no device to look for."""

    def optimizer_context(self) -> AbstractContextManager[None]:
        return tensor_types_named_cuda()  # as tensors on a GPU are


@dataclass(frozen=True)
class Result:
    """What a rank computed, and the vendors' kernels that it called."""

    logprobs: list[dict[str, FloatArray]]
    learned: Learned
    calls: Counter[str]


@contextmanager
def npu_path(with_mindspeed: bool = False) -> Iterator[tuple[Platform, Counter[str]]]:
    fake, mindspeed = FakeTorchNpu(), FakeMindSpeed()
    install(fake)
    if with_mindspeed:
        install(mindspeed)
    dist.Backend.register_backend(
        "hccl",
        lambda store, rank, size, timeout: dist.ProcessGroupGloo(store, rank, size, timeout),
        devices=["cpu"],
    )
    platform, calls = NpuOnHost(), Counter[str]()
    platform.prepare()
    with HcclRules() as rules:
        yield platform, calls
    calls.update(fake.calls + mindspeed.calls)
    calls["reductions"] = rules.num_reductions


@contextmanager
def cuda_path(
    kernel: str = "flash_attn", dtype: torch.dtype = torch.bfloat16
) -> Iterator[tuple[Platform, Counter[str]]]:
    from r2vpo_megatron.device import cuda

    calls = Counter[str]()
    flash = FakeFlashAttn(dtypes=(dtype,))
    if kernel == "flash_attn":
        install(flash)

    def counted_varlen_attn(*args: Any, scale: None = None, **kwargs: Any) -> Tensor:
        calls["varlen_attn"] += 1
        return windowed_varlen_attn(*args, **kwargs)

    # Named, since their names are looked at.
    parameters = frozenset({"window_size", "enable_gqa"})
    with (
        mock.patch("torch.nn.attention.varlen.varlen_attn", counted_varlen_attn),
        mock.patch.object(cuda, "_signature_of_varlen_attn", lambda: parameters),
        mock.patch.object(cuda, "_FLASH_DTYPES", (dtype,)),
        mock.patch.object(cuda, "attention_per_sequence", None),
    ):
        yield CudaOnHost(), calls
    calls.update(flash.calls)


PATHS: dict[str, Callable[[], AbstractContextManager[tuple[Platform, Counter[str]]]]] = {
    "cpu": lambda: nullcontext((get_platform("cpu"), Counter())),
    "npu": npu_path,
    "npu_mindspeed": lambda: npu_path(with_mindspeed=True),
    "cuda": cuda_path,
    "cuda_float32": lambda: cuda_path(dtype=torch.float32),
    "cuda_varlen": lambda: cuda_path("varlen_attn"),
}


def log_probs_and_updates(
    rank: int,
    world_size: int,
    init_method: str,
    path: str,
    parallel: ParallelConfig,
    dtype: str,
    model_dir: Path,
    mini_batches: list[list[Trajectory]],
) -> Result:
    config = run_config(parallel, dtype=dtype)
    with PATHS[path]() as (platform, calls):
        state = start_state(rank, world_size, init_method, parallel, platform)
        assert dist.get_backend(state.tensor_group) == platform.collective_backend
        actor = make_actor(config, model_dir, state, platform)
        logprobs = [
            actor.compute_logprobs(rank_batches(mini_batch, config.parallel, state))
            for mini_batch in mini_batches
        ]
        learned = learn(config, model_dir, state, mini_batches, platform)
        destroy_parallel()
    return Result(logprobs, learned, calls)


Problem = tuple[Path, torch.nn.Module, list[list[Trajectory]]]


@pytest.fixture(scope="module")
def problem(tmp_path_factory: pytest.TempPathFactory) -> Problem:
    """A model whose weights bf16 holds exactly, and what it learns from."""
    folder = tmp_path_factory.mktemp("pangu-platforms")
    model = save_well_conditioned("pangu-untied", folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    model.save_pretrained(folder)
    return folder, model, make_mini_batches(model)


@pytest.fixture(scope="module")
def run(problem: Problem) -> Callable[[str, str, str], list[Result]]:
    folder, _, mini_batches = problem

    @functools.cache
    def run(path: str, layout: str, dtype: str) -> list[Result]:
        parallel = LAYOUTS[layout]
        arguments = (path, parallel, dtype, folder, mini_batches)
        results: list[Result] = run_ranks(parallel.num_ranks, log_probs_and_updates, *arguments)
        return results

    return run


def all_logprobs(results: list[Result]) -> dict[str, FloatArray]:
    return {n: v for r in results for part in r.logprobs for n, v in part.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("path", ["npu", "cuda_float32"])
def test_a_float32_step_equals_the_cpus(path: str, layout: str, run: Any) -> None:
    results, expected = run(path, layout, "float32"), run("cpu", layout, "float32")
    kernels = NPU_KERNELS if path == "npu" else {"flash_attn_varlen_func"}
    for result in results:
        assert min(result.calls[kernel] for kernel in kernels) > 0
        assert result.calls["reductions"] > 0 or path != "npu"
    logprobs, wanted = all_logprobs(results), all_logprobs(expected)
    assert set(logprobs) == set(wanted) and len(wanted) == 11
    for name, values in wanted.items():
        np.testing.assert_allclose(logprobs[name], values, atol=3e-6, rtol=0)
    one, other = results[0].learned, expected[0].learned
    for gradients, others in zip(one.gradients, other.gradients, strict=True):
        assert relative_error(as_vector(gradients), as_vector(others)) < 2e-6
        for name, gradient in others.items():
            assert relative_error(gradients[name], gradient) < 6e-6, name
    assert relative_error(as_vector(one.weights), as_vector(other.weights)) < 5e-8
    assert one.ratio_penalties == pytest.approx(other.ratio_penalties, rel=2e-6)


@pytest.mark.parametrize("path", ["npu", "npu_mindspeed", "cuda", "cuda_varlen"])
def test_a_bf16_step_is_as_far_from_float64_as_the_cpus(
    path: str, run: Any, problem: Problem
) -> None:
    _, model, mini_batches = problem
    reference = reference_updates(model, run_config(ParallelConfig()), mini_batches)
    (result,), (cpu,) = run(path, "one", "bfloat16"), run("cpu", "one", "bfloat16")
    kernels = {
        "npu": NPU_KERNELS,
        "npu_mindspeed": {*NPU_KERNELS, "npu_matmul_add_fp32"},
        "cuda": {"flash_attn_varlen_func"},
        "cuda_varlen": {"varlen_attn"},
    }[path]
    assert {kernel for kernel in result.calls if result.calls[kernel]} - {"reductions"} == kernels
    # Over the updates: the rounding of a single one is luck.
    error, rounding = (
        np.sqrt(
            np.mean(
                [
                    relative_error(as_vector(mine), as_vector(exact)) ** 2
                    for mine, exact in zip(learned.gradients, reference.gradients, strict=True)
                ]
            )
        )
        for learned in (result.learned, cpu.learned)
    )
    assert 1e-3 < rounding < 0.03
    assert error < 1.5 * rounding
    for name, values in all_logprobs([cpu]).items():
        np.testing.assert_allclose(all_logprobs([result])[name], values, atol=0.03, rtol=0)


def refused_by_hccl(rank: int, world_size: int, init_method: str) -> list[str]:
    dist.init_process_group("gloo", init_method=init_method, rank=rank, world_size=world_size)
    refused = []
    for dtype in (torch.float64, torch.uint8, torch.float32, torch.int64):
        try:
            with HcclRules():
                dist.all_reduce(torch.ones(2, dtype=dtype))
        except AssertionError as error:
            refused.append(str(error))
    with HcclRules():  # what is only moved may be of any type
        dist.all_gather([torch.ones(1).double() for _ in range(world_size)], torch.ones(1).double())
    dist.destroy_process_group()
    return refused


def test_the_rules_of_hccl_refuse_a_float64_sum() -> None:
    expected = ["c10d::allreduce_ of torch.float64", "c10d::allreduce_ of torch.uint8"]
    assert run_ranks(2, refused_by_hccl) == [expected, expected]
