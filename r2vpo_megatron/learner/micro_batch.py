"""A rank's share of a packed micro-batch, on its device: what the model and the loss need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from r2vpo_megatron.device.host_copies import copy_to_device
from r2vpo_megatron.models.attention import pack_sequences
from r2vpo_megatron.parallel.context import context_positions
from r2vpo_megatron.records import PackedBatch
from r2vpo_megatron.rl.loss import ResponseTokens


@dataclass(frozen=True)
class MicroBatch:
    """Shape legend: T packed tokens of this context rank, N response tokens among them.

    Attributes:
        token_ids, position_ids: [1, T] int64, Megatron's batch layout.
        packed_sequences: Megatron's PackedSeqParams of these sequences.
        response_positions: [N] int64, which of the T predict a response token.
        target_ids: [N] int64, the response tokens.
        tokens: what the loss needs of them.
        response_places: [N] int64, where they stand in all of the micro-batch's responses put
            end to end, on whatever context rank.
        response_lengths: tokens of each sample's whole response, in the order of `sample_ids`.
        sample_ids: the samples of the whole micro-batch; tail padding has none.
        num_counted_responses: what this rank adds to the number of responses. Context ranks
            share them, so the first one counts them all and the others none.
    """

    token_ids: Tensor
    position_ids: Tensor
    packed_sequences: Any
    response_positions: Tensor
    target_ids: Tensor
    tokens: ResponseTokens
    response_places: Tensor
    response_lengths: tuple[int, ...]
    sample_ids: tuple[str, ...]
    num_counted_responses: int

    @classmethod
    def of(
        cls,
        batch: PackedBatch,
        device: torch.device,
        *,
        context_rank: int = 0,
        context_size: int = 1,
        sum_over_context: Callable[[Tensor], Tensor] | None = None,
    ) -> MicroBatch:
        """Select this rank's tokens, and the response tokens among them, and move them over.

        Args:
            batch: the whole micro-batch, the same on all context ranks.
            device: of this rank.
            context_rank: of this rank.
            context_size: ranks that share the micro-batch.
            sum_over_context: adds a tensor up over those ranks; needed where there are several.

        Raises:
            ValueError: the micro-batch does not divide into the chunks of the context ranks.
        """
        assert context_size == 1 or sum_over_context is not None
        positions = context_positions(len(batch.token_ids), context_rank, context_size)
        is_response = batch.response_mask[positions]
        responses = positions[is_response]
        sequence_ids = batch.sequence_ids[responses]
        lengths = np.bincount(
            batch.sequence_ids[batch.response_mask], minlength=len(batch.sample_ids)
        )
        places = np.cumsum(batch.response_mask)[responses] - 1

        def move(array: Any) -> Tensor:
            return copy_to_device(torch.from_numpy(np.ascontiguousarray(array)), device)

        tokens = ResponseTokens(
            behavior_logprobs=move(batch.behavior_logprobs[responses]),
            rollout_logprobs=move(batch.rollout_logprobs[responses]),
            policy_versions=move(batch.policy_versions[responses]),
            advantages=move(batch.advantages[responses]),
            sequence_lengths=move(lengths[sequence_ids].astype(np.float32)),
            sequence_ids=move(sequence_ids),
            num_sequences=len(batch.sample_ids),
            sum_over_context=sum_over_context,
        )
        return cls(
            token_ids=move(batch.token_ids[positions]).unsqueeze(0),
            position_ids=move(batch.position_ids[positions]).unsqueeze(0),
            packed_sequences=pack_sequences(
                batch.cumulative_lengths.tolist(),
                device,
                context_rank=context_rank,
                context_size=context_size,
            ),
            response_positions=move(np.flatnonzero(is_response)),
            target_ids=move(batch.target_ids[responses]),
            tokens=tokens,
            response_places=move(places),
            response_lengths=tuple(int(length) for length in lengths),
            sample_ids=batch.sample_ids,
            num_counted_responses=len(batch.sample_ids) if context_rank == 0 else 0,
        )

    def whole_responses(self, values_N: Tensor) -> tuple[Tensor, ...]:
        """The values of each sample's whole response, in the order of `sample_ids`.

        Collective: every rank of the context group must call, also one without response tokens.

        Args:
            values_N: [N] of this rank's response tokens.
        """
        if self.tokens.sum_over_context is None:
            return values_N.split(list(self.response_lengths))
        values = values_N.new_zeros(sum(self.response_lengths))
        values[self.response_places] = values_N
        return self.tokens.sum_over_context(values).split(list(self.response_lengths))
