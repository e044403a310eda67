"""The loss: its closed-form gradient, the truncated importance weight, parts of a micro-batch."""

from __future__ import annotations

import math

import pytest
import torch

from r2vpo_megatron.rl.aggregation import AGGREGATIONS
from r2vpo_megatron.rl.loss import LossSettings, ResponseTokens, loss_gradient, policy_loss
from r2vpo_megatron.rl.objectives import OBJECTIVES
from r2vpo_megatron.rl.ratios import truncated_importance_weights
from r2vpo_megatron.rl.statistics import MicroBatchStatistics, RatioStatistics, merge_vectors

LENGTHS = (1, 4, 7, 12)
LOCAL = sorted(name for name, objective in OBJECTIVES.items() if not objective.needs_sequence_ratio)
# Beyond the limit of +-20, at it, inside it, and around 1.
EXTREMES = (-30.0, -20.0, -6.0, 1e-6, -1e-6, 0.25, 6.0, 20.0, 30.0)


def make_tokens(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ResponseTokens]:
    """Log-probs of the policy and what is known of the tokens of four responses."""
    generator = torch.Generator().manual_seed(0)
    num_tokens = sum(LENGTHS)
    lengths = torch.tensor(LENGTHS)
    ids = torch.repeat_interleave(torch.arange(len(LENGTHS)), lengths)

    def normal() -> torch.Tensor:
        return torch.randn(num_tokens, generator=generator, dtype=dtype)

    behavior = -40.0 + normal()
    log_ratio = 0.4 * normal()
    log_ratio[: len(EXTREMES)] = torch.tensor(EXTREMES, dtype=dtype)
    advantages = torch.tensor([1.0, -1.5, 0.0, 0.7], dtype=dtype)[ids]
    tokens = ResponseTokens(
        behavior_logprobs=behavior,
        rollout_logprobs=behavior + 0.8 * normal(),
        policy_versions=torch.zeros(num_tokens, dtype=torch.int64),
        advantages=advantages,
        sequence_lengths=lengths[ids].to(dtype),
        sequence_ids=ids,
        num_sequences=len(LENGTHS),
    )
    return behavior + log_ratio, tokens


@pytest.mark.parametrize("cap", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("name", LOCAL)
def test_autograd_of_the_loss_equals_its_closed_form(name, aggregation, cap):
    policy, tokens = make_tokens()
    policy.requires_grad_()
    settings = LossSettings(OBJECTIVES[name], aggregation, 0.3, importance_cap=cap)
    loss, _ = policy_loss(policy, tokens, settings)
    (expected,) = torch.autograd.grad(loss, policy)
    gradient = loss_gradient(policy, tokens, settings)
    assert not gradient.requires_grad
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-10)

    # Part by part, with parts that cut through responses.
    parts = [slice(0, 3), slice(3, 3), slice(3, 17), slice(17, None)]
    pieces = [loss_gradient(policy[part], tokens.narrow(part), settings) for part in parts]
    assert torch.equal(torch.cat(pieces), gradient)


def test_a_gradient_that_needs_the_whole_response_has_no_local_form():
    policy, tokens = make_tokens()
    with pytest.raises(AssertionError, match="whole response"):
        loss_gradient(policy, tokens, LossSettings(OBJECTIVES["topr"], "token_mean", 0.3))


def test_the_truncated_importance_weight_by_hand():
    # Learner over engine: 1/4, 1, 1.5, 2 (the cap) and 8, and what exp would overflow on.
    behavior = torch.tensor([0.25, 1.0, 1.5, 2.0, 8.0]).log()
    behavior = torch.cat([behavior, torch.tensor([200.0])])
    weights = truncated_importance_weights(behavior, torch.zeros(6), 2.0)
    torch.testing.assert_close(weights, torch.tensor([0.25, 1.0, 1.5, 2.0, 2.0, 2.0]))
    assert (truncated_importance_weights(behavior, torch.zeros(6), 1.7) >= 1.7).sum() == 3


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_the_importance_weight_multiplies_each_token_and_has_no_gradient(name):
    policy, tokens = make_tokens()
    policy.requires_grad_()
    tokens.behavior_logprobs.requires_grad_()

    def gradients(cap: float) -> tuple[torch.Tensor, torch.Tensor, MicroBatchStatistics]:
        settings = LossSettings(OBJECTIVES[name], "token_mean", 0.3, importance_cap=cap)
        loss, kept = policy_loss(policy, tokens, settings)
        by_policy, by_behavior = torch.autograd.grad(loss, (policy, tokens.behavior_logprobs))
        return by_policy, by_behavior, kept

    plain, plain_by_behavior, _ = gradients(0.0)
    weighted, weighted_by_behavior, kept = gradients(2.0)
    weights = torch.exp(tokens.behavior_logprobs - tokens.rollout_logprobs).clamp(max=2.0).detach()
    torch.testing.assert_close(weighted, plain * weights)
    torch.testing.assert_close(weighted_by_behavior, plain_by_behavior * weights)

    merged = RatioStatistics.from_vector(merge_vectors(kept.vector[None]), torch.zeros(5))
    metrics = merged.metrics()
    assert metrics["importance/mean_weight"] == pytest.approx(weights.mean().item(), rel=1e-6)
    truncated = (weights == 2.0).double().mean().item()
    assert 0 < truncated < 1
    assert metrics["importance/truncated_fraction"] == pytest.approx(truncated)


def test_without_a_cap_no_weight_is_reported():
    policy, tokens = make_tokens()
    _, kept = policy_loss(policy, tokens, LossSettings(OBJECTIVES["r2vpo"], "token_mean", 0.3))
    merged = RatioStatistics.from_vector(merge_vectors(kept.vector[None]), torch.zeros(5))
    assert not any(name.startswith("importance/") for name in merged.metrics())
    torch.testing.assert_close(kept.excess.log1p().max().item(), 20.0, rtol=1e-6, atol=0.0)
    assert math.isfinite(merged.second_moment)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_the_entropy_is_aggregated_like_the_surrogates(aggregation):
    policy, tokens = make_tokens()
    entropy = torch.rand(len(policy), dtype=torch.float64, requires_grad=True)
    settings = LossSettings(OBJECTIVES["r2vpo"], aggregation, 0.3, entropy_coefficient=0.01)
    assert not settings.is_local
    loss, _ = policy_loss(policy, tokens, settings, entropy)
    loss.backward()
    per_token = 1 / tokens.sequence_lengths if aggregation == "sequence_mean" else 1.0
    torch.testing.assert_close(entropy.grad, torch.zeros_like(policy) - 0.01 * per_token)
