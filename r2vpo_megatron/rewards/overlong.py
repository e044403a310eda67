"""Soft overlong punishment: the nearer a response comes to the length limit, the less it is worth.

A response that is cut off at the limit gives no answer, so its verdict is noise; a penalty that
grows over a buffer before the limit tells the policy what was wrong (DAPO, arXiv 2503.14476,
Eq. 13).
"""

from __future__ import annotations


def overlong_penalty(num_tokens: int, *, max_tokens: int, buffer_tokens: int) -> float:
    """What is added to the reward of a response of this length, in -1..0.

    Args:
        num_tokens: Length of the response in tokens, its stop token included.
        max_tokens: Lmax, the longest response that sampling allows; from here on it is -1.
        buffer_tokens: Lc, tokens before the limit over which the penalty grows linearly from 0;
            0 turns it off.
    """
    if buffer_tokens == 0:
        return 0.0
    return min(max((max_tokens - buffer_tokens - num_tokens) / buffer_tokens, -1.0), 0.0)
