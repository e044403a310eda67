"""The softmax of a vocabulary split over tensor parallel ranks, a chunk of tokens at a time.

A rank reduces its columns to four numbers per token; one gathering round makes the softmax of the
whole vocabulary of them. The logits themselves never leave their rank.

Shape legend: N tokens, C tokens of a chunk, V vocabulary columns of this rank, R ranks, K numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

# Logit of a padded column. Finite, so that a shard of nothing but padding yields 0 * finite = 0
# and not NaN when the shards are combined.
PADDED_LOGIT = -1e30

# A CPU takes the softmax a few rows at a time: they stay in its cache over the passes (34 against
# 93 ms for 256 x 153,376). An accelerator would only wait for launches: there they bound the fp32
# copies of bf16 logits.
CPU_BLOCK_BYTES, ACCELERATOR_BLOCK_BYTES = 4 << 20, 128 << 20


@dataclass(frozen=True)
class VocabularyShard:
    """Which columns of the vocabulary this tensor parallel rank holds.

    Attributes:
        start: id of the shard's first column.
        num_valid: leading columns that stand for a token; the rest is padding.
        group: the tensor parallel group; None for a whole vocabulary on one rank.
    """

    start: int
    num_valid: int
    group: dist.ProcessGroup | None

    @classmethod
    def of_rank(
        cls,
        vocab_size: int,
        shard_columns: int,
        tensor_rank: int,
        group: dist.ProcessGroup | None,
    ) -> VocabularyShard:
        """The shard of `tensor_rank`, of `shard_columns` columns, padding at the very end."""
        start = tensor_rank * shard_columns
        return cls(start, min(max(vocab_size - start, 0), shard_columns), group)


@dataclass(frozen=True)
class HeadSettings:
    """How a chunk's logits become a softmax."""

    shard: VocabularyShard
    scale: float  # 1 / temperature
    chunk_tokens: int
    with_entropy: bool

    def chunks(self, num_tokens: int) -> Iterator[slice]:
        """Slices of so many tokens, the last one shorter."""
        for start in range(0, num_tokens, self.chunk_tokens):
            yield slice(start, start + self.chunk_tokens)

    def logits_(self, rows: Tensor, buffer: Tensor) -> Tensor:
        """[rows, V] logits, fp32 at least, from those of the product: scaled, padding out of reach.

        In place where the rows are wide enough already, else in the buffer.
        """
        logits = rows if rows.dtype == buffer.dtype else buffer.copy_(rows)
        if self.scale != 1.0:
            logits.mul_(self.scale)
        logits[:, self.shard.num_valid :] = PADDED_LOGIT
        return logits

    def local_targets(self, targets_C: Tensor) -> tuple[Tensor, Tensor]:
        """[C] column of each target in this shard (0 if elsewhere), [C] whether it is here."""
        columns = targets_C - self.shard.start
        is_here = (columns >= 0) & (columns < self.shard.num_valid)
        return torch.where(is_here, columns, 0), is_here


@dataclass(frozen=True)
class Softmax:
    """Per token, the same on all ranks of the tensor group: [C] each.

    The probability of a column is exp(logit - maximum) / normalizer.
    """

    maximum: Tensor
    normalizer: Tensor  # at least 1, so no log-prob can round to above 0
    logprobs: Tensor
    entropy: Tensor  # 0 where it was not asked for


def row_blocks(matrix: Tensor, *vectors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """A few rows at a time: rows, two buffers, the rows' entries of the vectors [rows, 1].

    The buffers [2, rows, V], fp32 at least, are the same memory for every block. Were they made
    anew, what else is allocated meanwhile would settle in their places, and the heap of a CPU
    would grow to the size of the matrix.
    """
    block_bytes = CPU_BLOCK_BYTES if matrix.device.type == "cpu" else ACCELERATOR_BLOCK_BYTES
    num_rows = max(1, block_bytes // (4 * matrix.shape[1]))
    buffers = matrix.new_empty(
        (2, min(num_rows, len(matrix)), matrix.shape[1]),
        dtype=torch.promote_types(matrix.dtype, torch.float32),
    )
    columns = [vector.unsqueeze(1).split(num_rows) for vector in vectors]
    for rows, *entries in zip(matrix.split(num_rows), *columns, strict=True):
        yield rows, buffers[:, : len(rows)], *entries


def softmax_(matrix_CV: Tensor, targets_C: Tensor, head: HeadSettings) -> tuple[Softmax, Tensor]:
    """Reduce the product's logits, overwriting each by exp(logit - this rank's maximum of the row).

    Returns:
        The softmax over all ranks, and [C] this rank's maxima.
    """
    columns_C, is_here_C = head.local_targets(targets_C)
    blocks = []
    for rows, buffers, columns, is_here in row_blocks(matrix_CV, columns_C, is_here_C):
        logits = head.logits_(rows, buffers[0])
        target = torch.where(is_here, logits.gather(1, columns), 0.0)
        maxima = logits.amax(dim=1, keepdim=True)
        logits.sub_(maxima)
        if head.with_entropy:
            exponentials = torch.exp(logits, out=buffers[1])
            weighted = logits.mul_(exponentials).sum(dim=1, keepdim=True)
        else:
            exponentials = logits.exp_()
            weighted = torch.zeros_like(maxima)
        sums = exponentials.sum(dim=1, keepdim=True)
        if exponentials is not rows:
            rows.copy_(exponentials)
        blocks.append(torch.cat([maxima, sums, target, weighted], dim=1))
    local_KC = torch.cat(blocks).t().contiguous()
    return _combine_shards(local_KC, head), local_KC[0]


def _combine_shards(local_KC: Tensor, head: HeadSettings) -> Softmax:
    """The softmax of the whole vocabulary from each shard's four numbers, in one round."""
    group = head.shard.group
    if group is None or dist.get_world_size(group) == 1:
        gathered_RKC = local_KC.unsqueeze(0)
    else:
        parts = [torch.empty_like(local_KC) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, local_KC, group=group)
        gathered_RKC = torch.stack(parts)
    maxima_RC, sums_RC, targets_RC, weighted_RC = gathered_RKC.unbind(dim=1)
    maximum_C = maxima_RC.amax(dim=0)
    rescale_RC = torch.exp(maxima_RC - maximum_C)
    normalizer_C = (sums_RC * rescale_RC).sum(dim=0)
    log_normalizer_C = normalizer_C.log()
    entropy_C = torch.zeros_like(maximum_C)
    if head.with_entropy:  # log normaliser - E[logit], both less the maximum
        shifted_RC = weighted_RC + sums_RC * (maxima_RC - maximum_C)
        entropy_C = log_normalizer_C - (shifted_RC * rescale_RC).sum(dim=0) / normalizer_C
    logprobs_C = targets_RC.sum(dim=0) - maximum_C - log_normalizer_C
    return Softmax(maximum_C, normalizer_C, logprobs_C, entropy_C)
