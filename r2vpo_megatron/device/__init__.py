"""The hardware layer: sole home of torch.cuda, torch.npu, collective back ends and patches."""

from __future__ import annotations

import importlib
import importlib.util

from r2vpo_megatron.device.base import Platform, SequenceLayout
from r2vpo_megatron.device.transfer_group import TransferGroup, TransferGroupError

PLATFORMS = {
    "cpu": "r2vpo_megatron.device.cpu:CpuPlatform",
    "cuda": "r2vpo_megatron.device.cuda:CudaPlatform",
    "npu": "r2vpo_megatron.device.npu:NpuPlatform",
}


def get_platform(name: str = "auto") -> Platform:
    """The platform of this name; "auto" takes an NPU if there is one, else a GPU, else the CPU.

    Raises:
        ValueError: no such platform.
    """
    if name == "auto":
        name = _detect()
    if name not in PLATFORMS:
        valid = ", ".join(["auto", *PLATFORMS])
        raise ValueError(f"platform = {name!r}: must be one of {valid}")
    module_name, class_name = PLATFORMS[name].split(":")
    platform: Platform = getattr(importlib.import_module(module_name), class_name)()
    return platform


def collective_platform(backend: str) -> Platform:
    """The platform whose collectives go over this back end: "gloo", "nccl" or "hccl".

    It need not be the one that this process computes on: gloo connects the hosts of any.

    Raises:
        ValueError: no platform has this back end.
    """
    platforms = [get_platform(name) for name in PLATFORMS]
    by_backend = {platform.collective_backend: platform for platform in platforms}
    if backend not in by_backend:
        raise ValueError(f"backend={backend!r}: must be one of {', '.join(by_backend)}")
    return by_backend[backend]


def _detect() -> str:
    import torch

    if importlib.util.find_spec("torch_npu") is not None:
        from r2vpo_megatron.device.npu import npu_is_available

        if npu_is_available():
            return "npu"
    return "cuda" if torch.cuda.is_available() else "cpu"


__all__ = [
    "PLATFORMS",
    "Platform",
    "SequenceLayout",
    "TransferGroup",
    "TransferGroupError",
    "collective_platform",
    "get_platform",
]
