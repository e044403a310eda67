"""Weights from the learner to the rollout engines."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from r2vpo_megatron.weight_sync.protocol import TensorMeta, WeightBucket, WeightSender
from r2vpo_megatron.weight_sync.shared_memory import SharedMemorySender

# Name of a back end -> sender for buckets of so many bytes.
BACKENDS: Mapping[str, Callable[[int], WeightSender]] = {
    "shared_memory": SharedMemorySender,
}

__all__ = ["BACKENDS", "SharedMemorySender", "TensorMeta", "WeightBucket", "WeightSender"]
