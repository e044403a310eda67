"""The dual variable lambda: three controllers, pure functions of the reduced statistic.

m2 = E_off[(rho - 1)^2] over the global batch of one update, identical on every rank, hence so
is lambda.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

MAX_LOG_STEP = 0.5  # the most that log lambda moves in one update, whatever the violation


@dataclass(frozen=True)
class DualSettings:
    """Settings shared by the controllers.

    Attributes:
        target: delta, the second moment aimed at.
        step_size: eta, lambda's step per unit of violation (paper).
        gain: k, the step of log lambda per relative violation (multiplicative).
        minimum, maximum: bounds of lambda for the multiplicative controller.
    """

    target: float
    step_size: float
    gain: float
    minimum: float
    maximum: float


def fixed(ratio_penalty: float, second_moment: float, settings: DualSettings) -> float:
    """Leave lambda as it is."""
    return ratio_penalty


def paper(ratio_penalty: float, second_moment: float, settings: DualSettings) -> float:
    """Projected gradient step: lambda <- max(0, lambda - eta (delta - m2)) (Eq. 12)."""
    return max(0.0, ratio_penalty - settings.step_size * (settings.target - second_moment))


def multiplicative(ratio_penalty: float, second_moment: float, settings: DualSettings) -> float:
    """Integral control in log space: lambda <- clip(lambda exp(k (m2 / delta - 1))).

    lambda itself is the integrator and is clipped, so it cannot wind up beyond its bounds; the
    step is bounded so that one outlier batch cannot throw it across them.
    """
    step = settings.gain * (second_moment / settings.target - 1.0)
    step = min(max(step, -MAX_LOG_STEP), MAX_LOG_STEP)
    start = max(ratio_penalty, settings.minimum)
    return min(max(start * math.exp(step), settings.minimum), settings.maximum)


DUAL_CONTROLLERS: dict[str, Callable[[float, float, DualSettings], float]] = {
    "fixed": fixed,
    "paper": paper,
    "multiplicative": multiplicative,
}
