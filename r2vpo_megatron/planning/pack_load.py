"""How much of a packed micro-batch a learner rank gets."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from r2vpo_megatron.config import ParallelConfig
from r2vpo_megatron.parallel.context import context_pieces, context_positions
from r2vpo_megatron.records import PackedBatch


@dataclass(frozen=True)
class PackLoad:
    """A rank's share of a micro-batch.

    Attributes:
        tokens: that it holds.
        response_tokens: of them, those that predict a response token.
        keys: that its attention sees, those of other context ranks included; its own tokens where
            there are none.
        mask_elements: of the masks that a CPU's kernel takes for pieces that do not begin their
            sequence.
    """

    tokens: int
    response_tokens: int
    keys: int
    mask_elements: int = 0

    @classmethod
    def worst(cls, parallel: ParallelConfig) -> PackLoad:
        """A full micro-batch of one sequence, nothing but response: more than any real one."""
        context = parallel.context
        tokens = parallel.max_tokens_per_micro_batch // context
        if context == 1:
            return cls(tokens, tokens, tokens)
        # Two chunks of tokens / 2; those of a rank but the last see 2 CP + 1 chunks together.
        mask_elements = (2 * context + 2) * (tokens // 2) ** 2
        return cls(tokens, tokens, (2 * context + 1) * tokens // 2, mask_elements)

    @classmethod
    def of_batch(cls, batch: PackedBatch, context_rank: int, context_size: int) -> PackLoad:
        """The share of one context rank of a real micro-batch.

        Raises:
            ValueError: as `context_positions`.
        """
        positions = context_positions(len(batch.token_ids), context_rank, context_size)
        num_response = int(batch.response_mask[positions].sum())
        if context_size == 1:
            return cls(len(positions), num_response, len(positions))
        pieces = context_pieces(batch.cumulative_lengths, positions)
        sizes = {
            (end - start, last - first)
            for (start, end), (first, last) in zip(
                itertools.pairwise(pieces.query_offsets.tolist()),
                itertools.pairwise(pieces.key_offsets.tolist()),
                strict=True,
            )
            if end - start != last - first
        }
        masks = sum(queries * keys for queries, keys in sizes)
        return cls(len(positions), num_response, len(pieces.key_positions), masks)
