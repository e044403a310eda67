"""RMSNorm for Megatron's local layer spec, aware of sequence parallelism.

Megatron's WrappedTorchNorm refuses sequence parallelism, and its other norms need CUDA
extensions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / sqrt(mean(x ** 2) + eps) * weight, the quotient rounded to x's dtype first.

    That rounding is what Hugging Face and vLLM do; it matters in bfloat16.
    """

    def __init__(
        self, config: Any, hidden_size: int, eps: float, *, device: torch.device, **unused: Any
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=device)
        )
        # finalize_model_grads sums the gradients of such parameters over the TP group: under
        # sequence parallelism each rank sees a part of the tokens only.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension of x [..., hidden_size]."""
        normalized: Tensor = _RMSNorm.apply(x, self.weight, self.eps)
        return normalized


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
