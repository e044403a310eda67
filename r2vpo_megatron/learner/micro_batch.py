"""A packed micro-batch on the rank's device, reduced to what the model and the loss need."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from r2vpo_megatron.models.attention import pack_sequences
from r2vpo_megatron.records import PackedBatch
from r2vpo_megatron.rl.loss import ResponseTokens


@dataclass(frozen=True)
class MicroBatch:
    """Shape legend: T packed tokens, N response tokens among them.

    Attributes:
        token_ids, position_ids: [1, T] int64, Megatron's batch layout.
        packed_sequences: Megatron's PackedSeqParams of these sequences.
        response_positions: [N] int64, positions whose hidden state predicts a response token.
        target_ids: [N] int64, the response tokens.
        tokens: what the loss needs of them.
        response_lengths: response tokens of each sample, in the order of `sample_ids`.
        sample_ids: the samples in it; tail padding has none.
    """

    token_ids: Tensor
    position_ids: Tensor
    packed_sequences: Any
    response_positions: Tensor
    target_ids: Tensor
    tokens: ResponseTokens
    response_lengths: tuple[int, ...]
    sample_ids: tuple[str, ...]

    @classmethod
    def of(cls, batch: PackedBatch, device: torch.device) -> MicroBatch:
        """Select the response tokens on the host and move everything over."""
        mask = batch.response_mask
        sequence_ids = batch.sequence_ids[mask]
        lengths = np.bincount(sequence_ids, minlength=len(batch.sample_ids))

        def move(array: Any) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(device)

        tokens = ResponseTokens(
            behavior_logprobs=move(batch.behavior_logprobs[mask]),
            advantages=move(batch.advantages[mask]),
            sequence_lengths=move(lengths[sequence_ids].astype(np.float32)),
            sequence_ids=move(sequence_ids),
            num_sequences=len(batch.sample_ids),
        )
        return cls(
            token_ids=move(batch.token_ids).unsqueeze(0),
            position_ids=move(batch.position_ids).unsqueeze(0),
            packed_sequences=pack_sequences(batch.cumulative_lengths.tolist(), device),
            response_positions=move(np.flatnonzero(mask)),
            target_ids=move(batch.target_ids[mask]),
            tokens=tokens,
            response_lengths=tuple(int(length) for length in lengths),
            sample_ids=batch.sample_ids,
        )
