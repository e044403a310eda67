"""Nested state in files that nothing executes: JSON, and safetensors beside it.

NAME.json has the state, with each numpy array replaced by its number; NAME.safetensors has the
arrays by that number. JSON knows no infinity and no "not a number": such floats are its bits.
"""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

_ARRAY, _FLOAT = "__array__", "__float__"  # keys of the objects that stand for such values
_MARKS = ({_ARRAY}, {_FLOAT})
_MOST_BYTES = 8  # of an array's element: what numpy calls longdouble differs between machines


def save_state(folder: Path, name: str, state: dict[str, Any]) -> None:
    """Write `folder/name.json` and `folder/name.safetensors`.

    Args:
        folder: exists.
        name: of the files.
        state: nested dicts with strings as keys, lists, and at the leaves None, booleans,
            integers of any size, floats, strings and numpy arrays of booleans, integers and
            floats of 16 to 64 bits, in this machine's order of bytes.

    Raises:
        TypeError: something else is in it; the message has its path.
        OSError: the disk is full or failed.
    """
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    text = json.dumps(_encode(state, name, arrays), allow_nan=False)
    (folder / f"{name}.json").write_text(text, encoding="utf-8")
    path = folder / f"{name}.safetensors"
    try:
        save_file(arrays, path)
    except SafetensorError as error:  # all that its writer says of a full disk
        raise OSError(f"{path}: {error}") from error


def load_state(folder: Path, name: str) -> dict[str, Any]:
    """Read what `save_state` wrote.

    Raises:
        ValueError: they are damaged, or do not belong together.
        OSError: one cannot be read.
    """
    try:
        arrays = load_file(folder / f"{name}.safetensors")
    except SafetensorError as error:
        raise ValueError(f"{folder / name}.safetensors: {error}") from error
    encoded = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    try:
        state = _decode(encoded, arrays)
    except KeyError as error:
        raise ValueError(f"{folder / name}.safetensors: array {error} is missing") from error
    if not isinstance(state, dict):
        raise ValueError(f"{folder / name}.json: holds no state")
    return state


def _encode(value: Any, path: str, arrays: dict[str, np.ndarray[Any, Any]]) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {_FLOAT: struct.pack(">d", value).hex()}
    if isinstance(value, list):
        return [_encode(item, f"{path}[{i}]", arrays) for i, item in enumerate(value)]
    if isinstance(value, dict) and value.keys() not in _MARKS:
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"{path}: the key {key!r} is no string")
        return {key: _encode(item, f"{path}.{key}", arrays) for key, item in value.items()}
    if isinstance(value, np.ndarray) and _is_storable(value.dtype):
        number = str(len(arrays))
        arrays[number] = np.ascontiguousarray(value)
        # safetensors' writer flattens no dimensions, but numpy makes a scalar's array one of them.
        return {_ARRAY: [number, list(value.shape)]}
    raise TypeError(f"{path}: {type(value).__name__} {value!r:.60} cannot be stored")


def _is_storable(dtype: np.dtype[Any]) -> bool:
    return dtype.kind in "biuf" and dtype.isnative and dtype.itemsize <= _MOST_BYTES


def _decode(value: Any, arrays: dict[str, np.ndarray[Any, Any]]) -> Any:
    if isinstance(value, list):
        return [_decode(item, arrays) for item in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {_FLOAT}:
        return struct.unpack(">d", bytes.fromhex(value[_FLOAT]))[0]
    if value.keys() == {_ARRAY}:
        number, shape = value[_ARRAY]
        return arrays[number].reshape(shape)
    return {key: _decode(item, arrays) for key, item in value.items()}
