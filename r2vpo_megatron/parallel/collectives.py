"""The collectives that statistics need; every reduction of a statistic goes through here."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from r2vpo_megatron.parallel.state import ParallelState
from r2vpo_megatron.rl.staleness import BUCKETS, SUMS_PER_BUCKET, buckets_from_sums
from r2vpo_megatron.rl.statistics import (
    QUANTILES,
    VECTOR_LENGTH,
    MicroBatchStatistics,
    RatioStatistics,
    excess_quantiles,
    merge_vectors,
)

_STALENESS_SHAPE = (len(BUCKETS), SUMS_PER_BUCKET)
_STALENESS_LENGTH = len(BUCKETS) * SUMS_PER_BUCKET


def reduce_statistics(
    kept: Sequence[MicroBatchStatistics], state: ParallelState
) -> RatioStatistics:
    """Merge the statistics of one optimizer step over all ranks, identically on each.

    The vectors, and with them the sums by staleness, are gathered over data x context parallel
    ranks of the last stage and summed in rank order in float64 on the host: the same bits on every
    rank, and without fp64 collectives, which HCCL lacks. Each float64 sum travels as two fp32
    numbers, 48 bits of it. The ratios themselves are gathered as well, for their quantiles. Tensor
    parallel ranks hold duplicates, each gathers in a group of its own and nothing is added up over
    them. Pipeline stages then get the last stage's result.

    Collective: every rank must call, also one whose batch was empty.

    Args:
        kept: on the last stage, of its micro-batches; ignored elsewhere.
        state: the ranks' layout.

    Returns:
        Statistics of the global batch, on every rank.
    """
    lengths = [VECTOR_LENGTH, _STALENESS_LENGTH, len(QUANTILES)]
    merged = torch.zeros(2, sum(lengths), dtype=torch.float32, device=state.device)
    if state.is_last_stage:
        local = _split_float64(_merge_rows(_as_rows(kept))).to(state.device)
        parts = [torch.zeros_like(local) for _ in range(state.data_size * state.context_size)]
        dist.all_gather(parts, local, group=state.data_context_group)
        everyone = torch.stack([part.cpu().double().sum(dim=0) for part in parts])
        excess = [statistics.excess for statistics in kept]
        values = gather_values(torch.cat(excess or [torch.zeros(0)]), state)
        result = torch.cat([_merge_rows(everyone), excess_quantiles(values)])
        merged = _split_float64(result).to(state.device)
    if state.pipeline_size > 1:
        last_stage = dist.get_global_rank(state.pipeline_group, state.pipeline_size - 1)
        dist.broadcast(merged, src=last_stage, group=state.pipeline_group)
    vector, staleness, quantiles = merged.cpu().double().sum(dim=0).split(lengths)
    buckets = buckets_from_sums(staleness.view(_STALENESS_SHAPE))
    return RatioStatistics.from_vector(vector, quantiles, buckets)


def _as_rows(kept: Sequence[MicroBatchStatistics]) -> Tensor:
    """[M, K] on the host: of each micro-batch its vector, then its staleness sums; M may be 0."""
    if not kept:
        return torch.zeros(0, VECTOR_LENGTH + _STALENESS_LENGTH)
    return torch.stack([torch.cat([each.vector, each.staleness.flatten()]) for each in kept]).cpu()


def _merge_rows(rows_MK: Tensor) -> Tensor:
    """[K] float64 of micro-batches or ranks in their order."""
    vectors, staleness = rows_MK.double().split([VECTOR_LENGTH, _STALENESS_LENGTH], dim=1)
    return torch.cat([merge_vectors(vectors), staleness.sum(dim=0)])


def gather_values(values_N: Tensor, state: ParallelState) -> Tensor:
    """All ranks' values, in rank order, over data x context parallel ranks.

    Sizes travel first; then every rank sends as many values as the largest has, since HCCL and
    gloo gather equal sizes only.

    Collective: every rank of the group must call, whatever number of values it has.

    Args:
        values_N: [N] fp32 of this rank; N may differ between ranks and be 0.
        state: the ranks' layout.

    Returns:
        [sum of N] fp32 on the rank's device.
    """
    values_N = values_N.to(state.device, torch.float32)
    group, num_ranks = state.data_context_group, state.data_size * state.context_size
    size = torch.tensor([values_N.numel()], dtype=torch.int64, device=state.device)
    gathered_sizes = [torch.zeros_like(size) for _ in range(num_ranks)]
    dist.all_gather(gathered_sizes, size, group=group)
    sizes = torch.cat(gathered_sizes).tolist()
    if max(sizes) == 0:
        return values_N
    padded = values_N.new_zeros(max(sizes))
    padded[: values_N.numel()] = values_N
    parts = [torch.empty_like(padded) for _ in range(num_ranks)]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def _split_float64(vector_K: Tensor) -> Tensor:
    """[2, K] fp32 whose sum is the float64 vector to about 48 bits; infinities stay in row 0."""
    high = vector_K.float()
    low = torch.where(high.isfinite(), (vector_K - high.double()).float(), 0.0)
    return torch.stack([high, low])
