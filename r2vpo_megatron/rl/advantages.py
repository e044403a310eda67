"""Group-relative advantages: one number per response (arXiv 2601.03320, Eq. 3)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

STD_OFFSET = 1e-6  # the paper's delta: keeps a group of equal rewards at 0


def group_advantages(rewards: Sequence[float], *, normalize_by_std: bool = True) -> list[float]:
    """A_hat = (r - mean) / (std + 1e-6) over the responses of one prompt.

    Args:
        rewards: [G] rewards of the group.
        normalize_by_std: whether to divide by the group's (population) standard deviation.

    Returns:
        [G] advantages; exactly 0 where the rewards are all equal.

    Raises:
        ValueError: for an empty group or a reward that is not finite.
    """
    values = np.asarray(rewards, dtype=np.float64)
    if values.size == 0 or not np.isfinite(values).all():
        raise ValueError(f"rewards = {list(rewards)} of a group: need at least one, all finite")
    # Relative to the first reward, equal rewards are zeros; the rounding of a mean of other equal
    # numbers, divided by STD_OFFSET, would make an advantage of nothing.
    values = values - values[0]
    centered = values - values.mean()
    if normalize_by_std:
        centered = centered / (values.std() + STD_OFFSET)
    return [float(value) for value in centered]
