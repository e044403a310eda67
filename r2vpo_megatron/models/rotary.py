"""Rotary position embedding, rotate-half form, by a table looked up once per micro-batch."""

from __future__ import annotations

from typing import Any

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


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (i, i + head_dim / 2) of x [T, heads, head_dim]; no gradient to the table."""
    rotated: Tensor = _Rotary.apply(x, cos, sin)
    return rotated


class _Rotary(torch.autograd.Function):
    """The gradient of a rotation is the rotation back; nothing but the table is kept for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, sin, -1.0), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, direction: float) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    half_sin = sin.chunk(2, dim=-1)[0]
    rotated = x * cos
    rotated_first, rotated_second = rotated.chunk(2, dim=-1)
    rotated_first.addcmul_(second, half_sin, value=-direction)
    rotated_second.addcmul_(first, half_sin, value=direction)
    return rotated
