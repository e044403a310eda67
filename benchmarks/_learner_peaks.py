"""Peak memory of real learner ranks on the CPU, beside what the plan says of them.

Two measures of a rank's memory, both above what it holds when Megatron is imported:
    tensors    the most bytes that torch's CPU allocator had given out at a time, from the
               profiler's memory events: what a model of tensors can be held to
    resident   the high-water mark of the process: what the kernel sees, with the allocator's holes,
               gloo's buffers, code and threads
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks._learner_cases import RATIO_PENALTY, LearnerCase, running_learner
from benchmarks.convert import write_checkpoint
from r2vpo_megatron.models.spec import read_model_spec
from r2vpo_megatron.observability.memory import resident_bytes
from r2vpo_megatron.planning.devices import find_device
from r2vpo_megatron.planning.learner_memory import LearnerRankMemory, learner_memory
from r2vpo_megatron.planning.pack_load import PackLoad
from tests.distributed.ranks import run_ranks

NUM_UPDATES = 2  # AdamW makes its moments in the first


@dataclass(frozen=True)
class RankPeak:
    """What one rank held at most, in bytes above the imports.

    Attributes:
        tensor_bytes: given out by torch's allocator.
        resident_bytes: resident; of a run of its own, since the profiler's records take memory.
    """

    tensor_bytes: int
    resident_bytes: int


def measure_peaks(case: LearnerCase, folder: Path, *, resident: bool = True) -> list[RankPeak]:
    """Two updates on real ranks, by rank; the parent must have imported Megatron, with one thread.

    Args:
        case: what runs.
        folder: an empty one, for the checkpoint.
        resident: whether to run once more for the resident size, else it is 0.
    """
    model_dir = folder / "model"
    write_checkpoint(case.shape, case.architecture, model_dir)
    num_ranks = case.parallel.num_ranks
    tensors = run_ranks(num_ranks, _tensor_peak, case, model_dir, timeout_seconds=600.0)
    sizes = [0] * num_ranks
    if resident:
        sizes = run_ranks(num_ranks, _resident_peak, case, model_dir, timeout_seconds=600.0)
    return [RankPeak(*pair) for pair in zip(tensors, sizes, strict=True)]


def modelled_peak(case: LearnerCase, model_dir: Path, rank: int) -> LearnerRankMemory:
    """What the plan says of a rank, from the very micro-batches that it gets."""
    parallel = case.parallel
    batches = case.micro_batches()
    # Megatron's order of ranks: tensor, context, data, pipeline.
    context_rank = rank // parallel.tensor % parallel.context
    stage = rank // (parallel.tensor * parallel.context * parallel.data)
    loads = [
        PackLoad.of_batch(batch, context_rank, parallel.context)
        for of_rank in batches
        for batch in of_rank
    ]
    names = [field.name for field in dataclasses.fields(PackLoad)]
    load = PackLoad(*(max(getattr(load, name) for load in loads) for name in names))
    spec = read_model_spec(model_dir)
    return learner_memory(spec, case.config, find_device("cpu"), len(batches[0]), load)[stage]


def _tensor_peak(
    rank: int, world_size: int, init_method: str, case: LearnerCase, model_dir: Path
) -> int:
    from torch.profiler import ProfilerActivity, profile

    with (
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
        running_learner(rank, init_method, case, model_dir) as (actor, batches),
    ):
        for _ in range(NUM_UPDATES):
            actor.update(batches, RATIO_PENALTY, policy_version=0)
    return _peak_of_events(profiler)


def _resident_peak(
    rank: int, world_size: int, init_method: str, case: LearnerCase, model_dir: Path
) -> int:
    Path("/proc/self/clear_refs").write_text("5")  # the parent's peak is not this rank's
    before = resident_bytes()
    with running_learner(rank, init_method, case, model_dir) as (actor, batches):
        for _ in range(NUM_UPDATES):
            actor.update(batches, RATIO_PENALTY, policy_version=0)
        return _high_water_bytes() - before


def _high_water_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM")


def _peak_of_events(profiler: Any) -> int:
    """Most bytes allocated at a time since the profiler began.

    What threads of gloo free is not among the events. That a block was freed shows only when its
    address is given out again; until then it counts.
    """
    live: dict[int, int] = {}
    current, peak = 0, 0
    for _, address, num_bytes in sorted(_allocations(profiler)):
        if num_bytes > 0:
            current += num_bytes - live.get(address, 0)
            live[address] = num_bytes
            peak = max(peak, current)
        else:
            current -= live.pop(address, 0)
    return peak


def _allocations(profiler: Any) -> Iterator[tuple[int, int, int]]:
    """(time in ns, address, bytes, below 0 where they are freed) of every event."""
    from torch._C._profiler import _EventType

    remaining = list(profiler.profiler.kineto_results.experimental_event_tree())
    while remaining:
        event = remaining.pop()
        remaining.extend(event.children)
        if event.tag == _EventType.Allocation:
            fields = event.extra_fields
            yield event.start_time_ns, fields.ptr, fields.alloc_size
