"""What the paper reports, to set beside our own numbers, and how to read a transcription of it.

Only what was read in a source stands here. No cell of the paper's Table 1 was available when
this was written, so `rows` is empty: docs/paper_results.md tells what is known.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from r2vpo_megatron.evaluation.benchmarks import BENCHMARKS


@dataclass(frozen=True)
class ReportedRow:
    """One method's row in somebody's table; percent, by benchmark name."""

    model: str
    method: str
    percents: Mapping[str, float]
    average: float | None


@dataclass(frozen=True)
class ReportedTable:
    """Somebody's table: where it stands, its rows, and what is said about it in words."""

    source: str
    rows: tuple[ReportedRow, ...]
    remarks: tuple[str, ...]


REPORTED: dict[str, ReportedTable] = {
    "paper": ReportedTable(
        source="arXiv 2601.03320v1, Table 1",
        rows=(),
        remarks=(
            "The cells of the paper's Table 1 are not part of this project: they could not be "
            "read in any source at hand. Copy them from the paper into a CSV file and give "
            "--reference FILE.csv.",
            "Abstract of arXiv 2601.03320v1: average relative gains of up to 17% over strong "
            "clipping-based baselines, with about 50% fewer rollouts to convergence; models "
            "DeepSeek-Distill-Qwen-1.5B, openPangu-Embedded-1B and -7B.",
            "Abstract of arXiv 2605.26784v1, the later version: 7 model scales, fast and slow "
            "thinking; the gains are largest on the smaller models. It gives no figure.",
        ),
    )
}


def load_reported(name: str) -> ReportedTable:
    """An entry of `REPORTED`, or a CSV file with columns model, method, benchmarks, average.

    Raises:
        ValueError: neither of them, or the file has a fault; names file, row and column.
    """
    if name in REPORTED:
        return REPORTED[name]
    path = Path(name)
    if path.suffix != ".csv" or not path.is_file():
        raise ValueError(
            f"reference {name!r}: no such table; valid: {', '.join(REPORTED)}, or a .csv file "
            f"with columns model, method, benchmarks ({', '.join(BENCHMARKS)}), average"
        )
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = list(csv.reader(file, strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: not a CSV file in UTF-8: {error}") from error
    header = [column.strip() for column in lines[0]] if lines else []
    _check_header(path, header)
    rows = tuple(
        _read_row(f"{path}:{number}", header, line)
        for number, line in enumerate(lines[1:], start=2)
        if any(cell.strip() for cell in line)
    )
    if not rows:
        raise ValueError(f"{path}: no rows; valid: at least one below the header")
    return ReportedTable(source=str(path), rows=rows, remarks=())


def _check_header(path: Path, header: Sequence[str]) -> None:
    for column in ("model", "method"):
        if column not in header:
            raise ValueError(
                f"{path}: column {column}: missing; there are: {', '.join(header) or 'none'}"
            )
    valid = ("model", "method", "average", *BENCHMARKS)
    for column in header:
        if column not in valid:
            raise ValueError(f"{path}: column {column!r}: unknown; valid: {', '.join(valid)}")
        if header.count(column) > 1:
            raise ValueError(f"{path}: column {column}: there twice; valid: once")


def _read_row(where: str, header: Sequence[str], line: Sequence[str]) -> ReportedRow:
    if len(line) != len(header):
        raise ValueError(f"{where}: {len(line)} values; valid: one a column, {len(header)}")
    cells = {column: cell.strip() for column, cell in zip(header, line, strict=True)}
    for column in ("model", "method"):
        if not cells[column]:
            raise ValueError(f"{where}: column {column}: empty; valid: a name")
    percents = {
        column: _read_percent(cell, f"{where}: column {column}")
        for column, cell in cells.items()
        if column not in ("model", "method") and cell
    }
    average = percents.pop("average", None)
    return ReportedRow(cells["model"], cells["method"], percents, average)


def _read_percent(text: str, where: str) -> float:
    try:
        value = float(text.strip().removesuffix("%"))
    except ValueError as error:
        raise ValueError(f"{where}: {text!r}; valid: percent, such as 48.2") from error
    if not (math.isfinite(value) and 0.0 <= value <= 100.0):
        raise ValueError(f"{where}: {text!r}; valid: 0 to 100")
    return value
