"""Anonymous memory (memfd) that processes of one host share."""

from __future__ import annotations

import mmap
import os
import secrets
import socket
import struct
import warnings
import weakref

import torch
from torch import Tensor

_ALIGNMENT_BYTES = 64


class SharedFile:
    """A file without a name, mapped by its owner; closed when nothing refers to it.

    The kernel frees it when the last process that holds or maps it is gone, however that process
    ends, so nothing can be left behind in /dev/shm.

    Attributes:
        name: what /proc shows; no other file has it, on any host.
        fd: of the owner.
        capacity_bytes: size; pages are taken when they are first written.
        buffer: uint8 [capacity_bytes], the memory.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self.name = f"r2vpo-weights-{secrets.token_hex(8)}"
        self.fd = os.memfd_create(self.name, os.MFD_CLOEXEC)
        self.close = weakref.finalize(self, os.close, self.fd)
        os.ftruncate(self.fd, capacity_bytes)
        self.capacity_bytes = capacity_bytes
        memory = mmap.mmap(self.fd, capacity_bytes, flags=mmap.MAP_SHARED)
        self.buffer = torch.frombuffer(memory, dtype=torch.uint8)


class MemoryLane:
    """One end of a one-way street of tensors between two processes of a host.

    Tensors lie in memory that both map, one after the other. Where one finds no room, all before
    it must have been read, and it is put at the start; both ends count alike. A socket tells when.

    Args:
        memory: uint8 [capacity_bytes].
        line: connected to the other end.
    """

    def __init__(self, memory: Tensor, line: socket.socket) -> None:
        self._memory, self._line = memory, line
        self._end_bytes = 0

    def write(self, tensor: Tensor) -> None:
        """Append a tensor.

        Raises:
            RuntimeError: the reader has gone.
        """
        if not self._has_room(tensor):
            self._hear()
            self._end_bytes = 0
        self._next_place(tensor).copy_(tensor)
        self._tell()

    def make_room(self, like: Tensor) -> None:
        """At the reader: what was read will not be needed, if the next tensor finds no room."""
        if not self._has_room(like):
            self._tell()
            self._end_bytes = 0

    def read(self, like: Tensor) -> Tensor:
        """The next tensor, after `make_room`, of this one's shape and dtype.

        It lies in the memory of the lane, until room is made again.

        Raises:
            RuntimeError: the writer has gone.
        """
        self._hear()
        return self._next_place(like)

    def _has_room(self, tensor: Tensor) -> bool:
        return self._end_bytes + tensor.numel() * tensor.element_size() <= len(self._memory)

    def _next_place(self, like: Tensor) -> Tensor:
        num_bytes = like.numel() * like.element_size()
        data = self._memory[self._end_bytes : self._end_bytes + num_bytes]
        self._end_bytes += -(-num_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        return data.view(like.dtype).view(like.shape)

    def _tell(self) -> None:
        try:
            self._line.sendall(b"\0")
        except OSError as error:
            raise RuntimeError(f"the other end of a memory lane has gone: {error}") from error

    def _hear(self) -> None:
        if not self._line.recv(1):
            raise RuntimeError("the other end of a memory lane has gone")


class LaneOffer:
    """The writer's end of a lane before the reader has come.

    Attributes:
        address: for `reach_lane`; means something on this host only.
    """

    def __init__(self) -> None:
        self.address = f"\0r2vpo-lane-{secrets.token_hex(8)}"  # in no file system: goes with us
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(self.address)
        self._listener.listen()

    def accept(self, capacity_bytes: int) -> MemoryLane:
        """Let the reader in, whose `reach_lane` has succeeded.

        Args:
            capacity_bytes: of the lane; no tensor may be larger.
        """
        while True:
            line, _ = self._listener.accept()
            credentials = line.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            _, peer_user, _ = struct.unpack("3i", credentials)
            if peer_user == os.getuid():  # else somebody who has seen the address in /proc
                break
            line.close()
        file = SharedFile(capacity_bytes)
        socket.send_fds(line, [b"\0"], [file.fd])
        return MemoryLane(file.buffer, line)

    def close(self) -> None:
        """Let nobody in any more."""
        self._listener.close()


def reach_lane(address: str) -> socket.socket:
    """Come to the writer of a lane; waits for nothing.

    Raises:
        OSError: it is not of this host, or closed to this process.
    """
    line = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        line.connect(address)
    except OSError:
        line.close()
        raise
    return line


def join_lane(line: socket.socket) -> MemoryLane:
    """The reader's end of a lane, from what `reach_lane` gave; waits for the writer's `accept`.

    Raises:
        RuntimeError: the writer has gone.
    """
    _, descriptors, _, _ = socket.recv_fds(line, 1, 1)
    if not descriptors:
        raise RuntimeError("the other end of a memory lane has gone")
    try:
        memory = mmap.mmap(descriptors[0], 0, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
    finally:
        os.close(descriptors[0])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return MemoryLane(torch.frombuffer(memory, dtype=torch.uint8), line)
