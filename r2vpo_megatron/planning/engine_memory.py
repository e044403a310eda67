"""Memory of every rank of a vLLM engine, and the KV cache that it leaves."""

from __future__ import annotations

from dataclasses import dataclass

from r2vpo_megatron.config import ParallelConfig, RunConfig
from r2vpo_megatron.models.spec import ModelSpec, padded_vocab_size, validate_layout
from r2vpo_megatron.planning.devices import Device
from r2vpo_megatron.planning.learner_memory import ITEMSIZES, bucket_bytes
from r2vpo_megatron.planning.parameters import stage_parameters, total_parameters

_FP32 = 4
_STEP_TOKENS = 8192  # that vLLM takes in one step on an accelerator, and profiles its memory with


@dataclass(frozen=True)
class EngineRankMemory:
    """One tensor parallel rank of an engine, in bytes.

    Attributes:
        weights: parameters, in the model's dtype.
        workspace: activations of a step, logits and what sampling makes of them.
        kv_cache: what is left for keys and values within the engine's share; below 0 if nothing.
        buckets: of a weight push, outside of the engine's share.
        reserved: by the device's context and communicators.
        token_bytes: keys and values of one token.
        memory_bytes: of the device.
        longest_sequence: tokens that the KV cache must hold at least.
    """

    weights: int
    workspace: int
    kv_cache: int
    buckets: int
    reserved: int
    token_bytes: int
    memory_bytes: int
    longest_sequence: int

    @property
    def device_bytes(self) -> int:
        """What the engine takes."""
        used = self.weights + self.workspace + max(self.kv_cache, 0)
        return used + self.buckets + self.reserved

    @property
    def cached_tokens(self) -> int:
        """That the KV cache holds."""
        return max(self.kv_cache, 0) // self.token_bytes

    @property
    def missing_bytes(self) -> int:
        """What lacks for one sequence of the greatest length; 0 or below where nothing does."""
        for_one = self.longest_sequence * self.token_bytes - self.kv_cache
        return max(for_one, self.device_bytes - self.memory_bytes)


def engine_memory(spec: ModelSpec, config: RunConfig, device: Device) -> EngineRankMemory:
    """The memory of each rank of an engine of `rollout.tensor_parallel` devices.

    Raises:
        ValueError: a tensor parallel size that does not fit the model.
    """
    rollout = config.rollout
    tensor = rollout.tensor_parallel
    validate_layout(spec, tensor, 1)
    itemsize = ITEMSIZES[config.model.dtype]
    weights = total_parameters(stage_parameters(spec, ParallelConfig(tensor=tensor))[0]) * itemsize
    rows = spec.hidden_size + 3 * spec.ffn_size // tensor
    # Logits of the whole vocabulary, their softmax and a sorted or masked copy, all fp32.
    logits = 3 * rollout.max_num_seqs * padded_vocab_size(spec.vocab_size, 1) * _FP32
    workspace = _STEP_TOKENS * rows * itemsize + logits
    per_token = 2 * spec.num_layers * (spec.num_kv_heads // tensor) * spec.head_dim * itemsize
    if device.is_cpu:
        kv_cache = rollout.kv_cache_bytes // tensor
    else:
        share = int(device.memory_bytes * rollout.memory_fraction)
        kv_cache = share - weights - workspace - device.reserved_bytes
    return EngineRankMemory(
        weights=weights,
        workspace=workspace,
        kv_cache=kv_cache,
        buckets=bucket_bytes(spec, config, itemsize),
        reserved=device.reserved_bytes,
        token_bytes=per_token,
        memory_bytes=device.memory_bytes,
        longest_sequence=config.max_sequence_tokens,
    )
