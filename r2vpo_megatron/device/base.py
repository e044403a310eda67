"""What the rest of the project asks of the hardware: one contract, three implementations.

Everything that differs between a CPU, a CUDA GPU and an Ascend NPU lies behind `Platform`. No
other room calls torch.cuda or torch.npu, names a collective back end, or patches Megatron.
"""

from __future__ import annotations

import functools
import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from r2vpo_megatron.device import layer_functions
from r2vpo_megatron.device.host_copies import copy_to_device
from r2vpo_megatron.device.transfer_group import TransferGroup

_CUDA_TYPE_NAMES = {
    torch.float32: "torch.cuda.FloatTensor",
    torch.bfloat16: "torch.cuda.BFloat16Tensor",
    torch.float16: "torch.cuda.HalfTensor",
}


@dataclass(frozen=True)
class SequenceLayout:
    """Which keys each query of a packed micro-batch sees: those of its own piece.

    A piece is a sequence, or the part of one that context parallelism left on this rank: then its
    keys are the sequence's tokens up to the piece's last one, more than it has queries. The
    last query of a piece sees all of its keys, the one before sees one less, and so on.

    The offsets exist on the host and on the device: CPU and NPU kernels want Python integers,
    CUDA kernels a device tensor, and neither may cost a synchronisation per layer.
    """

    query_offsets: tuple[int, ...]  # [P + 1], starts with 0, ends with the number of queries
    key_offsets: tuple[int, ...]  # [P + 1], the same of the keys
    query_offsets_device: Tensor  # [P + 1] int32
    key_offsets_device: Tensor  # [P + 1] int32
    longest_query: int  # queries of the largest piece
    longest_key: int  # keys of the piece that has most

    @classmethod
    def of(
        cls,
        query_offsets: Sequence[int],
        device: torch.device,
        key_offsets: Sequence[int] | None = None,
    ) -> SequenceLayout:
        """Check the offsets and copy them to `device`.

        Args:
            query_offsets: [P + 1] integers (a numpy array will do), 0 first, increasing.
            device: where attention will run.
            key_offsets: [P + 1] likewise; None where the queries are the keys.

        Raises:
            ValueError: offsets that do not start at 0 or do not increase, or a piece that has
                fewer keys than queries.
        """
        queries, query_lengths = _checked_offsets("query_offsets", query_offsets)
        queries_on_device = copy_to_device(torch.tensor(queries, dtype=torch.int32), device)
        longest = max(query_lengths)
        if key_offsets is None:
            return cls(queries, queries, queries_on_device, queries_on_device, longest, longest)
        keys, key_lengths = _checked_offsets("key_offsets", key_offsets)
        too_few = any(k < q for q, k in zip(query_lengths, key_lengths, strict=False))
        if len(keys) != len(queries) or too_few:
            raise ValueError(
                f"key_offsets = {list(keys)} with query_offsets = {list(queries)}: every piece "
                "must have at least as many keys as queries"
            )
        keys_on_device = copy_to_device(torch.tensor(keys, dtype=torch.int32), device)
        return cls(queries, keys, queries_on_device, keys_on_device, longest, max(key_lengths))


