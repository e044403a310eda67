"""The statistics of an update by how old its tokens are.

A token's staleness is the version of the weights that the engines got last minus the version that
sampled it. Per bucket of it, sums over tokens, which add over micro-batches, ranks and updates; the
ratio's moments are centred before summing, as in `rl.statistics`.

Shape legend: N response tokens of a micro-batch, B buckets, C sums of each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BUCKETS = ("0", "1", "2", "3", "4_or_more")  # versions behind
SUMS_PER_BUCKET = 4
STALENESS_PREFIX = "staleness_"  # of the metrics' names


def staleness_sums(
    excess_N: Tensor, advantages_N: Tensor, policy_versions_N: Tensor, policy_version: int
) -> Tensor:
    """[B, C] fp32 sums of one micro-batch, in the order of `StalenessBucket`'s number fields.

    Args:
        excess_N: [N] fp32, rho - 1, without gradient; N may be 0.
        advantages_N: [N] fp32.
        policy_versions_N: [N] int64, the version that sampled each token.
        policy_version: what staleness is counted from; a token of a later one counts as fresh.
    """
    behind_N = (policy_version - policy_versions_N).clamp(0, len(BUCKETS) - 1)
    values_CN = torch.stack(
        [torch.ones_like(excess_N), excess_N, excess_N.square(), advantages_N.to(excess_N.dtype)]
    )
    # Masks and not index_add, which on a GPU adds up in another order each time.
    return torch.stack(
        [
            torch.where(behind_N == bucket, values_CN, 0.0).sum(dim=1)
            for bucket in range(len(BUCKETS))
        ]
    )


@dataclass(frozen=True)
class StalenessBucket:
    """Sums over the tokens of one bucket.

    Attributes:
        name: one of BUCKETS.
        tokens: number of response tokens.
        excess, excess_squared: sums of (rho - 1) and (rho - 1)^2.
        advantage: sum of the tokens' advantages.
    """

    name: str
    tokens: float
    excess: float
    excess_squared: float
    advantage: float

    def metrics(self, all_tokens: float) -> dict[str, float]:
        """Means by the names of metrics.jsonl, such as `staleness_0/second_moment`.

        Args:
            all_tokens: number of response tokens of all buckets together.
        """
        mean_excess = self.excess / self.tokens
        second_moment = self.excess_squared / self.tokens
        # A bucket may have a single token, whose ratio in fp32 may be 0.
        square_of_mean = (1.0 + mean_excess) ** 2
        mean_square = square_of_mean + max(second_moment - mean_excess**2, 0.0)
        values = {
            "tokens": self.tokens,
            "token_fraction": self.tokens / all_tokens,
            "mean_ratio": 1.0 + mean_excess,
            "second_moment": second_moment,
            "effective_sample_size": square_of_mean / mean_square if mean_square else 1.0,
            "mean_advantage": self.advantage / self.tokens,
        }
        return {f"{STALENESS_PREFIX}{self.name}/{name}": value for name, value in values.items()}


def buckets_from_sums(sums_BC: Tensor) -> tuple[StalenessBucket, ...]:
    """Name merged sums; only the buckets that have tokens."""
    named = zip(BUCKETS, sums_BC.tolist(), strict=True)
    return tuple(StalenessBucket(name, *sums) for name, sums in named if sums[0])


def staleness_metrics(buckets: Sequence[StalenessBucket]) -> dict[str, float]:
    """The metrics of every bucket; each has tokens."""
    all_tokens = sum(bucket.tokens for bucket in buckets)
    return {name: value for bucket in buckets for name, value in bucket.metrics(all_tokens).items()}


def merge_staleness(updates: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The metrics of several updates' tokens together, every token counting as much.

    Numbers of tokens are means over the updates, as `ratio/tokens` is.

    Args:
        updates: metrics of each; what is not of staleness is not looked at.
    """
    merged = []
    for name in BUCKETS:
        parts = [_sums_behind(update, f"{STALENESS_PREFIX}{name}") for update in updates]
        sums = [math.fsum(column) / len(parts) for column in zip(*parts, strict=True)]
        if any(sums):
            merged.append(StalenessBucket(name, *sums))
    return staleness_metrics(merged)


def _sums_behind(update: Mapping[str, float], bucket: str) -> tuple[float, float, float, float]:
    """What a bucket's metrics were made of; zeros where the update has none of it."""
    tokens = update.get(f"{bucket}/tokens", 0.0)
    if tokens == 0.0:
        return 0.0, 0.0, 0.0, 0.0
    return (
        tokens,
        tokens * (update[f"{bucket}/mean_ratio"] - 1.0),
        tokens * update[f"{bucket}/second_moment"],
        tokens * update[f"{bucket}/mean_advantage"],
    )
