"""The .metadata of a torch_dist checkpoint: which part of which tensor lies where.

It is a pickle, read as data (restricted_pickle.py); what a reader cannot use, such as the save
plans that Megatron-core adds, is passed over.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import numpy as np
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from r2vpo_megatron.checkpoint import restricted_pickle
from r2vpo_megatron.checkpoint.restricted_pickle import Global, Record, integers

METADATA_FILE = ".metadata"

T = TypeVar("T")
# (key, offsets) -> (file, position, length) of a blob
Places = dict[tuple[str, tuple[int, ...]], tuple[str, int, int]]

_DTYPES = {
    f"torch.{name}": dtype for name, dtype in vars(torch).items() if isinstance(dtype, torch.dtype)
}
_KNOWN_MODULES = {
    "torch.distributed.checkpoint.metadata": (
        "Metadata",
        "MetadataIndex",
        "TensorStorageMetadata",
        "TensorProperties",
        "_MEM_FORMAT_ENCODING",
        "ChunkStorageMetadata",
        "BytesStorageMetadata",
        "StorageMeta",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    # all_local_plans, which Megatron-core adds to find out whether it may skip planning.
    "torch.distributed.checkpoint.planner": (
        "SavePlan",
        "WriteItem",
        "WriteItemType",
        "TensorWriteData",
        "BytesIOWriteData",
    ),
    "megatron.core.dist_checkpointing.strategies.torch": ("MCoreMetadata", "MCoreSavePlan"),  # 0.15
    "torch.serialization": ("_get_layout",),
    "torch": ("Size",),
    "pathlib": ("PosixPath",),  # of the folder, in storage_meta
    "pathlib._local": ("PosixPath",),  # as Python 3.13 names it
}
_KNOWN_GLOBALS = frozenset(_DTYPES) | {
    f"{module}.{name}" for module, names in _KNOWN_MODULES.items() for name in names
}
_MAX_GRID_CELLS = 10_000_000


@dataclass(frozen=True)
class StoredChunk:
    """A box of a tensor, and the blob that holds it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    position: int  # of the blob's first byte
    length: int  # bytes of the blob


