"""The language-model head: hidden states -> log-probs of given tokens, vocabulary parallel.

No tensor of size [tokens, vocabulary] exists: tokens are taken in chunks, and the logits of a
chunk are made, reduced to a few numbers per token and dropped. Two ways to the gradient:

    general   backward makes the logits again: four products with the weight in all
    one pass  the caller says in advance what the derivative of its loss by each log-prob will
              be (`ExpectedSlopes`); the gradients are then formed while the logits are there:
              three products, which is the least there is, and nothing is made twice

With bf16 hidden states and weights the products with the weight are rounded to bf16, as in vLLM
and transformers; everything after the logits, and the sum of the weight's gradient over the
chunks, is fp32. A weight with a `main_grad` (Megatron's gradient buffer) gets its gradient there.

Shape legend: N tokens, C tokens of a chunk, H hidden size, V vocabulary columns of this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Logit of a padded column. Finite, so that a shard of nothing but padding yields 0 * finite = 0
# and not NaN when the shards are combined.
PADDED_LOGIT = -1e30

# Tokens of a chunk are as many as make logits of this size in fp32. More would need more memory,
# fewer more passes over the weight's gradient.
CHUNK_BYTES = 512 << 20
# A CPU takes the softmax a few rows at a time: they stay in its cache over the passes (34 against
# 93 ms for 256 x 153,376). An accelerator would only wait for launches.
CPU_BLOCK_BYTES = 4 << 20
# Vocabulary rows of one product of the weight's gradient, where it is not fp32 like its sum.
GRADIENT_BLOCK_COLUMNS = 16384


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
class ExpectedSlopes:
    """What backward will bring, known in advance; for objectives local to a token.

    Attributes:
        slopes_of: (log-probs of a chunk [C] fp32, the chunk's slice of the N tokens) -> [C] fp32
            derivative of the final loss by each of them. Called without gradient.
        report_mismatch: is given, in backward, a scalar on the device: the largest difference of
            a slope that came from the one that was expected, over the largest expected one. The
            gradients are wrong by that much.
    """

    slopes_of: Callable[[Tensor, slice], Tensor]
    report_mismatch: Callable[[Tensor], None]


def vocab_parallel_logprobs(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets_N: Tensor,
    shard: VocabularyShard,
    *,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
    with_entropy: bool = False,
    expected: ExpectedSlopes | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Log-prob of each target under softmax(hidden weight^T / temperature), and the entropy.

    Collective: every rank of `shard.group` must call, with the same N.

    Args:
        hidden_NH: [N, H], the same on every rank of the group. Its gradient is this rank's part:
            the caller's region (copy_to_... or gather_from_sequence_parallel_...) sums it.
        weight_VH: [V, H], this rank's shard. Where it has a `main_grad` its gradient is added
            there and autograd gets none; in the one pass that happens in forward already.
        targets_N: [N] int64 token ids of the whole vocabulary.
        shard: the columns of this rank.
        temperature: divides the logits.
        chunk_tokens: tokens whose logits exist at a time; by default as CHUNK_BYTES allows.
        with_entropy: whether to compute the entropy. Its part of backward runs only if a loss
            depends on it.
        expected: takes the one pass. No loss may then depend on the entropy.

    Returns:
        [N] fp32 log-probs, none above 0, and, if asked for, [N] fp32 entropies in nats, the same
        on every rank.
    """
    if chunk_tokens is None:
        chunk_tokens = max(1, CHUNK_BYTES // (4 * weight_VH.shape[0]))
    head = _Head(shard, 1.0 / temperature, chunk_tokens, with_entropy)
    if expected is None:
        logprobs, entropy = _GeneralHead.apply(hidden_NH, weight_VH, targets_N, head)
    else:
        logprobs, entropy = _OnePassHead.apply(hidden_NH, weight_VH, targets_N, head, expected)
    return logprobs, entropy if with_entropy else None


@dataclass(frozen=True)
class _Head:
    shard: VocabularyShard
    scale: float  # 1 / temperature
    chunk_tokens: int
    with_entropy: bool

    def chunks(self, num_tokens: int) -> Iterator[slice]:
        for start in range(0, num_tokens, self.chunk_tokens):
            yield slice(start, start + self.chunk_tokens)

    def logits(self, hidden_CH: Tensor, weight_VH: Tensor) -> Tensor:
        """[C, V] logits of this rank in fp32, padded columns pushed out of reach."""
        logits_CV = hidden_CH @ weight_VH.t()
        if logits_CV.dtype.itemsize < 4:
            logits_CV = logits_CV.float()
        if self.scale != 1.0:
            logits_CV.mul_(self.scale)
        logits_CV[:, self.shard.num_valid :] = PADDED_LOGIT
        return logits_CV

    def local_targets(self, targets_C: Tensor) -> tuple[Tensor, Tensor]:
        """[C] column of each target in this shard (0 if elsewhere), [C] whether it is here."""
        columns = targets_C - self.shard.start
        is_here = (columns >= 0) & (columns < self.shard.num_valid)
        return torch.where(is_here, columns, 0), is_here


@dataclass(frozen=True)
class _Softmax:
    """Per token, the same on all ranks of the tensor group: [C] each.

    The probability of a column is exp(logit - maximum) / normalizer.
    """

    maximum: Tensor
    normalizer: Tensor  # at least 1, so no log-prob can round to above 0
    logprobs: Tensor
    entropy: Tensor  # 0 where it was not asked for


def _row_blocks(matrix: Tensor, *vectors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Rows that fit a cache, each block with its entries of the vectors as columns [rows, 1]."""
    num_rows = len(matrix)
    if matrix.device.type == "cpu":
        num_rows = max(1, CPU_BLOCK_BYTES // (matrix.shape[1] * matrix.dtype.itemsize))
    columns = [vector.unsqueeze(1).split(num_rows) for vector in vectors]
    return zip(matrix.split(num_rows), *columns, strict=True)


def _softmax_(logits_CV: Tensor, targets_C: Tensor, head: _Head) -> tuple[_Softmax, Tensor]:
    """Reduce the logits, overwriting each by exp(logit - this rank's maximum of the row).

    Returns:
        The softmax over all ranks, and [C] this rank's maxima.
    """
    columns_C, is_here_C = head.local_targets(targets_C)
    target_C = logits_CV.gather(1, columns_C.unsqueeze(1)).squeeze(1)
    maxima_C = logits_CV.amax(dim=1)
    sums, weighted = [], []
    for rows, maxima in _row_blocks(logits_CV, maxima_C):
        rows.sub_(maxima)
        if head.with_entropy:
            exponentials = rows.exp()
            weighted.append(rows.mul_(exponentials).sum(dim=1))
            rows.copy_(exponentials)
        else:
            rows.exp_()
        sums.append(rows.sum(dim=1))
    sums_C = torch.cat(sums)
    weighted_C = torch.cat(weighted) if head.with_entropy else torch.zeros_like(sums_C)
    local = torch.stack([maxima_C, sums_C, torch.where(is_here_C, target_C, 0.0), weighted_C])
    return _combine_shards(local, head), maxima_C


def _combine_shards(local_KC: Tensor, head: _Head) -> _Softmax:
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
    return _Softmax(maximum_C, normalizer_C, logprobs_C, entropy_C)


class _GradientSums:
    """The gradients of hidden states and weight, filled chunk by chunk."""

    def __init__(self, hidden_NH: Tensor, weight_VH: Tensor, main_grad_VH: Tensor | None) -> None:
        self._hidden_NH, self._weight_VH = hidden_NH, weight_VH
        self._has_main_grad = main_grad_VH is not None
        self.hidden_NH = torch.empty_like(hidden_NH)
        # fp32: rounding the running sum to bf16 at every chunk adds an error per chunk.
        self.weight_VH = (
            torch.zeros_like(weight_VH, dtype=torch.promote_types(weight_VH.dtype, torch.float32))
            if main_grad_VH is None
            else main_grad_VH
        )

    def add(self, chunk: slice, grad_logits_CV: Tensor) -> None:
        """Two products, with the gradient of a chunk's logits."""
        hidden_CH = self._hidden_NH[chunk]
        grad_logits_CV = grad_logits_CV.to(hidden_CH.dtype)
        torch.matmul(grad_logits_CV, self._weight_VH, out=self.hidden_NH[chunk])
        if self.weight_VH.dtype == hidden_CH.dtype:
            self.weight_VH.addmm_(grad_logits_CV.t(), hidden_CH)
            return
        blocks = zip(
            self.weight_VH.split(GRADIENT_BLOCK_COLUMNS),
            grad_logits_CV.split(GRADIENT_BLOCK_COLUMNS, dim=1),
            strict=True,
        )
        for sum_BH, grad_logits_CB in blocks:
            sum_BH.add_(grad_logits_CB.t() @ hidden_CH)

    def weight_for_autograd(self) -> Tensor | None:
        """The weight's gradient in its own dtype; None where main_grad has it."""
        return None if self._has_main_grad else self.weight_VH.to(self._weight_VH.dtype)


def _add_at_targets_(matrix_CV: Tensor, values_C: Tensor, targets_C: Tensor, head: _Head) -> None:
    """Add each token's value at its target's column, where that is in this shard."""
    columns_C, is_here_C = head.local_targets(targets_C)
    here_C = torch.where(is_here_C, values_C, 0.0)
    matrix_CV.scatter_add_(1, columns_C.unsqueeze(1), here_C.unsqueeze(1))


class _OnePassHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        targets_N: Tensor,
        head: _Head,
        expected: ExpectedSlopes,
    ) -> tuple[Tensor, Tensor]:
        sums = _GradientSums(hidden_NH, weight_VH, getattr(weight_VH, "main_grad", None))
        logprobs, entropies, slopes = [], [], []
        for chunk in head.chunks(len(targets_N)):
            exps_CV = head.logits(hidden_NH[chunk], weight_VH)
            softmax, maxima_C = _softmax_(exps_CV, targets_N[chunk], head)
            slopes_C = expected.slopes_of(softmax.logprobs, chunk)
            # d log-prob / d logit_j = scale ((j is the target) - p_j)
            to_probability_C = torch.exp(maxima_C - softmax.maximum) / softmax.normalizer
            exps_CV.mul_((-head.scale * slopes_C * to_probability_C).unsqueeze(1))
            _add_at_targets_(exps_CV, head.scale * slopes_C, targets_N[chunk], head)
            sums.add(chunk, exps_CV)
            logprobs.append(softmax.logprobs)
            entropies.append(softmax.entropy)
            slopes.append(slopes_C)
        empty = hidden_NH.new_zeros(0, dtype=torch.float32)
        ctx.save_for_backward(sums.hidden_NH, torch.cat(slopes) if slopes else empty)
        ctx.grad_weight_VH = sums.weight_for_autograd()
        ctx.expected = expected
        entropy_N = torch.cat(entropies) if entropies else empty.clone()
        ctx.mark_non_differentiable(entropy_N)
        return torch.cat(logprobs) if logprobs else empty.clone(), entropy_N

    @staticmethod
    def backward(ctx: Any, grad_logprobs_N: Tensor, _: Any) -> Any:  # type: ignore[override]
        grad_hidden_NH, slopes_N = ctx.saved_tensors
        if len(slopes_N):
            largest = slopes_N.abs().amax().clamp(min=torch.finfo(torch.float32).tiny)
            ctx.expected.report_mismatch((grad_logprobs_N - slopes_N).abs().amax() / largest)
        return grad_hidden_NH, ctx.grad_weight_VH, None, None, None


class _GeneralHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, targets_N: Tensor, head: _Head
    ) -> tuple[Tensor, Tensor]:
        softmaxes = []
        for chunk in head.chunks(len(targets_N)):
            logits_CV = head.logits(hidden_NH[chunk], weight_VH)
            softmaxes.append(_softmax_(logits_CV, targets_N[chunk], head)[0])
        empty = hidden_NH.new_zeros(0, dtype=torch.float32)
        maximum_N, normalizer_N, logprobs_N, entropy_N = (
            torch.cat([empty, *(getattr(softmax, name) for softmax in softmaxes)])
            for name in ("maximum", "normalizer", "logprobs", "entropy")
        )
        ctx.save_for_backward(hidden_NH, weight_VH, targets_N, maximum_N, normalizer_N, entropy_N)
        ctx.head, ctx.main_grad_VH = head, getattr(weight_VH, "main_grad", None)
        ctx.set_materialize_grads(False)
        return logprobs_N, entropy_N

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, grad_logprobs_N: Tensor | None, grad_entropy_N: Tensor | None
    ) -> Any:
        hidden_NH, weight_VH, targets_N, maximum_N, normalizer_N, entropy_N = ctx.saved_tensors
        head, scale = ctx.head, ctx.head.scale
        sums = _GradientSums(hidden_NH, weight_VH, ctx.main_grad_VH)
        if grad_logprobs_N is None:
            grad_logprobs_N = torch.zeros_like(maximum_N)
        for chunk in head.chunks(len(targets_N)):
            matrix_CV = head.logits(hidden_NH[chunk], weight_VH)
            slopes_C, normalizer_C = grad_logprobs_N[chunk], normalizer_N[chunk]
            at_all_C = -scale * slopes_C / normalizer_C
            if grad_entropy_N is None:
                for rows, maxima, slopes in _row_blocks(matrix_CV, maximum_N[chunk], at_all_C):
                    rows.sub_(maxima).exp_().mul_(slopes)
            else:  # d entropy / d logit_j = -scale p_j (log p_j + entropy)
                at_log_C = -scale * grad_entropy_N[chunk] / normalizer_C
                offset_C = normalizer_C.log() - entropy_N[chunk]
                blocks = _row_blocks(matrix_CV, maximum_N[chunk], at_all_C, at_log_C, offset_C)
                for rows, maxima, slopes, log_slopes, offsets in blocks:
                    exponentials = rows.sub_(maxima).exp()
                    rows.sub_(offsets).mul_(log_slopes).add_(slopes).mul_(exponentials)
            _add_at_targets_(matrix_CV, scale * slopes_C, targets_N[chunk], head)
            sums.add(chunk, matrix_CV)
        return sums.hidden_NH, sums.weight_for_autograd(), None, None
