"""Read slices of, and write, Hugging Face checkpoint folders; safetensors only, no pickle."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from r2vpo_megatron.checkpoint.closing import Closing
from r2vpo_megatron.checkpoint.companions import copy_companions, state_dtype
from r2vpo_megatron.checkpoint.durable import synchronize, synchronize_one
from r2vpo_megatron.checkpoint.safetensors_header import (
    INDEX_FILE,
    SINGLE_FILE,
    TensorEntry,
    read_header,
    read_index,
)
from r2vpo_megatron.checkpoint.safetensors_stream import (
    SafetensorsFile,
    index_json,
    make_file,
    shard_names,
    tensor_bytes,
)
from r2vpo_megatron.checkpoint.tensor_check import abbreviated
from r2vpo_megatron.models.architecture import HfNames

_BLOCK_BYTES = 8 * 1024**2  # of whole rows, read at a time where columns are wanted


@dataclass(frozen=True)
class _OpenFile:
    descriptor: int
    header: bytes
    entries: tuple[TensorEntry, ...]


@dataclass(frozen=True)
class _StoredTensor:
    entry: TensorEntry
    file: str
    position: int  # of its first byte in the file


class CheckpointReader(Closing):
    """Tensors of a checkpoint folder by name, whole or in slices.

    Byte ranges are read, not mapped: resident memory is the slice that was asked for, and a file
    that shrinks meanwhile is an error rather than a signal. Reads may come from several threads.
    """

    def __init__(self, model_dir: str | Path) -> None:
        """Find every tensor and check headers and index; one descriptor a file stays open.

        Raises:
            ValueError: no safetensors file; an index or header that is broken, does not fit the
                file or leaves the folder; a tensor in two files or not in the index; a single
                file beside an index of others. Names the file and the fault.
        """
        self.folder = Path(model_dir)
        self._files: dict[str, _OpenFile] = {}
        self._tensors: dict[str, _StoredTensor] = {}
        self.index_metadata: dict[str, Any] = {}
        try:
            index = self.folder / INDEX_FILE
            if index.is_file():
                weight_map, self.index_metadata = read_index(index)
                if SINGLE_FILE not in weight_map.values() and (self.folder / SINGLE_FILE).is_file():
                    raise ValueError(
                        f"{index}: does not name {SINGLE_FILE} beside it, which other loaders "
                        "take instead; remove the one that is not the model"
                    )
                self._open_all(sorted(set(weight_map.values())))
                self._check_index(index, weight_map)
            elif (self.folder / SINGLE_FILE).is_file():
                self._open_all([SINGLE_FILE])
            else:
                raise ValueError(
                    f"model folder {self.folder}: has neither {SINGLE_FILE} nor {INDEX_FILE}; "
                    "only safetensors checkpoints are read"
                )
        except BaseException:
            self.close()
            raise

    def _open_all(self, files: Iterable[str]) -> None:
        for file in files:
            path = self.folder / file
            descriptor = os.open(path, os.O_RDONLY)
            try:
                header, entries = read_header(path, descriptor)
            except BaseException:
                os.close(descriptor)
                raise
            self._files[file] = _OpenFile(descriptor, header, entries)
            position = len(header)
            for entry in entries:
                if entry.name in self._tensors:
                    other = self._tensors[entry.name].file
                    raise ValueError(f"{path}: tensor {entry.name!r} is in {other} as well")
                self._tensors[entry.name] = _StoredTensor(entry, file, position)
                position += entry.nbytes

    def _check_index(self, index: Path, weight_map: Mapping[str, str]) -> None:
        for name, file in weight_map.items():
            if name not in self._tensors:
                raise ValueError(f"{index}: names tensor {name!r}, which {file} lacks")
            if self._tensors[name].file != file:
                raise ValueError(
                    f"{index}: says that tensor {name!r} is in {file}; "
                    f"it is in {self._tensors[name].file}"
                )
        for file, opened in self._files.items():
            unnamed = [entry.name for entry in opened.entries if entry.name not in weight_map]
            if unnamed:
                raise ValueError(f"{index}: does not name all of {file}: {abbreviated(unnamed)}")

    def close(self) -> None:
        """Close the files; nothing can be asked any more."""
        self._tensors.clear()
        while self._files:
            os.close(self._files.popitem()[1].descriptor)

    def names(self) -> list[str]:
        """All tensor names, by file and in the file's order."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return self._tensors[name].entry.shape

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor, without reading it."""
        return self._tensors[name].entry.dtype

    def nbytes(self, name: str) -> int:
        """Bytes of a tensor's values."""
        return self._tensors[name].entry.nbytes

    def file_of(self, name: str) -> str:
        """Name of the file that holds a tensor."""
        return self._tensors[name].file

    def files(self) -> list[str]:
        """Names of the safetensors files, sorted."""
        return list(self._files)

    def entries(self, file: str) -> tuple[TensorEntry, ...]:
        """Tensors of a file, in the order of their bytes."""
        return self._files[file].entries

    def header_bytes(self, file: str) -> bytes:
        """What stands before the values: length (8 bytes), JSON and padding, verbatim."""
        return self._files[file].header

    def tensor(self, name: str) -> Tensor:
        """A whole tensor, on the CPU."""
        stored = self._tensors[name]
        values = self._read(stored, 0, stored.entry.nbytes)
        return values.view(stored.entry.dtype).reshape(stored.entry.shape)

    def read_slice(self, name: str, dimension: int, start: int, stop: int) -> Tensor:
        """tensor[start:stop] along dimension 0 or 1, on the CPU, contiguous.

        Raises:
            ValueError: the tensor has no such slice.
        """
        stored = self._tensors[name]
        shape, dtype = stored.entry.shape, stored.entry.dtype
        if dimension not in (0, 1) or dimension >= len(shape):
            raise ValueError(f"tensor {name!r} {list(shape)}: cannot be cut along {dimension}")
        if not 0 <= start <= stop <= shape[dimension]:
            raise ValueError(
                f"tensor {name!r} {list(shape)}: has no slice {start}:{stop} along {dimension}"
            )
        row_bytes = math.prod(shape[1:]) * dtype.itemsize
        if dimension == 0:
            values = self._read(stored, start * row_bytes, stop * row_bytes)
            return values.view(dtype).reshape(stop - start, *shape[1:])
        part = torch.empty(shape[0], stop - start, *shape[2:], dtype=dtype)
        if part.numel() == 0:
            return part
        num_rows = min(shape[0], max(1, _BLOCK_BYTES // row_bytes))
        block = torch.empty(num_rows * row_bytes, dtype=torch.uint8)
        for row in range(0, shape[0], num_rows):
            end = min(row + num_rows, shape[0])
            read = block[: (end - row) * row_bytes]
            self._read_into(read, stored, row * row_bytes)
            part[row:end] = read.view(dtype).reshape(end - row, *shape[1:])[:, start:stop]
        return part

    def _read(self, stored: _StoredTensor, start: int, stop: int) -> Tensor:
        """Bytes [start, stop) of a tensor's values, uint8."""
        values = torch.empty(stop - start, dtype=torch.uint8)
        self._read_into(values, stored, start)
        return values

    def _read_into(self, values: Tensor, stored: _StoredTensor, start: int) -> None:
        """Fill `values`, uint8, with a tensor's bytes from `start` on."""
        view = values.numpy().data
        descriptor, position = self._files[stored.file].descriptor, stored.position + start
        done = 0
        while done < len(view):
            count = os.preadv(descriptor, [view[done:]], position + done)
            if count == 0:
                raise ValueError(
                    f"{self.folder / stored.file}: ends within tensor {stored.entry.name!r}; "
                    "it was cut short after it was opened"
                )
            done += count


def save_hf_checkpoint(
    tensors: Iterable[tuple[str, Tensor | None]],
    output_dir: str | Path,
    reference_dir: str | Path,
    max_shard_bytes: int = 5 * 1024**3,
    ignored_suffixes: tuple[str, ...] = HfNames.ignored_suffixes,
) -> None:
    """Write a Hugging Face checkpoint folder; it appears whole or not at all.

    It is on the disk before it has its name. Config, tokenizer, chat template and what else
    copy_companions takes are the reference's, unchanged, except that config.json states the dtype
    of `tensors` if their floating-point ones share one. Tensors of the reference with an ignored
    suffix, which the stream lacks since they are not learned, are copied, so that the folder has
    exactly the reference's tensors.

    Args:
        tensors: (name, tensor) pairs; one shard of them is held in memory at a time.
        output_dir: must not exist or be empty.
        reference_dir: the checkpoint from which training started.
        max_shard_bytes: a file ends before it would exceed this (one tensor may).
        ignored_suffixes: see above.

    Raises:
        ValueError: output_dir is in use, reference_dir has no config.json, or a tensor is None.
    """
    output, reference = Path(output_dir), Path(reference_dir)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"output folder {output}: exists and is not empty; name a new one")
    if not (reference / "config.json").is_file():
        raise ValueError(f"reference folder {reference}: has no config.json")
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{output.name}.partial-", dir=output.parent))
    try:
        dtypes: set[torch.dtype] = set()
        stream = _with_ignored(_noting_dtypes(tensors, dtypes), reference, ignored_suffixes)
        _write_shards(stream, temporary, max_shard_bytes)
        copy_companions(reference, temporary)
        if len(dtypes) == 1:
            state_dtype(temporary / "config.json", str(dtypes.pop()).removeprefix("torch."))
        temporary.chmod(0o777 & ~_umask())  # mkdtemp makes it private
        synchronize(temporary)
        if output.exists():
            output.rmdir()
        os.replace(temporary, output)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    synchronize_one(output.absolute().parent)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def _noting_dtypes(
    tensors: Iterable[tuple[str, Tensor | None]], dtypes: set[torch.dtype]
) -> Iterator[tuple[str, Tensor | None]]:
    """Pass the stream on and add the dtypes of its floating-point tensors to `dtypes`."""
    for name, tensor in tensors:
        if tensor is not None and tensor.is_floating_point():
            dtypes.add(tensor.dtype)
        yield name, tensor


def _with_ignored(
    tensors: Iterable[tuple[str, Tensor | None]], reference: Path, suffixes: tuple[str, ...]
) -> Iterator[tuple[str, Tensor | None]]:
    written = set()
    for name, tensor in tensors:
        written.add(name)
        yield name, tensor
    if not ((reference / SINGLE_FILE).is_file() or (reference / INDEX_FILE).is_file()):
        return
    with CheckpointReader(reference) as reader:
        for name in reader.names():
            if name.endswith(suffixes) and name not in written:
                yield name, reader.tensor(name)


def _write_shards(
    tensors: Iterable[tuple[str, Tensor | None]], folder: Path, max_shard_bytes: int
) -> None:
    files: list[SafetensorsFile] = []
    pending: list[tuple[TensorEntry, Tensor]] = []
    pending_bytes = 0

    def flush() -> None:
        file = make_file(f"{len(files)}.part", [entry for entry, _ in pending])
        with open(folder / file.name, "wb") as stream:
            stream.write(file.header)
            for _, values in pending:
                stream.write(tensor_bytes(values))
        files.append(file)
        pending.clear()

    for name, tensor in tensors:
        if tensor is None:
            raise ValueError(f"tensor {name} is None: only the writing rank may save a checkpoint")
        entry = TensorEntry(name, tensor.dtype, tuple(tensor.shape))
        if pending and pending_bytes + entry.nbytes > max_shard_bytes:
            flush()
            pending_bytes = 0
        pending.append((entry, _owned_on_cpu(tensor)))
        pending_bytes += entry.nbytes
    flush()
    _name_shards(folder, files)


def _owned_on_cpu(tensor: Tensor) -> Tensor:
    """A CPU tensor with storage of its own size, detached from the model.

    A view would keep alive storage that other tensors share; and the parameters may change
    before the shard is written.
    """
    detached = tensor.detach()
    return detached.cpu() if detached.device.type != "cpu" else detached.clone()


def _name_shards(folder: Path, parts: list[SafetensorsFile]) -> None:
    names = shard_names(len(parts))
    files = [replace(part, name=name) for part, name in zip(parts, names, strict=True)]
    for part, file in zip(parts, files, strict=True):
        os.replace(folder / part.name, folder / file.name)
    index = index_json(files)
    if index is not None:
        (folder / INDEX_FILE).write_text(index, encoding="utf-8")
