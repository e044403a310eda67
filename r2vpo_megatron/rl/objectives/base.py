"""What every objective is given, and what it gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from r2vpo_megatron.rl.ratios import Ratios


@dataclass(frozen=True)
class ObjectiveInputs:
    """Per-token inputs of an objective, over the N response tokens of a micro-batch.

    Attributes:
        ratios: rho of each token against the behaviour policy.
        advantages: [N] fp32, A_hat, constant over a response.
        sequence_log_ratio: [N] fp32 without gradient, the sum of log rho over the token's whole
            response; given where `needs_sequence_ratio`, else None.
        sequence_lengths: [N] fp32, number of response tokens of the token's response.
        ratio_penalty: lambda, the current weight of (rho - 1)^2.
    """

    ratios: Ratios
    advantages: Tensor
    sequence_log_ratio: Tensor | None
    sequence_lengths: Tensor
    ratio_penalty: float


class Objective(Protocol):
    """A policy-gradient objective: a surrogate to maximise and its closed-form gradient."""

    @property
    def needs_sequence_ratio(self) -> bool:
        """Whether the gradient of a token depends on its whole response."""
        ...

    def surrogate(self, inputs: ObjectiveInputs) -> Tensor:
        """[N] fp32, the objective of each token; autograd through it is the update."""
        ...

    def gradient_weight(self, inputs: ObjectiveInputs) -> Tensor:
        """[N] fp32, g = d surrogate / d log pi_theta in closed form, without gradient."""
        ...
