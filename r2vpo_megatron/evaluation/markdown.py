"""Tables in Markdown, and how they get on a terminal."""

from __future__ import annotations

import re
from collections.abc import Sequence

# What Markdown reads as a mark. An underscore inside a word is none: math_dapo is left alone.
_MARKS = re.compile(r"[\\|*`<]|\[|\]|(?<![A-Za-z0-9_])_+|_+(?![A-Za-z0-9_])")


def escape_markdown(text: str) -> str:
    """Text that stays one cell of a table and is shown as it is."""
    return _MARKS.sub(
        lambda match: "".join(f"\\{sign}" for sign in match[0]), " ".join(text.split())
    )


def printable(text: str, encoding: str | None) -> str:
    """Text that a terminal of this encoding takes; other characters become escapes."""
    encoding = encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def markdown_table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    bold: frozenset[tuple[int, int]] = frozenset(),
) -> str:
    """A table; all cells are escaped.

    Args:
        bold: (row, column) of cells to print bold, counted from 0, header not counted.
    """
    lines = [[escape_markdown(cell) for cell in header], ["---"] * len(header)]
    for number, row in enumerate(rows):
        cells = [escape_markdown(cell) for cell in row]
        lines.append(
            [
                f"**{cell}**" if (number, column) in bold and cell else cell
                for column, cell in enumerate(cells)
            ]
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
