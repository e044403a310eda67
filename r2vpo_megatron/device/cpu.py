"""CPU with gloo: what lets Megatron-core, written for CUDA, run without an accelerator.

Megatron-core 0.16 names "cuda" literally in a few places. `prepare` answers those names with
CPU equivalents, as torch_npu's transfer_to_npu does on Ascend. It refuses to run where a CUDA
device exists: there the stand-ins would hide real hardware.
"""

from __future__ import annotations

import importlib
import resource
import sys
import types
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from r2vpo_megatron.device.base import (
    Platform,
    SequenceLayout,
    attention_per_sequence,
    tensor_types_named_cuda,
)
from r2vpo_megatron.device.transfer_group import TransferGroup

# Modules of megatron-core 0.16.1 that pass device="cuda" or pin_memory=True to a torch factory.
_MODULES_WITH_CUDA_LITERALS = (
    "megatron.core.dist_checkpointing.exchange_utils",
    "megatron.core.dist_checkpointing.strategies.state_dict_saver",
    "megatron.core.models.common.embeddings.rope_utils",
    "megatron.core.optimizer.clip_grads",
    "megatron.core.optimizer.optimizer",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.transformer.utils",
    "megatron.core.utils",
)
_FACTORIES = frozenset({"arange", "empty", "empty_like", "full", "ones", "tensor", "zeros"})
_STAND_IN_MARK = "_r2vpo_cpu_stand_in"


class CpuPlatform(Platform):
    """Every feature of the learner, slowly; what the tests run on."""

    name = "cpu"
    collective_backend = "gloo"

    def prepare(self) -> None:
        """Install the stand-ins; see the module's text."""
        if getattr(torch.cuda, _STAND_IN_MARK, False):
            return
        if torch.cuda.is_available():
            raise RuntimeError(
                "platform cpu: this process sees a CUDA device, which Megatron-core would take; "
                "start it with CUDA_VISIBLE_DEVICES set to nothing, or use --runtime.device cuda"
            )
        if "megatron.core.tensor_parallel" in sys.modules:
            raise RuntimeError("platform cpu: prepare() must run before megatron is imported")
        _answer_torch_cuda_names()
        _answer_megatron_literals()
        setattr(torch.cuda, _STAND_IN_MARK, True)

    def torch_device(self, local_rank: int) -> torch.device:
        """The CPU, whatever the rank."""
        return torch.device("cpu")

    def transformer_config_overrides(self) -> dict[str, Any]:
        """No CUDA kernels, and no freeing of pipeline outputs.

        deallocate_pipeline_outputs with overlapped interleaved pipelines corrupts gradients on
        gloo: a send may still read the storage that is being freed.
        """
        return {
            "use_cpu_initialization": True,
            "gradient_accumulation_fusion": False,
            "bias_activation_fusion": False,
            "masked_softmax_fusion": False,
            "deallocate_pipeline_outputs": False,
        }

    def packed_attention(
        self, query: Tensor, key: Tensor, value: Tensor, layout: SequenceLayout
    ) -> Tensor:
        """One scaled_dot_product_attention a piece."""
        return attention_per_sequence(query, key, value, layout)

    def accelerator_resource(self) -> str | None:
        """None: Ray counts CPUs by itself."""
        return None

    def memory_allocated_bytes(self) -> int:
        """Resident bytes of this process, 0 where the system does not tell."""
        try:
            with open("/proc/self/statm") as statm:
                return int(statm.read().split()[1]) * resource.getpagesize()
        except OSError:
            return 0

    def peak_memory_bytes(self) -> int:
        """Peak resident bytes since the process started."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak_bytes = peak if sys.platform == "darwin" else peak * 1024
        # The kernel updates the peak now and then only.
        return max(peak_bytes, self.memory_allocated_bytes())

    def reset_peak_memory(self) -> None:
        """Not possible for a process's resident size."""

    def synchronize(self) -> None:
        """Nothing is asynchronous."""

    def empty_cache(self) -> None:
        """Nothing is cached."""

    def current_device(self) -> torch.device:
        """The CPU."""
        return torch.device("cpu")

    def transfer_group(
        self, store: dist.Store, rank: int, size: int, timeout_seconds: float
    ) -> TransferGroup:
        """Gloo, whose interface GLOO_SOCKET_IFNAME chooses. Needs no `prepare`."""
        # Gloo gives up before the group does: only then does it let go of a broadcast.
        gloo_timeout = timedelta(seconds=0.8 * timeout_seconds)
        backend = dist.ProcessGroupGloo(store, rank, size, gloo_timeout)
        return TransferGroup(backend, timeout_seconds)

    @property
    def fuses_adamw(self) -> bool:
        """Torch has one since 2.4."""
        return True

    def optimizer_context(self) -> AbstractContextManager[None]:
        """Megatron's optimizers know CUDA's tensor type names only."""
        return tensor_types_named_cuda()


