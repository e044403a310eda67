"""Ratio statistics as mergeable vectors, so that any split of a batch gives the same result.

A micro-batch yields one small fp32 vector on its device. Vectors of all micro-batches and all
ranks are merged in float64 on the host (`parallel.collectives`), once per optimizer step. All
moments are sums of powers of (rho - 1), centred BEFORE summing: E[rho^2] - E[rho]^2 in fp32 is
100% off at a ratio std of 3e-4.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from r2vpo_megatron.rl.ratios import Ratios

NUM_SUMS = 7  # leading entries of a vector that add; then one maximum and one minimum
VECTOR_LENGTH = NUM_SUMS + 2


def ratio_vector(
    ratios: Ratios,
    advantages_N: Tensor,
    gradient_weights_N: Tensor,
    objective_N: Tensor,
    entropy_N: Tensor | None = None,
) -> Tensor:
    """[9] fp32 statistics of one micro-batch, in the order of `RatioStatistics`' fields.

    Args:
        ratios: of the micro-batch's N response tokens; N may be 0.
        advantages_N: [N] fp32.
        gradient_weights_N: [N] fp32, the objective's closed-form g.
        objective_N: [N] fp32, surrogates times their aggregation weights.
        entropy_N: [N] fp32 in nats, where it was computed.
    """
    excess = ratios.excess.detach().float()
    zero = excess.new_zeros(())
    is_empty = excess.numel() == 0
    return torch.stack(
        [
            zero + excess.numel(),
            excess.sum(),
            excess.square().sum(),
            objective_N.detach().float().sum(),
            ((gradient_weights_N == 0) & (advantages_N != 0)).float().sum(),
            ratios.clamped.float().sum(),
            zero if entropy_N is None else entropy_N.detach().float().sum(),
            zero - 1.0 if is_empty else excess.max(),
            zero + torch.inf if is_empty else excess.min(),
        ]
    )


def merge_vectors(vectors_MK: Tensor) -> Tensor:
    """[9] float64 from [M, 9] vectors of micro-batches or ranks, in their given order."""
    vectors = vectors_MK.double()
    return torch.cat(
        [
            vectors[:, :NUM_SUMS].sum(dim=0),
            vectors[:, NUM_SUMS : NUM_SUMS + 1].amax(dim=0),
            vectors[:, NUM_SUMS + 1 :].amin(dim=0),
        ]
    )


@dataclass(frozen=True)
class RatioStatistics:
    """A merged vector by name: sums over the response tokens of the global batch, and extremes.

    Attributes:
        tokens: number of response tokens.
        excess, excess_squared: sums of (rho - 1) and (rho - 1)^2.
        objective: sum of weighted surrogates.
        clipped: tokens with an advantage whose gradient weight is exactly 0.
        clamped: tokens whose log-ratio was limited to +-20.
        entropy: sum of the policy's entropy, in nats, where it was computed.
        max_excess, min_excess: extremes of rho - 1.
    """

    tokens: float
    excess: float
    excess_squared: float
    objective: float
    clipped: float
    clamped: float
    entropy: float
    max_excess: float
    min_excess: float

    @classmethod
    def from_vector(cls, vector_K: Tensor) -> RatioStatistics:
        """Name the entries of a merged vector."""
        return cls(*vector_K.tolist())

    @property
    def is_finite(self) -> bool:
        """Whether every sum is a finite number; the extremes of an empty batch are not asked."""
        return all(math.isfinite(value) for value in astuple(self)[:NUM_SUMS])

    @property
    def second_moment(self) -> float:
        """E[(rho - 1)^2] about 1, the statistic of Eq. 9-12 that the dual variable sees."""
        return self.excess_squared / max(self.tokens, 1.0)

    def metrics(self) -> dict[str, float]:
        """Means and moments by the names of metrics.jsonl.

        `ratio/variance` is about the mean; `ratio/effective_sample_size` is
        (sum rho)^2 / (N sum rho^2), 1 when all ratios are equal. Without tokens all but the
        count are left out.
        """
        if self.tokens == 0:
            return {"ratio/tokens": 0.0}
        mean_excess = self.excess / self.tokens
        mean_square = 1.0 + 2.0 * mean_excess + self.second_moment
        return {
            "ratio/tokens": self.tokens,
            "ratio/mean": 1.0 + mean_excess,
            "ratio/second_moment": self.second_moment,
            "ratio/variance": self.second_moment - mean_excess**2,
            "ratio/max": 1.0 + self.max_excess,
            "ratio/min": 1.0 + self.min_excess,
            "ratio/effective_sample_size": (1.0 + mean_excess) ** 2 / mean_square,
            "ratio/clipped_fraction": self.clipped / self.tokens,
            "ratio/clamped_fraction": self.clamped / self.tokens,
            "policy/entropy": self.entropy / self.tokens,
        }
