"""Safetensors files planned before their bytes exist: a header, then the tensors one by one."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from r2vpo_megatron.checkpoint.safetensors_header import (
    DTYPES,
    METADATA_KEY,
    SINGLE_FILE,
    TensorEntry,
)
from r2vpo_megatron.checkpoint.tensor_check import abbreviated

if TYPE_CHECKING:
    from r2vpo_megatron.checkpoint.safetensors_io import CheckpointReader

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class SafetensorsFile:
    """A safetensors file: `header`, then the values of `entries` in their order, no gaps.

    Values are little-endian and contiguous, as `tensor_bytes` gives them. They are aligned to
    their element size only where the order of dtypes makes them so; the format asks for no more.
    """

    name: str
    entries: tuple[TensorEntry, ...]
    header: bytes  # length (8 bytes), JSON, padding

    @property
    def nbytes(self) -> int:
        """Bytes of the whole file."""
        return len(self.header) + sum(entry.nbytes for entry in self.entries)


def make_file(name: str, entries: Iterable[TensorEntry]) -> SafetensorsFile:
    """Lay out one file with the metadata that transformers asks for, {"format": "pt"}.

    Raises:
        ValueError: two tensors of one name, or a dtype that the format lacks.
    """
    listed = tuple(entries)
    header: dict[str, Any] = {METADATA_KEY: {"format": "pt"}}
    position = 0
    for entry in listed:
        if entry.name in header:
            raise ValueError(f"{name}: tensor {entry.name!r} occurs twice (or has a reserved name)")
        if entry.dtype not in _DTYPE_NAMES:
            raise ValueError(
                f"{name}: tensor {entry.name!r} has dtype {entry.dtype}, which safetensors files "
                f"cannot hold; valid: {', '.join(map(str, _DTYPE_NAMES))}"
            )
        header[entry.name] = {
            "dtype": _DTYPE_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [position, position + entry.nbytes],
        }
        position += entry.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return SafetensorsFile(name, listed, len(text).to_bytes(8, "little") + text)


def plan_files(entries: Iterable[TensorEntry], max_shard_bytes: int) -> list[SafetensorsFile]:
    """Deal tensors out to files, in order; a file ends before it would exceed the limit.

    Args:
        entries: in the order in which they will be written.
        max_shard_bytes: of tensors in a file; one tensor alone may exceed it.

    Returns:
        `model.safetensors`, or `model-00001-of-0000n.safetensors` and so on.

    Raises:
        ValueError: a limit below 1 byte, two tensors of one name, or a dtype that the format lacks.
    """
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes = {max_shard_bytes}: must be at least 1 byte")
    shards: list[list[TensorEntry]] = [[]]
    shard_bytes = 0
    for entry in entries:
        if shards[-1] and shard_bytes + entry.nbytes > max_shard_bytes:
            shards.append([])
            shard_bytes = 0
        shards[-1].append(entry)
        shard_bytes += entry.nbytes
    files = [
        make_file(name, shard) for name, shard in zip(shard_names(len(shards)), shards, strict=True)
    ]
    _weight_map(files)
    return files


def plan_like(reader: CheckpointReader, entries: Iterable[TensorEntry]) -> list[SafetensorsFile]:
    """Deal the same tensors out as a reference checkpoint has them: same files, same order.

    Where a file's dtypes and shapes are the reference's, so is its header, to the byte; with
    equal values the whole file is.

    Args:
        reader: of the reference checkpoint.
        entries: of all its tensors, computed buffers included; in any order.

    Raises:
        ValueError: listing tensors that only one of the two has, or that `entries` has twice.
    """
    wanted: dict[str, TensorEntry] = {}
    for entry in entries:
        if entry.name in wanted:
            raise ValueError(f"tensor {entry.name!r} is to be written twice")
        wanted[entry.name] = entry
    present = set(reader.names())
    problems = [
        f"{title}: {abbreviated(names)}"
        for title, names in (
            ("not in the reference", [name for name in wanted if name not in present]),
            ("only in the reference", [name for name in reader.names() if name not in wanted]),
        )
        if names
    ]
    if problems:
        raise ValueError(
            f"the tensors to write are not those of the reference checkpoint {reader.folder}: "
            + "; ".join(problems)
        )
    files = []
    for name in reader.files():
        theirs = reader.entries(name)
        ours = tuple(wanted[entry.name] for entry in theirs)
        if ours == theirs:
            files.append(SafetensorsFile(name, ours, reader.header_bytes(name)))
        else:
            files.append(make_file(name, ours))
    return files


def index_json(
    files: Sequence[SafetensorsFile], reference: CheckpointReader | None = None
) -> str | None:
    """Write `model.safetensors.index.json` as transformers does.

    metadata.total_size is the sum of the tensors' bytes, whatever a reference says. Of the other
    metadata of a reference, total_parameters alone is taken over, and only if names and shapes
    are the reference's, since it counts them; what else may stand there speaks of other weights.

    Args:
        files: of the whole checkpoint.
        reference: the checkpoint that plan_like took the files from.

    Returns:
        The file's text; None if all is in one `model.safetensors`, which needs no index.

    Raises:
        ValueError: a tensor is in two files.
    """
    weight_map = _weight_map(files)
    if [file.name for file in files] == [SINGLE_FILE]:
        return None
    entries = [entry for file in files for entry in file.entries]
    metadata: dict[str, Any] = {"total_size": sum(entry.nbytes for entry in entries)}
    if reference is not None:
        shapes = {name: reference.shape(name) for name in reference.names()}
        count = reference.index_metadata.get("total_parameters")
        if type(count) is int and shapes == {entry.name: entry.shape for entry in entries}:
            metadata["total_parameters"] = count
    index = {"metadata": metadata, "weight_map": weight_map}
    return json.dumps(index, indent=2, sort_keys=True) + "\n"


def shard_names(num_files: int) -> list[str]:
    """File names of a checkpoint, by Hugging Face's convention."""
    if num_files == 1:
        return [SINGLE_FILE]
    return [f"model-{n + 1:05d}-of-{num_files:05d}.safetensors" for n in range(num_files)]


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Values of a CPU tensor as a file holds them; not a copy if it is contiguous."""
    flat = tensor.detach().contiguous().flatten().view(torch.uint8)
    return flat.numpy().data


def _weight_map(files: Iterable[SafetensorsFile]) -> dict[str, str]:
    file_of: dict[str, str] = {}
    for file in files:
        for entry in file.entries:
            if entry.name in file_of:
                raise ValueError(
                    f"tensor {entry.name!r} is in two files: {file_of[entry.name]} and {file.name}"
                )
            file_of[entry.name] = file.name
    return file_of
