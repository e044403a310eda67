"""Weight pushes through anonymous shared memory, for processes of one host.

Each bucket is a file that has no name anywhere (see SharedFile), so nothing can be left behind.
Receivers open it through /proc/<sender's pid>/fd/<fd> and map it without copying.

Fresh memory costs more than copying into it (the kernel clears every page, and both sides fault
each in), so files are filled again, in a push and from push to push, and receivers keep their
mappings for as long as the sender keeps the files. A receiver holds a shared lock (flock) on a file
while it has tensors of the bucket (vLLM keeps those of a layer that goes on in the next one); a
locked file is not filled again. The kernel drops the locks of a process that dies.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import socket
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from r2vpo_megatron.device.host_memory import SharedFile
from r2vpo_megatron.rollout.weight_updates import WeightUpdateError
from r2vpo_megatron.weight_sync.device_buffers import BufferWriter
from r2vpo_megatron.weight_sync.protocol import SourceTensor, aligned
from r2vpo_megatron.weight_sync.sender import BucketSender, BucketWriter, StageTimes


@dataclass(frozen=True)
class MemfdHandle:
    """Where a bucket's memory is found: the sender's process and file descriptor there.

    `held` are the names of all files that the sender has; mappings of others are of no use.
    """

    host: str
    pid: int
    fd: int
    name: str
    capacity_bytes: int
    held: frozenset[str]

    def attach(self, link: Any = None) -> memoryview:
        """Map the sender's memory, or take the mapping that `link` has.

        The mapping is private: writing to it would copy the page and leave the sender's alone.

        Raises:
            WeightUpdateError: the memory is not reachable from this process.
        """
        mapping: _Mapping = link.mapping_of(self) if link is not None else _Mapping(self)
        return mapping.lease()

    def open(self) -> int:
        """A file descriptor of this process.

        Raises:
            WeightUpdateError: the memory is not reachable from this process.
        """
        path = f"/proc/{self.pid}/fd/{self.fd}"
        try:
            # Process ids repeat on other hosts; the name tells whether this is the right file.
            target = os.readlink(path)
            if target != f"/memfd:{self.name} (deleted)":
                raise WeightUpdateError(f"{self._unreachable(path)}: it is {target!r}")
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise WeightUpdateError(f"{self._unreachable(path)}: {error.strerror}") from error

    def _unreachable(self, path: str) -> str:
        return (
            f"cannot open the weight bucket {path} of host {self.host} on host "
            f"{socket.gethostname()} (shared memory needs sender and receiver on one host, in one "
            "PID namespace, run by one user, and the sender to hold the bucket still)"
        )


class _Mapping:
    """A sender's file, mapped; locked as long as a lease of it is alive."""

    def __init__(self, handle: MemfdHandle) -> None:
        self._fd = handle.open()
        weakref.finalize(self, os.close, self._fd)
        self._memory = mmap.mmap(
            self._fd,
            handle.capacity_bytes,
            flags=mmap.MAP_PRIVATE,
            prot=mmap.PROT_READ | mmap.PROT_WRITE,
        )
        self._num_leases = 0

    def lease(self) -> memoryview:
        """The memory. Tensors made of the view keep it alive, and so the lock."""
        fcntl.flock(self._fd, fcntl.LOCK_SH)
        self._num_leases += 1
        view = memoryview(self._memory)
        weakref.finalize(view, self._end_lease).atexit = False
        return view

    def _end_lease(self) -> None:
        self._num_leases -= 1
        if self._num_leases == 0:
            fcntl.flock(self._fd, fcntl.LOCK_UN)


