"""Weight pushes through device memory that processes of one node share by handle (CUDA IPC)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from r2vpo_megatron.device import get_platform
from r2vpo_megatron.rollout.weight_updates import WeightUpdateError
from r2vpo_megatron.weight_sync.device_buffers import BufferWriter, new_buffer
from r2vpo_megatron.weight_sync.protocol import SourceTensor
from r2vpo_megatron.weight_sync.sender import BucketSender, BucketWriter


@dataclass(frozen=True)
class DeviceMemoryHandle:
    """A bucket in another process's device memory."""

    platform_name: str
    exported: Any
    num_bytes: int

    def attach(self, link: Any = None) -> torch.Tensor:
        """Copy the bucket: uint8 [num_bytes] on this process's device.

        A copy, since one handle serves all receivers and its count of readers only one: what a
        receiver keeps of a bucket must not depend on the sender's memory.

        Raises:
            WeightUpdateError: the memory cannot be reached from here.
        """
        platform = get_platform(self.platform_name)
        try:
            copy = platform.open_memory(self.exported)[: self.num_bytes].clone()
            platform.synchronize()
        except RuntimeError as error:
            raise WeightUpdateError(
                "cannot open a weight bucket in device memory (sender and receiver must be on one "
                f"node, and their devices have access to each other): {error}"
            ) from error
        return copy


class _DeviceMemoryWriter(BufferWriter):
    """A bucket that receivers open by handle."""

    platform_name = "cuda"

    def _publish(self, num_bytes: int) -> DeviceMemoryHandle:
        platform = get_platform(self.platform_name)
        platform.synchronize()  # what was copied into the bucket is there
        exported = platform.export_memory(self.buffer)
        return DeviceMemoryHandle(self.platform_name, exported, num_bytes)

    def finish(self) -> None:
        """Nothing to wait for: receivers have copied the bucket when they say it is loaded."""


class CudaIpcSender(BucketSender):
    """Sends weights to processes with GPUs of the same node; see `BucketSender`."""

    def _new_writer(self, first: SourceTensor) -> BucketWriter:
        # New memory each time: memory that has been exported is not filled a second time.
        device = get_platform(_DeviceMemoryWriter.platform_name).current_device()
        buffer = new_buffer(self._bucket_bytes, first, device)
        return _DeviceMemoryWriter(self._bucket_bytes, buffer, self._times)
