"""The format of a weight push: named tensors in buckets, described apart from their bytes.

A bucket is one flat buffer. Its descriptor (`WeightBucket`) is small, picklable and says where each
tensor lies in it; the `handle` in the descriptor knows how another process comes to the buffer.
Drivers pass descriptors around; tensor bytes never travel with them.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from r2vpo_megatron.checkpoint.layout import TensorPieces
from r2vpo_megatron.rollout.weight_updates import WeightUpdateError
from r2vpo_megatron.weight_sync.checksums import begin_digest, bucket_checksum, finish_digests

# Views of any dtype need aligned offsets; a cache line serves every one.
TENSOR_ALIGNMENT_BYTES = 64
# What a sender takes: pieces are put together in the bucket, without a copy between.
SourceTensor = torch.Tensor | TensorPieces


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

    def attach(self, link: Any = None) -> Any:
        """Give the buffer: uint8 [at least num_bytes], or an object with the buffer interface.

        Args:
            link: what `WeightConnection.join` gave this process, for handles that need it.
        """
        ...


class WeightConnection(Protocol):
    """Where a sender and its receivers meet, for back ends that need it. Small and picklable."""

    def join(self, rank: int) -> Any:
        """Become member `rank` of 1..size-1 (0 is the sender); blocks until all have.

        Returns:
            The link, for `WeightBucket.open`. Its `close()` leaves.

        Raises:
            WeightTransferInterrupted: the others did not come in time.
        """
        ...


class WeightSender(Protocol):
    """The learner's end of a weight push, on the one rank that holds the gathered tensors."""

    @property
    def needs_connection(self) -> bool:
        """Whether receivers must join a connection before the first push, and after a loss."""
        ...

    def offer_connection(self, host: str, size: int, timeout_seconds: float) -> WeightConnection:
        """Make a meeting place on this host, for this sender and `size` - 1 receivers."""
        ...

    def join_connection(self) -> None:
        """Join the place last offered, as the receivers do at the same time."""
        ...

    def buckets(
        self, version: int, named_tensors: Iterable[tuple[str, SourceTensor]]
    ) -> Iterator[WeightBucket]:
        """Send tensors bucket by bucket; see `BucketSender.buckets`."""
        ...

    @property
    def push_checksum(self) -> int:
        """Checksum of the last push; defined once its buckets are exhausted."""
        ...

    def metrics(self) -> dict[str, float]:
        """Sizes and stage times of the last push."""
        ...

    def end_push(self) -> None:
        """End the open push, if any. Where it is host memory, the next one fills the same."""
        ...

    def close(self) -> None:
        """End the open push, if any, and free all memory; the connection stays."""
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
        handle: how to come to the buffer.
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

    def open(
        self, link: Any = None, stage_seconds: dict[str, float] | None = None
    ) -> dict[str, torch.Tensor]:
        """Come to the bucket's memory, or receive it, and verify it.

        Args:
            link: what `WeightConnection.join` gave, for back ends that need a connection.
            stage_seconds: gets "receive" and "verify".

        Returns:
            Tensors by name, in host or device memory as the back end has it. They may be views of
            the sender's memory: treat them as read-only. Each keeps the bucket's memory alive;
            drop them when they have been loaded.

        Raises:
            WeightTransferInterrupted: the connection broke.
            WeightUpdateError: the bucket cannot be reached from here, or its bytes are not those
                that the sender described.
        """
        start = time.perf_counter()
        flat = self.handle.attach(link)
        if not isinstance(flat, torch.Tensor):
            flat = torch.frombuffer(flat, dtype=torch.uint8, count=self.num_bytes)
        received = time.perf_counter()
        parts = [
            flat[meta.offset_bytes : meta.offset_bytes + meta.num_bytes] for meta in self.tensors
        ]
        digests = finish_digests([begin_digest(part) for part in parts])
        checksum = bucket_checksum(self.tensors, digests)
        if checksum != self.checksum:
            raise WeightUpdateError(
                f"bucket {self.index} of version {self.version} is damaged: its checksum is "
                f"{checksum:#018x}, the sender's {self.checksum:#018x}"
            )
        if stage_seconds is not None:
            stage_seconds |= {
                "receive": received - start,
                "verify": time.perf_counter() - received,
            }
        return {
            meta.name: part.view(dtype_from_name(meta.dtype)).view(meta.shape)
            for meta, part in zip(self.tensors, parts, strict=True)
        }


def describe_tensor(name: str, tensor: SourceTensor, end_bytes: int) -> TensorMeta:
    """Place a tensor at the first aligned offset from `end_bytes` on."""
    return TensorMeta(
        name=name,
        shape=tuple(tensor.shape),
        dtype=str(tensor.dtype).removeprefix("torch."),
        offset_bytes=aligned(end_bytes),
        num_bytes=tensor.numel() * tensor.element_size(),
    )


def aligned(num_bytes: int) -> int:
    """The first aligned offset from `num_bytes` on."""
    return -(-num_bytes // TENSOR_ALIGNMENT_BYTES) * TENSOR_ALIGNMENT_BYTES


def tensor_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bytes in row-major order, where it lies: uint8 [num_bytes], a view if it can."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def dtype_from_name(name: str) -> torch.dtype:
    """`torch.bfloat16` for "bfloat16"."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise WeightUpdateError(f"dtype={name!r}: this torch has no such dtype")
    return dtype
