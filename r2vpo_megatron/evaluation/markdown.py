"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Sequence


def escape_markdown(text: str) -> str:
    """Text that stays one cell of a table and is shown as it is."""
    text = " ".join(text.split())
    for sign in ("\\", "|", "*", "_", "`", "<", "[", "]"):
        text = text.replace(sign, f"\\{sign}")
    return text


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
