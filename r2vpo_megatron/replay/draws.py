"""Which samples an iteration's updates get: uniform draws, with replacement or dealt out."""

from __future__ import annotations

import numpy as np

from r2vpo_megatron.records import IntArray


def draw_with_replacement(
    generator: np.random.Generator, num_stored: int, num_updates: int, size: int
) -> IntArray:
    """[num_updates, size] indices below `num_stored`, each drawn by itself."""
    if num_updates * size == 0:
        return np.zeros((num_updates, size), dtype=np.int64)
    return generator.integers(num_stored, size=(num_updates, size), dtype=np.int64)


def deal_out(
    generator: np.random.Generator, num_stored: int, num_updates: int, size: int
) -> IntArray:
    """[num_updates, size] indices below `num_stored`, drawn without replacement.

    The samples are shuffled and dealt out, shuffled again and dealt out again, as often as it
    takes, and what is dealt is cut into updates. So over all of them no sample is used twice before
    every other was used once. Where a new shuffle begins in the middle of an update, it begins with
    samples that this update has not had. So within an update no sample occurs twice either, unless
    the update is larger than what is stored: then, as over all updates, any two samples occur
    equally often, give or take one.

    Every sample is as likely as any other to be at any place.
    """
    updates = np.zeros((num_updates, size), dtype=np.int64)
    undealt = np.zeros(0, dtype=np.int64)
    for update in updates:
        filled = 0
        while filled < size:
            if len(undealt) == 0:
                wanted = size - filled
                undealt = _shuffle(generator, num_stored, update[:filled], wanted)
            dealt, undealt = np.split(undealt, [size - filled])
            update[filled : filled + len(dealt)] = dealt
            filled += len(dealt)
    return updates


def _shuffle(
    generator: np.random.Generator, num_stored: int, so_far: IntArray, wanted: int
) -> IntArray:
    """A random order whose first `wanted` occur `so_far` as seldom as can be."""
    order = generator.permutation(num_stored)
    if wanted >= num_stored or len(so_far) == 0:
        return order
    counts = np.bincount(so_far, minlength=num_stored)
    first = order[np.argsort(counts[order], kind="stable")[:wanted]]
    return np.concatenate([first, order[~np.isin(order, first)]])
