"""The statistics of one optimizer step, reduced over ranks that hold uneven shares, or nothing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from r2vpo_megatron.device import get_platform
from r2vpo_megatron.parallel.collectives import gather_values, reduce_statistics
from r2vpo_megatron.parallel.state import destroy_parallel, initialize_parallel
from r2vpo_megatron.rl.ratios import importance_ratios
from r2vpo_megatron.rl.staleness import staleness_sums
from r2vpo_megatron.rl.statistics import QUANTILES, MicroBatchStatistics, ratio_vector
from tests.distributed.ranks import run_ranks

NUM_TOKENS = 1000
POLICY_VERSION = 9
# Of three data parallel ranks: sizes of their micro-batches; together all tokens.
SPLITS = {
    "even": ([334], [333], [333]),
    "uneven": ([1, 700], [0, 298], [1]),
    "empty_first": ([0], [1000], [0, 0]),
    "empty_last": ([400, 100], [500], []),
}
Share = tuple[list[int], ...]


def kept_of(log_ratio: torch.Tensor, versions: torch.Tensor) -> MicroBatchStatistics:
    """Of tokens whose advantage is the size of their log-ratio."""
    ratios = importance_ratios(log_ratio, torch.zeros_like(log_ratio))
    ones = torch.ones_like(log_ratio)
    vector = ratio_vector(ratios, ones, ones, log_ratio)
    staleness = staleness_sums(ratios.excess, log_ratio.abs(), versions, POLICY_VERSION)
    return MicroBatchStatistics(vector, ratios.excess, staleness, torch.zeros(1))


def all_log_ratios() -> torch.Tensor:
    log_ratio = 0.3 * torch.randn(NUM_TOKENS, generator=torch.Generator().manual_seed(3))
    log_ratio[::250] = 25.0  # beyond the limit
    return log_ratio


def all_versions() -> torch.Tensor:
    """Of no token is the staleness 2; of half of them it is 4 or more."""
    behind = torch.tensor([0, 1, 1, 3, 4, 4, 5, 5])
    return POLICY_VERSION - behind.repeat(NUM_TOKENS // len(behind))


def reduce(
    rank: int, world_size: int, init_method: str, splits: Sequence[Share], pipeline: int
) -> list[dict[str, float]]:
    state = initialize_parallel(
        get_platform("cpu"),
        rank=rank,
        world_size=world_size,
        pipeline=pipeline,
        init_method=init_method,
    )
    metrics = []
    for split in splits:
        sizes = [size for share in split for size in share]
        assert sum(sizes) == NUM_TOKENS
        parts = zip(all_log_ratios().split(sizes), all_versions().split(sizes), strict=True)
        shares = [[kept_of(*next(parts)) for _ in share] for share in split]
        kept = shares[state.data_rank] if state.is_last_stage else []
        metrics.append(reduce_statistics(kept, state).metrics())
    destroy_parallel()
    return metrics


@pytest.mark.parametrize("pipeline", [1, 2])
def test_any_split_over_ranks_gives_the_statistics_of_the_whole(pipeline: int) -> None:
    results = run_ranks(3 * pipeline, reduce, list(SPLITS.values()), pipeline)
    log_ratio = all_log_ratios().double().clamp(max=20.0)
    excess = torch.expm1(log_ratio).numpy()
    ratio = 1 + excess
    expected = {
        "ratio/tokens": NUM_TOKENS,
        "ratio/mean": ratio.mean(),
        "ratio/second_moment": (excess**2).mean(),
        "ratio/variance": excess.var(),
        "ratio/max": ratio.max(),
        "ratio/min": ratio.min(),
        "ratio/effective_sample_size": ratio.sum() ** 2 / (NUM_TOKENS * (ratio**2).sum()),
        "ratio/clipped_fraction": 0.0,
        "ratio/clamped_fraction": 4 / NUM_TOKENS,
    }
    for quantile in QUANTILES:
        name = f"ratio/quantile_{round(100 * quantile):02d}"
        expected[name] = 1 + np.quantile(excess, quantile)
    behind = POLICY_VERSION - all_versions().numpy()
    for name, chosen in (
        ("0", behind == 0),
        ("1", behind == 1),
        ("3", behind == 3),
        ("4_or_more", behind >= 4),
    ):
        rho = ratio[chosen]
        expected[f"staleness_{name}/tokens"] = len(rho)
        expected[f"staleness_{name}/token_fraction"] = len(rho) / NUM_TOKENS
        expected[f"staleness_{name}/mean_ratio"] = rho.mean()
        expected[f"staleness_{name}/second_moment"] = ((rho - 1) ** 2).mean()
        size = rho.sum() ** 2 / (len(rho) * (rho**2).sum())
        expected[f"staleness_{name}/effective_sample_size"] = size
        advantages = all_log_ratios().abs().double().numpy()[chosen]
        expected[f"staleness_{name}/mean_advantage"] = advantages.mean()
    for rank_metrics in results:
        assert rank_metrics == results[0]  # the same bits on every rank
        for metrics in rank_metrics:
            assert {name for name in metrics if name.startswith("staleness_")} <= set(expected)
            for name, value in expected.items():
                assert metrics[name] == pytest.approx(value, rel=1e-6, abs=1e-12), name
            quantiles = {k: v for k, v in metrics.items() if "quantile" in k}
            assert len(quantiles) == len(QUANTILES)
            assert quantiles.items() <= rank_metrics[0].items()  # the same bits for any split


def gather_nothing_then_something(
    rank: int, world_size: int, init_method: str
) -> tuple[int, list[float]]:
    state = initialize_parallel(
        get_platform("cpu"), rank=rank, world_size=world_size, init_method=init_method
    )
    nothing = gather_values(torch.zeros(0), state)
    something = gather_values(torch.full((rank,), float(rank)), state)
    metrics = reduce_statistics([], state).metrics()
    destroy_parallel()
    assert metrics == {"ratio/tokens": 0.0}
    return len(nothing), something.tolist()


def test_values_come_in_rank_order_and_nothing_is_nothing() -> None:
    assert run_ranks(3, gather_nothing_then_something) == [(0, [1.0, 2.0, 2.0])] * 3
