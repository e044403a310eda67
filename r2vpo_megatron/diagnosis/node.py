"""A look at one node, from a process there: plain facts, judged elsewhere."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from r2vpo_megatron.device.report import DeviceReport, report_devices
from r2vpo_megatron.diagnosis.packages import installed_versions

PROBE_BYTES = 64 << 20
_BLOCK = bytes(1 << 20)


@dataclass(frozen=True)
class FolderReport:
    """A folder as one node sees it.

    Attributes:
        path: of it.
        error: why it cannot be written; empty if it can.
        names: of what the driver put there, to see that it is the same folder.
        free_bytes: room for this user.
        write_bytes_per_second: of a file that was brought to the disk.
    """

    path: str
    error: str = ""
    names: tuple[str, ...] = ()
    free_bytes: int = 0
    write_bytes_per_second: float = 0.0


@dataclass(frozen=True)
class NodeReport:
    """What was seen on a node.

    Attributes:
        name: its host name.
        python: version of its interpreter.
        packages: installed versions by name.
        devices: None where `device_error` says why.
        folders: that a run writes to.
        model_files: bytes by name of the files in the model's folder; empty if it is not there.
        time_seconds: its wall clock, when `clock_seconds` was read.
        clock_seconds: its monotonic clock.
        open_files: how many a process may have.
        shared_memory_bytes: free in /dev/shm.
    """

    name: str
    python: str
    packages: dict[str, str]
    devices: DeviceReport | None
    device_error: str
    folders: tuple[FolderReport, ...]
    model_files: dict[str, int]
    open_files: int
    shared_memory_bytes: int
    time_seconds: float = field(default=0.0)


def examine_node(
    platform_name: str, folders: Sequence[str], model_dir: str, mark: str
) -> NodeReport:
    """Look at the node of the calling process.

    Args:
        platform_name: "cpu", "cuda" or "npu".
        folders: that a run writes to.
        model_dir: that all ranks read.
        mark: beginning of the names of files that are looked for, and made, in `folders`.
    """
    devices, device_error = None, ""
    try:
        devices = report_devices(platform_name)
    except RuntimeError as error:
        device_error = str(error)
    return NodeReport(
        name=socket.gethostname(),
        python=".".join(map(str, sys.version_info[:3])),
        packages=installed_versions(),
        devices=devices,
        device_error=device_error,
        folders=tuple(_examine_folder(Path(folder), mark) for folder in folders),
        model_files=_sizes(Path(model_dir)),
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        shared_memory_bytes=shutil.disk_usage("/dev/shm").free,
        time_seconds=time.time(),
    )


def _examine_folder(folder: Path, mark: str) -> FolderReport:
    probe = folder / f"{mark}.{socket.gethostname()}.{os.getpid()}"
    try:
        names = tuple(sorted(path.name for path in folder.glob(f"{mark}.driver*")))
        start = time.perf_counter()
        with probe.open("wb", buffering=0) as file:
            for _ in range(PROBE_BYTES // len(_BLOCK)):
                file.write(_BLOCK)
            os.fsync(file.fileno())
        rate = PROBE_BYTES / (time.perf_counter() - start)
        return FolderReport(str(folder), "", names, shutil.disk_usage(folder).free, rate)
    except OSError as error:
        return FolderReport(str(folder), error=error.strerror or str(error))
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()


def _sizes(folder: Path) -> dict[str, int]:
    try:
        return {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}
    except OSError:
        return {}
