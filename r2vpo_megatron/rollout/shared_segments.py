"""Shared-memory files of a tensor-parallel engine, for whoever must remove them in its place.

vLLM's ranks talk through files in /dev/shm, which they remove when they end. Ranks that are killed
with their engine do not come to that.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import psutil

SHARED_MEMORY = Path("/dev/shm")
# Of Python's multiprocessing (segments, semaphores) and of vLLM; Ray's are not to be touched.
_PREFIXES = ("psm_", "sem.mp-", "vllm_")


def list_segments() -> tuple[str, ...]:
    """Names of the files in /dev/shm that this process and its descendants have mapped."""
    process = psutil.Process()
    inodes: set[int] = set()
    for pid in (process.pid, *(child.pid for child in process.children(recursive=True))):
        try:
            lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
        except OSError:  # it has ended, or this is no Linux
            continue
        inodes.update(int(line.split()[4]) for line in lines if f"{SHARED_MEMORY}/" in line)
    # Not by the name in the map: glibc makes a semaphore under another one and renames it.
    files = SHARED_MEMORY.iterdir() if inodes else ()
    return tuple(sorted(file.name for file in files if _is_one_of(file, inodes)))


def remove_segments(names: Iterable[str]) -> None:
    """Remove files that an engine has left; those that are gone, or on another host, are not."""
    for name in names:
        if name.startswith(_PREFIXES):
            (SHARED_MEMORY / name).unlink(missing_ok=True)


def _is_one_of(file: Path, inodes: set[int]) -> bool:
    try:
        return file.name.startswith(_PREFIXES) and file.stat().st_ino in inodes
    except FileNotFoundError:  # another process has removed it meanwhile
        return False
