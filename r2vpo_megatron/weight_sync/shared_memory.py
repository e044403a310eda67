"""Weight pushes through anonymous shared memory, for processes of one host.

Each bucket is a memfd: a file that has no name anywhere. The kernel frees it when the last process
that holds or maps it is gone, however that process ends, so nothing can be left behind in
/dev/shm. Receivers open it through /proc/<sender's pid>/fd/<fd> and map it without copying.

A finished bucket is sealed against writing, so a receiver may go on reading it (vLLM keeps the
tensors of a layer that continues in the next bucket) after the sender has let go of it.
"""

from __future__ import annotations

import dataclasses
import fcntl
import mmap
import os
import secrets
import socket
import time
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass

import torch

from r2vpo_megatron.rollout.engine import WeightUpdateError, fold_checksum
from r2vpo_megatron.weight_sync.protocol import (
    TensorMeta,
    WeightBucket,
    bucket_checksum,
    describe_tensor,
    tensor_bytes,
)


@dataclass(frozen=True)
class MemfdHandle:
    """Where a bucket's memory is found: the sender's process and file descriptor there."""

    host: str
    pid: int
    fd: int
    name: str
    num_bytes: int

    def attach(self) -> mmap.mmap:
        """Map the sender's memory.

        The mapping is private: writing to it would copy the page and leave the sender's alone.

        Raises:
            WeightUpdateError: the memory is not reachable from this process.
        """
        path = f"/proc/{self.pid}/fd/{self.fd}"
        try:
            # Process ids repeat on other hosts; the name tells whether this is the right file.
            target = os.readlink(path)
            if target != f"/memfd:{self.name} (deleted)":
                raise WeightUpdateError(f"{self._unreachable(path)}: it is {target!r}")
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise WeightUpdateError(f"{self._unreachable(path)}: {error.strerror}") from error
        try:
            return mmap.mmap(
                fd, self.num_bytes, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE
            )
        finally:
            os.close(fd)

    def _unreachable(self, path: str) -> str:
        return (
            f"cannot open the weight bucket {path} of host {self.host} on host "
            f"{socket.gethostname()} (shared memory needs sender and receiver on one host, in one "
            "PID namespace, run by one user, and the sender to hold the bucket still)"
        )


