"""The language-model head: hidden states -> log-probs of given tokens, vocabulary parallel.

No tensor of size [tokens, vocabulary] exists: tokens are taken in chunks, the logits of a chunk
are made, reduced to a few numbers per token and dropped, and made again in backward.

With bf16 hidden states and weights the products with the weight are rounded to bf16, as in vLLM
and transformers; everything after the logits, and the sum of the weight's gradient over the
chunks, is fp32.

Shape legend: N tokens, C tokens of a chunk, H hidden size, V vocabulary columns of this rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Logit of a padded column. Finite, so that a shard of nothing but padding yields 0 * finite = 0
# and not NaN when the shards are combined.
PADDED_LOGIT = -1e30


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


def vocab_parallel_logprobs(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets_N: Tensor,
    shard: VocabularyShard,
    *,
    temperature: float = 1.0,
    chunk_tokens: int = 256,
    with_entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Log-prob of each target under softmax(hidden weight^T / temperature), and the entropy.

    Collective: every rank of `shard.group` must call, with the same N.

    Args:
        hidden_NH: [N, H], the same on every rank of the group. Its gradient is this rank's part:
            the caller's region (copy_to_... or gather_from_sequence_parallel_...) sums it.
        weight_VH: [V, H], this rank's shard.
        targets_N: [N] int64 token ids of the whole vocabulary.
        shard: the columns of this rank.
        temperature: divides the logits.
        chunk_tokens: tokens whose logits exist at a time.
        with_entropy: whether to compute the entropy. Its part of backward runs only if a loss
            depends on it.

    Returns:
        [N] fp32 log-probs and, if asked for, [N] fp32 entropies in nats, the same on every rank.
    """
    logprobs, entropy = _VocabParallelLogprobs.apply(
        hidden_NH, weight_VH, targets_N, shard, temperature, chunk_tokens, with_entropy
    )
    return logprobs, entropy if with_entropy else None


def _chunk_logits(
    hidden_CH: Tensor, weight_VH: Tensor, shard: VocabularyShard, scale: float
) -> Tensor:
    """[C, V] fp32 logits of this rank, padded columns pushed out of reach."""
    logits_CV = (hidden_CH @ weight_VH.t()).float().mul_(scale)
    logits_CV[:, shard.num_valid :] = PADDED_LOGIT
    return logits_CV


def _local_targets(targets_C: Tensor, shard: VocabularyShard) -> tuple[Tensor, Tensor]:
    """[C] column of each target in this shard (0 where it is elsewhere), [C] whether it is here."""
    columns = targets_C - shard.start
    is_here = (columns >= 0) & (columns < shard.num_valid)
    return torch.where(is_here, columns, 0), is_here


def _combine_shards(local_KC: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[3, C] (log normaliser, target logit, mean logit) from each shard's [4, C] in one round."""
    if group is None or dist.get_world_size(group) == 1 or local_KC.numel() == 0:
        gathered_RKC = local_KC.unsqueeze(0)
    else:
        parts = [torch.empty_like(local_KC) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, local_KC, group=group)
        gathered_RKC = torch.stack(parts)
    maxima_RC, sums_RC, targets_RC, weighted_RC = gathered_RKC.unbind(dim=1)
    maximum_C = maxima_RC.amax(dim=0)
    rescale_RC = torch.exp(maxima_RC - maximum_C)
    sum_C = (sums_RC * rescale_RC).sum(dim=0)
    mean_logit_C = (weighted_RC * rescale_RC).sum(dim=0) / sum_C
    return torch.stack([maximum_C + sum_C.log(), targets_RC.sum(dim=0), mean_logit_C])


class _VocabParallelLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        targets_N: Tensor,
        shard: VocabularyShard,
        temperature: float,
        chunk_tokens: int,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        combined = []
        for hidden_CH, targets_C in zip(
            hidden_NH.split(chunk_tokens), targets_N.split(chunk_tokens), strict=True
        ):
            logits_CV = _chunk_logits(hidden_CH, weight_VH, shard, 1.0 / temperature)
            columns_C, is_here_C = _local_targets(targets_C, shard)
            target_C = logits_CV.gather(1, columns_C.unsqueeze(1)).squeeze(1)
            maximum_C = logits_CV.amax(dim=1)
            if with_entropy:
                weights_CV = torch.exp(logits_CV - maximum_C.unsqueeze(1))
                weighted_C = logits_CV.mul_(weights_CV).sum(dim=1)
            else:
                weights_CV = logits_CV.sub_(maximum_C.unsqueeze(1)).exp_()
                weighted_C = maximum_C
            local = [
                maximum_C,
                weights_CV.sum(dim=1),
                torch.where(is_here_C, target_C, 0.0),
                weighted_C,
            ]
            combined.append(_combine_shards(torch.stack(local), shard.group))
        log_normalizer_N, target_N, mean_logit_N = torch.cat(combined, dim=1)
        entropy_N = log_normalizer_N - mean_logit_N
        ctx.save_for_backward(hidden_NH, weight_VH, targets_N, log_normalizer_N, entropy_N)
        ctx.shard, ctx.scale, ctx.chunk_tokens = shard, 1.0 / temperature, chunk_tokens
        ctx.set_materialize_grads(False)
        return target_N - log_normalizer_N, entropy_N

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, grad_logprobs_N: Tensor | None, grad_entropy_N: Tensor | None
    ) -> Any:
        hidden_NH, weight_VH, targets_N, log_normalizer_N, entropy_N = ctx.saved_tensors
        grad_hidden_NH = torch.empty_like(hidden_NH)
        # fp32: rounding the running sum to bf16 at every chunk adds an error per chunk.
        grad_weight_VH = torch.zeros_like(weight_VH, dtype=torch.float32)
        if grad_logprobs_N is None:
            grad_logprobs_N = torch.zeros_like(log_normalizer_N)
        for start in range(0, len(targets_N), ctx.chunk_tokens):
            chunk = slice(start, start + ctx.chunk_tokens)
            logits_CV = _chunk_logits(hidden_NH[chunk], weight_VH, ctx.shard, ctx.scale)
            log_softmax_CV = logits_CV.sub_(log_normalizer_N[chunk].unsqueeze(1))
            slope_CV = grad_logprobs_N[chunk].unsqueeze(1)
            if grad_entropy_N is not None:  # d entropy / d logit_j = -p_j (log p_j + entropy)
                slope_CV = slope_CV + grad_entropy_N[chunk].unsqueeze(1) * (
                    log_softmax_CV + entropy_N[chunk].unsqueeze(1)
                )
            grad_logits_CV = log_softmax_CV.exp().mul_(slope_CV).neg_()
            columns_C, is_here_C = _local_targets(targets_N[chunk], ctx.shard)
            at_target_C = torch.where(is_here_C, grad_logprobs_N[chunk], 0.0)
            grad_logits_CV.scatter_add_(1, columns_C.unsqueeze(1), at_target_C.unsqueeze(1))
            grad_logits_CV = grad_logits_CV.mul_(ctx.scale).to(hidden_NH.dtype)
            torch.matmul(grad_logits_CV, weight_VH, out=grad_hidden_NH[chunk])
            if weight_VH.dtype == torch.float32:
                grad_weight_VH.addmm_(grad_logits_CV.t(), hidden_NH[chunk])
            else:
                grad_weight_VH.add_(grad_logits_CV.t() @ hidden_NH[chunk])
        return grad_hidden_NH, grad_weight_VH.to(weight_VH.dtype), None, None, None, None, None
