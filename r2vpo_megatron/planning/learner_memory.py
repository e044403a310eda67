"""Memory of every learner rank, by item and at the moment of its peak."""

from __future__ import annotations

from dataclasses import dataclass

from r2vpo_megatron.config import RunConfig
from r2vpo_megatron.models.spec import ModelSpec, padded_vocab_size, validate_parallel
from r2vpo_megatron.planning.activations import EdgeActivations, LayerActivations
from r2vpo_megatron.planning.devices import Device
from r2vpo_megatron.planning.pack_load import PackLoad
from r2vpo_megatron.planning.parameters import (
    ChunkParameters,
    stage_parameters,
    total_parameters,
)
from r2vpo_megatron.planning.schedule import peak_in_flight

ITEMSIZES = {"float32": 4, "bfloat16": 2}
_FP32 = 4
# Transports whose buckets lie in the device's memory.
_DEVICE_BACKENDS = ("nccl", "hccl", "cuda_ipc")


@dataclass(frozen=True)
class Moment:
    """A time at which a rank may hold most.

    Attributes:
        name: what is going on.
        activations: bytes kept for backward.
        workspace: bytes that this moment alone needs.
    """

    name: str
    activations: int
    workspace: int

    @property
    def total(self) -> int:
        """Both."""
        return self.activations + self.workspace


@dataclass(frozen=True)
class LearnerRankMemory:
    """One rank of a pipeline stage, in bytes; all its tensor parallel ranks are alike.

    Attributes:
        stage: pipeline rank.
        num_parameters: that it holds.
        weights: parameters in the model's dtype.
        gradients: Megatron's buffer, fp32.
        optimizer: AdamW's moments and, of a 16-bit model, the fp32 parameters.
        peak: the moment of the peak.
        buffers: gathered tokens, attention masks, buckets of a weight push.
        reserved: by the device's context and communicators.
        checkpoint_copy: in host memory, while an asynchronous checkpoint is written.
    """

    stage: int
    num_parameters: int
    weights: int
    gradients: int
    optimizer: int
    peak: Moment
    buffers: int
    reserved: int
    checkpoint_copy: int

    @property
    def tensor_bytes(self) -> int:
        """Of all tensors at the peak."""
        state = self.weights + self.gradients + self.optimizer
        return state + self.peak.total + self.buffers

    @property
    def device_bytes(self) -> int:
        """What the device must have."""
        return self.tensor_bytes + self.reserved


def learner_memory(
    spec: ModelSpec,
    config: RunConfig,
    device: Device,
    num_micro_batches: int,
    load: PackLoad | None = None,
) -> list[LearnerRankMemory]:
    """The memory of a rank of every pipeline stage.

    Args:
        spec: the model.
        config: of the run; its parallel section is the layout.
        device: that the ranks run on.
        num_micro_batches: of one update, on one data parallel rank.
        load: the largest micro-batch's share of a rank; None for the worst that fits the budget.

    Raises:
        ValueError: a layout that does not fit the model.
    """
    parallel = config.parallel
    validate_parallel(spec, parallel)
    load = load or PackLoad.worst(parallel)
    itemsize = ITEMSIZES[config.model.dtype]
    is_cpu = device.is_cpu
    layer = LayerActivations.of(spec, parallel, load, itemsize, is_cpu=is_cpu)
    edges = EdgeActivations.of(spec, parallel, load, itemsize, is_cpu=is_cpu)
    return [
        _stage_memory(
            stage, chunks, spec, config, device, layer, edges, itemsize, num_micro_batches
        )
        for stage, chunks in enumerate(stage_parameters(spec, parallel))
    ]


def _stage_memory(
    stage: int,
    chunks: list[ChunkParameters],
    spec: ModelSpec,
    config: RunConfig,
    device: Device,
    layer: LayerActivations,
    edges: EdgeActivations,
    itemsize: int,
    num_micro_batches: int,
) -> LearnerRankMemory:
    parallel = config.parallel
    num_shards = parallel.data * parallel.context if config.optimizer.distributed else 1
    num_elements = sum(chunk.buffer_elements(num_shards) for chunk in chunks)
    num_stepped = num_elements // num_shards
    main_bytes = _FP32 if itemsize < _FP32 else 0
    optimizer = num_stepped * (2 * _FP32 + main_bytes)
    moments = [
        *_schedule_moments(chunks, stage, config, layer, edges, num_micro_batches),
        _step_moment(chunks, device, num_shards),
    ]
    buffers = edges.gather_buffer + edges.masks
    if stage == 0 and config.weight_sync.backend in _DEVICE_BACKENDS and not device.is_cpu:
        buffers += bucket_bytes(spec, config, itemsize)
    return LearnerRankMemory(
        stage=stage,
        num_parameters=total_parameters(chunks),
        weights=num_elements * itemsize,
        gradients=num_elements * _FP32,
        optimizer=optimizer,
        peak=max(moments, key=lambda moment: moment.total),
        buffers=buffers,
        reserved=device.reserved_bytes,
        # The first data parallel rank writes the parameters too.
        checkpoint_copy=num_elements * itemsize + optimizer,
    )


def _schedule_moments(
    chunks: list[ChunkParameters],
    stage: int,
    config: RunConfig,
    layer: LayerActivations,
    edges: EdgeActivations,
    num_micro_batches: int,
) -> list[Moment]:
    """The moments of forward and backward, for every chunk where it is at its fullest."""
    parallel, recompute = config.parallel, config.parallel.recompute
    kept = [
        chunk.num_layers * layer.kept(recompute)
        + edges.data
        # What goes to the next stage is kept by the schedule, the final norm by the head.
        + (edges.final_norm if chunk.has_head else layer.stream)
        for chunk in chunks
    ]
    moments = []
    for number, most, _ in peak_in_flight(kept, stage, parallel.pipeline, num_micro_batches):
        chunk = chunks[number]
        if chunk.has_head:
            moments.append(Moment("LM head", most, edges.head))
            moments.append(Moment("head's backward", most, edges.head_backward))
        if chunk.num_layers:
            backward = layer.backward(recompute) + layer.stream
            moments.append(Moment("a layer's backward", most, backward))
        if chunk.has_embedding:
            workspace = edges.embedding_backward + layer.stream
            moments.append(Moment("embedding's backward", most - kept[number], workspace))
    return moments


def _step_moment(chunks: list[ChunkParameters], device: Device, num_shards: int) -> Moment:
    """Reduction of the gradients and the optimizer's step: no activations are left."""
    largest = max(chunk.largest for chunk in chunks) * _FP32
    # Clipping scales a gradient into a new tensor; an AdamW that is not fused needs three.
    workspace = largest if device.fuses_adamw else 3 * largest
    if device.is_cpu and num_shards > 1:
        # gloo's reduce-scatter works on a copy of the buffer.
        buffer = max(chunk.buffer_elements(num_shards) for chunk in chunks)
        workspace = max(workspace, buffer * _FP32)
    return Moment("optimizer's step", 0, workspace)


def bucket_bytes(spec: ModelSpec, config: RunConfig, itemsize: int) -> int:
    """Two buckets of a weight push; a tensor that is larger gets a bucket of its own."""
    largest = padded_vocab_size(spec.vocab_size, 1) * spec.hidden_size * itemsize
    return 2 * max(config.weight_sync.bucket_bytes, largest)
