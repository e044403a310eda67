"""Core attention over packed sequences, and the description of a pack that travels with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor, nn

from r2vpo_megatron.device.base import SequenceLayout

PackedAttention = Callable[[Tensor, Tensor, Tensor, SequenceLayout], Tensor]


@dataclass
class PackedSequences(PackedSeqParams):  # type: ignore[misc]
    """Megatron's PackedSeqParams with the offsets on the host too, and the rotary table.

    Megatron's own RoPE for packs reads the offsets back from the device in every layer; a table
    looked up by position once per micro-batch costs nothing.
    """

    layout: SequenceLayout | None = None
    rotary_cos: Tensor | None = None  # [T, 1, head_dim], the activations' dtype
    rotary_sin: Tensor | None = None  # [T, 1, head_dim]

    def with_rotary(self, cos: Tensor, sin: Tensor) -> PackedSequences:
        """A copy that carries the table."""
        return replace(self, rotary_cos=cos, rotary_sin=sin)


def pack_sequences(cumulative_lengths: Sequence[int], device: torch.device) -> PackedSequences:
    """Describe a pack for the model.

    Args:
        cumulative_lengths: [S + 1] offsets, 0 first, T last; a numpy array will do. Tail padding
            is a sequence of its own.
        device: where the model is.

    Raises:
        ValueError: offsets that do not start at 0 or do not increase.
    """
    layout = SequenceLayout.of(cumulative_lengths, device)
    offsets = layout.cumulative_lengths_device
    return PackedSequences(
        qkv_format="thd",
        cu_seqlens_q=offsets,
        cu_seqlens_kv=offsets,
        max_seqlen_q=layout.longest,
        max_seqlen_kv=layout.longest,
        layout=layout,
    )


def inverse_frequencies(head_dim: int, theta: float) -> Tensor:
    """theta ** (-2i / head_dim) for i in 0..head_dim/2-1: [head_dim / 2] fp32, on the CPU."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    return 1.0 / (theta**exponents)


def rotary_table(
    position_ids: Tensor, frequencies: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of position x frequency, computed in fp32.

    Args:
        position_ids: [T] integers, restarting at 0 for each sequence.
        frequencies: [head_dim / 2] fp32.
        dtype: of the result.

    Returns:
        cos and sin, [T, 1, head_dim] each; both halves of the last dimension are equal.
    """
    angles = torch.outer(position_ids.float(), frequencies)
    angles = torch.cat((angles, angles), dim=-1).unsqueeze(1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (i, i + head_dim / 2) of x [T, heads, head_dim]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class PackedCoreAttention(nn.Module):
    """RoPE, then causal attention inside each sequence of the pack, by the platform's kernel.

    Megatron's DotProductAttention knows no packs. Its SelfAttention calls this with q, k and v
    of this TP rank's heads and with RoPE left out (position_embedding_type "none").
    """

    def __init__(self, *, packed_attention: PackedAttention, **megatron_arguments: Any) -> None:
        super().__init__()
        self.packed_attention = packed_attention

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

        Args:
            query: [T, heads / TP, head_dim].
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
        query = apply_rotary(query, packed.rotary_cos, packed.rotary_sin)
        key = apply_rotary(key, packed.rotary_cos, packed.rotary_sin)
        return self.packed_attention(query, key, value, packed.layout).flatten(1)
