"""Standard errors and 95% intervals of means over problems, and of differences of such means."""

from __future__ import annotations

import math
from collections.abc import Sequence

NORMAL_QUANTILE = 1.959963984540054  # 97.5%


def standard_error(values: Sequence[float]) -> float | None:
    """Standard error of the mean of independent values; None of fewer than two.

    sqrt(sum (v_i - v)^2 / (n (n - 1))).
    """
    num_values = len(values)
    if num_values < 2:
        return None
    mean = math.fsum(values) / num_values
    squares = math.fsum((value - mean) ** 2 for value in values)
    return math.sqrt(squares / (num_values * (num_values - 1)))


def confidence_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95% interval of the mean of fractions, within 0..1; None of fewer than two.

    Wilson's interval for as many independent trials as would have this standard error,
    m (1 - m) / SE^2, with Student's quantile of n - 1 degrees of freedom. Near 0 and 1, where the
    spread is uncertain itself, m plus or minus t SE is too narrow and too low or high; elsewhere
    the two agree. Where all values are 0 or all are 1 their spread says nothing: n trials.
    """
    error = standard_error(values)
    if error is None:
        return None
    mean = math.fsum(values) / len(values)
    if mean in (0.0, 1.0):
        square, num_trials = NORMAL_QUANTILE**2, float(len(values))
    elif error == 0.0:
        return mean, mean
    else:
        square = student_quantile(len(values) - 1) ** 2
        num_trials = mean * (1.0 - mean) / error**2
    ratio = square / num_trials
    middle = mean + ratio / 2
    half = math.sqrt(ratio * (mean * (1.0 - mean) + ratio / 4))
    return max(0.0, (middle - half) / (1 + ratio)), min(1.0, (middle + half) / (1 + ratio))


def student_quantile(degrees_of_freedom: int) -> float:
    """97.5% quantile of Student's t, to three digits or better.

    Exact for 1 and 2; beyond, the expansion in 1 / degrees of freedom around the normal quantile
    (Abramowitz and Stegun 26.7.5).

    Raises:
        ValueError: fewer than one degree of freedom.
    """
    if degrees_of_freedom < 1:
        raise ValueError(f"{degrees_of_freedom} degrees of freedom; valid: at least 1")
    if degrees_of_freedom == 1:
        return math.tan(0.475 * math.pi)
    if degrees_of_freedom == 2:
        return 0.95 / math.sqrt(2 * 0.975 * 0.025)
    x = NORMAL_QUANTILE
    terms = (
        x,
        (x**3 + x) / 4,
        (5 * x**5 + 16 * x**3 + 3 * x) / 96,
        (3 * x**7 + 19 * x**5 + 17 * x**3 - 15 * x) / 384,
        (79 * x**9 + 776 * x**7 + 1482 * x**5 - 1920 * x**3 - 945 * x) / 92160,
    )
    return math.fsum(term / degrees_of_freedom**power for power, term in enumerate(terms))
