"""Bring what was written to the disk, so that it is still there after a loss of power."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from io import FileIO
from pathlib import Path


def synchronize(folder: str | Path, is_given_up: Callable[[], bool] = lambda: False) -> None:
    """Bring a folder to the disk: its files, its subfolders, itself, and its name in its parent.

    Args:
        folder: complete.
        is_given_up: asked before each file.

    Raises:
        OSError: the disk is full or failed; InterruptedError, it was given up.
    """
    folder = Path(folder)
    for path in sorted(folder.rglob("*")):
        if is_given_up():
            raise InterruptedError(errno.EINTR, "given up")
        synchronize_one(path)
    synchronize_one(folder)
    synchronize_one(folder.absolute().parent)


def synchronize_one(path: str | Path) -> None:
    """Bring a file, or a folder's list of names alone, to the disk.

    Raises:
        OSError: the disk is full or failed.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_all(stream: FileIO, buffer: memoryview) -> None:
    """Write a buffer to an unbuffered stream, which may take a part of it at a time."""
    while buffer:
        buffer = buffer[stream.write(buffer) :]


class BackgroundSync:
    """Bring files to the disk while they are being written, by a thread of its own.

    Left to the system, much is written at the end, and the writer is slowed down on its way there.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="synchronize")
        self._pending: Future[None] | None = None

    def start(self, descriptor: int) -> None:
        """Begin with what an open file has by now; nothing where the thread is busy.

        Raises:
            OSError: of an earlier start: the disk is full or failed.
        """
        if self._pending is not None and not self._pending.done():
            return
        self.wait()
        self._pending = self._pool.submit(_synchronize_and_close, os.dup(descriptor))

    def wait(self) -> None:
        """Wait for the last start.

        Raises:
            OSError: as `start`.
        """
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def close(self) -> None:
        """End the thread."""
        self._pool.shutdown(wait=True)


def _synchronize_and_close(descriptor: int) -> None:
    try:
        os.fdatasync(descriptor)
    finally:
        os.close(descriptor)
