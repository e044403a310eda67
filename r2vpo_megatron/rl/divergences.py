"""Divergences between two policies, and the ratio's second moment that approximates them.

At one state, with actions drawn from pi_off, every f-divergence is E_off[f(rho)]. Lemma 3.1 of
arXiv 2601.03320 says that for rho near 1 each is a multiple of m2 = E_off[(rho - 1)^2]:
JS about m2 / 8, either KL about m2 / 2. The generator of JS printed in the paper's proof is
wrong; the one here is the definition's, with f''(1) = 1/4.

Written in x = rho - 1, and with a linear term, whose expectation is 0, such that f is at least 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def _log1p_times(factor: Array, x: Array) -> Array:
    """factor log(1 + x), and its limit 0 where factor is 0 (at rho = 0)."""
    logarithm = np.log1p(np.where(factor == 0, 0.0, x))
    return np.asarray(factor * logarithm, dtype=np.float64)


def _jensen_shannon(x: Array) -> Array:
    """(rho / 2) log(2 rho / (rho + 1)) + (1 / 2) log(2 / (rho + 1))."""
    to_middle = np.log1p(x / 2.0)
    terms = _log1p_times(1.0 + x, x) - (1.0 + x) * to_middle - to_middle
    return np.asarray(0.5 * terms, dtype=np.float64)


def _kl_policy_behavior(x: Array) -> Array:
    """Rho log rho - (rho - 1)."""
    return _log1p_times(1.0 + x, x) - x


def _kl_behavior_policy(x: Array) -> Array:
    """-log rho + (rho - 1); infinite at rho = 0."""
    with np.errstate(divide="ignore"):
        return np.asarray(x - np.log1p(x), dtype=np.float64)


@dataclass(frozen=True)
class Divergence:
    """An f-divergence and its second-order approximation.

    Attributes:
        symbol: for people.
        generator: [...] f(1 + x) in nats from x >= -1, float64; good to 1e-6 relative for
            |x| >= 1e-5, below which its terms cancel.
        coefficient: f''(1) / 2, so that the divergence is about coefficient * m2.
    """

    symbol: str
    generator: Callable[[Array], Array]
    coefficient: float


DIVERGENCES = {
    "js": Divergence("JS(pi, off)", _jensen_shannon, 1 / 8),
    "kl_policy_behavior": Divergence("KL(pi || off)", _kl_policy_behavior, 1 / 2),
    "kl_behavior_policy": Divergence("KL(off || pi)", _kl_behavior_policy, 1 / 2),
}


def divergence(name: str, behavior_A: Array, excess_A: Array) -> float:
    """The divergence of two distributions over A actions, in nats.

    Args:
        name: one of DIVERGENCES.
        behavior_A: [A] float64, probabilities of pi_off.
        excess_A: [A] float64, rho - 1; its expectation under pi_off must be 0.
    """
    return float(behavior_A @ DIVERGENCES[name].generator(excess_A))


def second_moment(behavior_A: Array, excess_A: Array) -> float:
    """E_off[(rho - 1)^2] of two distributions over A actions."""
    return float(behavior_A @ np.square(excess_A))


def approximation_quotient(name: str, x: Array) -> Array:
    """[...] f(1 + x) / (coefficient x^2): 1 at x = 0, and falling in x for all DIVERGENCES."""
    entry = DIVERGENCES[name]
    safe = np.where(x == 0, 1.0, x)
    quotient = entry.generator(safe) / (entry.coefficient * np.square(safe))
    return np.where(x == 0, 1.0, quotient)


def quotient_bounds(name: str, radius: float) -> tuple[float, float]:
    """Between which D / (coefficient m2) lies for ANY two policies with |rho - 1| <= radius.

    D / (coefficient m2) is a mean of `approximation_quotient` over the actions, weighted by
    pi_off (rho - 1)^2, so the quotient's extremes over [-radius, radius] bound it.

    Raises:
        ValueError: the radius is not in (0, 1].
    """
    if not 0 < radius <= 1:
        raise ValueError(f"radius = {radius}: valid is above 0 and at most 1, since rho >= 0")
    low, high = approximation_quotient(name, np.array([radius, -radius]))
    return float(low), float(high)


def largest_deviation(name: str, relative_error: float) -> float:
    """The largest |rho - 1| up to which coefficient m2 is right to this relative error.

    Raises:
        ValueError: the error is not in (0, 0.2], where every divergence reaches it within |x| < 1.
    """
    if not 0 < relative_error <= 0.2:
        raise ValueError(f"relative_error = {relative_error}: valid is above 0 and at most 0.2")
    low, high = 0.0, 1.0
    for _ in range(50):  # bisection: the worse side's error grows with the radius
        middle = (low + high) / 2
        bounds = quotient_bounds(name, middle)
        if max(abs(bound - 1.0) for bound in bounds) > relative_error:
            high = middle
        else:
            low = middle
    return low
