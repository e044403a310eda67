"""Seconds of the learner's stages: log-probs of fresh responses, updates.

A stage's work on a micro-batch is the sum of what its matrix products, its attention kernels, its
passes over memory and its collectives take; nothing overlaps, as in the learner. A pipeline goes
at the pace of its slowest stage.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from r2vpo_megatron.config import RunConfig
from r2vpo_megatron.models.spec import ModelSpec, padded_vocab_size
from r2vpo_megatron.planning.activations import LayerActivations
from r2vpo_megatron.planning.devices import Device
from r2vpo_megatron.planning.learner_memory import ITEMSIZES
from r2vpo_megatron.planning.pack_load import PackLoad
from r2vpo_megatron.planning.parameters import ChunkParameters, stage_parameters
from r2vpo_megatron.planning.schedule import idle_share
from r2vpo_megatron.planning.workload import Workload

_FP32 = 4
PACKING_USE = 0.97  # of a micro-batch's budget, by benchmarks/packing.py
# Times that what a layer keeps passes through memory outside of products and kernels.
_FORWARD_PASSES, _BACKWARD_PASSES = 2.5, 5.0
# Passes over the logits of a chunk: softmax, and in an update their gradient.
_LOGPROB_PASSES, _UPDATE_PASSES = 4.0, 8.0
# Products of backward over those of forward. Attention's kernel makes the scores again.
_BACKWARD_PRODUCTS, _BACKWARD_ATTENTION = 2.0, 2.5
# Bytes per parameter of a step: norm, clipping, both moments, the parameter, all read and written.
_STEP_BYTES = 48


@dataclass(frozen=True)
class LearnerTimes:
    """Seconds of one iteration.

    Attributes:
        logprobs: of the fresh responses, 0 where the engines' are taken.
        forward, backward, recompute: of all updates, at the pace of the slowest stage.
        idle: of stages that wait at the pipeline's ends.
        reduction: of gradients over data parallel ranks, and of the weights' way back.
        step: of the optimizer.
        micro_batches: of one update on one data parallel rank.
    """

    logprobs: float
    forward: float
    backward: float
    recompute: float
    idle: float
    reduction: float
    step: float
    micro_batches: int

    @property
    def updates(self) -> float:
        """All updates of an iteration."""
        work = self.forward + self.backward + self.recompute
        return work + self.idle + self.reduction + self.step


@dataclass(frozen=True)
class _Work:
    """What one micro-batch asks of a rank: operations, bytes, seconds of collectives."""

    products: float = 0.0
    attention: float = 0.0
    bytes: float = 0.0
    collectives: float = 0.0

    def seconds(self, device: Device) -> float:
        computing = self.products / device.matmul_rate + self.attention / device.attention_rate
        return computing + self.bytes / device.stream_rate + self.collectives


def micro_batches_per_rank(num_samples: int, sequence_tokens: float, config: RunConfig) -> int:
    """Micro-batches into which a data parallel rank's share of some samples goes."""
    parallel = config.parallel
    tokens = num_samples * sequence_tokens / parallel.data
    per_batch = parallel.max_tokens_per_micro_batch * PACKING_USE
    # Sequences do not divide: at least one fits, and no more than whole ones.
    fitting = max(1.0, per_batch // sequence_tokens) * sequence_tokens
    return max(1, math.ceil(tokens / min(per_batch, fitting)))


def learner_times(
    spec: ModelSpec,
    config: RunConfig,
    device: Device,
    workload: Workload,
    devices_per_node: int,
) -> LearnerTimes:
    """Seconds of the learner in one iteration.

    Args:
        spec: the model.
        config: its parallel section is the layout.
        device: what the ranks run on.
        workload: of an iteration.
        devices_per_node: ranks that share a node, those of one tensor parallel group first.
    """
    parallel = config.parallel
    clock = _Clock(spec, config, device, workload, devices_per_node)
    chunks = stage_parameters(spec, parallel)
    num_micro_batches = micro_batches_per_rank(
        workload.samples_per_update, workload.sequence_tokens, config
    )
    tokens = workload.samples_per_update * workload.sequence_tokens
    load = clock.load(tokens / parallel.data / num_micro_batches)
    stages = [clock.stage(stage, load) for stage in chunks]
    slowest = max(stages, key=sum)
    forward, backward, recompute = (
        workload.updates * num_micro_batches * seconds for seconds in slowest
    )
    idle = idle_share(parallel.pipeline, parallel.virtual_pipeline, num_micro_batches)
    return LearnerTimes(
        logprobs=clock.logprobs(chunks),
        forward=forward,
        backward=backward,
        recompute=recompute,
        idle=idle * (forward + backward + recompute),
        reduction=workload.updates * max(clock.reduction(stage) for stage in chunks),
        step=workload.updates * max(clock.step(stage) for stage in chunks),
        micro_batches=num_micro_batches,
    )


class _Clock:
    """Times of one layout's parts."""

    def __init__(
        self,
        spec: ModelSpec,
        config: RunConfig,
        device: Device,
        workload: Workload,
        devices_per_node: int,
    ) -> None:
        self._spec, self._config, self._device = spec, config, device
        self._workload, self._per_node = workload, devices_per_node
        self._itemsize = ITEMSIZES[config.model.dtype]
        parallel = config.parallel
        self._columns = padded_vocab_size(spec.vocab_size, parallel.tensor) // parallel.tensor

    def load(self, tokens: float) -> PackLoad:
        """A context rank's share of a micro-batch of so many tokens."""
        context = self._config.parallel.context
        held = max(1, round(tokens / context))
        share = self._workload.response_tokens / self._workload.sequence_tokens
        seen = min(tokens, held * (context + 1) / 2) if context > 1 else held
        return PackLoad(held, max(1, round(held * share)), round(seen))

    def stage(self, chunks: list[ChunkParameters], load: PackLoad) -> tuple[float, float, float]:
        """Forward, backward and recomputation of one micro-batch, in seconds."""
        num_layers = sum(chunk.num_layers for chunk in chunks)
        forward, backward, again = self._layer(load)
        stage = [num_layers * seconds for seconds in (forward, backward, again)]
        if chunks[-1].has_head:
            stage[0] += self._head(load, products=3, passes=_UPDATE_PASSES)
        # Every gradient is written, read and added to its fp32 sum.
        num_parameters = sum(chunk.num_parameters for chunk in chunks)
        gradient_bytes = num_parameters * (2 * self._itemsize + 2 * _FP32)
        stage[1] += gradient_bytes / self._device.stream_rate
        return stage[0], stage[1], stage[2]

    def logprobs(self, stages: list[list[ChunkParameters]]) -> float:
        """Forward of all fresh responses, where the learner's log-probs are the denominator."""
        workload, parallel = self._workload, self._config.parallel
        if self._config.algorithm.behavior_logprobs != "learner":
            return 0.0
        number = micro_batches_per_rank(
            workload.num_responses, workload.sequence_tokens, self._config
        )
        tokens = workload.num_responses * workload.sequence_tokens
        load = self.load(tokens / parallel.data / number)
        forward, _, _ = self._layer(load)
        slowest = max(
            sum(chunk.num_layers for chunk in chunks) * forward
            + (self._head(load, 1, _LOGPROB_PASSES) if chunks[-1].has_head else 0.0)
            for chunks in stages
        )
        idle = idle_share(parallel.pipeline, parallel.virtual_pipeline, number)
        return number * slowest * (1 + idle)

    def reduction(self, chunks: list[ChunkParameters]) -> float:
        """Gradients over data and context ranks and, distributed, the weights' way back."""
        parallel = self._config.parallel
        group = parallel.data * parallel.context
        if group == 1:
            return 0.0
        rate = self._rate(parallel.tensor * group)
        elements = sum(chunk.num_parameters for chunk in chunks)
        back = self._itemsize if self._config.optimizer.distributed else _FP32
        seconds = elements * (_FP32 + back) * (group - 1) / group / rate
        return seconds + 2 * len(chunks) * self._device.collective_seconds

    def step(self, chunks: list[ChunkParameters]) -> float:
        """Clearing the gradients, their norm, AdamW."""
        parallel = self._config.parallel
        shards = parallel.data * parallel.context if self._config.optimizer.distributed else 1
        elements = sum(chunk.num_parameters for chunk in chunks)
        return (elements * _FP32 + elements / shards * _STEP_BYTES) / self._device.stream_rate

    def _layer(self, load: PackLoad) -> tuple[float, float, float]:
        """Forward, backward and recomputation of one layer, in seconds."""
        spec, parallel = self._spec, self._config.parallel
        query, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        hidden = spec.hidden_size
        mlp = 2 * 3 * hidden * spec.ffn_size * load.tokens / parallel.tensor
        projections = 2 * hidden * (2 * query + 2 * kv) * load.tokens / parallel.tensor
        attention = 2 * query * load.tokens * self._workload.attended_tokens / parallel.tensor
        layer = LayerActivations.of(
            spec, parallel, load, self._itemsize, is_cpu=self._device.is_cpu
        )
        kept, collectives = layer.kept("none"), self._layer_collectives(load)
        forward = _Work(mlp + projections, attention, _FORWARD_PASSES * kept, collectives)
        backward = _Work(
            _BACKWARD_PRODUCTS * (mlp + projections),
            _BACKWARD_ATTENTION * attention,
            _BACKWARD_PASSES * kept,
            collectives,
        )
        context = self._context_collective(load)
        again = {
            "none": _Work(),
            "full": forward,
            "core_attn": _Work(0.0, attention, _FORWARD_PASSES * layer.attention, context),
            "mlp": _Work(mlp, 0.0, _FORWARD_PASSES * layer.mlp, (collectives - context) / 2),
        }[parallel.recompute]
        device = self._device
        return forward.seconds(device), backward.seconds(device), again.seconds(device)

    def _layer_collectives(self, load: PackLoad) -> float:
        """Two all-reduces over tensor ranks; keys and values over context ranks."""
        tensor = self._config.parallel.tensor
        seconds = self._context_collective(load)
        if tensor > 1:
            size = load.tokens * self._spec.hidden_size * self._itemsize
            moved = 2 * size * (tensor - 1) / tensor / self._rate(tensor)
            seconds += 2 * (moved + self._device.collective_seconds)
        return seconds

    def _context_collective(self, load: PackLoad) -> float:
        parallel, spec = self._config.parallel, self._spec
        if parallel.context == 1:
            return 0.0
        kv = 2 * spec.num_kv_heads * spec.head_dim // parallel.tensor
        moved = (parallel.context - 1) * load.tokens * kv * self._itemsize
        rate = self._rate(parallel.tensor * parallel.context)
        return moved / rate + self._device.collective_seconds

    def _head(self, load: PackLoad, products: int, passes: float) -> float:
        """The LM head on the response tokens of a micro-batch."""
        logits = load.response_tokens * self._columns
        work = _Work(2.0 * products * logits * self._spec.hidden_size, 0.0, passes * logits * _FP32)
        return work.seconds(self._device)

    def _rate(self, span: int) -> float:
        """Bytes a second of a collective whose ranks are among `span` neighbouring ones."""
        return self._device.link_rate(within_node=span <= self._per_node)
