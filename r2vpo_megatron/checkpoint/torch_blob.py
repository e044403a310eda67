"""What torch.save makes of one tensor: written without copying it, read by byte ranges.

A blob is a zip archive, not compressed, with a small pickle that describes the tensor (data.pkl)
and a record of its bare values (data/0). torch.load reads what is written here; what is read here
is as torch.save or a training framework wrote it, or hostile.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import struct
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch
from torch import Tensor

from r2vpo_megatron.checkpoint import restricted_pickle
from r2vpo_megatron.checkpoint.restricted_pickle import Global, Record, integers

Buffer = bytes | memoryview

_STORAGES: dict[torch.dtype, Any] = {
    torch.bfloat16: torch.BFloat16Storage,
    torch.float16: torch.HalfStorage,
    torch.float32: torch.FloatStorage,
    torch.float64: torch.DoubleStorage,
    torch.int64: torch.LongStorage,
    torch.int32: torch.IntStorage,
    torch.int16: torch.ShortStorage,
    torch.int8: torch.CharStorage,
    torch.uint8: torch.ByteStorage,
    torch.bool: torch.BoolStorage,
}
_DTYPES = {f"torch.{storage.__name__}": dtype for dtype, storage in _STORAGES.items()}
_REBUILD = "torch._utils._rebuild_tensor_v2"
_KNOWN_GLOBALS = frozenset({_REBUILD, "collections.OrderedDict", *_DTYPES})
_ARCHIVE = "archive"  # torch.save's name for the archive of a file without a name
_FORMAT_VERSION = b"3\n"
_MAX_PICKLE_BYTES = 2**20
_SCRATCH_BYTES = 16 * 2**20  # of rows, read to take some of their columns
_LOCAL_SIGNATURE = b"PK\x03\x04"
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, lengths of name and extra field


def tensor_buffers(tensor: Tensor) -> list[Buffer]:
    """The blob of a tensor in parts, of which one is the tensor's own memory.

    Equal tensors have equal bytes, on whatever version of torch.

    Args:
        tensor: contiguous, on the CPU; must not change before the parts are written.

    Raises:
        ValueError: not contiguous, not on the CPU, or of a dtype that has no place in a checkpoint.
    """
    if tensor.dtype not in _STORAGES:
        valid = ", ".join(str(dtype).removeprefix("torch.") for dtype in _STORAGES)
        raise ValueError(f"dtype = {tensor.dtype}: must be one of {valid}")
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise ValueError("a tensor to be written must be contiguous and on the CPU")
    stream = io.BytesIO()
    _TensorPickler(stream, tensor).dump(_Rebuilt(tensor))
    return _archive(stream.getvalue(), {"data/0": _memory(tensor)})


def encode_tensor(tensor: Tensor) -> bytes:
    """The blob of a tensor, in one piece; see tensor_buffers."""
    return b"".join(tensor_buffers(tensor))


def encode_object(value: Any) -> bytes:
    """The blob of an object of plain Python values (numbers, text, None, lists, dicts)."""
    return b"".join(_archive(pickle.dumps(value, protocol=2), {}))


def encode_extra_state() -> bytes:
    """The blob of an `_extra_state`: Megatron's layers without Transformer Engine have None.

    megatron/core/dist_checkpointing/strategies/torch.py (mcore_to_pyt_state_dict) saves a list
    with one entry for each local shard of the object.
    """
    return encode_object([None])


@dataclass(frozen=True)
class TensorBlob:
    """Where the values of a tensor lie in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements
    offset: int  # elements of the storage before the tensor's first
    storage_numel: int
    position: int  # of the storage's first byte in the file

    def read_into(self, descriptor: int, ranges: Sequence[tuple[int, int]], out: Tensor) -> None:
        """Fill `out` with tensor[start:stop, ...], reading no rows but those.

        Args:
            descriptor: of the file.
            ranges: (start, stop) for each dimension, within the tensor and not empty.
            out: of that shape and of the tensor's dtype.

        Raises:
            ValueError: the file ends before the values do.
        """
        if not self._is_contiguous():
            storage = torch.empty(self.storage_numel, dtype=self.dtype)
            _read_bytes(descriptor, self.position, storage)
            whole = storage.as_strided(self.shape, self.strides, self.offset)
            out.copy_(whole[tuple(slice(*part) for part in ranges)])
            return
        # Dimensions of size 1 in front, such as the layer's, tell nothing about where rows lie.
        first = next((d for d, size in enumerate(self.shape) if size > 1), len(self.shape))
        rows = (0, 1) if first == len(self.shape) else ranges[first]
        inner_shape, inner_ranges = self.shape[first + 1 :], list(ranges[first + 1 :])
        row_bytes = math.prod(inner_shape) * self.dtype.itemsize
        begin = self.position + self.offset * self.dtype.itemsize
        out = out.view(rows[1] - rows[0], *out.shape[first + 1 :])
        if out.is_contiguous() and all(
            part == (0, size) for part, size in zip(inner_ranges, inner_shape, strict=True)
        ):
            _read_bytes(descriptor, begin + rows[0] * row_bytes, out)
            return
        num_rows = max(1, min(rows[1] - rows[0], _SCRATCH_BYTES // row_bytes))
        scratch = torch.empty(num_rows, *inner_shape, dtype=self.dtype)
        taken = (slice(None), *(slice(*part) for part in inner_ranges))
        for row in range(rows[0], rows[1], num_rows):
            part = scratch[: min(num_rows, rows[1] - row)]
            _read_bytes(descriptor, begin + row * row_bytes, part)
            out[row - rows[0] : row - rows[0] + len(part)] = part[taken]

    def _is_contiguous(self) -> bool:
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size > 1 and stride != expected:
                return False
            expected *= size
        return True


def locate_tensor(descriptor: int, position: int, length: int) -> TensorBlob:
    """Find the values of the tensor in a blob.

    Args:
        descriptor: of the file.
        position: of the blob's first byte.
        length: of the blob, in bytes.

    Raises:
        ValueError: no whole blob of a tensor is there.
    """
    archive = _StoredArchive(descriptor, position, length)
    if "byteorder" in archive and archive.read("byteorder") != sys.byteorder.encode():
        raise ValueError("was written with the other byte order")
    description = restricted_pickle.loads(archive.read("data.pkl"), _KNOWN_GLOBALS)
    if not isinstance(description, Record) or description.name != _REBUILD:
        raise ValueError("does not hold a tensor")
    match description.arguments:
        case (
            Record("persistent", ("storage", Global(storage), str(name), _, int(storage_numel))),
            int(offset),
            size,
            stride,
            *_,
        ):
            shape, strides = integers(size, "shape"), integers(stride, "strides")
        case _:
            raise ValueError("describes its tensor in an unknown way")
    dtype = _DTYPES.get(storage)
    values, num_bytes = archive.locate(f"data/{name}")
    if dtype is None or len(strides) != len(shape) or num_bytes != storage_numel * dtype.itemsize:
        raise ValueError("describes its tensor in an unknown way")
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if offset < 0 or (0 not in shape and last >= storage_numel):
        raise ValueError(f"holds {storage_numel} values, too few for shape {list(shape)}")
    return TensorBlob(dtype, shape, strides, offset, storage_numel, values)


class _Rebuilt:
    """Pickled as the call by which torch.load makes the tensor again."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def __reduce__(self) -> tuple[Any, ...]:
        tensor = self._tensor
        shape, strides = tuple(tensor.shape), tuple(tensor.stride())
        rebuild = torch._utils._rebuild_tensor_v2
        return rebuild, (_Storage(), 0, shape, strides, False, OrderedDict())


class _Storage:
    """Stands in a pickle for the values, which follow in a record of their own."""


class _TensorPickler(pickle.Pickler):
    def __init__(self, stream: BinaryIO, tensor: Tensor) -> None:
        super().__init__(stream, protocol=2)
        self._id = ("storage", _STORAGES[tensor.dtype], "0", "cpu", tensor.numel())

    def persistent_id(self, value: Any) -> Any:
        return self._id if isinstance(value, _Storage) else None


class _Parts(io.RawIOBase):
    """A stream that keeps the buffers written to it, not a copy of them."""

    def __init__(self) -> None:
        self.buffers: list[Buffer] = []

    def writable(self) -> bool:
        return True

    def write(self, buffer: Any) -> int:
        self.buffers.append(buffer)
        return len(buffer)


class _Window(io.RawIOBase):
    """A range of a file, as a file."""

    def __init__(self, descriptor: int, position: int, length: int) -> None:
        self._descriptor, self._position, self._length = descriptor, position, length
        self._current = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._current, os.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise ValueError("it points before its beginning")
        self._current = base + offset
        return self._current

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self._length - self._current))
        done = os.preadv(
            self._descriptor, [memoryview(buffer)[:count]], self._position + self._current
        )
        self._current += done
        return done


def _archive(description: bytes, values: Mapping[str, memoryview]) -> list[Buffer]:
    parts = _Parts()
    records: dict[str, Buffer] = {
        "data.pkl": description,
        "byteorder": sys.byteorder.encode(),
        **values,
        "version": _FORMAT_VERSION,
    }
    with zipfile.ZipFile(parts, "w", zipfile.ZIP_STORED) as archive:
        for name, record in records.items():
            info = zipfile.ZipInfo(f"{_ARCHIVE}/{name}", date_time=(1980, 1, 1, 0, 0, 0))
            info.create_system = 3
            archive.writestr(info, record)
    return parts.buffers


def _memory(tensor: Tensor) -> memoryview:
    """The values of a contiguous tensor as bytes, not copied."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


class _StoredArchive:
    """An uncompressed zip archive in a range of a file; checksums are not looked at.

    torch.save can leave them out, and torch.load does not compare them.
    """

    def __init__(self, descriptor: int, position: int, length: int) -> None:
        self._descriptor, self._position, self._length = descriptor, position, length
        try:
            with zipfile.ZipFile(_Window(descriptor, position, length)) as archive:
                # torch.load knows the records by what follows the archive's name.
                self._records = {i.filename.partition("/")[2]: i for i in archive.infolist()}
        except (zipfile.BadZipFile, NotImplementedError, struct.error, ValueError) as error:
            raise ValueError(f"is not what torch.save writes ({error})") from error

    def __contains__(self, name: str) -> bool:
        return name in self._records

    def locate(self, name: str) -> tuple[int, int]:
        """Position in the file of the first byte of a record, and its bytes."""
        if name not in self._records:
            raise ValueError(f"is not what torch.save writes (it has no record {name!r})")
        info = self._records[name]
        header = b""
        if 0 <= info.header_offset < self._length:
            where = self._position + info.header_offset
            header = os.pread(self._descriptor, _LOCAL_HEADER.size, where)
        if len(header) < _LOCAL_HEADER.size or not header.startswith(_LOCAL_SIGNATURE):
            raise ValueError(f"is not what torch.save writes (record {name!r} is not there)")
        _, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(header)
        start = info.header_offset + _LOCAL_HEADER.size + name_bytes + extra_bytes
        if info.compress_type != zipfile.ZIP_STORED or start + info.file_size > self._length:
            raise ValueError(f"its record {name!r} is compressed or not whole")
        return self._position + start, info.file_size

    def read(self, name: str) -> bytes:
        """A small record."""
        start, size = self.locate(name)
        if size > _MAX_PICKLE_BYTES:
            raise ValueError(f"its record {name!r} has {size} bytes")
        return os.pread(self._descriptor, size, start)


def _read_bytes(descriptor: int, position: int, out: Tensor) -> None:
    """Fill a contiguous tensor with the bytes of a file from `position` on."""
    view, done = _memory(out), 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done:]], position + done)
        if count == 0:
            raise ValueError("ends before its values do")
        done += count
