"""Ratio statistics under any split, the loss, advantages and the dual controllers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from r2vpo_megatron.rl.advantages import group_advantages
from r2vpo_megatron.rl.aggregation import denominator_count, token_weights
from r2vpo_megatron.rl.dual import DualSettings, fixed, multiplicative, paper
from r2vpo_megatron.rl.loss import ResponseTokens, policy_loss
from r2vpo_megatron.rl.objectives import OBJECTIVES
from r2vpo_megatron.rl.ratios import importance_ratios
from r2vpo_megatron.rl.statistics import (
    VECTOR_LENGTH,
    RatioStatistics,
    merge_vectors,
    ratio_vector,
)


def vector_of(log_ratio):
    ratios = importance_ratios(log_ratio, torch.zeros_like(log_ratio))
    ones = torch.ones_like(log_ratio)
    return ratio_vector(ratios, ones, ones, ones)


def test_moments_by_hand():
    # Ratios 0.5, 1 and 2: excess -0.5, 0, 1.
    statistics = RatioStatistics.from_vector(
        merge_vectors(vector_of(torch.tensor([0.5, 1.0, 2.0]).log())[None])
    )
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
    merged = merge_vectors(torch.stack([vector_of(part) for part in log_ratio.split(sizes)]))
    statistics = RatioStatistics.from_vector(merged)
    assert statistics.tokens == 1000
    assert statistics.second_moment == pytest.approx(excess.square().mean().item(), rel=1e-6)
    variance = statistics.metrics()["ratio/variance"]
    assert variance == pytest.approx(excess.var(correction=0).item(), rel=1e-5)


def test_an_empty_batch_has_no_moments_and_is_finite():
    statistics = RatioStatistics.from_vector(merge_vectors(vector_of(torch.zeros(0))[None]))
    assert statistics.metrics() == {"ratio/tokens": 0.0}
    assert statistics.is_finite
    nothing = RatioStatistics.from_vector(
        merge_vectors(torch.cat([vector_of(torch.zeros(0))[None], vector_of(torch.ones(1))[None]]))
    )
    assert nothing.metrics()["ratio/max"] == pytest.approx(math.e, rel=1e-6)
    assert len(merge_vectors(torch.zeros(3, VECTOR_LENGTH))) == VECTOR_LENGTH


def test_nan_is_seen():
    vector = merge_vectors(vector_of(torch.tensor([float("nan"), 0.0]))[None])
    assert not RatioStatistics.from_vector(vector).is_finite


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [("token_mean", -(1 + 1 + 4) / 3), ("sequence_mean", -(1 + 4) / 2), ("token_sum", -6 / 2)],
)
def test_aggregations_by_hand(aggregation, expected):
    # Two responses, of two and one tokens, advantages 1 and 4, all ratios 1.
    tokens = ResponseTokens(
        behavior_logprobs=torch.zeros(3),
        advantages=torch.tensor([1.0, 1.0, 4.0]),
        sequence_lengths=torch.tensor([2.0, 2.0, 1.0]),
        sequence_ids=torch.tensor([0, 0, 1]),
        num_sequences=2,
    )
    loss, vector = policy_loss(torch.zeros(3), tokens, OBJECTIVES["r2vpo"], aggregation, 0.04)
    assert loss.item() / denominator_count(aggregation, 3, 2) == pytest.approx(expected)
    assert vector[3].item() == pytest.approx(-loss.item())
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


def settings(step_size=math.nan, gain=math.nan):
    """Each controller must read its own number: the other's is not one."""
    return DualSettings(target=0.04, step_size=step_size, gain=gain, minimum=1e-3, maximum=1e3)


def test_dual_steps_by_hand():
    assert fixed(0.04, 9.0, settings()) == 0.04
    assert paper(0.04, 0.05, settings(step_size=1e-3)) == pytest.approx(0.04001)
    assert paper(1e-6, 0.0, settings(step_size=1e-3)) == 0.0
    assert multiplicative(0.5, 0.08, settings(gain=0.2)) == pytest.approx(0.5 * math.exp(0.2))
    assert multiplicative(0.5, 0.04, settings(gain=0.2)) == 0.5
    assert multiplicative(900.0, 40.0, settings(gain=0.2)) == 1e3
    assert multiplicative(0.0, 0.0, settings(gain=0.2)) == 1e-3


@pytest.mark.parametrize("start", [1e-3, 0.04, 50.0])
def test_multiplicative_control_reaches_its_target_and_stays(start):
    # A plant like the measured one: the second moment falls with lambda, with a lag and noise.
    torch.manual_seed(0)
    ratio_penalty, second_moment, trace = start, 0.2, []
    for _ in range(120):
        steady = 0.3 / (1.0 + 12.0 * ratio_penalty)
        second_moment += 0.5 * (steady * (1 + 0.05 * torch.randn(()).item()) - second_moment)
        ratio_penalty = multiplicative(ratio_penalty, second_moment, settings(gain=0.25))
        trace.append(second_moment)
    late = trace[50:]
    assert sum(late) / len(late) == pytest.approx(0.04, rel=0.05)
    assert max(late) < 0.04 * 1.25
