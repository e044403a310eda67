"""The dual variable lambda: three controllers, pure functions of the reduced statistic.

m2 = E_off[(rho - 1)^2] over the global batch of one update, identical on every rank, hence so
is lambda. `DualVariable` holds lambda between updates and goes into a checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

MAX_LOG_STEP = 0.1  # the most that log lambda moves in one update, whatever the violation


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
    """Integral control in log space: lambda <- clip(lambda exp(clip(k (m2 / delta - 1)))).

    lambda itself is the integrator and is clipped, so it cannot wind up beyond its bounds. The
    step is bounded alike in both directions: else lambda rises in a transient many times faster
    than it can fall afterwards, m2 being at least 0, and Adam remembers the gradients of so large
    a lambda for a thousand updates. One outlier batch then moves it no further than any other.
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


class DualVariable:
    """Lambda, stepped once per optimizer update by one of the controllers.

    Attributes:
        value: lambda of the next update.
        num_updates: steps taken since the run began.
    """

    def __init__(self, controller: str, start: float, settings: DualSettings) -> None:
        """Begin at `start`, with a controller of DUAL_CONTROLLERS."""
        self._controller = DUAL_CONTROLLERS[controller]
        self._settings = settings
        self.value = start
        self.num_updates = 0

    def step(self, second_moment: float) -> None:
        """Take in m2 of the update that was made with `value`."""
        self.value = self._controller(self.value, second_moment, self._settings)
        self.num_updates += 1

    def state_dict(self) -> dict[str, Any]:
        """Plain values; settings belong to the run's configuration and are not among them."""
        return {"value": self.value, "num_updates": self.num_updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken.

        Raises:
            ValueError: a key is missing or unknown, or a value is not one that lambda or a
                count can have. Nothing is changed then.
        """
        if state.keys() != {"value", "num_updates"}:
            raise ValueError(
                f"state of the dual variable has keys {sorted(state)}; valid: "
                "'num_updates' and 'value'"
            )
        value, num_updates = state["value"], state["num_updates"]
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (is_number and math.isfinite(value) and value >= 0):
            raise ValueError(f"lambda = {value!r} of a checkpoint: valid is a finite number >= 0")
        if not (isinstance(num_updates, int) and num_updates >= 0):
            raise ValueError(f"num_updates = {num_updates!r} of a checkpoint: valid is a count")
        self.value, self.num_updates = float(value), num_updates
