"""Ratio statistics as mergeable vectors, so that any split of a batch gives the same result.

A micro-batch yields one small fp32 vector on its device. Vectors of all micro-batches and all
ranks are merged in float64 on the host (`parallel.collectives`), once per optimizer step. All
moments are sums of powers of (rho - 1), centred BEFORE summing: E[rho^2] - E[rho]^2 in fp32 is
100% off at a ratio std of 3e-4.

Quantiles do not merge, so the values themselves are kept until the step and gathered: 4 bytes
per response token of the global batch on every rank of the last stage (two million tokens, 256
responses of 8,192: 8 MiB), and four times that while they are sorted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from r2vpo_megatron.rl.ratios import Ratios
from r2vpo_megatron.rl.staleness import StalenessBucket, staleness_metrics

NUM_SUMS = 11  # leading entries of a vector that add; then one maximum and one minimum
VECTOR_LENGTH = NUM_SUMS + 2
QUANTILES = (0.01, 0.05, 0.5, 0.95, 0.99)


@dataclass(frozen=True)
class MicroBatchStatistics:
    """What the last stage keeps of a micro-batch until the optimizer step, without gradient.

    Attributes:
        vector: [13] fp32, see `ratio_vector`.
        excess: [N] fp32, rho - 1 of its response tokens; N may be 0.
        staleness: [5, 4] fp32, see `rl.staleness.staleness_sums`.
        non_finite: [num_sequences] fp32, tokens of each response whose log-probs, advantage or
            loss is not finite.
        sample_ids: of those responses, where they are known.
    """

    vector: Tensor
    excess: Tensor
    staleness: Tensor
    non_finite: Tensor
    sample_ids: tuple[str, ...] = ()


def ratio_vector(
    ratios: Ratios,
    advantages_N: Tensor,
    gradient_weights_N: Tensor,
    objective_N: Tensor,
    entropy_N: Tensor | None = None,
    importance_N: Tensor | None = None,
    importance_cap: float = 0.0,
    non_finite_N: Tensor | None = None,
    denominator: int = 0,
) -> Tensor:
    """[13] fp32 statistics of one micro-batch, in the order of `RatioStatistics`' number fields.

    Args:
        ratios: of the micro-batch's N response tokens; N may be 0.
        advantages_N: [N] fp32.
        gradient_weights_N: [N] fp32, the objective's closed-form g.
        objective_N: [N] fp32, surrogates times their aggregation weights.
        entropy_N: [N] fp32 in nats, where it was computed.
        importance_N: [N] fp32, truncated importance weights, where they are on.
        importance_cap: what they were truncated at.
        non_finite_N: [N] bool, tokens with something that is not finite, where it was looked for.
        denominator: what the micro-batch adds to what the objective is divided by.
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
            zero if importance_N is None else importance_N.float().sum(),
            zero if importance_N is None else (importance_N >= importance_cap).float().sum(),
            zero if non_finite_N is None else non_finite_N.float().sum(),
            zero + denominator,
            zero - 1.0 if is_empty else excess.max(),
            zero + torch.inf if is_empty else excess.min(),
        ]
    )


def merge_vectors(vectors_MK: Tensor) -> Tensor:
    """[13] float64 from [M, 13] vectors of micro-batches or ranks in their order; M may be 0."""
    neutral = torch.tensor([[0.0] * NUM_SUMS + [-1.0, torch.inf]], dtype=torch.float64)
    vectors = torch.cat([neutral.to(vectors_MK.device), vectors_MK.double()])
    return torch.cat(
        [
            vectors[:, :NUM_SUMS].sum(dim=0),
            vectors[:, NUM_SUMS : NUM_SUMS + 1].amax(dim=0),
            vectors[:, NUM_SUMS + 1 :].amin(dim=0),
        ]
    )


def excess_quantiles(excess_N: Tensor) -> Tensor:
    """[Q] float64 on the host: the QUANTILES of N values, interpolated linearly between two.

    A function of the values as a set, hence the same bits however they were split. NaN where N
    is 0.

    Args:
        excess_N: [N] fp32, in any order, on any device.
    """
    if excess_N.numel() == 0:
        return torch.full((len(QUANTILES),), torch.nan, dtype=torch.float64)
    last = excess_N.numel() - 1
    positions_Q = torch.tensor(QUANTILES, dtype=torch.float64) * last
    below_Q = positions_Q.floor().long()
    ordered_N = excess_N.sort().values
    pairs = ordered_N[torch.cat([below_Q, (below_Q + 1).clamp(max=last)]).to(excess_N.device)]
    lower_Q, upper_Q = pairs.cpu().double().chunk(2)
    return torch.lerp(lower_Q, upper_Q, positions_Q - below_Q)


@dataclass(frozen=True)
class RatioStatistics:
    """A merged vector by name: sums over the response tokens of the global batch, and extremes.

    Attributes:
        quantiles: of rho - 1, at QUANTILES.
        tokens: number of response tokens.
        excess, excess_squared: sums of (rho - 1) and (rho - 1)^2.
        objective: sum of weighted surrogates.
        clipped: tokens with an advantage whose gradient weight is exactly 0.
        clamped: tokens whose log-ratio was limited to +-20.
        entropy: sum of the policy's entropy, in nats, where it was computed.
        importance: sum of truncated importance weights; 0 where they are off.
        truncated: tokens whose importance weight was cut at its cap.
        non_finite: tokens whose log-probs, advantage or loss is not finite.
        denominator: of the objective, tokens or responses as the aggregation has it.
        max_excess, min_excess: extremes of rho - 1.
        staleness: sums by how old the tokens are, of the buckets that have some.
    """

    quantiles: tuple[float, ...]
    tokens: float
    excess: float
    excess_squared: float
    objective: float
    clipped: float
    clamped: float
    entropy: float
    importance: float
    truncated: float
    non_finite: float
    denominator: float
    max_excess: float
    min_excess: float
    staleness: tuple[StalenessBucket, ...] = ()

    @classmethod
    def from_vector(
        cls, vector_K: Tensor, quantiles_Q: Tensor, staleness: tuple[StalenessBucket, ...] = ()
    ) -> RatioStatistics:
        """Name the entries of a merged vector; quantiles as `excess_quantiles` gives them."""
        statistics = cls(tuple(quantiles_Q.tolist()), *vector_K.tolist())
        return replace(statistics, staleness=staleness)

    @property
    def is_finite(self) -> bool:
        """Whether every token's part and every sum is finite; extremes are not asked."""
        sums = [field.name for field in fields(self)[1 : 1 + NUM_SUMS]]
        return self.non_finite == 0 and all(math.isfinite(getattr(self, name)) for name in sums)

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
        metrics = {
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
        for quantile, excess in zip(QUANTILES, self.quantiles, strict=True):
            metrics[f"ratio/quantile_{round(100 * quantile):02d}"] = 1.0 + excess
        if self.importance > 0:  # every weight is above 0 where there are any
            metrics["importance/mean_weight"] = self.importance / self.tokens
            metrics["importance/truncated_fraction"] = self.truncated / self.tokens
        return metrics | staleness_metrics(self.staleness)
