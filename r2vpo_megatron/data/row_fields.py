"""Fields of a row that a user's file gave: checked, and named in every complaint."""

from __future__ import annotations

import math
from typing import Any

_SHOWN_CHARACTERS = 60


def describe(value: Any) -> str:
    """Say what a value is, in at most a line."""
    if value is None:
        return "nothing"
    text = repr(value)
    if len(text) > _SHOWN_CHARACTERS:
        text = text[: _SHOWN_CHARACTERS - 3] + "..."
    return f"{text} ({type(value).__name__})"


def field_error(where: str, name: str, value: Any, valid: str) -> ValueError:
    """Return the error of one field.

    Args:
        where: The file and row, `file:row`.
        name: Of the field, dotted where it lies inside another.
        value: What it holds.
        valid: What it may hold.
    """
    return ValueError(f"{where}: field {name}: got {describe(value)}; valid: {valid}")


def get_field(row: dict[str, Any], name: str, where: str) -> Any:
    """Return a field, which may lie inside others (`reward_model.ground_truth`).

    A field whose own name has dots is found as well.

    Args:
        row: One row.
        name: Of the field.
        where: The file and row, for messages.

    Raises:
        ValueError: The row has no such field; names those that it has.
    """
    if name in row:
        return row[name]
    value: Any = row
    path: list[str] = []
    for part in name.split("."):
        if not isinstance(value, dict) or part not in value:
            inside = value if isinstance(value, dict) else {}
            have = ", ".join([".".join([*path, str(key)]) for key in inside]) or "none"
            raise ValueError(f"{where}: field {name}: missing; the row has: {have}")
        value = value[part]
        path.append(part)
    return value


def get_text(row: dict[str, Any], name: str, where: str) -> str:
    """Return a field that must hold text.

    Raises:
        ValueError: It is missing, blank or no string.
    """
    value = get_field(row, name, where)
    if not isinstance(value, str) or not value.strip():
        raise field_error(where, name, value, "a non-empty string")
    return value


def answer_text(value: Any) -> str | None:
    """Return a gold answer as text, or None where it is not one.

    Strings are kept as they are, but for blanks around them. An integer may come as a float
    (27.0), as a JSON or parquet column of numbers has it. A float with a fraction is refused:
    which decimals were meant is lost.
    """
    if isinstance(value, bool):
        return None
    if isinstance(value, float):
        return str(int(value)) if math.isfinite(value) and value.is_integer() else None
    if isinstance(value, int):
        return str(value)
    if isinstance(value, str) and value.strip():
        return value.strip()
    return None


ANSWER_VALUES = "a non-empty string or an integer (27.0 counts as 27)"
