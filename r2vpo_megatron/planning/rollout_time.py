"""Seconds that engines need for an iteration's responses, and a weight push for its bytes."""

from __future__ import annotations

import functools
import heapq
from dataclasses import dataclass

from r2vpo_megatron.config import ParallelConfig, RunConfig
from r2vpo_megatron.models.spec import ModelSpec
from r2vpo_megatron.planning.devices import Device
from r2vpo_megatron.planning.engine_memory import EngineRankMemory
from r2vpo_megatron.planning.learner_memory import ITEMSIZES
from r2vpo_megatron.planning.workload import Workload


@dataclass(frozen=True)
class RolloutTimes:
    """Seconds of one iteration.

    Attributes:
        prefill: of the prompts.
        decode: until the last response of an iteration that starts with idle engines ends.
        steady: of decode where engines have other responses to go on with; not less than the
            longest response leaves, for which no more iterations are waited than may run ahead.
        concurrency: responses that an engine decodes at a time.
        tokens_per_second: of all engines, while they are full.
    """

    prefill: float
    decode: float
    steady: float
    concurrency: int
    tokens_per_second: float


@dataclass(frozen=True)
class EngineRates:
    """What one engine's steps are made of, in seconds.

    Attributes:
        product_seconds: of one token's products.
        weight_seconds: of reading all weights.
        cached_seconds: of reading one token's keys and values.
        collective_seconds: of starting all collectives of a step.
        moved_seconds: of one token's part of what they move.
        sampler_seconds: of drawing one token from its logits.
        step_seconds: of scheduler and launches.
        hides_weights: products go on while weights are read.
    """

    product_seconds: float
    weight_seconds: float
    cached_seconds: float
    collective_seconds: float
    moved_seconds: float
    sampler_seconds: float
    step_seconds: float
    hides_weights: bool

    @classmethod
    def of(cls, spec: ModelSpec, config: RunConfig, device: Device) -> EngineRates:
        """Derive them.

        Args:
            spec: the model.
            config: of the run.
            device: that the engine's ranks run on.
        """
        tensor = config.rollout.tensor_parallel
        itemsize = ITEMSIZES[config.model.dtype]
        # Looking up an embedding reads a row; a tied one is read whole, as the head.
        lookup = 0 if spec.tied_embeddings else spec.vocab_size * spec.hidden_size
        num_multiplied = (spec.num_parameters - lookup) / tensor
        kv_bytes = 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * itemsize / tensor
        collective, moved = 0.0, 0.0
        if tensor > 1:
            rate = device.link_rate(within_node=True)
            collective = 2 * spec.num_layers * device.collective_seconds
            row = spec.hidden_size * itemsize
            moved = 2 * spec.num_layers * 2 * row * (tensor - 1) / tensor / rate
        return cls(
            product_seconds=2 * num_multiplied / device.matmul_rate,
            weight_seconds=num_multiplied * itemsize / device.stream_rate,
            cached_seconds=kv_bytes / (device.memory_bandwidth * device.cache_efficiency),
            collective_seconds=collective,
            moved_seconds=moved,
            sampler_seconds=device.sampler_passes * 4 * spec.vocab_size / device.stream_rate,
            step_seconds=device.step_seconds,
            hides_weights=not device.is_cpu,
        )

    def step(self, responses: float, cached_tokens: float) -> float:
        """Seconds of one decoding step."""
        products = responses * self.product_seconds
        together = max if self.hides_weights else sum
        work = together((products, self.weight_seconds)) + cached_tokens * self.cached_seconds
        of_each = responses * (self.moved_seconds + self.sampler_seconds)
        return work + of_each + self.collective_seconds + self.step_seconds

    def prefill(self, tokens: float) -> float:
        """Seconds of some prompts' tokens."""
        return tokens * (self.product_seconds + self.moved_seconds)


def rollout_times(
    spec: ModelSpec,
    config: RunConfig,
    device: Device,
    workload: Workload,
    memory: EngineRankMemory,
) -> RolloutTimes:
    """Seconds of the engines in one iteration.

    Args:
        spec: the model.
        config: of the run; its rollout section says how many engines there are.
        device: that they run on.
        workload: of an iteration.
        memory: of a rank of an engine.
    """
    num_engines = config.rollout.num_engines
    rates = EngineRates.of(spec, config, device)
    held = workload.prompt_tokens + workload.attended_tokens / 2
    concurrency = max(1, min(config.rollout.max_num_seqs, int(memory.cached_tokens / held)))
    per_engine = max(1, -(-workload.num_responses // num_engines))
    # A group's prompt is read once: its responses go to one engine, which caches it.
    groups = max(1.0, per_engine / workload.responses_per_prompt)
    decode = _decode(rates, workload, per_engine, concurrency)
    ahead = per_engine * (1 + config.iterations_ahead)
    full = min(concurrency, ahead)
    step = rates.step(full, full * held)
    # An iteration's responses begin so many iterations before they are learned from.
    longest = workload.response_lengths(per_engine)[0] * step / (1 + config.iterations_ahead)
    return RolloutTimes(
        prefill=rates.prefill(groups * workload.prompt_tokens),
        decode=decode,
        steady=max(per_engine * workload.response_tokens / full * step, longest),
        concurrency=full,
        tokens_per_second=num_engines * full / step,
    )


@functools.lru_cache(maxsize=4096)
def _decode(rates: EngineRates, workload: Workload, num_responses: int, concurrency: int) -> float:
    """Seconds until the last of an engine's responses ends, from responses that end in turn.

    Between two ends the number of responses stays and the cache grows by a token each.
    """
    # In no order: as many long ones early as late.
    lengths = workload.response_lengths(num_responses)
    waiting = [lengths[(index * 7919) % num_responses] for index in range(num_responses)]
    if len(set(waiting)) < min(2, num_responses):  # 7919 divides the number
        waiting = lengths[:]
    seconds, now, cached = 0.0, 0.0, 0.0
    active: list[tuple[float, float]] = []  # (step at which it ends, its length)
    while waiting or active:
        while waiting and len(active) < concurrency:
            length = waiting.pop()
            heapq.heappush(active, (now + length, length))
            cached += workload.prompt_tokens
        end, length = heapq.heappop(active)
        steps, count = end - now, len(active) + 1
        seconds += steps * rates.step(count, cached + count * steps / 2)
        cached += count * steps - length - workload.prompt_tokens
        now = end
    return seconds


def push_seconds(
    spec: ModelSpec, config: RunConfig, device: Device, parallel: ParallelConfig, per_node: int
) -> float:
    """Seconds of one weight push: rank 0 gathers a bucket, then sends it, while engines load one.

    Args:
        spec: the model.
        config: of the run.
        device: of rank 0.
        parallel: the learner's layout.
        per_node: devices of a node.
    """
    num_bytes = spec.num_parameters * ITEMSIZES[config.model.dtype]
    model_ranks = parallel.tensor * parallel.pipeline
    far = device.link_rate(within_node=False)
    # The ranks of a stage are neighbours; those of other stages are data parallel size apart.
    is_near = parallel.num_ranks <= per_node
    gather = (1 - 1 / model_ranks) / (device.link_rate(within_node=True) if is_near else far)
    return num_bytes * (gather + 1 / far)
