"""The collectives that statistics need; every reduction of a statistic goes through here."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from r2vpo_megatron.parallel.state import ParallelState
from r2vpo_megatron.rl.statistics import RatioStatistics, merge_vectors


def reduce_statistics(vectors_MK: Tensor, state: ParallelState) -> RatioStatistics:
    """Merge the statistics of one optimizer step over all ranks, identically on each.

    The vectors are gathered over data x context parallel ranks of the last stage and summed in
    rank order in float64 on the host: the same bits on every rank, and without fp64 collectives,
    which HCCL lacks. Each float64 sum travels as two fp32 numbers, 48 bits of it. Tensor parallel
    ranks hold duplicates and never take part. Pipeline stages then get the last stage's result.

    Collective: every rank must call, also one whose batch was empty.

    Args:
        vectors_MK: [M, K] fp32 on the last stage, M of its micro-batches; ignored elsewhere.
        state: the ranks' layout.

    Returns:
        Statistics of the global batch, on every rank.
    """
    num_entries = vectors_MK.shape[-1]
    merged = torch.zeros(2, num_entries, dtype=torch.float32, device=state.device)
    if state.is_last_stage:
        local = merge_vectors(vectors_MK.cpu())
        parts = [torch.zeros_like(merged) for _ in range(state.data_size * state.context_size)]
        dist.all_gather(
            parts, _split_float64(local).to(state.device), group=state.data_context_group
        )
        everyone = torch.stack([part.cpu().double().sum(dim=0) for part in parts])
        merged = _split_float64(merge_vectors(everyone)).to(state.device)
    if state.pipeline_size > 1:
        last_stage = dist.get_global_rank(state.pipeline_group, state.pipeline_size - 1)
        dist.broadcast(merged, src=last_stage, group=state.pipeline_group)
    return RatioStatistics.from_vector(merged.cpu().double().sum(dim=0))


def _split_float64(vector_K: Tensor) -> Tensor:
    """[2, K] fp32 whose sum is the float64 vector to about 48 bits; infinities stay in row 0."""
    high = vector_K.float()
    low = torch.where(high.isfinite(), (vector_K - high.double()).float(), 0.0)
    return torch.stack([high, low])
