"""The learner's micro-batches on a device that is not there, by torch's fake tensors.

Fake tensors have a shape, a dtype and a device, and no numbers. Two tensors of different devices
do not meet unnoticed, and nothing can be read back: a stray tensor on the host fails, and so does
a read that would make the host wait for the device. A process that called `make_device` is of no
use for anything else.

    python -m tests.fake_device npu|cuda:TENSOR:CONTEXT[:FAULT] ...

prints what was done, a line of JSON for each case.

The device has the name "npu" on either path. CPU builds of torch can make one up whose tensors
have gradients only under the name for devices of others.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from r2vpo_megatron.config import ParallelConfig
from r2vpo_megatron.data.packing import pack
from r2vpo_megatron.device import Platform
from r2vpo_megatron.device import cpu as stand_ins
from r2vpo_megatron.device.cuda import CudaPlatform
from r2vpo_megatron.device.npu import NpuPlatform
from r2vpo_megatron.parallel.state import destroy_parallel
from tests.device_fakes import FakeFlashAttn, FakeTorchNpu, install
from tests.distributed.learner_runs import make_trajectories

LENGTHS = ((5, 9), (3, 12), (6, 5))


class _CudaMeansNpu(TorchFunctionMode):
    """As torch_npu's transfer_to_npu: who asks a function of torch for "cuda" gets the NPU."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = torch.device("npu", 0)
        kwargs.pop("pin_memory", None)
        return func(*args, **kwargs)


class _CopiesToHost(TorchDispatchMode):
    """Notes what goes between host and device, and what of it waits.

    What is of float64 must be on the host: an NPU's own cores do not compute in it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.dtype == torch.float64:
                assert leaf.device.type == "cpu", f"{func} in float64 on {leaf.device}"
        if func._schema.name == "aten::_to_copy" and args[0].device != result.device:
            way = f"{args[0].device.type} to {result.device.type}"
            waits = "" if kwargs.get("non_blocking") else ", waiting"
            self.seen[way + waits] += 1
        return result


class NpuOfFakes(NpuPlatform):
    collective_backend = "fake"

    def prepare(self) -> None:
        """The stand-ins are there."""

    def torch_device(self, local_rank: int) -> torch.device:
        return torch.device("npu", 0)

    def current_device(self) -> torch.device:
        return torch.device("npu", 0)


class CudaOfFakes(CudaPlatform):
    collective_backend = "fake"
    prepare, torch_device, current_device = (  # type: ignore[assignment]
        NpuOfFakes.prepare,
        NpuOfFakes.torch_device,
        NpuOfFakes.current_device,
    )


def make_device() -> None:
    """Make the device known to torch and to Megatron. For the rest of this process."""
    _setup_privateuseone_for_python_backend("npu")
    device = torch.device("npu", 0)
    cuda: Any = torch.cuda
    stand_ins._answer_torch_cuda_names()
    cuda.current_device = lambda: device
    torch.Tensor.cuda = lambda tensor, *args, **kwargs: tensor.to(device)  # type: ignore
    torch.nn.Module.cuda = lambda module, *args, **kwargs: module.to(device)  # type: ignore
    import megatron.core.tensor_parallel.random as random

    random._lazy_call = lambda call, **kwargs: call()
    # It compares states of the host's generator, which have numbers.
    random.CudaRNGStatesTracker.fork = lambda *args, **kwargs: nullcontext()


class _KernelsOfFakes(FakeTorchNpu):
    """The kernels without what looks at numbers."""

    def npu_fusion_attention(self, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        assert kwargs["atten_mask"].device == query.device
        return (_attend(query, *args[:2]),)

    def npu_rotary_mul(self, input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str) -> Tensor:
        front, back = input.chunk(2, dim=-1)
        return input * r1 + torch.cat((-back, front), dim=-1) * r2


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Something of all three, by operations that know no sequences."""
    group = query.shape[1] // key.shape[1]
    both = (key * value).sum(dim=0, keepdim=True).repeat_interleave(group, dim=1)
    return query * both


def _flash(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, **rest: Any
) -> Tensor:
    assert cu_seqlens_q.device == cu_seqlens_k.device == q.device
    return _attend(q, k, v)


@contextmanager
def _pinning(pinned: list[Tensor]) -> Iterator[None]:
    """Fake tensors cannot be pinned: note which ones are asked for."""

    def pin_memory(tensor: Tensor) -> Tensor:
        assert tensor.device.type == "cpu"
        pinned.append(tensor)
        return tensor

    with mock.patch.object(torch.Tensor, "pin_memory", pin_memory):
        yield


@contextmanager
def _groups_of_one_process() -> Iterator[None]:
    """Process groups made inside have as many ranks as wanted, and this process is one of them."""
    init, new_group = dist.init_process_group, dist.new_group

    def init_fake(backend: str, init_method: str, **rest: Any) -> None:
        init("fake", store=FakeStore(), **rest)

    def new_fake(*args: Any, **rest: Any) -> Any:
        return new_group(*args, **(rest | {"backend": "fake"}))

    with (
        mock.patch.object(dist, "init_process_group", init_fake),
        mock.patch.object(dist, "new_group", new_fake),
    ):
        yield


