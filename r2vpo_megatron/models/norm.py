"""RMSNorm for Megatron's local layer spec, aware of sequence parallelism.

Megatron's WrappedTorchNorm refuses sequence parallelism, and its other norms need CUDA
extensions.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / sqrt(mean(x ** 2) + eps) * weight, the quotient rounded to x's dtype first.

    That rounding is what Hugging Face and vLLM do; it matters in bfloat16.
    """

    def __init__(
        self,
        config: TransformerConfig,
        hidden_size: int,
        eps: float,
        *,
        device: torch.device,
        **unused: Any,
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
        return self.weight * nn.functional.rms_norm(x, (x.shape[-1],), eps=self.eps)
