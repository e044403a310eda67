"""How per-token objectives become one loss: per-token weights and one global denominator.

The loss of an optimizer step is  -sum over tokens (weight * objective) / denominator,  where the
denominator counts tokens or responses of the GLOBAL batch: all micro-batches on all ranks. A
token's weight is known from its own response, so any split of the batch gives the same loss.
"""

from __future__ import annotations

import torch
from torch import Tensor

AGGREGATIONS = ("token_mean", "sequence_mean", "token_sum")


def token_weights(aggregation: str, sequence_lengths_N: Tensor) -> Tensor:
    """[N] fp32 weight of each response token.

    Args:
        aggregation: token_mean (1 each), sequence_mean (1 / its response's length) or token_sum
            (1 each, as Eq. 2 of the paper is printed).
        sequence_lengths_N: [N] fp32, response tokens of the token's whole response.
    """
    if aggregation == "sequence_mean":
        return 1.0 / sequence_lengths_N
    return torch.ones_like(sequence_lengths_N)


def denominator_count(aggregation: str, num_tokens: int, num_responses: int) -> int:
    """What a micro-batch adds to the denominator: its response tokens, or its responses (1/G)."""
    return num_tokens if aggregation == "token_mean" else num_responses