def run_micro_batches(platform: Platform, parallel: ParallelConfig) -> dict[str, Any]:
    """Log-probs, then forward and backward, of a rank of a tiny openPangu in bf16.

    Returns:
        The devices of what was computed, the copies that were made, the number of pinned tensors,
        and that of weights with a gradient.
    """
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from r2vpo_megatron.learner.forward_step import PolicyHead, logprob_step, policy_step
    from r2vpo_megatron.learner.head_checks import HeadChecks
    from r2vpo_megatron.learner.micro_batch import MicroBatch
    from r2vpo_megatron.models.build import build_model
    from r2vpo_megatron.models.spec import ModelSpec
    from r2vpo_megatron.parallel.collectives import _as_rows, _merge_rows
    from r2vpo_megatron.parallel.context import sum_over_context
    from r2vpo_megatron.parallel.state import initialize_parallel
    from r2vpo_megatron.rl.loss import LossSettings
    from r2vpo_megatron.rl.objectives import OBJECTIVES
    from r2vpo_megatron.rl.statistics import excess_quantiles

    with _groups_of_one_process():
        state = initialize_parallel(
            platform,
            rank=0,
            world_size=parallel.num_ranks,
            tensor=parallel.tensor,
            context=parallel.context,
            init_method="",
        )
    spec = ModelSpec(
        architecture="pangu",
        vocab_size=200,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        ffn_size=48,
        norm_eps=1e-5,
        rope_theta=500.0,
        max_positions=64,
        tied_embeddings=False,
        qkv_bias=True,
        o_bias=True,
        dtype="bfloat16",
    )
    models = build_model(
        spec,
        state,
        platform,
        sequence_parallel=parallel.sequence_parallel,
        recompute=parallel.recompute,
        dtype=torch.bfloat16,
    )
    # As make_trainable does, but for the optimizer, whose ranks tell each other of its groups. What
    # comes after the last micro-batch reads numbers, once an update.
    model = DistributedDataParallel(
        config=models[0].config,
        ddp_config=DistributedDataParallelConfig(grad_reduce_in_fp32=True),
        module=models[0],
    )
    packed = pack(make_trajectories(LENGTHS, seed=0), pad_to_multiple_of=parallel.tokens_multiple)
    head = PolicyHead(state, spec.vocab_size, 0.8, parallel.sequence_parallel)
    settings = LossSettings(
        objective=OBJECTIVES["r2vpo"],
        aggregation="token_mean",
        ratio_penalty=0.3,
        policy_version=6,
        importance_cap=2.0,
        entropy_coefficient=0.0,
    )
    checks = HeadChecks(state.device, compare_plain=True)
    pinned: list[Tensor] = []
    copies = _CopiesToHost()

    def batches() -> Iterator[MicroBatch]:
        while True:
            yield MicroBatch.of(
                packed,
                state.device,
                context_rank=state.context_rank,
                context_size=state.context_size,
                sum_over_context=lambda x: sum_over_context(x, state.context_group),
            )

    def run(step: Any, forward_only: bool) -> list[Any]:
        kept: list[Any] = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=batches(),
            model=model,
            num_microbatches=2,
            seq_length=1,
            micro_batch_size=1,
            forward_only=forward_only,
        )
        return kept

    with _pinning(pinned), copies:
        with torch.no_grad():
            logprobs = run(logprob_step(head), True)
        kept = run(policy_step(head, settings, checks), False)
        micro_batches = dict(copies.seen)
        # As reduce_statistics does, but for its collectives, once an update.
        rows = torch.cat(
            [_merge_rows(_as_rows(kept)), excess_quantiles(torch.cat([k.excess for k in kept]))]
        )
        assert rows.dtype == torch.float64
    devices = {value.device.type for part in logprobs for value in part.values()}
    devices |= {
        value.device.type
        for part in kept
        for value in vars(part).values()
        if isinstance(value, Tensor)
    }
    gradients = [parameter.main_grad for parameter in models[0].parameters()]
    return {
        "devices": sorted(devices | {gradient.device.type for gradient in gradients}),
        "copies": micro_batches,
        "pinned": len(pinned),
        "gradients": len(gradients),
    }


# What the test must find, done to a tensor [T, F] in every layer.
_FAULTS: dict[str, Callable[[Tensor], Tensor]] = {
    "stray": lambda x: x * torch.ones(x.shape[-1], dtype=x.dtype),
    "read": lambda x: x * float(x.detach().amax()),
    "float64": lambda x: x.double().to(x.dtype),
}


def _run_case(case: str) -> dict[str, Any]:
    name, tensor, context, *faults = case.split(":")
    parallel = ParallelConfig(
        tensor=int(tensor),
        context=int(context),
        sequence_parallel=int(tensor) > 1,
        recompute="full",
    )
    platform = NpuOfFakes() if name == "npu" else CudaOfFakes()
    if faults:
        plain, spoil = platform.swiglu, _FAULTS[faults[0]]
        platform.swiglu = lambda gate_up: spoil(plain(gate_up))  # type: ignore[method-assign]
    try:
        return run_micro_batches(platform, parallel)
    except (AssertionError, RuntimeError) as error:
        return {"error": repr(error)}
    finally:
        destroy_parallel()


def main() -> None:
    """See the module's text."""
    make_device()
    flash = FakeFlashAttn()
    flash.flash_attn_varlen_func = _flash  # type: ignore[method-assign, assignment]
    install(flash)
    install(_KernelsOfFakes())
    with FakeTensorMode(), _CudaMeansNpu():
        for case in sys.argv[1:]:
            print(json.dumps(_run_case(case)))


if __name__ == "__main__":
    main()
