"""Importance ratios in fp32, accurate where it matters: near 1.

Shape legend: N response tokens of a micro-batch (prompt tokens and padding never get here).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0  # exp(20) = 4.9e8: its square is still finite in fp32


@dataclass(frozen=True)
class Ratios:
    """rho = pi_theta / pi_off per response token, carried as the excess over 1.

    Attributes:
        log_ratio: [N] fp32, log rho limited to +-20 in value, with the gradient of log pi_theta.
        excess: [N] fp32, rho - 1 = expm1(log_ratio).
        clamped: [N] bool, where the limit was in force.
    """

    log_ratio: Tensor
    excess: Tensor
    clamped: Tensor

    @property
    def ratio(self) -> Tensor:
        """[N] fp32, rho; not excess + 1, which is 0 for a rho below 6e-8."""
        return torch.exp(self.log_ratio)


def importance_ratios(policy_logprobs_N: Tensor, behavior_logprobs_N: Tensor) -> Ratios:
    """Ratio of the current policy to the behaviour policy that sampled the token.

    The limit changes the value only: a plain clamp would have no gradient beyond it, and a token
    that far off is the one that must be pulled back. expm1 keeps rho - 1 exact to fp32 near 1,
    where exp(x) - 1 is 4.6% off at 1e-6.

    Args:
        policy_logprobs_N: [N] fp32, log pi_theta, with gradient.
        behavior_logprobs_N: [N] fp32, log pi_off.
    """
    raw = policy_logprobs_N - behavior_logprobs_N
    limited = raw.detach().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    log_ratio = raw + (limited - raw.detach())
    return Ratios(log_ratio, torch.expm1(log_ratio), limited != raw.detach())


def truncated_importance_weights(
    behavior_logprobs_N: Tensor, rollout_logprobs_N: Tensor, cap: float
) -> Tensor:
    """min(pi_learner / pi_rollout, cap): corrects for an engine that computes another policy.

    The engine drew the tokens from its own rendering of the weights, while log pi_off is the
    learner's; this is the importance weight between the two, truncated so that its variance is
    bounded (Ionides 2008). A constant: neither policy depends on the weights being trained.

    Args:
        behavior_logprobs_N: [N] fp32, the learner's log-probs with the weights that sampled.
        rollout_logprobs_N: [N] fp32, the engine's log-probs.
        cap: largest weight, above 0.

    Returns:
        [N] fp32 without gradient, in (0, cap].
    """
    log_weight = (behavior_logprobs_N - rollout_logprobs_N).detach()
    weight = torch.exp(log_weight.clamp(max=math.log(cap)))
    return torch.where(log_weight >= math.log(cap), cap, weight.clamp(max=cap))