class _CpuGenerators:
    """torch.cuda.default_generators, with the CPU's generator for any index."""

    def __getitem__(self, index: object) -> torch.Generator:
        return torch.default_generator


class _NoStream:
    """A CUDA stream or event where all work is synchronous."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __enter__(self) -> _NoStream:
        return self

    def __exit__(self, *args: object) -> None:
        pass

    def wait_stream(self, stream: object) -> None:
        pass

    def wait_event(self, event: object) -> None:
        pass

    def record_event(self, event: object = None) -> _NoStream:
        return _NoStream()

    def record(self, stream: object = None) -> None:
        pass

    def wait(self, stream: object = None) -> None:
        pass

    def synchronize(self) -> None:
        pass


def _returning(make: Callable[[], Any]) -> Callable[..., Any]:
    """A new function each time: torch._dynamo refuses two names for one function object."""

    def stand_in(*args: Any, **kwargs: Any) -> Any:
        return make()

    return stand_in


def _answer_torch_cuda_names() -> None:
    cuda: Any = torch.cuda
    for name in ("synchronize", "empty_cache", "set_device", "reset_peak_memory_stats"):
        setattr(cuda, name, _returning(lambda: None))
    for name in ("memory_allocated", "memory_reserved", "max_memory_allocated"):
        setattr(cuda, name, _returning(lambda: 0))
    cuda.memory_stats = _returning(dict)
    cuda.current_device = _returning(lambda: torch.device("cpu"))
    cuda.Stream = type("Stream", (_NoStream,), {})
    cuda.Event = type("Event", (_NoStream,), {})
    for name in ("current_stream", "default_stream", "stream"):
        setattr(cuda, name, _returning(_NoStream))

    # Not torch.manual_seed: that calls torch.cuda.manual_seed_all in its turn.
    cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(seed)
    cuda.manual_seed_all = lambda seed: torch.default_generator.manual_seed(seed)
    cuda.get_rng_state = lambda device="cuda": torch.get_rng_state()
    cuda.random.get_rng_state = lambda device="cuda": torch.get_rng_state()
    cuda.set_rng_state = lambda state, device="cuda": torch.set_rng_state(state)
    cuda.default_generators = _CpuGenerators()

    def tensor_cuda(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return tensor

    def module_cuda(module: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
        return module

    torch.Tensor.cuda = tensor_cuda  # type: ignore[method-assign, assignment]
    torch.nn.Module.cuda = module_cuda  # type: ignore[method-assign, assignment]


class _TorchOnCpu(types.ModuleType):
    """`torch`, but factories read device="cuda" as the CPU and never pin memory.

    Bound to the name `torch` inside single Megatron modules. Wrapping torch's own factories
    would reach every library: it breaks torch.device("meta") and with it transformers.
    """

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(torch, name)
        if name not in _FACTORIES:
            return attribute

        def factory(*args: Any, **kwargs: Any) -> Any:
            if str(kwargs.get("device", "")).startswith("cuda"):
                kwargs["device"] = "cpu"
            kwargs.pop("pin_memory", None)
            return attribute(*args, **kwargs)

        return factory


def _answer_megatron_literals() -> None:
    proxy = _TorchOnCpu("torch")
    for name in _MODULES_WITH_CUDA_LITERALS:
        setattr(importlib.import_module(name), "torch", proxy)  # noqa: B010
    # torch.cuda._lazy_call queues a call until CUDA starts, which is never.
    random: Any = importlib.import_module("megatron.core.tensor_parallel.random")
    random._lazy_call = lambda call, **kwargs: call()
