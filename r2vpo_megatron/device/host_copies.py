"""Small tensors on their way from the host to a device, without the host waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor


def copy_to_device(host: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`; the copy takes its turn after what the device was asked before.

    From pageable memory a copy makes the host wait until the device has come that far, and a
    micro-batch would cost a dozen such waits. Torch keeps the pinned memory until it was read.

    Args:
        host: on the CPU; on another device it may be changed or freed as soon as this returns.
        device: the CPU itself shares memory with `host`.
    """
    if device.type != "cpu":
        host = host.pin_memory()
    return host.to(device, non_blocking=True)
