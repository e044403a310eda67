"""maj@k: how often a vote of k responses picks the right answer, exactly and without drawing."""

from __future__ import annotations

import math
from collections.abc import Sequence


def majority_scores(
    num_right: int, wrong_votes: Sequence[int], num_silent: int, ks: Sequence[int]
) -> list[float]:
    """Expected score of one problem's vote, for each k.

    k of the problem's n responses are drawn without replacement. The answer with most votes wins;
    tied answers share the point; responses without an answer do not vote, and where none votes
    the score is 0. All right responses are one answer, since they equal the reference.

    The expectation is a sum over how many votes r the right answer gets. A wrong answer with
    fewer than r responses in all can neither win nor tie, so only the larger ones need to be
    followed one by one: ways[t][j] counts the draws of j responses from them in which none has
    more than r votes and t have just r.

    Args:
        num_right: Right responses, c.
        wrong_votes: Responses of each wrong answer.
        num_silent: Responses without an answer.
        ks: Sizes of the vote, each 1 to n.
    """
    num_samples = num_right + sum(wrong_votes) + num_silent
    totals = [0.0] * len(ks)
    for right_votes in range(1, min(num_right, max(ks)) + 1):
        small = num_silent + sum(votes for votes in wrong_votes if votes < right_votes)
        large = [votes for votes in wrong_votes if votes >= right_votes]
        ways = _ways_without_winner(large, right_votes, max(ks) - right_votes)
        choose_right = math.comb(num_right, right_votes)
        for position, k in enumerate(ks):
            others = k - right_votes
            if others < 0:
                continue
            for num_tied, by_size in enumerate(ways):
                draws = sum(
                    count * math.comb(small, others - size)
                    for size, count in enumerate(by_size[: others + 1])
                    if count
                )
                # Integers until here: a ratio of two huge whole numbers is still exact enough.
                share = choose_right * draws / math.comb(num_samples, k)
                totals[position] += share / (1 + num_tied)
    return totals


def _ways_without_winner(groups: Sequence[int], most: int, max_size: int) -> list[list[int]]:
    """ways[t][j]: draws of j from the groups, none above `most` votes and t at just `most`."""
    ways = [[0] * (max_size + 1) for _ in range(len(groups) + 1)]
    ways[0][0] = 1
    for position, votes in enumerate(groups):
        grown = [[0] * (max_size + 1) for _ in range(len(groups) + 1)]
        choices = [math.comb(votes, taken) for taken in range(most + 1)]
        for num_tied, by_size in enumerate(ways[: position + 1]):
            for size, count in enumerate(by_size):
                if not count:
                    continue
                for taken in range(min(most, max_size - size) + 1):
                    row = grown[num_tied + 1] if taken == most else grown[num_tied]
                    row[size + taken] += count * choices[taken]
        ways = grown
    return ways
