"""Read a value of a row by a dotted path such as meta.solution or messages[-1].content."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, overload

_STEP = re.compile(r"([^.\[\]]+)|\[(-?\d+)\]")


def find_value(row: Mapping[str, Any], path: str) -> Any:
    """The value at `path`, or None where a step of it is absent or of another kind.

    Args:
        path: Names separated by dots, positions of a list in brackets, from the end if negative.
    """
    value: Any = row
    for name, position in _STEP.findall(path):
        if name:
            if not isinstance(value, Mapping) or name not in value:
                return None
            value = value[name]
        else:
            # Text is a sequence, too; its characters are no columns.
            if not isinstance(value, (list, tuple)):
                return None
            index = int(position)
            if not -len(value) <= index < len(value):
                return None
            value = value[index]
    return value


@overload
def choose_column(
    row: Mapping[str, Any], candidates: Sequence[str], where: str, content: str
) -> str: ...


@overload
def choose_column(
    row: Mapping[str, Any], candidates: Sequence[str], where: str, content: None = None
) -> str | None: ...


def choose_column(
    row: Mapping[str, Any], candidates: Sequence[str], where: str, content: str | None = None
) -> str | None:
    """The first candidate with a value in this row.

    Args:
        where: "file:row", for the message.
        content: What the column holds, for the message; None where the column may be absent.

    Raises:
        ValueError: `content` is given and no candidate has a value.
    """
    for path in candidates:
        if find_value(row, path) is not None:
            return path
    if content is None:
        return None
    names = column_names(row)
    empty = [path for path in candidates if path in names]
    if empty:
        raise ValueError(f"{where}: column {empty[0]}: null; valid: {content}")
    raise ValueError(
        f"{where}: no column for {content}; there are: {', '.join(names) or 'none'}; "
        f"valid: one of {', '.join(candidates)}"
    )


def read_column(row: Mapping[str, Any], path: str, where: str) -> Any:
    """The value at `path`.

    Raises:
        ValueError: this row has none.
    """
    value = find_value(row, path)
    if value is None:
        raise ValueError(
            f"{where}: column {path}: missing or null; there are: "
            f"{', '.join(column_names(row)) or 'none'}"
        )
    return value


def column_names(row: Mapping[str, Any]) -> list[str]:
    """Paths of a row's values, objects and the last element of lists opened."""
    names: list[str] = []
    for name, value in row.items():
        if isinstance(value, (list, tuple)) and value and isinstance(value[-1], Mapping):
            names += [f"{name}[-1].{inner}" for inner in column_names(value[-1])]
        elif isinstance(value, Mapping) and value:
            names += [f"{name}.{inner}" for inner in column_names(value)]
        else:
            names.append(str(name))
    return names
