"""Where metrics go: a file of JSON lines always, TensorBoard events if wanted."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

MetricValue = float | int | bool | str | None

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


FILE_NAMES = {"iteration": "metrics.jsonl", "update": "updates.jsonl"}


class MetricsWriter:
    """Writes one record per iteration to `metrics.jsonl`, and its numbers to TensorBoard.

    Or, with another key, one per optimizer step to `updates.jsonl`.

    Each record is one line `{"iteration": i, ...}`, on disk when `write` returns, so a crash loses
    nothing that was written. A resumed run appends; a line torn by a crash is cut off first. JSON
    knows no NaN or infinity: they are written as the strings "NaN", "Infinity" and "-Infinity",
    which `read_metrics` turns back.

    Args:
        run_dir: Folder of the run, made if missing.
        tensorboard: Also write events to `run_dir/tensorboard`.
        key: What a record belongs to and is numbered by: `iteration` or `update`.

    Raises:
        ModuleNotFoundError: `tensorboard` is wanted and not installed.
    """

    def __init__(self, run_dir: Path, tensorboard: bool = True, key: str = "iteration") -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self.path = run_dir / FILE_NAMES[key]
        self._key = key
        _cut_torn_line(self.path)
        self._file = self.path.open("ab", buffering=0)
        self._tensorboard = _open_tensorboard(run_dir / "tensorboard") if tensorboard else None

    def write(self, number: int, metrics: Mapping[str, MetricValue]) -> None:
        """Append one record.

        Args:
            number: Of the iteration (or update): first key of the line, TensorBoard's axis.
            metrics: Plain Python values; numpy scalars are taken as their Python value.

        Raises:
            OSError: the disk is full or failed; nothing of the record is in the file.
        """
        record = {self._key: number} | {name: _to_plain(value) for name, value in metrics.items()}
        encoded = {name: _encode(value) for name, value in record.items()}
        self._append((json.dumps(encoded, allow_nan=False) + "\n").encode())
        if self._tensorboard is not None:
            try:
                for name, value in record.items():
                    if name != self._key and isinstance(value, int | float):
                        self._tensorboard.add_scalar(name, value, number)
                self._tensorboard.flush()
            except OSError as error:  # its writer has ended with it
                print(f"TensorBoard's events end here: {error}", flush=True)
                self._tensorboard = None

    def _append(self, line: bytes) -> None:
        descriptor = self._file.fileno()
        size = os.fstat(descriptor).st_size
        try:
            left = line
            while left:
                left = left[os.write(descriptor, left) :]
            os.fsync(descriptor)
        except OSError:
            os.ftruncate(descriptor, size)
            raise

    def close(self) -> None:
        """Close the files; writing afterwards is an error."""
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def read_metrics(path: Path, key: str = "iteration") -> list[dict[str, Any]]:
    """Read the records that a `MetricsWriter` wrote.

    An iteration that was run again after a resume counts once, with its last record, and none
    counts that lies beyond where the run went back to; so the result is one row per iteration in
    order. Likewise with the key `update`. A torn last line is left out.

    Raises:
        ValueError: another line is not a record.
    """
    text = path.read_text(encoding="utf-8")
    by_number: dict[int, dict[str, Any]] = {}
    newest = -1
    for line_number, line in enumerate(text.splitlines(keepends=True), start=1):
        if not line.endswith("\n"):
            break
        try:
            record = json.loads(line)
            number = record[key]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}:{line_number}: not a metrics record (a JSON object with an {key})"
            ) from error
        if number < newest:  # the run went back: what it had made beyond is not its own any more
            by_number = {known: by_number[known] for known in by_number if known < number}
        newest = number
        by_number[number] = {name: _decode(value) for name, value in record.items()}
    return [by_number[number] for number in sorted(by_number)]


def _to_plain(value: Any) -> MetricValue:
    # numpy's and torch's scalars; named by what they offer, since neither is imported here.
    plain: MetricValue = value.item() if hasattr(value, "item") else value
    return plain


def _encode(value: MetricValue) -> MetricValue:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _decode(value: Any) -> Any:
    return _NON_FINITE.get(value, value) if isinstance(value, str) else value


def _cut_torn_line(path: Path) -> None:
    if not path.exists():
        return
    with path.open("rb+") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)


def _open_tensorboard(directory: Path) -> Any:
    # Imported here: torch takes a second, and the command line must answer before that.
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(directory))
