"""Checks of configuration values, and the one form of their errors."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any


def require(condition: bool, field: str, value: Any, valid: str) -> None:
    """Raise the one form of error that a bad configuration value gets."""
    if not condition:
        raise ValueError(f"{field} = {value!r} is not valid: {valid}")


def require_positive(section: str, config: Any, *names: str) -> None:
    """Raise unless each of these counts or sizes is at least 1."""
    for name in names:
        value = getattr(config, name)
        require(value >= 1, f"{section}.{name}", value, "at least 1")


def require_choice(field: str, value: Any, choices: Collection[str]) -> None:
    """Raise unless `value` is one of `choices`, and list them."""
    valid = "one of " + ", ".join(repr(choice) for choice in choices)
    require(value in choices, field, value, valid)
