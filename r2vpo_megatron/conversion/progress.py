"""How far a conversion is: a bar on a terminal, one line at the end anywhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


class ConversionProgress:
    """Bytes done, bytes a second and time left; a context manager.

    Args:
        stream: where to write, standard error by default.
        clock: monotonic, in seconds.
    """

    def __init__(
        self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._clock = clock
        self._bars: Progress | None = None
        if self._stream.isatty():
            self._bars = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                DownloadColumn(),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
                console=Console(file=self._stream, highlight=False),
            )

    def __enter__(self) -> Self:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def stage(self, name: str, num_bytes: int) -> Callable[[int], None]:
        """Begin a part of the work.

        Args:
            name: shown before the bar.
            num_bytes: of the whole part.

        Returns:
            To be called, from any thread, with the bytes that were just done.
        """
        if self._bars is None:
            return lambda done: None
        bars = self._bars
        task = bars.add_task(name, total=num_bytes)
        return lambda done: bars.advance(task, done)

    def message(self, text: str) -> None:
        """A line of its own on a terminal; nothing anywhere else."""
        if self._bars is not None:
            self._bars.console.print(text, markup=False)

    def done(self, what: str, num_bytes: int, seconds: float) -> None:
        """Say what was written, where, and how fast.

        Args:
            what: "wrote FOLDER: 12 files".
            num_bytes: that this run wrote.
            seconds: that writing took.
        """
        rate = num_bytes / max(seconds, 1e-9) / 1e9
        line = f"{what}, {human_bytes(num_bytes)} in {seconds:.1f} s, {rate:.2f} GB/s"
        if self._bars is None:
            print(line, file=self._stream, flush=True)
        else:
            self._bars.console.print(line, markup=False)

    def now(self) -> float:
        """The clock's seconds."""
        return self._clock()


def human_bytes(num_bytes: float) -> str:
    """1.5 GB and the like, in powers of 1000."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if num_bytes < 1000 or unit == "GB":
            break
        num_bytes /= 1000
    return f"{num_bytes:.0f} {unit}" if unit == "bytes" else f"{num_bytes:.2f} {unit}"
