"""Strict decoding of JSON into frozen dataclasses: each complaint names the file and the field."""

from __future__ import annotations

import dataclasses
import math
import types
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints


def decode(kind: Any, value: Any, file: str, name: str) -> Any:
    """Make a value of a type from what `json.loads` gave.

    Args:
        kind: A dataclass, int, float, str, bool, None, Any, dict[str | int, X], tuple[X, ...],
            tuple[X, Y] or a union of these.
        file: For the message.
        name: Dotted path of the field, "" for the whole.

    Raises:
        ValueError: the value is of another type; a field is missing or unknown.
    """
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
        return _decode_dataclass(kind, value, file, name)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return _decode_union(kind, arguments, value, file, name)
    if origin is dict:
        return _decode_dict(arguments, value, file, name)
    if origin is tuple:
        return _decode_tuple(kind, arguments, value, file, name)
    return _decode_scalar(kind, value, file, name)


def refuse_constant(text: str) -> NoReturn:
    """For `json.loads(parse_constant=...)`: NaN and infinities are no JSON.

    Raises:
        ValueError: always.
    """
    raise ValueError(f"{text} is not a number that JSON knows")


def _decode_dataclass(kind: Any, value: Any, file: str, name: str) -> Any:
    if not isinstance(value, dict):
        raise _wrong_type(value, file, name, "an object")
    hints = get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    unknown = sorted(set(value) - set(fields))
    if unknown:
        raise ValueError(
            f"{file}: field {_join(name, unknown[0])}: unknown; valid: {', '.join(fields)}"
        )
    decoded = {}
    for field_name, field in fields.items():
        if field_name in value:
            inner = _join(name, field_name)
            decoded[field_name] = decode(hints[field_name], value[field_name], file, inner)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ValueError(f"{file}: field {_join(name, field_name)}: missing")
    return kind(**decoded)


def _decode_union(kind: Any, arguments: tuple[Any, ...], value: Any, file: str, name: str) -> Any:
    if value is None and type(None) in arguments:
        return None
    others = [argument for argument in arguments if argument is not type(None)]
    # Only "X or None" occurs, so that the complaint about X is the right one.
    assert len(others) == 1, kind
    return decode(others[0], value, file, name)


def _decode_dict(arguments: tuple[Any, ...], value: Any, file: str, name: str) -> Any:
    if not isinstance(value, dict):
        raise _wrong_type(value, file, name, "an object")
    key_kind, value_kind = arguments
    decoded = {}
    for key, item in value.items():
        if key_kind is int:
            if not key.isdecimal():
                raise ValueError(f"{file}: field {name}: key {key!r}; valid: a whole number")
            decoded_key: Any = int(key)
        else:
            decoded_key = key
        decoded[decoded_key] = decode(value_kind, item, file, _join(name, key))
    return decoded


def _decode_tuple(kind: Any, arguments: tuple[Any, ...], value: Any, file: str, name: str) -> Any:
    if not isinstance(value, list):
        raise _wrong_type(value, file, name, "a list")
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        arguments = (arguments[0],) * len(value)
    if len(arguments) != len(value):
        raise ValueError(f"{file}: field {name}: {len(value)} items; valid: {len(arguments)}")
    return tuple(
        decode(argument, item, file, f"{name}[{index}]")
        for index, (argument, item) in enumerate(zip(arguments, value, strict=True))
    )


def _decode_scalar(kind: Any, value: Any, file: str, name: str) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    # A bool is an int in Python, but not in a file.
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise _wrong_type(value, file, name, kind.__name__)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{file}: field {name}: {value}; valid: a finite number")
    return value


def _wrong_type(value: Any, file: str, name: str, valid: str) -> ValueError:
    shown = repr(value)[:60]
    return ValueError(
        f"{file}: field {name or '(all)'}: got {shown} ({type(value).__name__}); valid: {valid}"
    )


def _join(name: str, inner: str) -> str:
    return f"{name}.{inner}" if name else inner
