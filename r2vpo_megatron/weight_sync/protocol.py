"""The format of a weight push: named tensors in buckets, described apart from their bytes.

A bucket is one flat buffer. Its descriptor (`WeightBucket`) is small, picklable and says where each
tensor lies in it; the `handle` in the descriptor knows how another process attaches to the buffer.
Drivers pass descriptors around; tensor bytes never travel with them.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from r2vpo_megatron.rollout.engine import WeightUpdateError

# Views of any dtype need aligned offsets; a cache line serves every one.
TENSOR_ALIGNMENT_BYTES = 64


@dataclass(frozen=True)
class TensorMeta:
    """One tensor of a bucket. `name` is its Hugging Face name, `dtype` as in "bfloat16"."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    offset_bytes: int
    num_bytes: int


class BucketHandle(Protocol):
    """A way to a bucket's buffer that survives pickling."""

    def attach(self) -> Any:
        """Give the buffer as an object with the buffer interface, without copying it."""
        ...


class WeightSender(Protocol):
    """The learner's end of a weight push, on the one rank that holds the gathered tensors."""

    def buckets(
        self, version: int, named_tensors: Iterable[tuple[str, torch.Tensor]]
    ) -> Iterator[WeightBucket]:
        """Send tensors bucket by bucket. A bucket lives until the next one is asked for."""
        ...

    @property
    def push_checksum(self) -> int:
        """Checksum of the last push; defined once its buckets are exhausted."""
        ...

    def metrics(self) -> dict[str, float]:
        """Sizes and stage times of the last push."""
        ...

    def close(self) -> None:
        """Free what is still held."""
        ...


@dataclass(frozen=True)
class WeightBucket:
    """Descriptor of one bucket of a push.

    Attributes:
        version: policy version that the push brings.
        index: position of the bucket in the push, from 0.
        tensors: what lies in it, in order.
        num_bytes: size of the buffer.
        checksum: see `bucket_checksum`.
        handle: how to attach to the buffer.
    """

    version: int
    index: int
    tensors: tuple[TensorMeta, ...]
    num_bytes: int
    checksum: int
    handle: BucketHandle

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """Hugging Face names of the tensors, in order."""
        return tuple(meta.name for meta in self.tensors)

    def open(self) -> dict[str, torch.Tensor]:
        """Attach to the bucket and verify it.

        Returns:
            CPU tensors by name: views of the sender's memory, not copies. Each keeps the bucket's
            memory alive; drop them when they have been loaded. Treat them as read-only.

        Raises:
            WeightUpdateError: the bucket cannot be reached from here, or its bytes are not those
                that the sender described.
        """
        flat = torch.frombuffer(self.handle.attach(), dtype=torch.uint8, count=self.num_bytes)
        checksum = 0
        tensors: dict[str, torch.Tensor] = {}
        for meta in self.tensors:
            data = flat[meta.offset_bytes : meta.offset_bytes + meta.num_bytes]
            checksum = bucket_checksum(checksum, meta, data)
            tensors[meta.name] = data.view(dtype_from_name(meta.dtype)).view(meta.shape)
        if checksum != self.checksum:
            raise WeightUpdateError(
                f"bucket {self.index} of version {self.version} is damaged: its checksum is "
                f"{checksum:#010x}, the sender's {self.checksum:#010x}"
            )
        return tensors


def bucket_checksum(checksum: int, meta: TensorMeta, data: torch.Tensor) -> int:
    """Extend the checksum of a bucket by its next tensor; a bucket starts from 0.

    It covers name, shape, dtype and bytes, so that two tensors cannot change places unnoticed.

    Args:
        checksum: that of the tensors before.
        meta: description of the tensor.
        data: its bytes, uint8 [num_bytes] on the CPU.
    """
    head = f"{meta.name}:{meta.dtype}:{meta.shape};"
    return zlib.crc32(data.numpy().data, zlib.crc32(head.encode(), checksum))


def describe_tensor(name: str, tensor: torch.Tensor, end_bytes: int) -> TensorMeta:
    """Place a tensor at the first aligned offset from `end_bytes` on."""
    offset = -(-end_bytes // TENSOR_ALIGNMENT_BYTES) * TENSOR_ALIGNMENT_BYTES
    return TensorMeta(
        name=name,
        shape=tuple(tensor.shape),
        dtype=str(tensor.dtype).removeprefix("torch."),
        offset_bytes=offset,
        num_bytes=tensor.numel() * tensor.element_size(),
    )


def tensor_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bytes in row-major order: uint8 [num_bytes] on the CPU, a view if it can be."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)


def dtype_from_name(name: str) -> torch.dtype:
    """`torch.bfloat16` for "bfloat16"."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise WeightUpdateError(f"dtype={name!r}: this torch has no such dtype")
    return dtype
