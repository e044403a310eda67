"""What the rest of the project asks of the hardware: one contract, three implementations.

Everything that differs between a CPU, a CUDA GPU and an Ascend NPU lies behind `Platform`. No
other room calls torch.cuda or torch.npu, names a collective back end, or patches Megatron.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

_CUDA_TYPE_NAMES = {
    torch.float32: "torch.cuda.FloatTensor",
    torch.bfloat16: "torch.cuda.BFloat16Tensor",
    torch.float16: "torch.cuda.HalfTensor",
}


@dataclass(frozen=True)
class SequenceLayout:
    """Where the sequences of a packed micro-batch begin and end.

    The offsets exist on the host and on the device: CPU and NPU kernels want Python integers,
    CUDA kernels a device tensor, and neither may cost a synchronisation per layer.
    """

    cumulative_lengths: tuple[int, ...]  # [S + 1], starts with 0, ends with T
    cumulative_lengths_device: Tensor  # [S + 1] int32
    longest: int  # tokens of the longest sequence

    @classmethod
    def of(cls, cumulative_lengths: Sequence[int], device: torch.device) -> SequenceLayout:
        """Check the offsets and copy them to `device`.

        Args:
            cumulative_lengths: [S + 1] integers (a numpy array will do), 0 first, increasing.
            device: where attention will run.

        Raises:
            ValueError: the offsets do not start at 0 or do not increase.
        """
        host = tuple(int(offset) for offset in cumulative_lengths)
        lengths = [end - start for start, end in itertools.pairwise(host)]
        if len(host) < 2 or host[0] != 0 or min(lengths) < 1:
            raise ValueError(
                f"cumulative_lengths = {list(host)}: must start with 0 and increase, "
                "one entry more than there are sequences"
            )
        on_device = torch.tensor(host, dtype=torch.int32).to(device, non_blocking=True)
        return cls(host, on_device, max(lengths))


class Platform(ABC):
    """One kind of hardware. Instances hold no state but what `prepare` installed in libraries."""

    name: ClassVar[str]
    collective_backend: ClassVar[str]

    @abstractmethod
    def prepare(self) -> None:
        """Make Megatron importable here. Must run before megatron is imported; idempotent.

        Raises:
            RuntimeError: a package or device that this platform needs is missing.
        """

    @abstractmethod
    def torch_device(self, local_rank: int) -> torch.device:
        """Select and return the device of the process with this rank on its node."""

    @abstractmethod
    def transformer_config_overrides(self) -> dict[str, Any]:
        """Fields of Megatron's TransformerConfig that this hardware dictates."""

    @abstractmethod
    def packed_attention(
        self, query: Tensor, key: Tensor, value: Tensor, layout: SequenceLayout
    ) -> Tensor:
        """Causal attention inside each sequence of a packed batch, none across.

        Args:
            query: [T, heads, head_dim].
            key: [T, kv_heads, head_dim]; kv_heads divides heads, each serves a group of them.
            value: [T, kv_heads, head_dim].
            layout: where sequences begin and end; its last offset is T.

        Returns:
            [T, heads, head_dim], scores scaled by head_dim ** -0.5.
        """

    @abstractmethod
    def accelerator_resource(self) -> str | None:
        """Ray's resource name for one device: "GPU", "NPU", or None on a CPU."""

    @abstractmethod
    def memory_allocated_bytes(self) -> int:
        """Bytes this process holds on its device now."""

    @abstractmethod
    def peak_memory_bytes(self) -> int:
        """Most bytes held since the last reset_peak_memory (on a CPU: since the start)."""

    @abstractmethod
    def reset_peak_memory(self) -> None:
        """Start a new measurement of peak_memory_bytes, where the platform can."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until the device has done everything asked of it; for timers."""

    @abstractmethod
    def empty_cache(self) -> None:
        """Return cached device memory to the system."""

    def seed(self, seed: int) -> None:
        """Seed torch's generators on the host and on the device."""
        torch.manual_seed(seed)

    def optimizer_context(self) -> AbstractContextManager[None]:
        """Hold this open around get_megatron_optimizer(...) and around optimizer.step()."""
        return nullcontext()


def attention_per_sequence(
    query: Tensor, key: Tensor, value: Tensor, layout: SequenceLayout
) -> Tensor:
    """Reference for `Platform.packed_attention`: one scaled_dot_product_attention a sequence.

    A loop over sequences beats one dense block-diagonal mask: the mask's quadratic cost is over
    the whole pack, the loop's over each sequence.
    """
    offsets = layout.cumulative_lengths
    grouped = query.shape[1] != key.shape[1]
    outputs = [
        scaled_dot_product_attention(
            query[start:end].transpose(0, 1).unsqueeze(0),
            key[start:end].transpose(0, 1).unsqueeze(0),
            value[start:end].transpose(0, 1).unsqueeze(0),
            is_causal=True,
            enable_gqa=grouped,
        )
        .squeeze(0)
        .transpose(0, 1)
        for start, end in itertools.pairwise(offsets)
    ]
    return torch.cat(outputs)


@contextmanager
def tensor_types_named_cuda() -> Iterator[None]:
    """Let Tensor.type() name CUDA types, the only ones Megatron's optimizers accept.

    Needed by megatron/core/optimizer/{optimizer,distrib_optimizer}.py (0.16) when they are built
    and by clip_grads.py in each step; goes when they test dtypes instead of type names.
    """
    plain_type = torch.Tensor.type

    def type_naming_cuda(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not args and not kwargs and tensor.dtype in _CUDA_TYPE_NAMES:
            return _CUDA_TYPE_NAMES[tensor.dtype]
        return plain_type(tensor, *args, **kwargs)

    torch.Tensor.type = type_naming_cuda  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        torch.Tensor.type = plain_type  # type: ignore[method-assign]
