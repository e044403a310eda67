"""Anonymous memory (memfd) that processes of one host share."""

from __future__ import annotations

import mmap
import os
import secrets
import weakref

import torch


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
