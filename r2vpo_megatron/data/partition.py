"""Split weighted items into the fewest bins of a capacity, balanced."""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Sequence


def partition_balanced(
    weights: Sequence[int], *, capacity: int, num_bins_multiple_of: int
) -> list[list[int]]:
    """Distribute items over bins; each item goes to exactly one.

    For each number of bins, longest-processing-time-first is tried, which balances best, then
    best-fit-decreasing, which fits where the bins must be nearly full. On long-tailed lengths this
    fills more than Karmarkar-Karp does and is much cheaper.

    Args:
        weights: Of the items, each between 1 and `capacity`. Ties are broken by index.
        capacity: Largest sum of a bin.
        num_bins_multiple_of: The number of bins is a multiple of this.

    Returns:
        Item indices of each bin. A bin is empty only where there are fewer items than bins.
    """
    assert all(0 < weight <= capacity for weight in weights)
    step = num_bins_multiple_of
    num_bins = max(1, -(-sum(weights) // (capacity * step))) * step
    heaviest_first = sorted(range(len(weights)), key=lambda index: (-weights[index], index))
    while True:
        for fit in (_least_loaded, _best_fit):
            bins = fit(weights, heaviest_first, num_bins, capacity)
            if bins is not None:
                return bins
        # Ends at the latest where every item has a bin of its own.
        num_bins += step


def _least_loaded(
    weights: Sequence[int], order: Sequence[int], num_bins: int, capacity: int
) -> list[list[int]] | None:
    """Each item into the emptiest bin; None where that overflows."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    heap = [(0, number) for number in range(num_bins)]
    for index in order:
        load, number = heap[0]
        if load + weights[index] > capacity:
            return None
        heapq.heapreplace(heap, (load + weights[index], number))
        bins[number].append(index)
    return bins


def _best_fit(
    weights: Sequence[int], order: Sequence[int], num_bins: int, capacity: int
) -> list[list[int]] | None:
    """Each item into the fullest bin with room for it; None where there is none."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    room = [(capacity, number) for number in range(num_bins)]  # ascending
    for index in order:
        place = bisect.bisect_left(room, (weights[index], -1))
        if place == num_bins:
            return None
        left, number = room.pop(place)
        bisect.insort(room, (left - weights[index], number))
        bins[number].append(index)
    _fill_empty_bins(bins)
    return bins


def _fill_empty_bins(bins: list[list[int]]) -> None:
    """Move the lightest item of the bin with the most items to each empty bin."""
    for members in bins:
        if not members:
            fullest = max(bins, key=len)
            if len(fullest) < 2:
                return
            members.append(fullest.pop())