@dataclass(frozen=True)
class StoredTensor:
    """A tensor and the chunks that make it up."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[StoredChunk, ...]


def read_metadata(folder: Path) -> dict[str, StoredTensor]:
    """Tensors of a checkpoint by key, in the file's order; byte objects are passed over.

    Raises:
        ValueError: .metadata is broken, or names a file outside the folder.
    """
    path = folder / METADATA_FILE
    try:
        return _parse(restricted_pickle.loads(path.read_bytes(), _KNOWN_GLOBALS))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


def encode_metadata(
    tensors: Iterable[StoredTensor], objects: Iterable[tuple[str, str, int, int]]
) -> bytes:
    """The file's content.

    Args:
        tensors: all tensors,
        objects: and (key, file, position, length) of each byte object.

    Raises:
        ValueError: the chunks of a tensor do not cover it, once.
    """
    entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    for tensor in tensors:
        check_cover(tensor)
        chunks = [
            ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes))
            for chunk in tensor.chunks
        ]
        properties = TensorProperties(dtype=tensor.dtype)
        entries[tensor.key] = TensorStorageMetadata(properties, torch.Size(tensor.shape), chunks)
        for chunk in tensor.chunks:
            index = MetadataIndex(tensor.key, chunk.offsets)
            storage[index] = _StorageInfo(chunk.file, chunk.position, chunk.length)
    for key, file, position, length in objects:
        entries[key] = BytesStorageMetadata()
        storage[MetadataIndex(key)] = _StorageInfo(file, position, length)
    return pickle.dumps(Metadata(state_dict_metadata=entries, storage_data=storage), protocol=4)


def check_cover(tensor: StoredTensor) -> None:
    """Check that the chunks of a tensor are within it, do not overlap and leave no gap.

    Every edge of a chunk cuts its dimension; on the grid of all cuts each cell must belong to
    exactly one chunk.

    Raises:
        ValueError: it does not.
    """
    what = f"tensor {tensor.key!r} {list(tensor.shape)}"
    for chunk in tensor.chunks:
        inside = len(chunk.offsets) == len(chunk.sizes) == len(tensor.shape) and all(
            offset + size <= limit
            for offset, size, limit in zip(chunk.offsets, chunk.sizes, tensor.shape, strict=True)
        )
        if not inside:
            raise ValueError(
                f"{what}: the chunk at {list(chunk.offsets)} of {list(chunk.sizes)} is not "
                "within the tensor"
            )
    filled = [chunk for chunk in tensor.chunks if 0 not in chunk.sizes]
    stored, expected = sum(math.prod(chunk.sizes) for chunk in filled), math.prod(tensor.shape)
    if stored != expected:
        raise ValueError(
            f"{what}: its chunks hold {stored:,} values, not {expected:,}; some "
            f"{'are missing' if stored < expected else 'overlap'}"
        )
    cuts: list[set[int]] = [{0} for _ in tensor.shape]
    for chunk in filled:
        for edges, offset, size in zip(cuts, chunk.offsets, chunk.sizes, strict=True):
            edges |= {offset, offset + size}
    numbers = [{cut: number for number, cut in enumerate(sorted(edges))} for edges in cuts]
    grid = [max(1, len(number) - 1) for number in numbers]
    if math.prod(grid) > _MAX_GRID_CELLS:
        raise ValueError(f"{what}: is cut in too irregular a way")
    counts = np.zeros(grid, dtype=np.int32)
    for chunk in filled:
        box = tuple(
            slice(number[offset], number[offset + size])
            for number, offset, size in zip(numbers, chunk.offsets, chunk.sizes, strict=True)
        )
        counts[box] += 1
    if filled and not (counts == 1).all():
        raise ValueError(f"{what}: its chunks overlap, and some are missing")


def _parse(metadata: Any) -> dict[str, StoredTensor]:
    if not isinstance(metadata, Record):
        raise ValueError("does not hold a Metadata object")
    entries = _typed(metadata.field("state_dict_metadata"), dict, "state_dict_metadata")
    places: Places = {}
    for index, info in _typed(metadata.field("storage_data"), dict, "storage_data").items():
        key = _typed(_typed(index, Record, "storage_data").field("fqn"), str, "storage_data")
        if (offset := index.field("offset")) is not None:
            places[key, integers(offset, f"an offset of {key!r}")] = _place(info, key)
    return {
        key: _tensor(_typed(key, str, "state_dict_metadata"), entry, places)
        for key, entry in entries.items()
        if not _typed(entry, Record, f"{key!r}").name.endswith(".BytesStorageMetadata")
    }


def _tensor(key: str, entry: Record, places: Places) -> StoredTensor:
    what = f"tensor {key!r}"
    shape = integers(entry.field("size"), f"shape of {what}")
    match entry.field("properties"):
        case Record(state=(Global(name), *_)) if name in _DTYPES:
            dtype = _DTYPES[name]
        case _:
            raise ValueError(f"{what}: has no dtype")
    chunks = []
    for chunk in _typed(entry.field("chunks"), list, f"chunks of {what}"):
        box = _typed(chunk, Record, f"chunks of {what}")
        offsets = integers(box.field("offsets"), f"offsets of {what}")
        sizes = integers(box.field("sizes"), f"sizes of {what}")
        if (key, offsets) not in places:
            raise ValueError(f"{what}: does not say where the chunk at {list(offsets)} lies")
        chunks.append(StoredChunk(offsets, sizes, *places[key, offsets]))
    return StoredTensor(key, shape, dtype, tuple(chunks))


def _place(info: Any, key: str) -> tuple[str, int, int]:
    record = _typed(info, Record, f"storage of {key!r}")
    file = _typed(record.field("relative_path"), str, f"file of {key!r}")
    parts = PurePosixPath(file).parts
    if not parts or parts[0].startswith("/") or ".." in parts or "\0" in file or "\\" in file:
        raise ValueError(f"{key!r} lies in {file!r}: must be a path inside the folder")
    if record.field("transform_descriptors"):
        raise ValueError(f"{key!r} is compressed or encrypted, which is not supported")
    place = (record.field("offset"), record.field("length"))
    position, length = integers(place, f"place of {key!r}")
    return file, position, length


def _typed(value: Any, kind: type[T], what: str) -> T:
    if not isinstance(value, kind):
        raise ValueError(f"{what}: is of an unexpected kind, {type(value).__name__}")
    return value
