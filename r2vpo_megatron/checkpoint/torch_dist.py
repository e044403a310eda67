"""Megatron-core's torch_dist checkpoints, read and written without a process group.

torch_dist_metadata.py  what .metadata says: which part of which tensor lies where
torch_blob.py           the values of one part of a tensor
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from r2vpo_megatron.checkpoint.closing import Closing
from r2vpo_megatron.checkpoint.torch_blob import (
    TensorBlob,
    encode_extra_state,
    encode_object,
    encode_tensor,
    locate_tensor,
    tensor_buffers,
)
from r2vpo_megatron.checkpoint.torch_dist_metadata import (
    METADATA_FILE,
    StoredChunk,
    StoredTensor,
    check_cover,
    encode_metadata,
    read_metadata,
)

__all__ = [
    "StoredChunk",
    "StoredTensor",
    "TorchDistReader",
    "encode_extra_state",
    "encode_tensor",
    "is_torch_dist",
    "tensor_buffers",
    "write_metadata",
]

_CONFIG_FILE = "metadata.json"
_COMMON_FILE = "common.pt"
_CONFIG = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
_COMMON = {"checkpoint_version": 3.0, "iteration": 0}  # what Megatron-LM looks for first


class TorchDistReader(Closing):
    """Tensors of a torch_dist folder by key, whole or in boxes.

    Of a blob only the rows that are asked for are read. Reads may come from several threads.
    """

    def __init__(self, folder: str | Path, *, trust_pickle: bool = False) -> None:
        """Read .metadata; the tensors' files are opened for each read alone.

        Args:
            folder: holds .metadata.
            trust_pickle: let `common` run what code common.pt may hold.

        Raises:
            ValueError: no torch_dist checkpoint, or .metadata is broken or names files outside.
        """
        self.folder = Path(folder)
        self._trust_pickle = trust_pickle
        self._checked: set[str] = set()
        self._blobs: dict[StoredChunk, TensorBlob] = {}
        _check_format(self.folder)
        self.tensors = read_metadata(self.folder)

    def close(self) -> None:
        """Forget where values lie; no file is open."""
        self._blobs.clear()

    def check(self, key: str) -> None:
        """Check that the chunks of a tensor cover it, once, and lie within their files.

        Raises:
            ValueError: they do not, or a file is missing.
        """
        if key in self._checked:
            return
        tensor = self.tensors[key]
        try:
            check_cover(tensor)
        except ValueError as error:
            raise ValueError(f"{self.folder / METADATA_FILE}: {error}") from error
        ends: dict[str, int] = {}
        for chunk in tensor.chunks:
            ends[chunk.file] = max(ends.get(chunk.file, 0), chunk.position + chunk.length)
        for file, end in ends.items():
            path = self.folder / file
            if not path.is_file():
                raise ValueError(f"{path}: is missing; it holds a part of tensor {key!r}")
            size = path.stat().st_size
            if end > size:
                raise ValueError(
                    f"{path}: has {size:,} bytes, but tensor {key!r} ends at byte {end:,}; "
                    "the file is cut short"
                )
        self._checked.add(key)

    def read(
        self, key: str, ranges: Sequence[tuple[int, int]], out: Tensor | None = None
    ) -> Tensor:
        """A box of a tensor, on the CPU.

        Args:
            key: in `tensors`.
            ranges: (start, stop) for each dimension of the whole tensor.
            out: filled and returned if given; of the box's shape and the tensor's dtype.

        Returns:
            The box; contiguous, unless `out` is not.

        Raises:
            ValueError: the tensor has no such box, or what it is stored in is broken.
        """
        tensor = self.tensors[key]
        if len(ranges) != len(tensor.shape) or not all(
            0 <= start <= stop <= size
            for (start, stop), size in zip(ranges, tensor.shape, strict=True)
        ):
            raise ValueError(f"tensor {key!r} {list(tensor.shape)}: has no slice {list(ranges)}")
        self.check(key)
        if out is None:
            out = torch.empty([stop - start for start, stop in ranges], dtype=tensor.dtype)
        assert out.dtype == tensor.dtype
        for chunk in tensor.chunks:
            # What the box and the chunk share: in the tensor, in the chunk, in the box.
            shared = [
                (max(start, offset), min(stop, offset + size))
                for (start, stop), offset, size in zip(
                    ranges, chunk.offsets, chunk.sizes, strict=True
                )
            ]
            if any(start >= stop for start, stop in shared):
                continue
            taken = [(a - o, b - o) for (a, b), o in zip(shared, chunk.offsets, strict=True)]
            filled = [slice(a - r[0], b - r[0]) for (a, b), r in zip(shared, ranges, strict=True)]
            self._read_chunk(tensor, chunk, taken, out[tuple(filled)])
        return out

    def _read_chunk(
        self, tensor: StoredTensor, chunk: StoredChunk, ranges: list[tuple[int, int]], out: Tensor
    ) -> None:
        path = self.folder / chunk.file
        descriptor = os.open(path, os.O_RDONLY)
        try:
            blob = self._blobs.get(chunk)
            if blob is None:
                blob = locate_tensor(descriptor, chunk.position, chunk.length)
                if blob.dtype != tensor.dtype or blob.shape != chunk.sizes:
                    raise ValueError(
                        f"is {blob.dtype} {list(blob.shape)}, not {tensor.dtype} "
                        f"{list(chunk.sizes)} as {METADATA_FILE} says"
                    )
                self._blobs[chunk] = blob
            blob.read_into(descriptor, ranges, out)
        except ValueError as error:
            raise ValueError(
                f"{path}: the part of tensor {tensor.key!r} at byte {chunk.position:,} {error}"
            ) from error
        finally:
            os.close(descriptor)

    def common(self) -> dict[str, Any]:
        """What common.pt holds; no code runs unless the reader was told to trust it.

        Raises:
            ValueError: there is none, it is broken, or it needs code to be run.
        """
        path = self.folder / _COMMON_FILE
        if not path.is_file():
            raise ValueError(f"{path}: is missing")
        try:
            state = torch.load(path, map_location="cpu", weights_only=not self._trust_pickle)
        except Exception as error:  # changed bytes make the unpickler raise errors of any kind
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(
                f"{path}: cannot be read as plain values ({reason}); trusted as "
                "a pickle it can be, and may run any code"
            ) from error
        if not isinstance(state, dict):
            raise ValueError(f"{path}: must hold a dictionary")
        return state


def is_torch_dist(folder: str | Path) -> bool:
    """Whether a folder is a torch_dist checkpoint, whole or broken.

    It is with .metadata, a *.distcp, or a metadata.json that names a sharded_backend: other
    programs have files of that name, too.
    """
    folder = Path(folder)
    if (folder / METADATA_FILE).is_file() or any(folder.glob("*.distcp")):
        return True
    try:
        config = json.loads((folder / _CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and "sharded_backend" in config


def write_metadata(
    folder: str | Path,
    tensors: Iterable[StoredTensor],
    objects: Iterable[tuple[str, str, int, int]],
) -> None:
    """Write all files of a checkpoint but those with the blobs; .metadata last.

    Args:
        folder: holds the files that the chunks name.
        tensors: all tensors in those files,
        objects: and (key, file, position, length) of each byte object.

    Raises:
        ValueError: the chunks of a tensor do not cover it, once.
    """
    metadata = encode_metadata(tensors, objects)
    (Path(folder) / _CONFIG_FILE).write_text(json.dumps(_CONFIG), encoding="utf-8")
    (Path(folder) / _COMMON_FILE).write_bytes(encode_object(_COMMON))
    (Path(folder) / METADATA_FILE).write_bytes(metadata)


def _check_format(folder: Path) -> None:
    if not folder.is_dir():
        raise ValueError(f"checkpoint {folder}: does not exist or is not a folder")
    if not (folder / METADATA_FILE).is_file():
        raise ValueError(
            f"checkpoint {folder}: has no {METADATA_FILE}; it is not a whole torch_dist checkpoint"
        )
    config = folder / _CONFIG_FILE
    if not config.is_file():
        return
    try:
        backend = json.loads(config.read_text(encoding="utf-8")).get("sharded_backend")
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{config}: is not a JSON object ({error})") from error
    if backend != _CONFIG["sharded_backend"]:
        raise ValueError(f"{config}: sharded_backend = {backend!r}: must be 'torch_dist'")
