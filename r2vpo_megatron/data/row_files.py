"""Rows of .jsonl and .parquet files, read as a stream, every fault named by file and row."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Small: rows become Python objects a batch at a time, and a prompt may be long.
_ROWS_PER_BATCH = 4096
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def read_rows(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (row number from 1, row) of a `.jsonl` or `.parquet` file.

    The file is checked here, its rows when they are asked for. Blank lines of a .jsonl file are
    skipped and counted. Memory stays bounded by a few thousand rows.

    Args:
        path: The file.

    Raises:
        ValueError: The file is missing, of another type, unreadable or empty, or a row is
            broken; the message starts with "file:" or "file:row:".
    """
    path = Path(path)
    if path.suffix not in _READERS:
        raise ValueError(f"{path}: file type {path.suffix!r}; valid: {', '.join(_READERS)}")
    if path.is_dir():
        raise ValueError(f"{path}: is a folder; valid: a file")
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise _empty(path)
    return _READERS[path.suffix](path)


def _read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    num_rows = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            content = line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line
            if not content.strip():
                continue
            num_rows += 1
            yield number, _parse_line(content, f"{path}:{number}")
    if num_rows == 0:
        raise _empty(path)


def _parse_line(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 (byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{where}: not a JSON object: {error.msg} at column {error.colno}"
        ) from error
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, deep nesting
        raise ValueError(f"{where}: not a JSON object that can be read: {error}") from error
    if not isinstance(row, dict):
        shown = repr(row)[:60]
        raise ValueError(f"{where}: got {shown} ({type(row).__name__}); valid: a JSON object")
    return row


def _read_parquet(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ValueError(
            f"{path}: reading .parquet needs the package pyarrow (pip install "
            "'r2vpo-megatron[data]'); install it or convert the file to .jsonl"
        ) from error
    try:
        file = parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a readable parquet file ({_first_line(error)})") from error
    with file:
        if file.metadata.num_rows == 0:
            raise _empty(path)
        number = 0
        try:
            for batch in file.iter_batches(_ROWS_PER_BATCH):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{path}:{number + 1}: not readable, nor what follows ({_first_line(error)})"
            ) from error


# Suffix -> reader.
_READERS: dict[str, Callable[[Path], Iterator[tuple[int, dict[str, Any]]]]] = {
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}


def _empty(path: Path) -> ValueError:
    return ValueError(f"{path}: empty; valid: at least one row")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]