class SharedMemoryLink:
    """A receiver's mappings of the files that pushes fill again and again."""

    def __init__(self) -> None:
        self._mappings: dict[str, _Mapping] = {}

    def mapping_of(self, handle: MemfdHandle) -> _Mapping:
        """The mapping of this bucket's file.

        Raises:
            WeightUpdateError: the memory is not reachable from this process.
        """
        for name in self._mappings.keys() - handle.held:
            del self._mappings[name]
        if handle.name not in self._mappings:
            self._mappings[handle.name] = _Mapping(handle)
        return self._mappings[handle.name]

    def close(self) -> None:
        """Let go of the files; memory that tensors still use stays until they are gone."""
        self._mappings.clear()


@dataclass(frozen=True)
class SharedMemoryConnection:
    """Nothing to meet at: a bucket says itself where it is. Gives receivers their links."""

    def join(self, rank: int) -> SharedMemoryLink:
        """See `WeightConnection.join`; waits for nobody."""
        return SharedMemoryLink()


def is_free(file: SharedFile) -> bool:
    """Whether no receiver has tensors of what is in it."""
    try:
        fcntl.flock(file.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    fcntl.flock(file.fd, fcntl.LOCK_UN)
    return True


class _MemfdWriter(BufferWriter):
    """A bucket in a file without a name."""

    def __init__(
        self,
        bucket_bytes: int,
        file: SharedFile,
        times: StageTimes,
        held: Iterable[str],
        give_back: Callable[[SharedFile], None],
    ) -> None:
        super().__init__(bucket_bytes, file.buffer, times)
        self._file: SharedFile | None = file
        self._held = frozenset(held)
        self._give_back = give_back

    def _publish(self, num_bytes: int) -> MemfdHandle:
        file = self._file
        assert file is not None, "the bucket has been released"
        host, pid = socket.gethostname(), os.getpid()
        return MemfdHandle(host, pid, file.fd, file.name, file.capacity_bytes, self._held)

    def finish(self) -> None:
        """Nothing to wait for: a file is filled again only when no receiver has tensors of it."""

    def release(self) -> None:
        """Give the file back. May be called again."""
        super().release()
        file, self._file = self._file, None
        if file is not None:
            self._give_back(file)


class SharedMemorySender(BucketSender):
    """Sends weights to processes of the same host; see `BucketSender`.

    Receivers may do without the connection, at the price of mapping each bucket anew.
    """

    needs_connection = True

    def __init__(self, bucket_bytes: int = 256 << 20) -> None:
        super().__init__(bucket_bytes)
        self._spare: list[SharedFile] = []
        self._filled: list[SharedFile] = []

    def offer_connection(
        self, host: str, size: int, timeout_seconds: float
    ) -> SharedMemoryConnection:
        """What gives receivers their links; nothing is opened."""
        return SharedMemoryConnection()

    def join_connection(self) -> None:
        """Nothing to join."""

    def end_push(self) -> None:
        """End the open push, if any; of its buckets the two largest are kept for the next."""
        super().end_push()
        self._spare.sort(key=lambda file: file.capacity_bytes)
        while len(self._spare) > 2:  # more were needed because a receiver still used one
            self._spare.pop(0).close()

    def close(self) -> None:
        """End the open push, if any, and free all memory. The sender can be used again."""
        super().close()
        while self._spare:
            self._spare.pop().close()

    def _new_writer(self, first: SourceTensor) -> BucketWriter:
        num_bytes = aligned(max(self._bucket_bytes, first.numel() * first.element_size()))
        free = sorted((f for f in self._spare if is_free(f)), key=lambda file: file.capacity_bytes)
        file = next((f for f in free if f.capacity_bytes >= num_bytes), None)
        if file is None:
            if free:  # too small for an outsized tensor: the new file takes its place
                self._spare.remove(free[0])
                free[0].close()
            file = SharedFile(num_bytes)
        else:
            self._spare.remove(file)
        self._filled.append(file)
        held = (f.name for f in (*self._spare, *self._filled))
        return _MemfdWriter(self._bucket_bytes, file, self._times, held, self._keep)

    def _keep(self, file: SharedFile) -> None:
        self._filled.remove(file)
        self._spare.append(file)
