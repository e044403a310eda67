"""Split weighted items into the fewest bins of a capacity, evenly over bins and ranks.

Shape legend: N items, B bins, R ranks; every rank owns B / R bins.
"""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from r2vpo_megatron.records import IntArray

# Loads this close to their mean are even: finer differences are lost in what a kernel's time
# varies by.
_TOLERANCE = 1e-3
# Items of the fullest bin or rank that one round tries to exchange; bounds the time of a round.
_MAX_CANDIDATES = 64


def partition_balanced(
    weights: Sequence[int], *, capacity: int, num_ranks: int
) -> list[list[list[int]]]:
    """Distribute items over the bins of ranks; each item goes to exactly one.

    For each number of bins, two starts are tried and improved by exchanging items: each item into
    the emptiest bin, heaviest first, which is nearly even but may overflow; then into the fullest
    bin that has room, which fits where bins must be nearly full. On long-tailed lengths that
    nearly always reaches the number of bins that the sum of the weights demands.

    Args:
        weights: Of the items, each between 1 and `capacity`. Ties are broken by index.
        capacity: Largest sum of a bin.
        num_ranks: R. Every rank gets the same number of bins.

    Returns:
        [rank][bin] item indices, ascending; a rank's bins from heavy to light. A bin is empty only
        where there are fewer items than bins.
    """
    assert all(0 < weight <= capacity for weight in weights)
    weights_N = np.array(weights, dtype=np.int64)
    heaviest_first = sorted(range(len(weights)), key=lambda index: (-weights[index], index))
    num_bins = max(1, -(-sum(weights) // (capacity * num_ranks))) * num_ranks
    while True:
        for start in (_emptiest_bin, _fullest_bin_with_room):
            bin_of_N = start(weights, heaviest_first, num_bins, capacity)
            if bin_of_N is None:
                continue
            _even_out(weights_N, bin_of_N, np.arange(num_bins), capacity)
            loads_B = _loads(weights_N, bin_of_N, num_bins)
            if loads_B.max() <= capacity:
                rank_of_B = _deal_to_ranks(loads_B, num_ranks)
                _even_out(weights_N, bin_of_N, rank_of_B, capacity)
                return _list_members(weights_N, bin_of_N, rank_of_B)
        # Ends at the latest where every item has a bin of its own.
        num_bins += num_ranks


def _emptiest_bin(
    weights: Sequence[int], order: Sequence[int], num_bins: int, capacity: int
) -> IntArray:
    """[N] bin of each item: the emptiest one, even where that overflows."""
    bin_of_N = np.zeros(len(weights), dtype=np.int64)
    heap = [(0, number) for number in range(num_bins)]
    for index in order:
        load, bin_of_N[index] = heap[0]
        heapq.heapreplace(heap, (load + weights[index], int(bin_of_N[index])))
    return bin_of_N


def _fullest_bin_with_room(
    weights: Sequence[int], order: Sequence[int], num_bins: int, capacity: int
) -> IntArray | None:
    """[N] bin of each item: the fullest one with room for it; None where there is none."""
    bin_of_N = np.zeros(len(weights), dtype=np.int64)
    room = [(capacity, number) for number in range(num_bins)]  # ascending
    for index in order:
        place = bisect.bisect_left(room, (weights[index], -1))
        if place == num_bins:
            return None
        left, bin_of_N[index] = room.pop(place)
        bisect.insort(room, (left - weights[index], int(bin_of_N[index])))
    _fill_empty_bins(order, bin_of_N, num_bins)
    return bin_of_N


def _fill_empty_bins(order: Sequence[int], bin_of_N: IntArray, num_bins: int) -> None:
    """Move the lightest item of the bin with the most items to each empty bin."""
    counts_B = np.bincount(bin_of_N, minlength=num_bins)
    for empty in np.flatnonzero(counts_B == 0):
        source = int(counts_B.argmax())
        if counts_B[source] < 2:
            return
        bin_of_N[[index for index in order if bin_of_N[index] == source][-1]] = empty
        counts_B[[source, empty]] += (-1, 1)


def _even_out(weights_N: IntArray, bin_of_N: IntArray, owner_of_B: IntArray, capacity: int) -> None:
    """Lower the largest load of an owner of bins, in place, by exchanging or moving items.

    Each round takes from the fullest owner the item whose exchange with an item of another, or
    whose move, leaves the larger of the two loads smallest. Ends when loads are even and fit, or
    when no exchange helps. Bins may overflow only while one does already; none becomes empty.

    Args:
        weights_N: [N] weights.
        bin_of_N: [N] bin of each item; changed.
        owner_of_B: [B] owner of each bin: the bin itself, or its rank.
        capacity: of a bin.
    """
    num_items, num_bins = len(weights_N), len(owner_of_B)
    num_owners = int(owner_of_B.max()) + 1
    # Partners of an exchange: the items, then nothing at all in each bin, which makes it a move.
    partner_weights = np.concatenate([weights_N, np.zeros(num_bins, dtype=np.int64)])
    for _ in range(4 * num_bins):
        loads_B = _loads(weights_N, bin_of_N, num_bins)
        owner_loads = _loads(loads_B, owner_of_B, num_owners)
        fullest = int(owner_loads.argmax())
        even = owner_loads.mean() * (1 + _TOLERANCE)
        if owner_loads[fullest] <= min(even, capacity * num_bins / num_owners):
            return
        candidates = np.flatnonzero(owner_of_B[bin_of_N] == fullest)
        candidates = candidates[:: -(-len(candidates) // _MAX_CANDIDATES)]
        partner_bins = np.concatenate([bin_of_N, np.arange(num_bins)])
        partner_owners = owner_of_B[partner_bins]

        moved = weights_N[candidates, None] - partner_weights
        larger = np.maximum(owner_loads[fullest] - moved, owner_loads[partner_owners] + moved)
        forbidden = (partner_owners == fullest) | (
            loads_B[partner_bins] + moved > max(capacity, loads_B.max())
        )
        is_alone = np.bincount(bin_of_N, minlength=num_bins)[bin_of_N[candidates]] == 1
        forbidden[is_alone, num_items:] = True
        larger[forbidden] = owner_loads[fullest]

        candidate, partner = divmod(int(larger.argmin()), len(partner_weights))
        if larger[candidate, partner] >= owner_loads[fullest]:
            return
        item = candidates[candidate]
        if partner < num_items:
            bin_of_N[partner] = bin_of_N[item]
        bin_of_N[item] = partner_bins[partner]


def _loads(weights: IntArray, place_of: IntArray, num_places: int) -> IntArray:
    """Sum of the weights at each of `num_places` places."""
    return np.bincount(place_of, weights=weights, minlength=num_places).astype(np.int64)


def _deal_to_ranks(loads_B: IntArray, num_ranks: int) -> IntArray:
    """[B] rank of each bin: each rank gets one of every row of bins of similar loads.

    Rows go from heavy to light, and in each row the rank with the least so far gets the heaviest.
    """
    rank_of_B = np.zeros(len(loads_B), dtype=np.int64)
    totals: npt.NDArray[np.int64] = np.zeros(num_ranks, dtype=np.int64)
    for row in np.argsort(-loads_B, kind="stable").reshape(-1, num_ranks):
        ranks = np.argsort(totals, kind="stable")
        rank_of_B[row] = ranks
        totals[ranks] += loads_B[row]
    return rank_of_B


def _list_members(
    weights_N: IntArray, bin_of_N: IntArray, rank_of_B: IntArray
) -> list[list[list[int]]]:
    """[rank][bin] item indices; a rank's bins from heavy to light."""
    loads_B = _loads(weights_N, bin_of_N, len(rank_of_B))
    bins: list[list[list[int]]] = [[] for _ in range(int(rank_of_B.max()) + 1)]
    for number in np.argsort(-loads_B, kind="stable"):
        bins[rank_of_B[number]].append(np.flatnonzero(bin_of_N == number).tolist())
    return bins
