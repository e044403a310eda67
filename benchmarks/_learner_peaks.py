"""Peak memory and stage times of real learner ranks on the CPU, for the benchmarks of the plan.

Two measures of a rank's memory, both above what it holds when Megatron is imported:
    tensors    the most bytes that torch's CPU allocator had given out at a time, from the
               profiler's memory events: what a model of tensors can be held to
    resident   the high-water mark of the process: what the kernel sees, with the allocator's holes,
               gloo's buffers, code and threads
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._shapes import Shape
from benchmarks.convert import write_checkpoint
from r2vpo_megatron import config as c
from r2vpo_megatron.data.packing import pack_trajectories
from r2vpo_megatron.observability.memory import resident_bytes
from r2vpo_megatron.records import PackedBatch, Trajectory
from tests.distributed.ranks import run_ranks

NUM_UPDATES = 2  # AdamW makes its moments in the first
PROMPT_SHARE = 8  # an eighth of a sequence is its prompt


@dataclass(frozen=True)
class LearnerCase:
    """A model, a layout and the sequences of one update."""

    name: str
    shape: Shape
    parallel: c.ParallelConfig
    lengths: tuple[int, ...]  # tokens of each sequence of the update
    architecture: str = "pangu"
    dtype: str = "float32"
    distributed: bool = True

    @property
    def config(self) -> c.RunConfig:
        """What the ranks run by."""
        return c.RunConfig(
            model=c.ModelConfig(path="unused", dtype=self.dtype),
            rollout=c.RolloutConfig(max_prompt_tokens=8, max_response_tokens=8),
            optimizer=c.OptimizerConfig(distributed=self.distributed),
            parallel=self.parallel,
            runtime=c.RuntimeConfig(device="cpu"),
        )

    def micro_batches(self) -> list[list[PackedBatch]]:
        """[data parallel rank][micro-batch] of the update."""
        return pack_trajectories(
            make_trajectories(self.lengths, self.shape.vocab),
            max_tokens_per_micro_batch=self.parallel.max_tokens_per_micro_batch,
            num_data_parallel_ranks=self.parallel.data,
            pad_to_multiple_of=self.parallel.tokens_multiple,
        )


@dataclass(frozen=True)
class RankPeak:
    """What one rank held at most, in bytes above the imports, and when."""

    tensor_bytes: int
    resident_bytes: int
    static_bytes: int  # of tensors, after an update


def make_trajectories(lengths: Sequence[int], vocab: int) -> list[Trajectory]:
    """Random sequences; log-probs as of a model that is nearly uniform."""
    random = np.random.default_rng(0)
    trajectories = []
    for index, length in enumerate(lengths):
        num_prompt = max(1, length // PROMPT_SHARE)
        num_response = length - num_prompt
        prompt, response = (
            tuple(random.integers(0, vocab, count).tolist()) for count in (num_prompt, num_response)
        )
        logprobs = np.full(num_response, -math.log(vocab), dtype=np.float32)
        trajectories.append(
            Trajectory(
                sample_id=f"{index:05d}",
                group_id="group",
                prompt_token_ids=prompt,
                response_token_ids=response,
                behavior_logprobs=logprobs,
                rollout_logprobs=logprobs,
                reward=0.0,
                advantage=float(random.normal()),
                finish_reason="stop",
                policy_versions=np.zeros(num_response, dtype=np.int64),
                iteration=1,
            )
        )
    return trajectories


def measure_peaks(case: LearnerCase, folder: Path) -> list[RankPeak]:
    """Two updates on real ranks; the parent must have imported Megatron, with one thread.

    Args:
        case: what runs.
        folder: an empty one, for the checkpoint.
    """
    model_dir = folder / "model"
    write_checkpoint(case.shape, case.architecture, model_dir)
    return run_ranks(
        case.parallel.num_ranks, _rank_peak, case, model_dir, timeout_seconds=600.0
    )


def _rank_peak(
    rank: int, world_size: int, init_method: str, case: LearnerCase, model_dir: Path
) -> RankPeak:
    import torch
    from torch.profiler import ProfilerActivity, profile

    from r2vpo_megatron.learner.start import start_learner
    from r2vpo_megatron.parallel.state import destroy_parallel

    batches = case.micro_batches()
    Path("/proc/self/clear_refs").write_text("5")  # the peak of the parent is not this rank's
    resident_before = resident_bytes()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        actor, state = start_learner(case.config, model_dir, rank, init_method)
        for _ in range(NUM_UPDATES):
            actor.update(batches[state.data_rank], 0.04, policy_version=0)
        torch.zeros(1)
    peak_resident = _high_water_bytes() - resident_before
    del actor
    destroy_parallel()
    peak, final = _peak_of_events(profiler)
    return RankPeak(peak, peak_resident, final)


def _high_water_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM")


def _peak_of_events(profiler: Any) -> tuple[int, int]:
    """Most bytes allocated at a time, and bytes at the end, since the profiler began."""
    events = sorted(
        (event.start_ns(), event.nbytes())
        for event in profiler.profiler.kineto_results.events()
        if event.name() == "[memory]"
    )
    sums = np.cumsum([num_bytes for _, num_bytes in events])
    return int(sums.max()), int(sums[-1])
