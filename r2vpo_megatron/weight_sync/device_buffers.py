"""Buckets in one flat tensor of host or device memory."""

from __future__ import annotations

import torch

from r2vpo_megatron.checkpoint.layout import TensorPieces
from r2vpo_megatron.weight_sync.protocol import SourceTensor, TensorMeta, aligned, dtype_from_name
from r2vpo_megatron.weight_sync.sender import BucketWriter, StageTimes


class BufferWriter(BucketWriter):
    """A bucket in a tensor; subclasses say how others come to it.

    Args:
        bucket_bytes: size of the bucket.
        buffer: uint8 [capacity], of aligned size; larger than the bucket for an outsized tensor.
        times: of the push.
    """

    def __init__(self, bucket_bytes: int, buffer: torch.Tensor, times: StageTimes) -> None:
        super().__init__(bucket_bytes, times)
        self._buffer: torch.Tensor | None = buffer

    @property
    def buffer(self) -> torch.Tensor:
        """The memory, until it is released."""
        assert self._buffer is not None, "the bucket has been released"
        return self._buffer

    def _store(self, meta: TensorMeta, tensor: SourceTensor) -> torch.Tensor:
        data = self.buffer[meta.offset_bytes : meta.offset_bytes + meta.num_bytes]
        place = data.view(dtype_from_name(meta.dtype)).view(meta.shape)
        # One pass, from any device and any strides.
        if isinstance(tensor, TensorPieces):
            tensor.copy_into(place)
        else:
            place.copy_(tensor.detach())
        return data

    def release(self) -> None:
        """Let go of the memory. May be called again."""
        self._buffer = None


def new_buffer(bucket_bytes: int, first: SourceTensor, device: torch.device) -> torch.Tensor:
    """Memory for a bucket that begins with this tensor: uint8, at least `bucket_bytes`."""
    num_bytes = max(bucket_bytes, first.numel() * first.element_size())
    return torch.empty(aligned(num_bytes), dtype=torch.uint8, device=device)
