"""RMSNorm for Megatron's local layer spec, aware of sequence parallelism.

Megatron's WrappedTorchNorm refuses sequence parallelism, and its other norms need CUDA
extensions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / sqrt(mean(x ** 2) + eps) * weight, by the platform's kernel."""

    def __init__(
        self,
        config: Any,
        hidden_size: int,
        eps: float,
        *,
        device: torch.device,
        rms_norm: Callable[[Tensor, Tensor, float], Tensor],
        **unused: Any,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.rms_norm = rms_norm
        self.weight = nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=device)
        )
        # finalize_model_grads sums the gradients of such parameters over the TP group: under
        # sequence parallelism each rank sees a part of the tokens only.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension of x [..., hidden_size]."""
        return self.rms_norm(x, self.weight, self.eps)
