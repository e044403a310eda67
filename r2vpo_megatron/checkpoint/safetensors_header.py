"""What a safetensors file and an index state, checked before anything is read by it."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
METADATA_KEY = "__metadata__"

# The format's names; what it has beyond these (4 and 6 bits) no model here stores.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

_MAX_JSON_BYTES = 100_000_000  # of a header, as the safetensors library has it; of an index, too
_MAX_ELEMENTS = 2**63 - 1


@dataclass(frozen=True)
class TensorEntry:
    """A tensor of a file, without its values."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(path: Path, descriptor: int) -> tuple[bytes, tuple[TensorEntry, ...]]:
    """Read and check the header of a safetensors file.

    Args:
        path: of the file.
        descriptor: of the same file, open for reading.

    Returns:
        Length (8 bytes), JSON and padding, verbatim; and the tensors in the order of their bytes,
        which follow the header and each other without gaps.

    Raises:
        ValueError: not a whole safetensors file, or a tensor of a dtype or size beyond torch's.
    """
    fault = f"{path}: is not a whole safetensors file"
    size = os.fstat(descriptor).st_size
    length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
    if size < 8 or length > min(size - 8, _MAX_JSON_BYTES):
        raise ValueError(
            f"{fault} (a header of {length} bytes in a file of {size}; at most {_MAX_JSON_BYTES} "
            "are valid)"
        )
    header = os.pread(descriptor, 8 + length, 0)
    fields = _parse_json(header[8:], fault)
    fields.pop(METADATA_KEY, None)
    for name, info in fields.items():
        dtype = info.get("dtype") if isinstance(info, dict) else None
        if str(dtype) not in DTYPES:
            raise ValueError(
                f"{path}: tensor {name!r} has dtype {dtype!r}; valid: {', '.join(DTYPES)}"
            )
    try:
        # Checks types, that shapes fit byte ranges, and that these fill the file without overlap.
        with safe_open(str(path), framework="numpy"):
            pass
    except SafetensorError as error:
        raise ValueError(f"{fault} ({error})") from error
    entries = []
    for name, info in sorted(fields.items(), key=lambda field: field[1]["data_offsets"]):
        shape = tuple(info["shape"])
        if math.prod(max(size, 1) for size in shape) > _MAX_ELEMENTS:
            raise ValueError(f"{path}: tensor {name!r} has shape {list(shape)}, which is too large")
        entries.append(TensorEntry(name, DTYPES[info["dtype"]], shape))
    return header, tuple(entries)


def read_index(index: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """Read and check the index of a checkpoint of several files.

    Returns:
        weight_map, whose files all exist beside the index, and metadata.

    Raises:
        ValueError: not an index, or it names a file that is missing, elsewhere or of another kind.
    """
    fault = f"{index}: is not a safetensors index"
    size = index.stat().st_size
    if size > _MAX_JSON_BYTES:
        raise ValueError(f"{fault} ({size} bytes; at most {_MAX_JSON_BYTES} are valid)")
    fields = _parse_json(index.read_bytes(), fault)
    weight_map, metadata = fields.get("weight_map"), fields.get("metadata", {})
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{fault} (weight_map must map tensor names to file names)")
    if not isinstance(metadata, dict):
        raise ValueError(f"{fault} (metadata must be an object)")
    for name, file in weight_map.items():
        if not _is_plain_name(file):
            raise ValueError(
                f"{index}: says that tensor {name!r} is in {file!r}; must be the name of a "
                ".safetensors file in the same folder"
            )
    files = sorted(set(weight_map.values()))
    missing = [file for file in files if not os.path.isfile(index.parent / file)]
    if missing:
        raise ValueError(f"{index}: names files that are missing: {', '.join(missing)}")
    return weight_map, metadata


def _is_plain_name(file: Any) -> bool:
    return (
        isinstance(file, str)
        and file.endswith(".safetensors")
        and not any(character in file for character in "/\\\0")
    )


def _parse_json(text: bytes, fault: str) -> dict[str, Any]:
    """Parse a JSON object; a key that occurs twice is an error."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        for key, value in pairs:
            if key in fields:
                raise ValueError(f"{key!r} occurs twice")
            fields[key] = value
        return fields

    try:
        fields = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:  # of encoding, syntax, long numbers, depth
        raise ValueError(f"{fault} ({error})") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{fault} (must hold a JSON object)")
    return fields
