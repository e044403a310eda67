"""What devices a machine has, and the versions of what drives them."""

from __future__ import annotations

import importlib
import os
import platform as machine
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

NVIDIA_DRIVER_FILE = Path("/proc/driver/nvidia/version")
ASCEND_DRIVER_FILE = Path("/usr/local/Ascend/driver/version.info")
CANN_HOMES = ("ASCEND_TOOLKIT_HOME", "ASCEND_HOME_PATH")  # set by CANN's set_env.sh
_VERSION = re.compile(r"(?:^|[^\d.])(\d+\.\d[\w.]*)")


@dataclass(frozen=True)
class DeviceReport:
    """Devices that this process sees.

    Attributes:
        names: of each device; a CPU is one.
        memory_bytes: of the device that has least.
        versions: of drivers and libraries, by name; what could not be found out is left out.
    """

    names: tuple[str, ...]
    memory_bytes: int
    versions: Mapping[str, str]


def report_devices(platform_name: str) -> DeviceReport:
    """Look at this machine's devices of a platform.

    Raises:
        RuntimeError: there are none, or their library does not load; says what is missing.
    """
    return {"cpu": _report_cpu, "cuda": _report_cuda, "npu": _report_npu}[platform_name]()


def _report_cpu() -> DeviceReport:
    usable = len(os.sched_getaffinity(0))
    return DeviceReport(
        names=(f"{usable} {machine.machine()} cores",),
        memory_bytes=psutil.virtual_memory().total,
        versions={},
    )


def _report_cuda() -> DeviceReport:
    if not torch.cuda.is_available():
        built = torch.version.cuda
        raise RuntimeError(
            "torch sees no CUDA device: is the driver loaded (nvidia-smi), CUDA_VISIBLE_DEVICES "
            f"right, and torch built for CUDA ({built or 'this torch is not'})?"
        )
    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    versions = {"driver": _version_in(NVIDIA_DRIVER_FILE), "CUDA of torch": torch.version.cuda}
    if torch.distributed.is_nccl_available():
        versions["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return DeviceReport(
        names=tuple(device.name for device in properties),
        memory_bytes=min(device.total_memory for device in properties),
        versions={name: version for name, version in versions.items() if version},
    )


def _report_npu() -> DeviceReport:
    try:
        npu = importlib.import_module("torch_npu").npu
    except (ImportError, OSError) as error:  # OSError: CANN's shared libraries are missing
        raise RuntimeError(
            f"torch_npu does not import ({error}): install it for torch {torch.__version__}, and "
            "source CANN's set_env.sh"
        ) from error
    if not npu.is_available():
        raise RuntimeError(
            "torch_npu sees no NPU: is the driver loaded (npu-smi info), and "
            "ASCEND_RT_VISIBLE_DEVICES right?"
        )
    properties = [npu.get_device_properties(index) for index in range(npu.device_count())]
    versions = {"driver": _version_in(ASCEND_DRIVER_FILE), "CANN": _cann_version()}
    return DeviceReport(
        names=tuple(device.name for device in properties),
        memory_bytes=min(device.total_memory for device in properties),
        versions={name: version for name, version in versions.items() if version},
    )


def _cann_version() -> str | None:
    """As the toolkit's own file says, whose name has changed with its releases."""
    for variable in CANN_HOMES:
        if home := os.environ.get(variable):
            for file in (*sorted(Path(home).glob("*install.info")), Path(home) / "version.cfg"):
                if version := _version_in(file):
                    return version
    return None


def _version_in(file: Path) -> str | None:
    """The first thing in a file that looks like a version."""
    try:
        match = _VERSION.search(file.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return None
    return match[1] if match else None
