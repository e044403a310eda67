"""R2VPO: the ratio's variance as a penalty in place of a clip (arXiv 2601.03320, Eq. 9-12).

    surrogate  = rho A - lambda (rho - 1)^2
    g          = rho (A - 2 lambda (rho - 1))

Nothing is cut off: a token far from the behaviour policy is still pushed, in its advantage's
direction while rho < 1 + A / (2 lambda), and back toward the behaviour policy beyond that.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from r2vpo_megatron.rl.objectives.base import ObjectiveInputs


@dataclass(frozen=True)
class R2VPO:
    """Ratio-variance regularised policy optimisation; lambda comes with the inputs."""

    needs_sequence_ratio: bool = False

    def surrogate(self, inputs: ObjectiveInputs) -> Tensor:
        """rho A - lambda (rho - 1)^2."""
        excess = inputs.ratios.excess
        return inputs.ratios.ratio * inputs.advantages - inputs.ratio_penalty * excess.square()

    def gradient_weight(self, inputs: ObjectiveInputs) -> Tensor:
        """rho (A - 2 lambda (rho - 1))."""
        ratio, excess = inputs.ratios.ratio.detach(), inputs.ratios.excess.detach()
        return ratio * (inputs.advantages - 2.0 * inputs.ratio_penalty * excess)
