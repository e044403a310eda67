"""What Megatron's pipeline schedule runs per micro-batch: forward, then log-probs or the loss.

A forward step returns (output, function of the output), as
`megatron.core.pipeline_parallel.schedules.forward_step` asks; the function runs on the last
stage alone and returns (loss sum, denominator count, what to keep).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.utils import unwrap_model
from torch import Tensor

from r2vpo_megatron.learner.head_checks import HeadChecks
from r2vpo_megatron.learner.micro_batch import MicroBatch
from r2vpo_megatron.parallel.state import ParallelState
from r2vpo_megatron.parallel.vocab_logprobs import ExpectedSlopes, vocab_parallel_logprobs
from r2vpo_megatron.parallel.vocab_softmax import VocabularyShard
from r2vpo_megatron.rl.aggregation import denominator_count
from r2vpo_megatron.rl.loss import LossSettings, loss_gradient, policy_loss

LossFunction = Callable[[Tensor], tuple[Tensor, Tensor, Any]]
ForwardStep = Callable[[Iterator[MicroBatch], Any], tuple[Tensor, LossFunction]]
SlopesOf = Callable[[Tensor, slice], Tensor]  # as in ExpectedSlopes


@dataclass(frozen=True)
class PolicyHead:
    """Log-probs of the response tokens from the last stage's hidden states."""

    state: ParallelState
    vocab_size: int
    temperature: float
    sequence_parallel: bool

    def logprobs(
        self,
        model: Any,
        hidden: Tensor,
        batch: MicroBatch,
        *,
        with_entropy: bool,
        slopes_of: SlopesOf | None = None,
        checks: HeadChecks | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """[N] fp32 log pi_theta at the sampling temperature and entropy, the same on TP ranks.

        Collective: every rank of the tensor parallel group must call.

        Args:
            model: the last stage's PolicyModel, wrapped or not.
            hidden: [T, 1, H] after the final norm; [T / TP, 1, H] under sequence parallelism.
            batch: the micro-batch that went in.
            with_entropy: whether to compute the entropy, in nats.
            slopes_of: derivative of the loss by a chunk's log-probs, where they alone decide it;
                takes the head's one pass.
            checks: of this update; needed with `slopes_of`.
        """
        group = self.state.tensor_group
        if self.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=True, group=group
            )
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden, group=group)
        weight = unwrap_model(model).lm_head_weight()
        shard = VocabularyShard.of_rank(
            self.vocab_size, weight.shape[0], self.state.tensor_rank, group
        )
        hidden_NH = hidden[:, 0].index_select(0, batch.response_positions)
        expected = None
        if slopes_of is not None:
            assert checks is not None
            expected = ExpectedSlopes(slopes_of, checks.report_slopes)
        logprobs, entropy = vocab_parallel_logprobs(
            hidden_NH,
            weight,
            batch.target_ids,
            shard,
            temperature=self.temperature,
            with_entropy=with_entropy,
            expected=expected,
        )
        if checks is not None:
            checks.report_logprobs(logprobs)
            checks.report_plain(
                logprobs,
                hidden_NH,
                weight,
                batch.target_ids,
                shard,
                self.temperature,
                self.vocab_size,
            )
        return logprobs, entropy


def _run_model(model: Any, batch: MicroBatch) -> Tensor:
    output: Tensor = model(
        batch.token_ids, batch.position_ids, None, packed_seq_params=batch.packed_sequences
    )
    return output


def logprob_step(head: PolicyHead) -> ForwardStep:
    """A forward step that keeps the log-probs of whole responses, sample id -> [R] fp32."""

    def forward_step(batches: Iterator[MicroBatch], model: Any) -> tuple[Tensor, LossFunction]:
        batch = next(batches)

        def keep_logprobs(hidden: Tensor) -> tuple[Tensor, Tensor, Any]:
            logprobs, _ = head.logprobs(model, hidden, batch, with_entropy=False)
            whole = batch.whole_responses(logprobs)
            kept = dict(zip(batch.sample_ids, whole, strict=True))
            return logprobs.sum(), _count(len(logprobs), hidden), kept

        return _run_model(model, batch), keep_logprobs

    return forward_step


def policy_step(head: PolicyHead, settings: LossSettings, checks: HeadChecks) -> ForwardStep:
    """A forward step that returns the R2VPO (or a baseline's) loss and keeps its statistics.

    Where the loss is local to a token the LM head takes its one pass.
    """

    def forward_step(batches: Iterator[MicroBatch], model: Any) -> tuple[Tensor, LossFunction]:
        batch = next(batches)

        def slopes_of(logprobs: Tensor, part: slice) -> Tensor:
            return loss_gradient(logprobs, batch.tokens.narrow(part), settings)

        def loss_and_statistics(hidden: Tensor) -> tuple[Tensor, Tensor, Any]:
            logprobs, entropy = head.logprobs(
                model,
                hidden,
                batch,
                with_entropy=True,
                slopes_of=slopes_of if settings.is_local else None,
                checks=checks,
            )
            count = denominator_count(
                settings.aggregation, len(logprobs), batch.num_counted_responses
            )
            loss, statistics = policy_loss(logprobs, batch.tokens, settings, entropy, count)
            kept = replace(statistics, sample_ids=batch.sample_ids)
            return loss, _count(count, hidden), kept

        return _run_model(model, batch), loss_and_statistics

    return forward_step


def _count(count: int, like: Tensor) -> Tensor:
    """Megatron adds the counts of micro-batches up in int32."""
    return torch.full((), count, dtype=torch.int, device=like.device)
