"""Fields of a row that a user's file gave: checked, and named in every complaint."""

from __future__ import annotations

import re
from typing import Any

_SHOWN_CHARACTERS = 60
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
# Beyond it a float no longer tells an integer from its neighbours.
_MAX_FLOAT_INTEGER = 2**53


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
        ValueError: The row has no such field, and names those that it has; or what should hold it
            is no object.
    """
    if name in row:
        return row[name]
    value: Any = row
    path: list[str] = []
    for part in name.split("."):
        if not isinstance(value, dict):
            raise field_error(where, ".".join(path), value, f"an object with {part}")
        if part not in value:
            have = ", ".join([".".join([*path, str(key)]) for key in value]) or "none"
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


def check_encodable(text: str, where: str, name: str) -> None:
    """Check that UTF-8 can hold a text: JSON can spell half a character, which no tokenizer takes.

    Raises:
        ValueError: It cannot.
    """
    if not text.isprintable() and _LONE_SURROGATE.search(text):
        raise field_error(where, name, text, "text that UTF-8 can hold")


def answer_text(value: Any) -> str | None:
    """Return a gold answer as text, or None where it is not one.

    Strings are kept as they are, but for blanks around them. An integer may come as a float
    (27.0), as a JSON or parquet column of numbers has it. A float with a fraction, or of more than
    2^53, is refused: which digits were meant is lost.
    """
    if isinstance(value, bool):
        return None
    if isinstance(value, float):
        # Not a number compares as false.
        is_exact = abs(value) <= _MAX_FLOAT_INTEGER and value.is_integer()
        return str(int(value)) if is_exact else None
    if isinstance(value, int):
        return str(value)
    if isinstance(value, str) and value.strip():
        return value.strip()
    return None


ANSWER_VALUES = "a non-empty string or an integer (27.0 counts as 27)"
