"""Core attention over packed sequences, and the description of a pack that travels with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor, nn

from r2vpo_megatron.device.base import Platform, SequenceLayout
from r2vpo_megatron.device.host_copies import copy_to_device
from r2vpo_megatron.parallel.context import context_pieces, context_positions, gathered_places


@dataclass
class PackedSequences(PackedSeqParams):  # type: ignore[misc]
    """Megatron's PackedSeqParams with the offsets on the host too, and the rotary table.

    Megatron's own RoPE for packs reads the offsets back from the device in every layer; a table
    looked up by position once per micro-batch costs nothing.
    """

    layout: SequenceLayout | None = None
    # [K] int64, where the keys of the layout's pieces stand among those gathered over the
    # context ranks; None where there is but one such rank.
    key_places: Tensor | None = None
    rotary_cos: Tensor | None = None  # [T, 1, head_dim], the activations' dtype
    rotary_sin: Tensor | None = None  # [T, 1, head_dim]

    def with_rotary(self, cos: Tensor, sin: Tensor) -> PackedSequences:
        """A copy that carries the table."""
        return replace(self, rotary_cos=cos, rotary_sin=sin)


def pack_sequences(
    cumulative_lengths: Sequence[int],
    device: torch.device,
    *,
    context_rank: int = 0,
    context_size: int = 1,
) -> PackedSequences:
    """Describe a pack, or this context rank's share of one, for the model.

    Args:
        cumulative_lengths: [S + 1] offsets of the whole pack, 0 first, T last; a numpy array will
            do. Tail padding is a sequence of its own.
        device: where the model is.
        context_rank: of this rank, which holds the tokens at `context_positions`.
        context_size: ranks that share the pack.

    Raises:
        ValueError: offsets that do not start at 0 or do not increase, or a T that does not
            divide into the chunks of the context ranks.
    """
    layout = SequenceLayout.of(cumulative_lengths, device)
    key_places = None
    if context_size > 1:
        offsets = np.asarray(cumulative_lengths, dtype=np.int64)
        num_tokens = int(offsets[-1])
        positions = context_positions(num_tokens, context_rank, context_size)
        pieces = context_pieces(offsets, positions)
        layout = SequenceLayout.of(
            pieces.query_offsets.tolist(), device, pieces.key_offsets.tolist()
        )
        places = gathered_places(pieces.key_positions, num_tokens, context_size)
        key_places = copy_to_device(torch.from_numpy(places), device)
    return PackedSequences(
        qkv_format="thd",
        cu_seqlens_q=layout.query_offsets_device,
        cu_seqlens_kv=layout.key_offsets_device,
        max_seqlen_q=layout.longest_query,
        max_seqlen_kv=layout.longest_key,
        layout=layout,
        key_places=key_places,
    )


class PackedCoreAttention(nn.Module):
    """RoPE, then causal attention inside each sequence of the pack, by the platform's kernels.

    Megatron's DotProductAttention knows no packs. Its SelfAttention calls this with q, k and v
    of this TP rank's heads and with RoPE left out (position_embedding_type "none").

    Under context parallelism q, k and v are of this rank's tokens. It gets the keys and values
    of all context ranks, and their gradients go back to them summed.
    """

    def __init__(
        self,
        *,
        platform: Platform,
        context_group: dist.ProcessGroup,
        **megatron_arguments: Any,
    ) -> None:
        super().__init__()
        self.platform = platform
        self.context_group = context_group

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        packed_seq_params: PackedSequences,
        **unused: Any,
    ) -> Tensor:
        """Attend.

        Collective: every rank of the context group must call.

        Args:
            query: [T, heads / TP, head_dim], T tokens of this context rank.
            key: [T, kv_heads / TP, head_dim].
            value: [T, kv_heads / TP, head_dim].
            attention_mask: ignored; the pack says who sees whom.
            packed_seq_params: with layout and rotary table.

        Returns:
            [T, heads / TP * head_dim].
        """
        packed = packed_seq_params
        assert packed.layout is not None
        assert packed.rotary_cos is not None and packed.rotary_sin is not None
        query = self.platform.apply_rotary(query, packed.rotary_cos, packed.rotary_sin)
        key = self.platform.apply_rotary(key, packed.rotary_cos, packed.rotary_sin)
        if packed.key_places is not None:
            key, value = self._gather_keys(key, value, packed.key_places)
        return self.platform.packed_attention(query, key, value, packed.layout).flatten(1)

    def _gather_keys(self, key: Tensor, value: Tensor, places_K: Tensor) -> tuple[Tensor, Tensor]:
        """[K, kv_heads / TP, head_dim] keys and values of this rank's pieces, in one transfer."""
        gathered = gather_from_sequence_parallel_region(
            torch.cat((key, value), dim=-1),
            tensor_parallel_output_grad=True,  # each rank has a part of the gradient: sum them
            group=self.context_group,
        )
        keys, values = gathered.index_select(0, places_K).chunk(2, dim=-1)
        return keys, values
