"""Command-line overrides of a RunConfig: `--section.field value`.

Parsed here and not by a library, because an error has to be one line that names the field, what
is wrong and what is nearest. tyro renders `--help` from the same dataclasses.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, get_type_hints

from r2vpo_megatron.config import RunConfig

_BOOLEANS = {"true": True, "false": False}


@dataclass(frozen=True)
class ConfigField:
    """One field that can be overridden."""

    section: str
    name: str
    type: Any  # a type, or a union of two

    @property
    def flag(self) -> str:
        """The option that sets it."""
        return f"--{self.section}.{self.name}".replace("_", "-")


def list_config_fields() -> dict[str, ConfigField]:
    """All fields of RunConfig's sections, by flag."""
    result = {}
    for section, section_type in get_type_hints(RunConfig).items():
        for name, field_type in get_type_hints(section_type).items():
            field = ConfigField(section, name, field_type)
            result[field.flag] = field
    return result


def apply_overrides(config: RunConfig, arguments: Sequence[str]) -> RunConfig:
    """Replace the named fields; a field given twice takes the last value.

    Args:
        config: The recipe's.
        arguments: `--section.field value` or `--section.field=value`, any number of times.

    Raises:
        ValueError: an unknown field, a missing value, or one that the field does not take.
    """
    known = list_config_fields()
    changes: dict[str, dict[str, Any]] = {}
    remaining = list(arguments)
    while remaining:
        flag, has_equals, value = remaining.pop(0).partition("=")
        field = known.get(flag.replace("_", "-"))
        if field is None:
            raise ValueError(_describe_unknown(flag, known))
        if not has_equals:
            if not remaining or remaining[0].startswith("--"):
                raise ValueError(f"{field.flag} needs a value ({_PARSERS[field.type][1]})")
            value = remaining.pop(0)
        changes.setdefault(field.section, {})[field.name] = _parse(field, value)
    # A section's own checks run once all its fields are in place.
    sections = {
        section: replace(getattr(config, section), **values) for section, values in changes.items()
    }
    return replace(config, **sections)


def print_help(config: RunConfig, program: str, description: str) -> None:
    """Print every field with its meaning, type and default, which is `config`'s value."""
    import tyro

    try:
        tyro.cli(
            # Options that take true or false, as `apply_overrides` reads them.
            tyro.conf.FlagConversionOff[RunConfig],
            default=config,
            prog=program,
            description=description,
            args=["--help"],
        )
    except BrokenPipeError:
        # Piped into `head` or a pager that was left: no fault, and the flush at exit must not fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _number_or_text(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text  # the section's own check says what is wrong with it


def _parse_bool(text: str) -> bool:
    return _BOOLEANS[text.lower()]


# Type of a field -> how to read it, and what to call it.
_PARSERS: dict[Any, tuple[Callable[[str], Any], str]] = {
    bool: (_parse_bool, "true or false"),
    int: (int, "an integer"),
    float: (float, "a number"),
    str: (str, "a string"),
    float | str: (_number_or_text, "a number or a ratio such as 3/2"),
}


def _parse(field: ConfigField, text: str) -> Any:
    parse, expected = _PARSERS[field.type]
    try:
        return parse(text)
    except (ValueError, KeyError):
        raise ValueError(f"{field.flag} {text}: not valid, must be {expected}") from None


def _describe_unknown(flag: str, known: dict[str, ConfigField]) -> str:
    if not flag.startswith("--"):
        return f"unexpected argument {flag!r}; overrides are written --section.field value"
    section, _, name = flag.removeprefix("--").replace("_", "-").partition(".")
    siblings = [other for other in known if other.startswith(f"--{section}.")]
    nearest = (
        # The usual mistakes: a section left out or confused, a typing error in a known section.
        [other for other in known if other.endswith(f".{name or section}")]
        or difflib.get_close_matches(f"--{section}.{name}", siblings, n=1, cutoff=0.75)
        or difflib.get_close_matches(flag.replace("_", "-"), known, n=1, cutoff=0.7)
    )
    if nearest:
        return f"unknown field {flag}; did you mean {' or '.join(nearest)}?"
    if siblings:
        return f"unknown field {flag}; {section} has: {', '.join(siblings)}"
    sections = ", ".join(field.name for field in fields(RunConfig))
    return f"unknown field {flag}; sections are: {sections} (--help lists all fields)"
