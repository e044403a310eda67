"""Norm, rotary embedding and SwiGLU in plain torch, each with a gradient that keeps little.

What `Platform` does where the hardware has no kernel of its own, and what those kernels must equal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

# x [T, heads, head_dim], cosine and sine [T, 1, head_dim], 1.0 to turn or -1.0 to turn back
Rotation = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `Platform.rms_norm`; the quotient is rounded to x's dtype before the weight.

    That rounding is what Hugging Face and vLLM do; it matters in bfloat16.
    """
    normalized: Tensor = _RMSNorm.apply(x, weight, eps)
    return normalized


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor, rotate: Rotation | None = None) -> Tensor:
    """See `Platform.apply_rotary`.

    Args:
        x: [T, heads, head_dim].
        cos: [T, 1, head_dim].
        sin: [T, 1, head_dim].
        rotate: a kernel that turns; None for plain torch.
    """
    rotated: Tensor = _Rotary.apply(x, cos, sin, rotate or _rotate)
    return rotated


def swiglu(gate_up: Tensor) -> Tensor:
    """See `Platform.swiglu`.

    Left to autograd, silu(gate) would be kept for the backward pass and the gradients of gate and
    up copied together.
    """
    activated: Tensor = _SwiGLU.apply(gate_up)
    return activated


class _RMSNorm(torch.autograd.Function):
    """Keeps x and a number per token; autograd of the formula would keep the quotient as well."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        inverse_rms = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse_rms)
        return (x * inverse_rms).to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        x, weight, inverse_rms = ctx.saved_tensors
        quotient = x * inverse_rms
        products = (grad * quotient).flatten(0, -2)
        grad_weight = products.sum(dim=0).to(weight.dtype)
        # d x = (g w - quotient mean(g w quotient)) / rms
        means = (products @ weight.to(products.dtype)).div_(x.shape[-1]).view_as(inverse_rms)
        grad_x = (grad * weight).to(quotient.dtype)
        grad_x.addcmul_(quotient, means, value=-1.0).mul_(inverse_rms)
        return grad_x.to(x.dtype), grad_weight, None


class _Rotary(torch.autograd.Function):
    """The gradient of a rotation is the rotation back; nothing but the table is kept for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, rotate: Rotation) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.rotate = rotate
        return rotate(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        return ctx.rotate(grad, cos, sin, -1.0), None, None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, direction: float) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    half_sin = sin.chunk(2, dim=-1)[0]
    rotated = x * cos
    rotated_first, rotated_second = rotated.chunk(2, dim=-1)
    rotated_first.addcmul_(second, half_sin, value=-direction)
    rotated_second.addcmul_(first, half_sin, value=direction)
    return rotated


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        grad_gate_up = torch.empty_like(gate_up)
        grad_gate, grad_up = grad_gate_up.chunk(2, dim=-1)
        torch.mul(grad, silu(gate), out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        return grad_gate_up