class _BucketWriter:
    """A bucket that is being filled."""

    def __init__(self, bucket_bytes: int) -> None:
        self._bucket_bytes = bucket_bytes
        self._name = f"r2vpo-weights-{secrets.token_hex(8)}"
        self._fd = os.memfd_create(self._name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        self._metas: list[TensorMeta] = []
        self._end_bytes = 0
        self._checksum = 0

    def has_room_for(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor fits; an empty bucket takes one of any size."""
        meta = describe_tensor("", tensor, self._end_bytes)
        return not self._metas or meta.offset_bytes + meta.num_bytes <= self._bucket_bytes

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Append a tensor."""
        meta = describe_tensor(name, tensor, self._end_bytes)
        data = tensor_bytes(tensor)
        view = data.numpy().data
        written = 0
        while written < meta.num_bytes:  # one call writes at most 2 GiB
            written += os.pwrite(self._fd, view[written:], meta.offset_bytes + written)
        self._checksum = bucket_checksum(self._checksum, meta, data)
        self._metas.append(meta)
        self._end_bytes = meta.offset_bytes + meta.num_bytes

    def seal(self, version: int, index: int) -> WeightBucket:
        """Make the bucket immutable and describe it."""
        num_bytes = max(self._end_bytes, 1)  # a mapping cannot be empty
        os.ftruncate(self._fd, num_bytes)
        seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
        fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, seals)
        handle = MemfdHandle(socket.gethostname(), os.getpid(), self._fd, self._name, num_bytes)
        return WeightBucket(version, index, tuple(self._metas), num_bytes, self._checksum, handle)

    def close(self) -> None:
        """Let go of the memory. May be called again."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


@dataclass
class _PushStatistics:
    """What a push has moved so far, and how long its stages took."""

    num_buckets: int = 0
    num_tensors: int = 0
    num_bytes: int = 0
    gather_seconds: float = 0.0
    write_seconds: float = 0.0


class SharedMemorySender:
    """Sends weights to processes of the same host; see `WeightSender`.

    At any time it holds one bucket and the tensor that comes next.

    Args:
        bucket_bytes: size of a bucket; a larger tensor gets a bucket of its own.

    Raises:
        ValueError: bucket_bytes is not positive.
    """

    def __init__(self, bucket_bytes: int = 256 << 20) -> None:
        if bucket_bytes < 1:
            raise ValueError(f"bucket_bytes={bucket_bytes}: must be at least 1")
        self._bucket_bytes = bucket_bytes
        self._push: Generator[WeightBucket, None, None] | None = None
        self._push_checksum: int | None = None
        self._statistics = _PushStatistics()

    def buckets(
        self, version: int, named_tensors: Iterable[tuple[str, torch.Tensor]]
    ) -> Iterator[WeightBucket]:
        """Write tensors to shared memory, bucket by bucket. Ends a push that is still open.

        A bucket is freed when the next one is asked for: by then every receiver must have loaded
        it. If `named_tensors` gathers from other ranks, each step is as collective as it is.

        Args:
            version: policy version that the weights are.
            named_tensors: (Hugging Face name, full tensor on any device); read once, lazily.

        Returns:
            An iterator of descriptors to pass to the receivers. It raises ValueError where a name
            comes a second time.
        """
        self.close()
        self._push_checksum = None
        self._statistics = _PushStatistics()
        self._push = self._generate(version, self._gathered(named_tensors))
        return self._push

    @property
    def push_checksum(self) -> int:
        """Checksum of the last push, for the receivers' `finish_weight_update`.

        Raises:
            WeightUpdateError: no push has been sent to its end.
        """
        if self._push_checksum is None:
            raise WeightUpdateError("no complete push: ask for buckets until there are no more")
        return self._push_checksum

    def metrics(self) -> dict[str, float]:
        """Sizes (bytes, counts) and stage times (seconds) of the last push."""
        return {
            f"weight_sync/{name}": float(value)
            for name, value in dataclasses.asdict(self._statistics).items()
        }

    def close(self) -> None:
        """End the open push, if any, and free its memory. The sender can be used again."""
        if self._push is not None:
            self._push.close()
            self._push = None

    def _generate(
        self, version: int, named_tensors: Iterable[tuple[str, torch.Tensor]]
    ) -> Generator[WeightBucket, None, None]:
        writer = None
        push_checksum = 0
        try:
            for name, tensor in named_tensors:
                if writer is not None and not writer.has_room_for(tensor):
                    bucket = self._publish(writer, version)
                    push_checksum = fold_checksum(push_checksum, bucket.index, bucket.checksum)
                    yield bucket
                    writer.close()
                    writer = None
                if writer is None:
                    writer = _BucketWriter(self._bucket_bytes)
                self._write(writer, name, tensor)
            if writer is not None:
                bucket = self._publish(writer, version)
                push_checksum = fold_checksum(push_checksum, bucket.index, bucket.checksum)
                yield bucket
            self._push_checksum = push_checksum
        finally:
            if writer is not None:
                writer.close()

    def _gathered(
        self, named_tensors: Iterable[tuple[str, torch.Tensor]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Pass the tensors on, each name once, and take the time that their source needs."""
        names: set[str] = set()
        start = time.perf_counter()
        for name, tensor in named_tensors:
            self._statistics.gather_seconds += time.perf_counter() - start
            if name in names:
                raise ValueError(f"tensor name {name!r} comes twice in one push")
            names.add(name)
            yield name, tensor
            start = time.perf_counter()
        self._statistics.gather_seconds += time.perf_counter() - start

    def _write(self, writer: _BucketWriter, name: str, tensor: torch.Tensor) -> None:
        start = time.perf_counter()
        writer.write(name, tensor)
        self._statistics.num_tensors += 1
        self._statistics.num_bytes += tensor.numel() * tensor.element_size()
        self._statistics.write_seconds += time.perf_counter() - start

    def _publish(self, writer: _BucketWriter, version: int) -> WeightBucket:
        bucket = writer.seal(version, self._statistics.num_buckets)
        self._statistics.num_buckets += 1
        return bucket
