"""Weight pushes by broadcast, to processes of any host: gloo, NCCL and HCCL.

The sender (rank 0) and every worker of every engine form a process group of their own, through a
store on the sender's node. Buckets are broadcast while the next one is gathered. They travel as
int32, which every back end takes; nothing here computes in other types than uint8, int32 and int64.

A member that dies breaks the group for all: the sender and the other receivers get
WeightTransferInterrupted, at once where the connection is closed and after the timeout where it
is not. A new group of those that are left must then be made and the push sent again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from r2vpo_megatron.device import TransferGroup, TransferGroupError, collective_platform
from r2vpo_megatron.rollout.weight_updates import WeightTransferInterrupted
from r2vpo_megatron.weight_sync.device_buffers import BufferWriter, new_buffer
from r2vpo_megatron.weight_sync.protocol import SourceTensor, aligned
from r2vpo_megatron.weight_sync.sender import BucketSender, BucketWriter, StageTimes

_GROUP_PREFIX = "r2vpo-weights"


@dataclass(frozen=True)
class CollectiveConnection:
    """Where the members of a group meet: a store on the sender's node."""

    backend: str
    host: str
    port: int
    size: int
    timeout_seconds: float

    def join(self, rank: int) -> ReceivingLink:
        """Become member `rank`; see `WeightConnection.join`."""
        try:
            store = dist.TCPStore(
                self.host,
                self.port,
                is_master=False,
                timeout=timedelta(seconds=self.timeout_seconds),
                wait_for_workers=False,
            )
        except RuntimeError as error:
            raise WeightTransferInterrupted(
                f"no weight sender at {self.host}:{self.port}: {error}"
            ) from error
        return ReceivingLink(self.group(store, rank), collective_platform(self.backend))

    def group(self, store: dist.Store, rank: int) -> TransferGroup:
        """Make this member's end of the group."""
        try:
            return collective_platform(self.backend).transfer_group(
                dist.PrefixStore(_GROUP_PREFIX, store), rank, self.size, self.timeout_seconds
            )
        except RuntimeError as error:
            raise WeightTransferInterrupted(
                f"{self.backend}: member {rank} of {self.size} could not join: {error}"
            ) from error


class ReceivingLink:
    """A receiver's membership in the group."""

    def __init__(self, group: TransferGroup, platform: Any) -> None:
        self._group = group
        self._platform = platform

    def receive(self, num_bytes: int) -> torch.Tensor:
        """The next bucket, in memory of this process: uint8 [num_bytes].

        Raises:
            WeightTransferInterrupted: a member has gone.
        """
        device = self._platform.current_device()
        buffer = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        try:
            self._group.wait(self._group.begin_broadcast(buffer.view(torch.int32)))
        except TransferGroupError as error:
            raise WeightTransferInterrupted(f"receiving a bucket: {error}") from error
        return buffer

    def close(self) -> None:
        """Leave the group."""
        self._group.close()


@dataclass(frozen=True)
class BroadcastHandle:
    """A bucket that comes as the next broadcast."""

    num_bytes: int

    def attach(self, link: Any = None) -> torch.Tensor:
        """Take part in the broadcast.

        Raises:
            WeightTransferInterrupted: this process has not joined, or a member has gone.
        """
        if link is None:
            raise WeightTransferInterrupted(
                "a broadcast bucket came to a process that has not joined the sender's connection"
            )
        received: torch.Tensor = link.receive(self.num_bytes)
        return received


class _BroadcastWriter(BufferWriter):
    """A bucket that is broadcast once it is complete; gives its memory back to be filled anew."""

    def __init__(
        self,
        bucket_bytes: int,
        buffer: torch.Tensor,
        times: StageTimes,
        group: TransferGroup,
        give_back: Callable[[torch.Tensor], None],
    ) -> None:
        super().__init__(bucket_bytes, buffer, times)
        self._group = group
        self._give_back = give_back
        self._work: Any = None
        self._finished = False

    def _publish(self, num_bytes: int) -> BroadcastHandle:
        try:
            self._work = self._group.begin_broadcast(self.buffer[:num_bytes].view(torch.int32))
        except TransferGroupError as error:
            raise WeightTransferInterrupted(f"sending a bucket: {error}") from error
        return BroadcastHandle(num_bytes)

    def finish(self) -> None:
        """Wait until all receivers have the bucket."""
        try:
            self._group.wait(self._work)
        except TransferGroupError as error:
            raise WeightTransferInterrupted(f"sending a bucket: {error}") from error
        self._finished = True

    def release(self) -> None:
        """Give the memory back, if no broadcast can still read it. May be called again."""
        if self._finished and self._buffer is not None:
            self._give_back(self._buffer)
        super().release()
        self._work = None


class CollectiveSender(BucketSender):
    """Broadcasts weights; see `BucketSender`.

    Args:
        bucket_bytes: size of a bucket.
        backend: "gloo", "nccl" or "hccl".
    """

    needs_connection = True

    def __init__(self, bucket_bytes: int = 256 << 20, *, backend: str) -> None:
        super().__init__(bucket_bytes)
        self._backend = backend
        self._store: dist.Store | None = None
        self._connection: CollectiveConnection | None = None
        self._group: TransferGroup | None = None
        self._spare: list[torch.Tensor] = []

    def offer_connection(
        self, host: str, size: int, timeout_seconds: float
    ) -> CollectiveConnection:
        """Leave the group of before and open a store on this host for a new one.

        Args:
            host: name or address of this node, as receivers reach it.
            size: members, the sender included.
            timeout_seconds: for joining, and for each broadcast.
        """
        self._leave()
        timeout = timedelta(seconds=timeout_seconds)
        store = dist.TCPStore(host, 0, is_master=True, timeout=timeout, wait_for_workers=False)
        self._store = store
        self._connection = CollectiveConnection(
            self._backend, host, store.port, size, timeout_seconds
        )
        return self._connection

    def join_connection(self) -> None:
        """Become member 0 of the connection last offered; blocks until all have joined.

        Raises:
            WeightTransferInterrupted: the others did not come in time.
        """
        assert self._connection is not None and self._store is not None, "offer a connection first"
        self._group = self._connection.group(self._store, 0)

    def end_push(self) -> None:
        """End the open push, if any, and free its memory, which may be scarce on a device."""
        super().end_push()
        self._spare.clear()

    def _leave(self) -> None:
        self.close()
        if self._group is not None:
            self._group.close()
        self._group = self._connection = self._store = None

    def _new_writer(self, first: SourceTensor) -> BucketWriter:
        if self._group is None:
            raise WeightTransferInterrupted("the sender has joined no connection")
        if self._spare and self._spare[-1].numel() >= first.numel() * first.element_size():
            buffer = self._spare.pop()
        else:
            device = collective_platform(self._backend).current_device()
            buffer = new_buffer(self._bucket_bytes, first, device)
        return _BroadcastWriter(self._bucket_bytes, buffer, self._times, self._group, self._keep)

    def _keep(self, buffer: torch.Tensor) -> None:
        # A buffer for an outsized tensor is not kept: two of it might be.
        if buffer.numel() == aligned(self._bucket_bytes):
            self._spare.append(buffer)


GlooSender = functools.partial(CollectiveSender, backend="gloo")
NcclSender = functools.partial(CollectiveSender, backend="nccl")
HcclSender = functools.partial(CollectiveSender, backend="hccl")
