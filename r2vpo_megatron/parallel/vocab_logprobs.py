"""The language-model head: hidden states -> log-probs of given tokens, vocabulary parallel.

No tensor of size [tokens, vocabulary] exists: tokens are taken in chunks, and the logits of a
chunk are made, reduced to a few numbers per token and dropped. Two ways to the gradient:

    general   backward makes the logits again: four products with the weight in all
    one pass  the caller says in advance what the derivative of its loss by each log-prob will
              be (`ExpectedSlopes`); the gradients are then formed while the logits are there:
              three products, which is the least there is, and nothing is made twice

With bf16 hidden states and weights the products with the weight take and give bf16, as in vLLM and
transformers; everything between the logits and their gradient, and the sum of the weight's
gradient over the chunks, is fp32. A weight with a `main_grad` (Megatron's gradient buffer) gets its
gradient there.

Shape legend: N tokens, C tokens of a chunk, H hidden size, V vocabulary columns of this rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from r2vpo_megatron.parallel.vocab_softmax import (
    HeadSettings,
    VocabularyShard,
    row_blocks,
    softmax_,
)

# Tokens of a chunk are as many as make logits of this size. More would need more memory, fewer
# more passes over the weight's gradient.
CHUNK_BYTES = 512 << 20
# Vocabulary rows of one product of the weight's gradient, where it is not fp32 like its sum.
GRADIENT_BLOCK_COLUMNS = 16384


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
        chunk_tokens = max(1, CHUNK_BYTES // (weight_VH.shape[0] * weight_VH.dtype.itemsize))
    head = HeadSettings(shard, 1.0 / temperature, chunk_tokens, with_entropy)
    if expected is None:
        logprobs, entropy = _GeneralHead.apply(hidden_NH, weight_VH, targets_N, head)
    else:
        logprobs, entropy = _OnePassHead.apply(hidden_NH, weight_VH, targets_N, head, expected)
    return logprobs, entropy if with_entropy else None


def _logit_gradient_(
    exps_CV: Tensor,
    factors_C: Tensor,
    slopes_C: Tensor,
    logprobs_C: Tensor,
    targets_C: Tensor,
    head: HeadSettings,
) -> None:
    """Turn exponentials into the gradient of the product's logits.

    d log-prob / d logit_j = scale ((j is the target) - p_j). The target's entry is made of its
    log-prob: where p is almost 1, 1 - p of a p in bf16 has no digit left.

    Args:
        exps_CV: [C, V] from `softmax_`; overwritten.
        factors_C: [C] fp32, the probability of a column over its exponential.
        slopes_C: [C] fp32, derivative of the loss by the log-prob.
        logprobs_C: [C] fp32.
        targets_C: [C] int64.
        head: settings.
    """
    at_all_C = -head.scale * slopes_C * factors_C
    at_target_C = -head.scale * slopes_C * torch.expm1(logprobs_C)
    columns_C, is_here_C = head.local_targets(targets_C)
    blocks = row_blocks(exps_CV, at_all_C, at_target_C, columns_C, is_here_C)
    for rows, buffers, at_all, at_target, columns, is_here in blocks:
        gradient = torch.mul(rows, at_all, out=rows if rows.dtype == at_all.dtype else buffers[0])
        gradient.scatter_(1, columns, torch.where(is_here, at_target, gradient.gather(1, columns)))
        if gradient is not rows:
            rows.copy_(gradient)


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
        """Two products, with the gradient of a chunk's logits in the hidden states' dtype."""
        hidden_CH = self._hidden_NH[chunk]
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


def _general_logit_gradient_(
    matrix_CV: Tensor,
    softmax: tuple[Tensor, Tensor],
    slopes_C: Tensor,
    entropy_slopes: tuple[Tensor, ...],
    targets_C: Tensor,
    head: HeadSettings,
) -> None:
    """Turn the product's logits, made again, into their gradient.

    Args:
        matrix_CV: [C, V] logits of the product; overwritten.
        softmax: [C] maximum and [C] normaliser of each row.
        slopes_C: [C] fp32, derivative of the loss by the log-prob.
        entropy_slopes: nothing, or [C] log normaliser - entropy and [C] the derivative by the
            entropy over the normaliser: d entropy / d logit_j = -scale p_j (log p_j + entropy).
        targets_C: [C] int64.
        head: settings.
    """
    maximum_C, normalizer_C = softmax
    columns_C, is_here_C = head.local_targets(targets_C)
    vectors = (maximum_C, slopes_C, slopes_C / normalizer_C, columns_C, is_here_C)
    blocks = row_blocks(matrix_CV, *vectors, *entropy_slopes)
    for rows, buffers, maxima, slopes, at_all, columns, is_here, *entropy in blocks:
        shifted = head.logits_(rows, buffers[0]).sub_(maxima)
        if not entropy:
            gradient = shifted.exp_().mul_(-head.scale * at_all)
        else:
            offsets, at_log = entropy
            exponentials = torch.exp(shifted, out=buffers[1])
            gradient = shifted.sub_(offsets).mul_(at_log).add_(at_all)
            gradient.mul_(exponentials.mul_(-head.scale))
        gradient.scatter_add_(1, columns, torch.where(is_here, head.scale * slopes, 0.0))
        if gradient is not rows:
            rows.copy_(gradient)


class _OnePassHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        targets_N: Tensor,
        head: HeadSettings,
        expected: ExpectedSlopes,
    ) -> tuple[Tensor, Tensor]:
        sums = _GradientSums(hidden_NH, weight_VH, getattr(weight_VH, "main_grad", None))
        logprobs, entropies, slopes = [], [], []
        for chunk in head.chunks(len(targets_N)):
            matrix_CV = hidden_NH[chunk] @ weight_VH.t()
            softmax, maxima_C = softmax_(matrix_CV, targets_N[chunk], head)
            slopes_C = expected.slopes_of(softmax.logprobs, chunk)
            factors_C = torch.exp(maxima_C - softmax.maximum) / softmax.normalizer
            _logit_gradient_(
                matrix_CV, factors_C, slopes_C, softmax.logprobs, targets_N[chunk], head
            )
            sums.add(chunk, matrix_CV)
            del matrix_CV  # else two chunks' are alive at once
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
        ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, targets_N: Tensor, head: HeadSettings
    ) -> tuple[Tensor, Tensor]:
        softmaxes = []
        for chunk in head.chunks(len(targets_N)):
            matrix_CV = hidden_NH[chunk] @ weight_VH.t()
            softmaxes.append(softmax_(matrix_CV, targets_N[chunk], head)[0])
            del matrix_CV  # else two chunks' are alive at once
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
        sums = _GradientSums(hidden_NH, weight_VH, ctx.main_grad_VH)
        if grad_logprobs_N is None:
            grad_logprobs_N = torch.zeros_like(maximum_N)
        for chunk in ctx.head.chunks(len(targets_N)):
            matrix_CV = hidden_NH[chunk] @ weight_VH.t()
            normalizer_C = normalizer_N[chunk]
            entropy_slopes: tuple[Tensor, ...] = ()
            if grad_entropy_N is not None:
                offsets_C = normalizer_C.log() - entropy_N[chunk]
                entropy_slopes = (offsets_C, grad_entropy_N[chunk] / normalizer_C)
            _general_logit_gradient_(
                matrix_CV,
                (maximum_N[chunk], normalizer_C),
                grad_logprobs_N[chunk],
                entropy_slopes,
                targets_N[chunk],
                ctx.head,
            )
            sums.add(chunk, matrix_CV)
            del matrix_CV  # else two chunks' are alive at once
        return sums.hidden_NH, sums.weight_for_autograd(), None, None