def _checked_offsets(name: str, offsets: Sequence[int]) -> tuple[tuple[int, ...], list[int]]:
    """Offsets as Python integers, and the lengths between them."""
    host = tuple(int(offset) for offset in offsets)
    lengths = [end - start for start, end in itertools.pairwise(host)]
    if len(host) < 2 or host[0] != 0 or min(lengths) < 1:
        raise ValueError(
            f"{name} = {list(host)}: must start with 0 and increase, "
            "one entry more than there are sequences"
        )
    return host, lengths


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
        """Causal attention inside each piece of a packed batch, none across.

        Args:
            query: [T, heads, head_dim].
            key: [K, kv_heads, head_dim]; kv_heads divides heads, each serves a group of them.
            value: [K, kv_heads, head_dim].
            layout: where pieces begin and end; its last offsets are T and K. The causal mask of
                a piece is aligned at its last query and last key.

        Returns:
            [T, heads, head_dim], scores scaled by head_dim ** -0.5.
        """

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x / sqrt(mean(x ** 2) + eps) * weight over the last dimension, the mean in fp32.

        Args:
            x: [..., H].
            weight: [H], x's dtype.
            eps: added to the mean square.
        """
        return layer_functions.rms_norm(x, weight, eps)

    def apply_rotary(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate pairs (i, i + head_dim / 2) of x; no gradient to the table.

        Args:
            x: [T, heads, head_dim].
            cos: [T, 1, head_dim], x's dtype; both halves of the last dimension are equal.
            sin: [T, 1, head_dim], likewise.
        """
        return layer_functions.apply_rotary(x, cos, sin)

    def swiglu(self, gate_up: Tensor) -> Tensor:
        """silu(gate) * up: [..., 2 F] with gate in front and up behind -> [..., F]."""
        return layer_functions.swiglu(gate_up)

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

    @abstractmethod
    def current_device(self) -> torch.device:
        """The device that this process works on."""

    @abstractmethod
    def transfer_group(
        self, store: dist.Store, rank: int, size: int, timeout_seconds: float
    ) -> TransferGroup:
        """Join a group beside the default one, over this platform's collective back end.

        Collective: every member must call, with the same store (or clients of one), within
        `timeout_seconds`. Buffers lie on `current_device()`.

        Args:
            store: of this group alone (a PrefixStore will do).
            rank: 0..size-1; 0 sends.
            size: members.
            timeout_seconds: for joining, and for each broadcast.

        Raises:
            RuntimeError: the others did not come.
        """

    def export_memory(self, tensor: Tensor) -> Any:
        """What lets another process of this node open a device tensor; it can be pickled.

        Raises:
            RuntimeError: this platform cannot.
        """
        raise RuntimeError(f"platform {self.name}: device memory cannot be shared by handle here")

    def open_memory(self, exported: Any) -> Tensor:
        """The exporter's memory as a tensor of this process, on its current device.

        Raises:
            RuntimeError: this platform cannot, or the device does not reach the memory.
        """
        raise RuntimeError(f"platform {self.name}: device memory cannot be shared by handle here")

    def seed(self, seed: int) -> None:
        """Seed torch's generators on the host and on the device."""
        torch.manual_seed(seed)

    def generator_states(self) -> dict[str, Tensor]:
        """States [N] uint8 of torch's generators on the host and on the device, by device type."""
        states, device = {"cpu": torch.get_rng_state()}, self.current_device()
        if device.type != "cpu":
            states[device.type] = torch.get_device_module(device).get_rng_state(device)
        return states

    def set_generator_states(self, states: Mapping[str, Tensor]) -> None:
        """Set what `generator_states` returned; of another platform's, the host's alone.

        Raises:
            RuntimeError: a state is not one of this version of torch.
        """
        torch.set_rng_state(states["cpu"])
        device = self.current_device()
        if device.type != "cpu" and device.type in states:
            torch.get_device_module(device).set_rng_state(states[device.type], device)

    @property
    def fuses_adamw(self) -> bool:
        """Whether torch.optim.AdamW has a kernel here that steps in one pass over the memory."""
        return False

    def optimizer_context(self) -> AbstractContextManager[None]:
        """Hold this open around get_megatron_optimizer(...) and around optimizer.step()."""
        return nullcontext()


def attention_per_sequence(
    query: Tensor, key: Tensor, value: Tensor, layout: SequenceLayout
) -> Tensor:
    """Reference for `Platform.packed_attention`: one scaled_dot_product_attention a piece.

    A loop over sequences beats one dense block-diagonal mask: the mask's quadratic cost is over
    the whole pack, the loop's over each sequence.
    """
    grouped = query.shape[1] != key.shape[1]
    queries, keys, values = (
        # Splitting has one gradient for all pieces; slices would each have one of the whole's size.
        whole.split([end - start for start, end in itertools.pairwise(offsets)])
        for whole, offsets in (
            (query, layout.query_offsets),
            (key, layout.key_offsets),
            (value, layout.key_offsets),
        )
    )
    outputs = []
    for q, k, v in zip(queries, keys, values, strict=True):
        is_whole = len(q) == len(k)
        attended = scaled_dot_product_attention(
            q.transpose(0, 1).unsqueeze(0),
            k.transpose(0, 1).unsqueeze(0),
            v.transpose(0, 1).unsqueeze(0),
            attn_mask=None
            if is_whole  # torch aligns is_causal at the first query and key
            else _lower_right_causal_mask(len(q), len(k), q.dtype, q.device),
            is_causal=is_whole,
            enable_gqa=grouped,
        )
        outputs.append(attended.squeeze(0).transpose(0, 1))
    return torch.cat(outputs)


# A rank has at most two pieces that do not begin their sequence, the first of each of its two
# chunks: every layer of a micro-batch shares these masks.
@functools.lru_cache(maxsize=2)
def _lower_right_causal_mask(
    num_queries: int, num_keys: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """[queries, keys] to add to scores: 0 up to the query's own key, -inf beyond."""
    mask = torch.full((num_queries, num_keys), float("-inf"), dtype=dtype, device=device)
    return mask.triu_(num_keys - num_queries + 1)


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
