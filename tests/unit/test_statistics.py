"""Ratio statistics under any split, aggregation and advantages."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from r2vpo_megatron.rl.advantages import group_advantages
from r2vpo_megatron.rl.aggregation import denominator_count, token_weights
from r2vpo_megatron.rl.loss import LossSettings, ResponseTokens, policy_loss
from r2vpo_megatron.rl.objectives import OBJECTIVES
from r2vpo_megatron.rl.ratios import importance_ratios
from r2vpo_megatron.rl.statistics import (
    QUANTILES,
    VECTOR_LENGTH,
    RatioStatistics,
    excess_quantiles,
    merge_vectors,
    ratio_vector,
)


def vector_of(log_ratio):
    ratios = importance_ratios(log_ratio, torch.zeros_like(log_ratio))
    ones = torch.ones_like(log_ratio)
    return ratio_vector(ratios, ones, ones, ones)


def statistics_of(*vectors):
    """Without quantiles, which other tests look at."""
    merged = merge_vectors(torch.stack(vectors))
    return RatioStatistics.from_vector(merged, excess_quantiles(torch.zeros(0)))


def test_moments_by_hand():
    # Ratios 0.5, 1 and 2: excess -0.5, 0, 1.
    statistics = statistics_of(vector_of(torch.tensor([0.5, 1.0, 2.0]).log()))
    metrics = statistics.metrics()
    assert metrics["ratio/second_moment"] == pytest.approx(1.25 / 3)
    assert metrics["ratio/mean"] == pytest.approx(3.5 / 3)
    assert metrics["ratio/variance"] == pytest.approx(1.25 / 3 - (0.5 / 3) ** 2, rel=1e-6)
    assert (metrics["ratio/max"], metrics["ratio/min"]) == pytest.approx((2.0, 0.5))
    assert metrics["ratio/effective_sample_size"] == pytest.approx(3.5**2 / (3 * 5.25))


@pytest.mark.parametrize("sizes", [[1000], [1, 999], [500, 0, 500], [250] * 4])
def test_any_split_gives_the_statistics_of_the_whole(sizes):
    torch.manual_seed(0)
    log_ratio = torch.randn(1000) * 3e-4
    excess = torch.expm1(log_ratio.double())
    statistics = statistics_of(*[vector_of(part) for part in log_ratio.split(sizes)])
    assert statistics.tokens == 1000
    assert statistics.second_moment == pytest.approx(excess.square().mean().item(), rel=1e-6)
    variance = statistics.metrics()["ratio/variance"]
    assert variance == pytest.approx(excess.var(correction=0).item(), rel=1e-5)


@given(
    log_ratios=st.lists(st.floats(-3.0, 3.0, width=32), min_size=1, max_size=60),
    seed=st.integers(0, 9),
)
def test_quantiles_are_exact_and_know_no_order(log_ratios, seed):
    excess = torch.expm1(torch.tensor(log_ratios))
    quantiles = excess_quantiles(excess)
    expected = np.quantile(excess.double().numpy(), QUANTILES)
    np.testing.assert_allclose(quantiles.numpy(), expected, rtol=1e-12, atol=1e-15)
    order = torch.randperm(len(excess), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(excess_quantiles(excess[order]), quantiles)


def test_quantiles_are_reported_as_ratios():
    vector = merge_vectors(vector_of(torch.zeros(101))[None])
    quantiles = excess_quantiles(torch.arange(101).float() / 100)
    metrics = RatioStatistics.from_vector(vector, quantiles).metrics()
    reported = {name: value for name, value in metrics.items() if "quantile" in name}
    assert reported == pytest.approx(
        {
            "ratio/quantile_01": 1.01,
            "ratio/quantile_05": 1.05,
            "ratio/quantile_50": 1.5,
            "ratio/quantile_95": 1.95,
            "ratio/quantile_99": 1.99,
        }
    )


def test_an_empty_batch_has_no_moments_and_is_finite():
    statistics = statistics_of(vector_of(torch.zeros(0)))
    assert statistics.metrics() == {"ratio/tokens": 0.0}
    assert statistics.is_finite
    nothing = statistics_of(vector_of(torch.zeros(0)), vector_of(torch.ones(1)))
    assert nothing.metrics()["ratio/max"] == pytest.approx(math.e, rel=1e-6)
    no_micro_batch = merge_vectors(torch.zeros(0, VECTOR_LENGTH))
    assert torch.equal(no_micro_batch, merge_vectors(vector_of(torch.zeros(0))[None]))


def test_clipped_and_clamped_tokens_are_counted():
    # Clipped: above with A > 0 (two, one of them beyond the limit of the ratio), below with A < 0.
    # Not: pushed back from above or below, at 1, or without an advantage.
    log_ratio = torch.tensor([1.5, math.exp(25.0), 0.5, 1.5, 0.5, 1.0, 0.5]).log()
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0, 1.0, 1.0, 0.0])
    tokens = ResponseTokens(
        behavior_logprobs=torch.full((7,), -30.0),
        rollout_logprobs=torch.full((7,), -30.0),
        policy_versions=torch.zeros(7, dtype=torch.int64),
        advantages=advantages,
        sequence_lengths=torch.full((7,), 7.0),
        sequence_ids=torch.zeros(7, dtype=torch.int64),
        num_sequences=1,
    )
    settings = LossSettings(OBJECTIVES["grpo"], "token_mean", 0.04)
    _, kept = policy_loss(log_ratio - 30.0, tokens, settings)
    metrics = statistics_of(kept.vector).metrics()
    assert metrics["ratio/clipped_fraction"] == pytest.approx(3 / 7)
    assert metrics["ratio/clamped_fraction"] == pytest.approx(1 / 7)


def test_nan_is_seen():
    assert not statistics_of(vector_of(torch.tensor([float("nan"), 0.0]))).is_finite


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [("token_mean", -(1 + 1 + 4) / 3), ("sequence_mean", -(1 + 4) / 2), ("token_sum", -6 / 2)],
)
def test_aggregations_by_hand(aggregation, expected):
    # Two responses, of two and one tokens, advantages 1 and 4, all ratios 1.
    tokens = ResponseTokens(
        behavior_logprobs=torch.zeros(3),
        rollout_logprobs=torch.zeros(3),
        policy_versions=torch.zeros(3, dtype=torch.int64),
        advantages=torch.tensor([1.0, 1.0, 4.0]),
        sequence_lengths=torch.tensor([2.0, 2.0, 1.0]),
        sequence_ids=torch.tensor([0, 0, 1]),
        num_sequences=2,
    )
    loss, kept = policy_loss(
        torch.zeros(3), tokens, LossSettings(OBJECTIVES["r2vpo"], aggregation, 0.04)
    )
    assert loss.item() / denominator_count(aggregation, 3, 2) == pytest.approx(expected)
    assert kept.vector[3].item() == pytest.approx(-loss.item())
    assert token_weights("token_sum", tokens.sequence_lengths).tolist() == [1.0, 1.0, 1.0]


def test_group_advantages_by_hand():
    normalized = group_advantages([1.0, 1.0, -1.0, -1.0])
    assert normalized == pytest.approx([1.0, 1.0, -1.0, -1.0], rel=1e-5)
    assert group_advantages([3.0, 0.0, 0.0], normalize_by_std=False) == pytest.approx([2, -1, -1])
    with pytest.raises(ValueError, match="all finite"):
        group_advantages([1.0, float("nan")])
    with pytest.raises(ValueError, match="at least one"):
        group_advantages([])


@given(reward=st.floats(allow_nan=False, allow_infinity=False), size=st.integers(1, 9))
@example(reward=0.1, size=3)  # whose mean rounds to another number than 0.1
def test_equal_rewards_have_no_advantage_at_all(reward, size):
    assert group_advantages([reward] * size) == [0.0] * size
