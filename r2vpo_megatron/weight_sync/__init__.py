"""Weights from the learner to the rollout engines."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from r2vpo_megatron.config.checks import require_choice
from r2vpo_megatron.weight_sync.collective import GlooSender, HcclSender, NcclSender
from r2vpo_megatron.weight_sync.device_memory import CudaIpcSender
from r2vpo_megatron.weight_sync.protocol import (
    TensorMeta,
    WeightBucket,
    WeightConnection,
    WeightSender,
)
from r2vpo_megatron.weight_sync.shared_memory import SharedMemorySender

# Name of a back end -> sender for buckets of so many bytes.
BACKENDS: Mapping[str, Callable[[int], WeightSender]] = {
    "shared_memory": SharedMemorySender,
    "gloo": GlooSender,
    "nccl": NcclSender,
    "cuda_ipc": CudaIpcSender,
    "hccl": HcclSender,
}

_THROUGH_HOST_MEMORY = ("shared_memory", "gloo")
# Name of a platform -> back ends that can be used on it, the natural one first.
_BACKENDS_OF_DEVICE: Mapping[str, tuple[str, ...]] = {
    "cpu": _THROUGH_HOST_MEMORY,
    "cuda": ("nccl", "cuda_ipc", *_THROUGH_HOST_MEMORY),
    "npu": ("hccl", *_THROUGH_HOST_MEMORY),
}
AUTO_BACKEND = "auto"
_ONE_NODE = frozenset({"shared_memory", "cuda_ipc"})


def backends_for(device_name: str) -> tuple[str, ...]:
    """Names of the back ends that work where learner and engines run on "cpu", "cuda" or "npu".

    Raises:
        ValueError: the device name is unknown.
    """
    if device_name not in _BACKENDS_OF_DEVICE:
        raise ValueError(
            f"device_name={device_name!r}: must be one of {', '.join(_BACKENDS_OF_DEVICE)}"
        )
    return _BACKENDS_OF_DEVICE[device_name]


def choose_backend(backend: str, device_name: str, is_one_machine: bool) -> str:
    """The back end that `weight_sync.backend` names; for "auto", the natural one.

    Args:
        backend: the field's value.
        device_name: "cpu", "cuda" or "npu".
        is_one_machine: whether learner and engines are certain to be on one node.

    Raises:
        ValueError: it does not work on this device.
    """
    valid = backends_for(device_name)
    if backend == AUTO_BACKEND:
        return next(name for name in valid if is_one_machine or not requires_one_node(name))
    require_choice("weight_sync.backend", backend, (AUTO_BACKEND, *valid))
    return backend


def requires_one_node(backend: str) -> bool:
    """Whether learner rank 0 and all engines must be on one node for this back end."""
    return backend in _ONE_NODE


__all__ = [
    "AUTO_BACKEND",
    "BACKENDS",
    "SharedMemorySender",
    "TensorMeta",
    "WeightBucket",
    "WeightConnection",
    "WeightSender",
    "backends_for",
    "choose_backend",
    "requires_one_node",
]
