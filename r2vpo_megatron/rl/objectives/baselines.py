"""The baselines of the comparison: clipped, gradient-preserving, tapered and unclipped.

Each `surrogate` is maximised; each `gradient_weight` is its derivative by log pi_theta.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from r2vpo_megatron.rl.objectives.base import ObjectiveInputs


@dataclass(frozen=True)
class Unclipped:
    """rho A, the control arm: R2VPO at lambda 0."""

    needs_sequence_ratio: bool = False

    def surrogate(self, inputs: ObjectiveInputs) -> Tensor:
        """Rho A."""
        return inputs.ratios.ratio * inputs.advantages

    def gradient_weight(self, inputs: ObjectiveInputs) -> Tensor:
        """Rho A."""
        return inputs.ratios.ratio.detach() * inputs.advantages


@dataclass(frozen=True)
class GRPO:
    """min(rho A, clip(rho, 1 - eps_low, 1 + eps_high) A) (DeepSeekMath; clip-high: DAPO)."""

    eps_low: float = 0.2
    eps_high: float = 0.2
    needs_sequence_ratio: bool = False

    def surrogate(self, inputs: ObjectiveInputs) -> Tensor:
        """The pessimistic bound; without gradient where the clip is in force."""
        ratio = inputs.ratios.ratio
        held = ratio.detach().clamp(1.0 - self.eps_low, 1.0 + self.eps_high)
        return torch.where(self._is_clipped(inputs), held, ratio) * inputs.advantages

    def gradient_weight(self, inputs: ObjectiveInputs) -> Tensor:
        """Rho A, and 0 where the clip is in force."""
        unclipped = inputs.ratios.ratio.detach() * inputs.advantages
        return torch.where(self._is_clipped(inputs), 0.0, unclipped)

    def _is_clipped(self, inputs: ObjectiveInputs) -> Tensor:
        """[N] bool, for surrogate and gradient alike: at the edge itself roundings would differ."""
        ratio, advantages = inputs.ratios.ratio.detach(), inputs.advantages
        above = (advantages > 0) & (ratio > 1.0 + self.eps_high)
        return above | ((advantages < 0) & (ratio < 1.0 - self.eps_low))


@dataclass(frozen=True)
class GPPO:
    """GRPO's clip on the value, its gradient kept at the clip's edge (Klear-Reasoner)."""

    eps_low: float = 0.2
    eps_high: float = 0.28
    needs_sequence_ratio: bool = False

    def surrogate(self, inputs: ObjectiveInputs) -> Tensor:
        """Gradient weight times (1 + log pi - stop_gradient(log pi)): value and slope agree."""
        log_ratio = inputs.ratios.log_ratio
        return self.gradient_weight(inputs) * (1.0 + log_ratio - log_ratio.detach())

    def gradient_weight(self, inputs: ObjectiveInputs) -> Tensor:
        """Rho A, with rho held at the edge that the advantage pushes it over."""
        ratio, advantages = inputs.ratios.ratio.detach(), inputs.advantages
        held = torch.where(
            advantages > 0,
            ratio.clamp(max=1.0 + self.eps_high),
            ratio.clamp(min=1.0 - self.eps_low),
        )
        return held * advantages


@dataclass(frozen=True)
class SPO:
    """rho A - |A| (rho - 1)^2 / (2 eps) (Simple Policy Optimization, arXiv 2401.16025)."""

    eps: float = 0.2
    needs_sequence_ratio: bool = False

    def surrogate(self, inputs: ObjectiveInputs) -> Tensor:
        """The quadratic that peaks at |rho - 1| = eps."""
        excess, advantages = inputs.ratios.excess, inputs.advantages
        penalty = advantages.abs() * excess.square() / (2 * self.eps)
        return inputs.ratios.ratio * advantages - penalty

    def gradient_weight(self, inputs: ObjectiveInputs) -> Tensor:
        """Rho (A - |A| (rho - 1) / eps)."""
        excess, advantages = inputs.ratios.excess.detach(), inputs.advantages
        slope = advantages - advantages.abs() * excess / self.eps
        return inputs.ratios.ratio.detach() * slope


@dataclass(frozen=True)
class TOPR:
    """Tapered off-policy REINFORCE: A > 0 as it is, A < 0 weighted by min(weight, 1).

    ratio_level: what the weight is. `sequence_product` (the paper), the response's product of
    ratios; `sequence_geometric`, their geometric mean; `token`, the token's own ratio.
    """

    ratio_level: str = "sequence_product"

    @property
    def needs_sequence_ratio(self) -> bool:
        """Whether the weight is the response's."""
        return self.ratio_level != "token"

    def surrogate(self, inputs: ObjectiveInputs) -> Tensor:
        """Gradient weight times log pi (up to a constant)."""
        return self.gradient_weight(inputs) * inputs.ratios.log_ratio

    def gradient_weight(self, inputs: ObjectiveInputs) -> Tensor:
        """A where A > 0, else min(weight, 1) A."""
        if self.ratio_level == "token":
            log_weight = inputs.ratios.log_ratio.detach()
        else:
            assert inputs.sequence_log_ratio is not None
            log_weight = inputs.sequence_log_ratio
            if self.ratio_level == "sequence_geometric":
                log_weight = log_weight / inputs.sequence_lengths
        tapered = inputs.advantages * torch.exp(log_weight.clamp(max=0.0))
        return torch.where(inputs.advantages > 0, inputs.advantages, tapered)
