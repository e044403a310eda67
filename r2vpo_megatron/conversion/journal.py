"""A folder that is written once, in order, appears whole or not at all, and can be resumed.

The pieces go to a hidden folder beside the output, and a journal in it says which are there. A
kill at any moment leaves that folder; resuming hashes its pieces again and goes on after the last
good one. When all is written the journal goes aside, the folder is renamed, the journal deleted.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from io import FileIO
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, BinaryIO

from r2vpo_megatron.checkpoint.durable import (
    BackgroundSync,
    synchronize,
    synchronize_one,
    write_all,
)
from r2vpo_megatron.conversion.folder_lock import (
    check_free,
    journal_aside,
    partial_folder,
    take_lock,
)

_JOURNAL = "journal.jsonl"
_BLOCK_BYTES = 1 << 20  # hashed and written while it is in the processor's cache
_SMALL_BYTES = 1 << 18  # of a piece that another thread would not write sooner
_MAX_SHOWN = 100  # characters of a value in a message
_FULL = (errno.ENOSPC, errno.EDQUOT)

Buffer = bytes | bytearray | memoryview
Produce = Callable[[], Iterable[Buffer]]
Advance = Callable[[int], None]


@dataclass(frozen=True)
class Written:
    """Where a piece lies; position and length in bytes."""

    file: str
    position: int
    length: int
    crc32: int


class StoppedError(OSError):
    """The disk is full or failed; the message says what is kept and how to go on."""


class JournaledFolder:
    """The output folder of one job, to be filled piece by piece; a context manager.

    Pieces are appended to their files in the order of the calls, by one thread, so the next
    piece can be produced meanwhile; two are in memory at most.

    Attributes:
        folder: where the files are until `finish`; companions may be put there directly, and are
            dropped when a killed job is resumed.
        notes: what a user should know about how the work began.
        num_known_bytes: bytes of pieces that a killed job had written.
    """

    def __init__(
        self,
        output: str | Path,
        job: Mapping[str, Any],
        *,
        resume: bool,
        stage: Callable[[str, int], Advance] = lambda *_: lambda _: None,
    ) -> None:
        """Describe the job; nothing is touched before the `with` block begins.

        Args:
            output: the folder to make; it must not exist, or be empty. Missing parents are made.
            job: everything that determines the bytes, in JSON's types.
            resume: go on with what a killed job with this output left.
            stage: called with a title and a number of bytes before what a killed job left is read
                again; what it returns is called with the bytes just read.
        """
        self.output = Path(os.path.abspath(output))
        self.folder = partial_folder(self.output)
        self.notes: list[str] = []
        self.num_known_bytes = 0
        self._job: dict[str, Any] = json.loads(json.dumps(job))
        self._resume = resume
        self._stage = stage
        self._known: dict[str, Written] = {}
        self._sizes: dict[str, int] = {}  # bytes of each file that belong to known pieces
        self._lock: int | None = None
        self._journal: FileIO | None = None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="writer")
        self._sync = BackgroundSync()
        self._pending: Future[Written] | None = None
        self._renamed = False

    def __enter__(self) -> JournaledFolder:
        """Take the folder.

        Raises:
            ValueError: the output exists; another process writes it; a partial folder is there
                and `resume` is off, or is of another job.
            OSError: the folder cannot be made.
        """
        check_free(self.output)
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self._lock = take_lock(self._lock_path)
        if self._lock is None:
            raise ValueError(f"output folder {self.output}: another process is writing it")
        try:
            check_free(self.output)
            self._begin()
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave what is written for a resumption, or nothing where no piece was finished."""
        self._pool.shutdown(wait=True)
        self._sync.close()
        if self._journal is not None:
            self._journal.close()
        if not self._renamed and not self._known:
            shutil.rmtree(self.folder, ignore_errors=True)
        self._release()

    def write(self, piece: str, file: str, produce: Produce) -> Written:
        """Append a piece to a file, unless the journal has it, and wait until it is there.

        Args:
            piece: its name, unique in the job.
            file: path inside the folder.
            produce: called only if the piece is not there; its buffers, one after the other, are
                the piece.

        Raises:
            ValueError: `file` would lie outside the folder.
            OSError: the disk is full or failed; says how to go on.
        """
        return self.submit(piece, file, produce).result()

    def submit(self, piece: str, file: str, produce: Produce) -> Future[Written]:
        """Like `write`, but return while the piece is being written.

        An error of an earlier piece may be raised by this call.
        """
        path = self._path(file)
        known = self._known.get(piece)
        if known is not None:
            assert known.file == file, (piece, known.file, file)
            return _finished(known)
        buffers = [memoryview(buffer).cast("B") for buffer in produce()]
        busy = self._pending is not None and not self._pending.done()
        if not busy and sum(map(len, buffers)) < _SMALL_BYTES:
            self.wait()
            return _finished(self._append(piece, file, path, buffers))
        self.wait()
        self._pending = self._pool.submit(self._append, piece, file, path, buffers)
        return self._pending

    def wait(self) -> None:
        """Wait until every submitted piece is written; its error, if any, is raised."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def finish(self) -> Path:
        """Bring everything to the disk and give the folder its name.

        Returns:
            The output folder.

        Raises:
            ValueError: the output has appeared meanwhile.
            OSError: the disk is full or failed.
        """
        self.wait()
        assert self._journal is not None
        journal, aside = self.folder / _JOURNAL, journal_aside(self.output)
        try:
            self._sync.wait()
            synchronize(self.folder)
            check_free(self.output)
            self._journal.close()
            os.rename(journal, aside)
            try:
                synchronize_one(self.folder)
                os.rename(self.folder, self.output)
            except OSError:
                with suppress(OSError):  # resuming finds it where it is, too
                    os.rename(aside, journal)
                raise
            self._renamed = True
            synchronize_one(self.output.parent)
        except OSError as error:
            raise self._explained(error, self.output) from error
        aside.unlink(missing_ok=True)
        return self.output

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """Say of a full disk what is kept and how to go on, whatever was being written."""
        try:
            yield
        except OSError as error:
            if isinstance(error, StoppedError) or error.errno not in _FULL:
                raise
            raise self._explained(error, Path(error.filename or self.folder)) from error

    @property
    def _lock_path(self) -> Path:
        return self.folder.with_name(self.folder.name + ".lock")

    def _release(self) -> None:
        if self._lock is not None:
            self._lock_path.unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = None

    def _begin(self) -> None:
        journal, aside = self.folder / _JOURNAL, journal_aside(self.output)
        if self.folder.exists() and not self._resume:
            raise ValueError(
                f"{self.folder}: an earlier conversion to {self.output} stopped half-way; "
                "go on with --resume, or delete that folder to start from nothing"
            )
        if self.folder.is_dir() and not journal.exists() and aside.is_file():
            os.rename(aside, journal)  # stopped while the folder was given its name
        if journal.is_file() and self._recover(journal):
            self._journal = open(journal, "ab", buffering=0)  # noqa: SIM115 (closed in __exit__)
            self.notes.append(
                f"resuming: {len(self._known):,} pieces ({self.num_known_bytes:,} bytes) are there"
            )
            return
        if self._resume:
            self.notes.append("there is nothing to resume: starting from nothing")
        if self.folder.exists():
            shutil.rmtree(self.folder)
        aside.unlink(missing_ok=True)
        self.folder.mkdir()
        self._journal = open(journal, "ab", buffering=0)  # noqa: SIM115 (closed in __exit__)
        self._append_line({"job": self._job})

    def _recover(self, journal: Path) -> bool:
        """Take over the pieces that the journal names and whose bytes are as it says.

        Returns:
            False where not even the job is legible: killed right at the start.
        """
        lines = journal.read_bytes().split(b"\n")[:-1]  # a last line without an end is torn
        if not lines:
            return False
        first = _parsed(lines[0])
        if not isinstance(first.get("job"), dict):
            return False
        if first["job"] != self._job:
            raise ValueError(
                f"{self.folder}: holds a conversion with other settings or sources: "
                f"{_difference(first['job'], self._job)}; give those, or delete that folder"
            )
        end = len(lines[0]) + 1
        there = sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())
        advance = self._stage("checking what is there", there - journal.stat().st_size)
        for line in lines[1:]:
            known_bytes = self.num_known_bytes
            if not self._take_over(_parsed(line)):
                break
            advance(self.num_known_bytes - known_bytes)
            end += len(line) + 1
        os.truncate(journal, end)
        for path in sorted(self.folder.rglob("*"), reverse=True):
            size = self._sizes.get(path.relative_to(self.folder).as_posix())
            if path.is_dir() and not path.is_symlink():
                if not any(path.iterdir()):
                    path.rmdir()
            elif size is not None:
                os.truncate(path, size)
            elif path != journal:
                path.unlink()
        return True

    def _take_over(self, line: Mapping[str, Any]) -> bool:
        """Add the piece of a journal line if its bytes follow on and are whole."""
        try:
            piece = line["piece"]
            written = Written(line["file"], line["position"], line["length"], line["crc32"])
            path = self._path(written.file)
            if written.position != self._sizes.get(written.file, 0):
                return False
            with open(path, "rb") as stream:
                stream.seek(written.position)
                if _crc32_of(stream, written.length) != written.crc32:
                    return False
        except (KeyError, TypeError, ValueError, OSError):
            return False
        self._register(piece, written)
        self.num_known_bytes += written.length
        return True

    def _register(self, piece: str, written: Written) -> None:
        self._known[piece] = written
        self._sizes[written.file] = written.position + written.length

    def _append(self, piece: str, file: str, path: Path, buffers: list[memoryview]) -> Written:
        position = self._sizes.get(file, 0)
        checksum = 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "ab", buffering=0) as stream:
                for buffer in buffers:
                    for start in range(0, len(buffer), _BLOCK_BYTES):
                        block = buffer[start : start + _BLOCK_BYTES]
                        checksum = zlib.crc32(block, checksum)
                        write_all(stream, block)
                self._sync.start(stream.fileno())
            length = sum(len(buffer) for buffer in buffers)
            written = Written(file, position, length, checksum)
            self._append_line({"piece": piece, **asdict(written)})
        except OSError as error:
            raise self._explained(error, path) from error
        self._register(piece, written)
        return written

    def _append_line(self, line: Mapping[str, Any]) -> None:
        assert self._journal is not None
        write_all(self._journal, memoryview(json.dumps(line).encode() + b"\n"))

    def _explained(self, error: OSError, path: Path) -> OSError:
        what = "the disk is full" if error.errno in _FULL else error.strerror or str(error)
        return StoppedError(
            error.errno or errno.EIO,
            f"{path}: {what}; {len(self._known):,} finished pieces are kept in {self.folder}: "
            "mend that and go on with --resume",
        )

    def _path(self, file: str) -> Path:
        parts = PurePosixPath(file).parts
        if not parts or parts[0] == "/" or ".." in parts or file == _JOURNAL or "\0" in file:
            raise ValueError(f"file {file!r}: must be a path inside the output folder")
        return self.folder.joinpath(*parts)


def _finished(written: Written) -> Future[Written]:
    future: Future[Written] = Future()
    future.set_result(written)
    return future


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _crc32_of(stream: BinaryIO, length: int) -> int | None:
    """Of the next bytes; None where there are fewer."""
    checksum = 0
    while length:
        block = stream.read(min(length, 4 * _BLOCK_BYTES))
        if not block:
            break
        checksum = zlib.crc32(block, checksum)
        length -= len(block)
    return checksum if not length else None


def _difference(there: Mapping[str, Any], here: Mapping[str, Any], prefix: str = "") -> str:
    """The first setting that differs, by its path, with both values."""
    for key in [*there, *(key for key in here if key not in there)]:
        left, right = there.get(key), here.get(key)
        if left == right:
            continue
        if isinstance(left, dict) and isinstance(right, dict):
            return _difference(left, right, f"{prefix}{key}.")
        return f"{prefix}{key} is {_shown(left)} there and {_shown(right)} here"
    raise AssertionError("there is no difference")


def _shown(value: Any) -> str:
    text = "missing" if value is None else json.dumps(value)
    return text if len(text) <= _MAX_SHOWN else text[: _MAX_SHOWN - 3] + "..."
