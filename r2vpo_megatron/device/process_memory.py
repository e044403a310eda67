"""Tensors in the memory of another process of this host, read from there without a copy between.

Linux's process_vm_readv copies from one process's memory straight to its place in another's
("cross memory attach", as MPI libraries use it for messages within a host).
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import errno
import math
import os
import secrets
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

IntArray = npt.NDArray[np.int64]

_PR_SET_PTRACER = 0x59616D61  # linux/prctl.h
_MOST_PIECES = 1024  # in a call: IOV_MAX
_MOST_BYTES = 1 << 30  # in a call; the kernel's limit is 2 GiB less a page
_LIBC = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class MemoryOffer:
    """What another process needs in order to read this one's memory, and to know that it can.

    Attributes:
        pid: of the process.
        proof: random bytes.
        proof_address: where they lie; so no other host's process of that id is taken for this one.
    """

    pid: int
    proof: bytes
    proof_address: int

    def is_readable(self) -> bool:
        """Whether this process may read the memory: one host, one user, and the kernel allows."""
        place = torch.zeros(len(self.proof), dtype=torch.uint8)
        with contextlib.suppress(OSError):
            _read(self.pid, self.proof_address, torch.empty_like(place, device="meta"), place)
        return place.numpy().tobytes() == self.proof


class OfferedMemory:
    """This process's memory, for one reader to read as long as it knows the addresses.

    Args:
        reader_pid: of the reader. Where the kernel's Yama module lets a process read only its
            descendants, it is told to make an exception for this one.
    """

    def __init__(self, reader_pid: int) -> None:
        _except_from_yama(reader_pid)
        self._proof = torch.frombuffer(bytearray(secrets.token_bytes(16)), dtype=torch.uint8)
        proof = self._proof.numpy().tobytes()
        self.offer = MemoryOffer(os.getpid(), proof, self._proof.data_ptr())

    def take_back(self) -> None:
        """Nobody is to read this process any more, as far as the kernel distinguishes."""
        _except_from_yama(0)


@dataclass(frozen=True)
class RemoteTensor:
    """A tensor, or a view of one, in the memory of another process, which must keep it.

    Attributes:
        pid: of that process.
        address: of its storage there.
        view: on the meta device; how the tensor lies in the storage.
    """

    pid: int
    address: int
    view: Tensor

    @property
    def shape(self) -> torch.Size:
        """As of a tensor."""
        return self.view.shape

    @property
    def dtype(self) -> torch.dtype:
        """As of a tensor."""
        return self.view.dtype

    def __len__(self) -> int:
        """As of a tensor."""
        return len(self.view)

    def __getitem__(self, rows: slice) -> RemoteTensor:
        """As of a tensor; a view."""
        return self._of(self.view[rows])

    def chunk(self, number: int) -> tuple[RemoteTensor, ...]:
        """As of a tensor; views."""
        return tuple(self._of(part) for part in self.view.chunk(number))

    def split(self, sizes: list[int], dim: int) -> tuple[RemoteTensor, ...]:
        """As of a tensor; views."""
        return tuple(self._of(part) for part in self.view.split(sizes, dim))

    def reshape(self, *shape: int) -> RemoteTensor:
        """A view, as of a tensor; where there is none it fails."""
        return self._of(self.view.view(shape))

    def contiguous(self) -> Tensor:
        """A copy in this process; see `copy_into`."""
        copy = torch.empty(self.shape, dtype=self.dtype)
        self.copy_into(copy)
        return copy

    def copy_into(self, place: Tensor) -> None:
        """Read the tensor.

        Args:
            place: in this process's host memory, of the same shape and dtype, of any strides.

        Raises:
            RuntimeError: the process has gone, or does not let itself be read.
        """
        assert place.shape == self.shape and place.dtype == self.dtype
        assert place.device.type == "cpu"
        try:
            _read(self.pid, self.address, self.view, place)
        except OSError as error:
            raise RuntimeError(
                f"the memory of process {self.pid} cannot be read: {error.strerror}"
            ) from error

    def _of(self, view: Tensor) -> RemoteTensor:
        return dataclasses.replace(self, view=view)


def _except_from_yama(pid: int) -> None:
    """Let one process look into this one, in place of the one before; 0: none."""
    arguments = [ctypes.c_ulong(number) for number in (pid, 0, 0, 0)]
    _LIBC.prctl(_PR_SET_PTRACER, *arguments)  # fails without Yama, where nobody needs it


def _read(pid: int, address: int, view: Tensor, place: Tensor) -> None:
    """Copy from a storage in another process to `place`.

    Args:
        pid: of the process.
        address: of the storage.
        view: what is to be read, on the meta device.
        place: of the same shape.

    Raises:
        OSError: the kernel refuses, or there is no such process or memory.
    """
    num_bytes = place.numel() * place.element_size()
    there = _pieces(address + int(view.storage_offset()) * view.element_size(), view)
    here = _pieces(place.data_ptr(), place)
    if max(len(there), len(here)) > _MOST_PIECES or num_bytes > _MOST_BYTES:
        dim = next(dim for dim, size in enumerate(place.shape) if size > 1)
        for view_half, place_half in zip(view.chunk(2, dim), place.chunk(2, dim), strict=True):
            _read(pid, address, view_half, place_half)
        return
    # Both sides may be cut differently: what counts is the order of the bytes.
    arguments = (here.ctypes.data, len(here), there.ctypes.data, len(there), 0)
    done = _LIBC.process_vm_readv(pid, *map(ctypes.c_ulong, arguments))
    if done != num_bytes:
        number = ctypes.get_errno() if done < 0 else errno.EFAULT
        raise OSError(number, os.strerror(number))


def _contiguous_dims(tensor: Tensor) -> int:
    """How many of the last dimensions lie in memory without a gap."""
    for dim in reversed(range(tensor.dim())):
        if tensor.shape[dim] != 1 and tensor.stride(dim) != math.prod(tensor.shape[dim + 1 :]):
            return tensor.dim() - 1 - dim
    return tensor.dim()


def _pieces(address: int, tensor: Tensor) -> IntArray:
    """Where a tensor lies: (address, bytes) of pieces without a gap, int64 [pieces, 2].

    Args:
        address: of its first element.
        tensor: its shape and strides count.
    """
    outer = tensor.dim() - _contiguous_dims(tensor)
    addresses = np.array([address], dtype=np.int64)
    for size, stride in zip(tensor.shape[:outer], tensor.stride()[:outer], strict=True):
        steps = np.arange(size, dtype=np.int64) * stride * tensor.element_size()
        addresses = (addresses[:, None] + steps).reshape(-1)
    pieces = np.empty((len(addresses), 2), dtype=np.int64)
    pieces[:, 0] = addresses
    pieces[:, 1] = math.prod(tensor.shape[outer:]) * tensor.element_size()
    return pieces
