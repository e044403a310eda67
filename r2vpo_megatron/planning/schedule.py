"""What Megatron's pipeline schedules hold at a time, and how long they leave stages idle."""

from __future__ import annotations

import functools
from collections.abc import Sequence


def peak_in_flight(
    kept_bytes: Sequence[int], stage: int, pipeline: int, num_micro_batches: int
) -> list[tuple[int, int, int]]:
    """Bytes that wait for their backward pass whenever a backward pass begins.

    Args:
        kept_bytes: of one micro-batch, for every chunk of this stage.
        stage: 0..pipeline-1.
        pipeline: stages.
        num_micro_batches: of one update.

    Returns:
        For each chunk that is ever at work: (chunk, the most bytes kept when one of its
        micro-batches is at the end of forward or begins backward, micro-batches kept then).
    """
    virtual = len(kept_bytes)
    states = _states(stage, pipeline, virtual, _enough(num_micro_batches, pipeline, virtual))
    most: dict[int, tuple[int, int]] = {}
    for chunk, held in states:
        size = sum(count * kept for count, kept in zip(held, kept_bytes, strict=True))
        most[chunk] = max(most.get(chunk, (0, 0)), (size, sum(held)))
    return [(chunk, size, held) for chunk, (size, held) in sorted(most.items())]


def _enough(num_micro_batches: int, pipeline: int, virtual: int) -> int:
    """As many micro-batches as fill a pipeline; more make no difference to what it holds."""
    if virtual > 1:  # whole rounds, as the learner makes them
        num_micro_batches = -(-num_micro_batches // pipeline) * pipeline
    return min(num_micro_batches, 4 * pipeline)


@functools.lru_cache(maxsize=1024)
def _states(
    stage: int, pipeline: int, virtual: int, num_micro_batches: int
) -> frozenset[tuple[int, tuple[int, ...]]]:
    """(chunk, held micro-batches by chunk) after every forward and before every backward.

    1F1B, or interleaved 1F1B in rounds of one micro-batch a stage
    (megatron/core/pipeline_parallel/schedules.py).
    """
    chunks = [
        chunk
        for first in range(0, num_micro_batches, pipeline)
        for chunk in range(virtual)
        for _ in range(min(pipeline, num_micro_batches - first))
    ]
    if virtual == 1:
        num_warmup = pipeline - stage - 1
    else:
        num_warmup = 2 * (pipeline - stage - 1) + (virtual - 1) * pipeline
    num_warmup = min(num_warmup, len(chunks))
    held = [0] * virtual
    states = set()

    def forward(index: int) -> None:
        held[chunks[index]] += 1
        states.add((chunks[index], tuple(held)))

    def backward(index: int) -> None:
        chunk = virtual - 1 - chunks[index]
        states.add((chunk, tuple(held)))
        held[chunk] -= 1

    for index in range(num_warmup):
        forward(index)
    for index in range(len(chunks) - num_warmup):
        forward(num_warmup + index)
        backward(index)
    for index in range(len(chunks) - num_warmup, len(chunks)):
        backward(index)
    return frozenset(states)


def idle_share(pipeline: int, virtual: int, num_micro_batches: int) -> float:
    """Time that stages wait at both ends of an update, over the time that they work.

    Args:
        pipeline: stages.
        virtual: chunks a stage.
        num_micro_batches: of one update.
    """
    return (pipeline - 1) / (virtual * num_micro_batches)
