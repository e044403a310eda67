"""Rotary position embedding, rotate-half form, by a table looked up once per micro-batch."""

from __future__ import annotations

import torch
from torch import Tensor


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
