"""Context parallelism: which tokens of a packed stream a rank holds, and what they attend to.

The stream of T tokens is cut into 2 CP equal chunks; context rank r holds chunks r and
2 CP - 1 - r, in this order. A late chunk of a long sequence attends to more keys than an early
one, and each rank has one of either kind, so causal attention costs every rank about the same.
This is the scheme of the Llama 3 report (arXiv 2407.21783, section 3.3.2), applied to the packed
stream as a whole: no sequence has to be padded.

Only core attention looks at other tokens. Keys and values are gathered over the context ranks;
everything else of the model is per token and needs nothing of this file.

Shape legend: T tokens of the stream, P pieces of sequences on a rank, K keys that they see.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from r2vpo_megatron.records import IntArray


def context_positions(num_tokens: int, context_rank: int, context_size: int) -> IntArray:
    """[T / CP] int64 positions of the stream that a context rank holds, ascending.

    Raises:
        ValueError: T does not divide into 2 CP chunks.
    """
    if context_size == 1:
        return np.arange(num_tokens, dtype=np.int64)
    if num_tokens % (2 * context_size):
        raise ValueError(
            f"{num_tokens} tokens in a micro-batch: context parallel size {context_size} cuts it "
            f"into {2 * context_size} equal chunks; pad the tail"
        )
    chunks = np.arange(num_tokens, dtype=np.int64).reshape(2 * context_size, -1)
    return chunks[[context_rank, 2 * context_size - 1 - context_rank]].reshape(-1)


@dataclass(frozen=True)
class ContextPieces:
    """The parts of sequences whose queries a rank holds, and the keys of each.

    A piece is a run of consecutive tokens of one sequence. It sees its sequence's tokens from
    the first one up to the piece's own last; so a sequence of which the rank has two pieces
    occurs twice among the keys.

    Attributes:
        query_offsets: [P + 1] int64, where pieces begin and end among the rank's tokens.
        key_offsets: [P + 1] int64, the same among their keys.
        key_positions: [K] int64, positions of the keys in the stream.
    """

    query_offsets: IntArray
    key_offsets: IntArray
    key_positions: IntArray


def context_pieces(cumulative_lengths: IntArray, positions: IntArray) -> ContextPieces:
    """Cut a rank's tokens into pieces.

    Args:
        cumulative_lengths: [S + 1] offsets of the whole stream's sequences, 0 first, T last.
        positions: from `context_positions`.
    """
    sequences = np.searchsorted(cumulative_lengths, positions, side="right") - 1
    is_start = np.ones(len(positions), dtype=np.bool_)
    is_start[1:] = (np.diff(positions) != 1) | (np.diff(sequences) != 0)
    query_offsets = np.append(np.flatnonzero(is_start), len(positions))
    first_keys = cumulative_lengths[sequences[query_offsets[:-1]]]
    last_keys = positions[query_offsets[1:] - 1]
    keys = [np.arange(a, b + 1) for a, b in zip(first_keys, last_keys, strict=True)]
    key_offsets = np.concatenate([[0], np.cumsum([len(part) for part in keys])])
    return ContextPieces(query_offsets, key_offsets, np.concatenate(keys))


def gathered_places(positions: IntArray, num_tokens: int, context_size: int) -> IntArray:
    """Where tokens of the stream stand once all context ranks' tokens are put end to end.

    Args:
        positions: any positions of the stream.
        num_tokens: T.
        context_size: CP.
    """
    order = [context_positions(num_tokens, rank, context_size) for rank in range(context_size)]
    places = np.empty(num_tokens, dtype=np.int64)
    places[np.concatenate(order)] = np.arange(num_tokens)
    return places[positions]


def sum_over_context(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of `values` over the context ranks, on each of them; without gradient.

    Collective: every rank of the context group must call, with the same shape.
    """
    total = values.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total
