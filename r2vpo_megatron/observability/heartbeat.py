"""What a process was doing last, readable by others on its node while it hangs or is stopped.

A process notes its beats in anonymous memory (memfd_create): no thread that could starve, no lock,
no file to remove. Others open that memory through /proc by the process id; it goes with the
process. Times are of the monotonic clock, which all processes of a node share and nobody sets.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, overload

# sequence, stages entered, step, time in ns, whether inside the stage, its name; then a CRC-32.
_RECORD = struct.Struct("<QQQQ?40s")
_CHECK = struct.Struct("<I")
_SLOT_BYTES = 128  # a record and its check
_MAX_NAME_BYTES = 249 - 40  # memfd_create(2) takes 249, of which prefix, kind and pid need some

T = TypeVar("T")


@dataclass(frozen=True)
class Beat:
    """The last thing that a process noted.

    Attributes:
        stage: that it entered last; empty before the first.
        num_stages: that it has entered in all.
        step: of the stage, 1, 2, ...: the micro-batch or bucket begun last; 0 before the first.
        is_inside: False once the stage was left.
        seconds_ago: when this was noted, before it was read.
    """

    stage: str
    num_stages: int
    step: int
    is_inside: bool
    seconds_ago: float

    def __str__(self) -> str:
        ago = f"{self.seconds_ago:.1f} s ago"
        if not self.num_stages:
            return f"no stage entered, started {ago}"
        step = f", step {self.step}" if self.step else ""
        where = "in" if self.is_inside else "idle since"
        return f"{where} {self.stage} (its stage {self.num_stages}{step}), last beat {ago}"


class Heartbeat:
    """Notes what the calling process does; for one thread.

    Processes whose progress is to be compared must enter the same stages in the same order.

    Args:
        name: tells others whose beats these are; see `name_of`.
    """

    def __init__(self, name: str) -> None:
        descriptor = open_memory("beats", name)
        os.truncate(descriptor, 2 * _SLOT_BYTES)
        self._memory = mmap.mmap(descriptor, 2 * _SLOT_BYTES)
        self._sequence = self._num_stages = self._step = 0
        self._stage, self._is_inside = b"", False
        self._note()

    def enter(self, stage: str) -> None:
        """A stage begins."""
        self._stage, self._is_inside = stage.encode(), True
        self._num_stages += 1
        self.step(0)

    def step(self, number: int) -> None:
        """The stage begins its part of this number, from 1 on."""
        self._step = number
        self._note()

    def leave(self) -> None:
        """The stage has ended; without effect where none has begun."""
        self._is_inside = False
        self._note()

    @contextmanager
    def stage(self, stage: str) -> Iterator[None]:
        """Enter for the block."""
        self.enter(stage)
        try:
            yield
        finally:
            self.leave()

    def counted(self, items: Sequence[T]) -> Sequence[T]:
        """The same items; whenever one is taken, its place in the sequence is the stage's step."""
        return _Counted(items, self)

    def _note(self) -> None:
        """Write the slot that does not hold the last beat: stopped midway, that one still stands.

        Nor need a reader wait for the writer: a slot that is half written fails its check.
        """
        self._sequence += 1
        record = _RECORD.pack(
            self._sequence,
            self._num_stages,
            self._step,
            time.monotonic_ns(),
            self._is_inside,
            self._stage,
        )
        start = self._sequence % 2 * _SLOT_BYTES
        slot = record + _CHECK.pack(zlib.crc32(record))
        self._memory[start : start + len(slot)] = slot


class _Counted(Sequence[T]):
    def __init__(self, items: Sequence[T], heartbeat: Heartbeat) -> None:
        self._items, self._heartbeat = items, heartbeat

    def __len__(self) -> int:
        return len(self._items)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...
    def __getitem__(self, index: int | slice) -> T | Sequence[T]:
        taken = self._items[index]
        if isinstance(index, int):
            self._heartbeat.step(index % len(self._items) + 1)
        return taken


def read_beat(pid: int) -> Beat | None:
    """The last beat of a process on this node, whatever state it is in; None: it notes none."""
    found = find_memory(pid, "beats")
    if found is None:
        return None
    try:
        with found.open("rb") as memory:
            content = memory.read(2 * _SLOT_BYTES)
    except OSError:
        return None  # it has ended
    if len(content) < 2 * _SLOT_BYTES:
        return None  # it is just making it
    slots = (content[:_SLOT_BYTES], content[_SLOT_BYTES:])
    records = [record for slot in slots if (record := _sound_record(slot)) is not None]
    if not records:
        return None
    _, num_stages, step, time_ns, is_inside, stage = max(records)
    name = stage.rstrip(b"\0").decode(errors="replace")
    seconds_ago = (time.monotonic_ns() - time_ns) / 1e9
    return Beat(name, num_stages, step, is_inside, seconds_ago)


def _sound_record(slot: bytes) -> tuple[int, int, int, int, bool, bytes] | None:
    record = slot[: _RECORD.size]
    (check,) = _CHECK.unpack_from(slot, _RECORD.size)
    fields: tuple[int, int, int, int, bool, bytes] = _RECORD.unpack(record)
    return fields if check == zlib.crc32(record) else None  # that of zeros is not zero


def name_of(pid: int) -> str | None:
    """What a process on this node gave its `Heartbeat` as name; None: it has none."""
    found = find_memory(pid, "beats")
    try:
        target = "" if found is None else os.readlink(found)
    except OSError:
        return None  # it has ended
    return target.split(" ", 2)[2].removesuffix(" (deleted)") if target else None


def open_memory(kind: str, name: str = "") -> int:
    """A descriptor of new memory of this process that others can find; open while it lives.

    Raises:
        ValueError: the name is too long.
    """
    if len(name.encode()) > _MAX_NAME_BYTES:
        raise ValueError(f"name={name!r}: must have at most {_MAX_NAME_BYTES} bytes")
    # With the process id: what a parent opened is in the hands of its forked children, too.
    return os.memfd_create(f"r2vpo-{kind} {os.getpid()} {name}")


def find_memory(pid: int, kind: str) -> Path | None:
    """Where to open the memory of this kind of a process on this node; None: there is none."""
    start = f"/memfd:r2vpo-{kind} {pid} "
    try:
        descriptors = list(Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return None  # it has ended, or is another user's
    for descriptor in descriptors:
        with contextlib.suppress(OSError):  # closed meanwhile
            if os.readlink(descriptor).startswith(start):
                return descriptor
    return None
