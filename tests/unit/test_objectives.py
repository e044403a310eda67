"""Objectives: autograd against the closed forms, limits, and hand-computed values."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from r2vpo_megatron.rl.objectives import OBJECTIVES, ObjectiveInputs
from r2vpo_megatron.rl.objectives.baselines import GPPO, GRPO, SPO, TOPR, Unclipped
from r2vpo_megatron.rl.objectives.r2vpo import R2VPO
from r2vpo_megatron.rl.ratios import MAX_LOG_RATIO, importance_ratios

# Around 1, at the edges of the clips, at the limit of +-20 and beyond it.
LOG_RATIOS = [-45.0, -20.5, -20.0, -6.0, -1.0, -0.3, -0.1, -1e-6, 0.0]
LOG_RATIOS += [1e-6, 0.1, 0.21, 0.26, 1.0, 6.0, 12.0, 20.0, 20.5, 25.0]
ADVANTAGES = [-2.5, -1.0, 0.0, 0.3, 1.0, 2.0]


def test_the_table_holds_the_papers_objectives_and_nothing_changes_them():
    assert {
        "r2vpo": R2VPO(),
        "grpo": GRPO(eps_low=0.2, eps_high=0.2),
        "grpo_clip_high": GRPO(eps_low=0.2, eps_high=0.28),
        "gppo": GPPO(eps_low=0.2, eps_high=0.28),
        "topr": TOPR(ratio_level="sequence_product"),
        "topr_geometric": TOPR(ratio_level="sequence_geometric"),
        "topr_token": TOPR(ratio_level="token"),
        "spo": SPO(eps=0.2),
        "unclipped": Unclipped(),
    } == OBJECTIVES
    for objective in OBJECTIVES.values():
        assert dataclasses.is_dataclass(objective)
        name = dataclasses.fields(objective)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(objective, name, None)
    local = {name for name, objective in OBJECTIVES.items() if not objective.needs_sequence_ratio}
    assert OBJECTIVES.keys() - local == {"topr", "topr_geometric"}


def make_inputs(policy, behavior, advantages, ratio_penalty, num_per_sequence=7):
    ratios = importance_ratios(policy, behavior)
    ids = torch.arange(len(policy)) // num_per_sequence
    sums = torch.zeros(int(ids.max()) + 1, dtype=policy.dtype)
    sums = sums.index_add(0, ids, ratios.log_ratio.detach())
    lengths = torch.bincount(ids).to(policy.dtype)
    return ObjectiveInputs(ratios, advantages, sums[ids], lengths[ids], ratio_penalty)


def grid(dtype):
    log_ratio, advantage = torch.meshgrid(
        torch.tensor(LOG_RATIOS, dtype=dtype), torch.tensor(ADVANTAGES, dtype=dtype), indexing="ij"
    )
    behavior = torch.full((log_ratio.numel(),), -30.0, dtype=dtype)
    return behavior + log_ratio.flatten(), behavior, advantage.flatten()


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
@pytest.mark.parametrize("ratio_penalty", [0.0, 0.04, 2.5])
def test_autograd_equals_closed_form_in_float64(name, ratio_penalty):
    policy, behavior, advantages = grid(torch.float64)
    policy.requires_grad_()
    inputs = make_inputs(policy, behavior, advantages, ratio_penalty)
    (gradient,) = torch.autograd.grad(OBJECTIVES[name].surrogate(inputs).sum(), policy)
    torch.testing.assert_close(
        gradient, OBJECTIVES[name].gradient_weight(inputs), rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize(
    ("name", "ratio", "advantage", "expected"),
    [
        ("r2vpo", 1.3, 1.0, 1.3 * (1.0 - 2 * 0.04 * 0.3)),
        ("r2vpo", 13.5, 1.0, 0.0),  # rho* = 1 + A / (2 lambda)
        ("r2vpo", 0.5, 0.0, 0.5 * 2 * 0.04 * 0.5),  # a pull back without any advantage
        ("grpo", 1.21, 1.0, 0.0),
        ("grpo", 1.19, 1.0, 1.19),
        ("grpo", 1.5, -1.0, -1.5),
        ("grpo", 0.79, -1.0, 0.0),
        ("grpo_clip_high", 1.27, 1.0, 1.27),
        ("grpo_clip_high", 1.29, 1.0, 0.0),
        ("gppo", 5.0, 2.0, 1.28 * 2.0),
        ("gppo", 0.1, -2.0, 0.8 * -2.0),
        ("gppo", 0.1, 2.0, 0.1 * 2.0),
        ("spo", 1.2, 3.0, 0.0),
        ("spo", 1.1, 2.0, 1.1 * 2.0 * 0.5),
        ("topr_token", 7.0, 1.5, 1.5),
        ("topr_token", 0.25, -2.0, -0.5),
        ("topr_token", 4.0, -2.0, -2.0),
        ("unclipped", 4.0, -2.0, -8.0),
    ],
)
def test_gradient_weight_by_hand(name, ratio, advantage, expected):
    policy = torch.tensor([math.log(ratio)], dtype=torch.float64)
    zeros = torch.zeros(1, dtype=torch.float64)
    inputs = make_inputs(policy, zeros, zeros + advantage, 0.04)
    weight = OBJECTIVES[name].gradient_weight(inputs)
    assert weight.item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_all_objectives_coincide_at_ratio_one(name):
    logprobs = torch.linspace(-5, -0.1, 24, dtype=torch.float64)
    advantages = torch.linspace(-2, 2, 24, dtype=torch.float64)
    inputs = make_inputs(logprobs, logprobs.clone(), advantages, 0.7)
    torch.testing.assert_close(OBJECTIVES[name].gradient_weight(inputs), advantages)


def test_limits_give_the_unclipped_objective():
    policy, behavior, advantages = grid(torch.float64)
    inputs = make_inputs(policy, behavior, advantages, 0.0)
    expected = OBJECTIVES["unclipped"].gradient_weight(inputs)
    torch.testing.assert_close(R2VPO().gradient_weight(inputs), expected)
    wide = GRPO(eps_low=math.inf, eps_high=math.inf)
    torch.testing.assert_close(wide.gradient_weight(inputs), expected)


def test_r2vpo_is_spo_at_another_width():
    # lambda 0.04 at |A| = 1 is SPO with eps = |A| / (2 lambda) = 12.5; eps 0.2 is lambda 2.5.
    policy, behavior, advantages = grid(torch.float64)
    advantages = advantages.sign()
    for ratio_penalty, eps in ((0.04, 12.5), (2.5, 0.2)):
        inputs = make_inputs(policy, behavior, advantages, ratio_penalty)
        ours, theirs = R2VPO().gradient_weight(inputs), SPO(eps).gradient_weight(inputs)
        torch.testing.assert_close(ours[advantages != 0], theirs[advantages != 0])


def test_within_their_bounds_the_clipped_objectives_are_unclipped():
    policy = torch.linspace(math.log(0.81), math.log(1.19), 30, dtype=torch.float64)
    advantages = torch.linspace(-2, 2, 30, dtype=torch.float64)
    inputs = make_inputs(policy, torch.zeros_like(policy), advantages, 0.0)
    expected = OBJECTIVES["unclipped"].gradient_weight(inputs)
    for name in ("grpo", "grpo_clip_high", "gppo"):
        assert torch.equal(OBJECTIVES[name].gradient_weight(inputs), expected), name


def test_topr_weights_a_response_by_its_product_or_geometric_mean():
    # One response of two tokens with ratios 0.5 and 0.25: product 0.125, geometric mean 0.3536.
    policy = torch.tensor([0.5, 0.25], dtype=torch.float64).log()
    inputs = make_inputs(policy, torch.zeros(2).double(), -torch.ones(2).double(), 0.0, 2)
    product = OBJECTIVES["topr"].gradient_weight(inputs)
    geometric = OBJECTIVES["topr_geometric"].gradient_weight(inputs)
    torch.testing.assert_close(product, torch.full((2,), -0.125, dtype=torch.float64))
    torch.testing.assert_close(geometric, torch.full((2,), -math.sqrt(0.125)).double())


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_float32_agrees_with_float64_down_to_tiny_deviations(name):
    magnitudes = torch.logspace(-6, 0, 25, dtype=torch.float64)
    log_ratio = torch.cat([-magnitudes, magnitudes]).float().double()
    # Without an advantage nothing is left but the penalty, which is as small as the deviation.
    for advantage in (-2.0, -0.3, 0.0, 0.3, 2.0):
        results = []
        for dtype in (torch.float32, torch.float64):
            policy = log_ratio.to(dtype).requires_grad_()
            zeros = torch.zeros(50, dtype=dtype)
            inputs = make_inputs(policy, zeros, zeros + advantage, 0.04)
            surrogate = OBJECTIVES[name].surrogate(inputs)
            (gradient,) = torch.autograd.grad(surrogate.sum(), policy)
            weight = OBJECTIVES[name].gradient_weight(inputs)
            results.append([gradient.double(), weight.double()])
        for float32, float64 in zip(*results, strict=True):
            torch.testing.assert_close(float32, float64, rtol=1e-5, atol=0.0)


def test_excess_is_accurate_near_one_and_limited_far_off():
    behavior = torch.zeros(3)
    ratios = importance_ratios(torch.tensor([1e-6, 100.0, -100.0]), behavior)
    assert ratios.excess[0].item() == pytest.approx(1.0000005e-6, rel=1e-6)
    assert ratios.excess[1].item() == pytest.approx(math.expm1(MAX_LOG_RATIO), rel=1e-6)
    assert ratios.clamped.tolist() == [False, True, True]
    assert torch.isfinite(ratios.excess.square()).all()


def test_a_limited_ratio_keeps_its_gradient():
    policy = torch.tensor([30.0], requires_grad=True)
    inputs = make_inputs(policy, torch.zeros(1), torch.zeros(1), 1.0, 1)
    R2VPO().surrogate(inputs).sum().backward()
    ratio = math.exp(MAX_LOG_RATIO)
    assert policy.grad is not None
    assert policy.grad.item() == pytest.approx(-2 * ratio * (ratio - 1), rel=1e-5)


@pytest.mark.parametrize("name", ["r2vpo", "spo", "unclipped"])
def test_a_token_far_below_the_behaviour_policy_still_has_a_gradient(name):
    """In fp32 rho - 1 is exactly -1 below rho = 6e-8; rho itself is not 0."""
    ratios = importance_ratios(torch.tensor([-40.0, -18.0]), torch.zeros(2))
    inputs = ObjectiveInputs(
        ratios=ratios,
        advantages=torch.ones(2),
        sequence_log_ratio=None,
        sequence_lengths=torch.ones(2),
        ratio_penalty=0.04,
    )
    weights = OBJECTIVES[name].gradient_weight(inputs)
    assert (weights > 0).all()  # so ratio/clipped_fraction does not count them
    torch.testing.assert_close(ratios.ratio, torch.tensor([-20.0, -18.0]).exp())


@pytest.mark.parametrize("name", ["grpo", "grpo_clip_high", "gppo"])
@pytest.mark.parametrize("advantage", [0.7, -1.3])
def test_surrogate_and_closed_form_agree_at_the_clips_edge_in_float32(name, advantage):
    """Neighbouring fp32 numbers around each edge: both must call the same tokens clipped."""
    edges = torch.tensor([1.28, 1.2, 0.8], dtype=torch.float64).log().float()
    steps = torch.arange(-400, 401).float() * 2.0**-25
    policy = (edges[:, None] + steps).flatten().requires_grad_()
    inputs = ObjectiveInputs(
        ratios=importance_ratios(policy, torch.zeros_like(policy)),
        advantages=torch.full_like(policy, advantage),
        sequence_log_ratio=None,
        sequence_lengths=torch.ones_like(policy),
        ratio_penalty=0.04,
    )
    OBJECTIVES[name].surrogate(inputs).sum().backward()
    torch.testing.assert_close(
        policy.grad, OBJECTIVES[name].gradient_weight(inputs), rtol=1e-6, atol=0.0
    )
