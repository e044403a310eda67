"""Context parallelism: who holds which tokens, and what pieces of sequences attend to."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from r2vpo_megatron.device import SequenceLayout, get_platform
from r2vpo_megatron.parallel.context import (
    ContextPieces,
    context_pieces,
    context_positions,
    gathered_places,
)

CPU = torch.device("cpu")


@st.composite
def split_streams(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    """Offsets of a padded stream's sequences, and a context size."""
    context_size = draw(st.integers(2, 5))
    lengths = draw(st.lists(st.integers(1, 30), min_size=1, max_size=8))
    padding = -sum(lengths) % (2 * context_size)
    lengths += [padding] * bool(padding)
    return np.concatenate([[0], np.cumsum(lengths)]), context_size


def pairs(offsets: np.ndarray, positions: np.ndarray, pieces: ContextPieces) -> np.ndarray:
    """[T, T] how often each (query, key) of the stream occurs in a rank's pieces."""
    seen = np.zeros((offsets[-1], offsets[-1]), dtype=int)
    for (start, end), (first, last) in zip(
        itertools.pairwise(pieces.query_offsets),
        itertools.pairwise(pieces.key_offsets),
        strict=True,
    ):
        keys = pieces.key_positions[first:last]
        for index in range(start, end):  # aligned at the last query and key
            seen[positions[index], keys[: len(keys) - (end - 1 - index)]] += 1
    return seen


@settings(max_examples=100, deadline=None)
@given(split_streams())
def test_ranks_together_see_the_causal_pairs_of_each_sequence_once(
    stream: tuple[np.ndarray, int],
) -> None:
    offsets, context_size = stream
    total = int(offsets[-1])
    seen, held = np.zeros((total, total), dtype=int), []
    for rank in range(context_size):
        positions = context_positions(total, rank, context_size)
        assert len(positions) == total // context_size
        held.append(positions)
        seen += pairs(offsets, positions, context_pieces(offsets, positions))
    assert sorted(np.concatenate(held)) == list(range(total))
    blocks = np.zeros_like(seen)
    for start, end in itertools.pairwise(offsets):
        blocks[start:end, start:end] = np.tri(end - start, dtype=int)
    np.testing.assert_array_equal(seen, blocks)

    everything = np.arange(total)
    places = gathered_places(everything, total, context_size)
    np.testing.assert_array_equal(np.concatenate(held)[places], everything)


@pytest.mark.parametrize("context_size", [2, 3, 8])
def test_one_long_sequence_costs_every_rank_the_same(context_size: int) -> None:
    offsets = np.array([0, 4 * 2 * context_size])
    work = []
    for rank in range(context_size):
        positions = context_positions(int(offsets[-1]), rank, context_size)
        work.append(pairs(offsets, positions, context_pieces(offsets, positions)).sum())
    assert len(set(work)) == 1


def test_the_chunks_of_a_rank_and_their_pieces_by_hand() -> None:
    offsets = np.array([0, 5, 9, 12])
    positions = context_positions(12, 0, 2)
    assert positions.tolist() == [0, 1, 2, 9, 10, 11]
    pieces = context_pieces(offsets, positions)
    assert pieces.query_offsets.tolist() == [0, 3, 6]
    assert pieces.key_positions.tolist() == [0, 1, 2, 9, 10, 11]

    # The last rank's chunks touch: what runs through both is one piece.
    positions = context_positions(12, 1, 2)
    assert positions.tolist() == [3, 4, 5, 6, 7, 8]
    pieces = context_pieces(offsets, positions)
    assert pieces.query_offsets.tolist() == [0, 2, 6]
    assert pieces.key_offsets.tolist() == [0, 5, 9]
    assert pieces.key_positions.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8]

    # A sequence of which a rank has two pieces occurs twice among its keys.
    pieces = context_pieces(np.array([0, 8]), context_positions(8, 0, 2))
    assert pieces.query_offsets.tolist() == [0, 2, 4]
    assert pieces.key_positions.tolist() == [0, 1, *range(8)]


def test_tokens_that_do_not_divide_are_refused() -> None:
    assert context_positions(5, 0, 1).tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="6 tokens .* size 2 cuts it into 4 equal chunks; pad"):
        context_positions(6, 0, 2)


@pytest.mark.parametrize("context_size", [2, 3])
@pytest.mark.parametrize("lengths", [[24], [1, 13, 2, 8], [5, 6, 7, 6], [17, 7]])
def test_attention_in_pieces_equals_that_of_whole_sequences_in_float64(
    lengths: list[int], context_size: int
) -> None:
    torch.manual_seed(0)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    query, key, value = (torch.randn(24, heads, 8, requires_grad=True) for heads in (6, 2, 2))
    attention = get_platform("cpu").packed_attention
    output = torch.zeros(24, 6, 8)
    for rank in range(context_size):
        positions = context_positions(24, rank, context_size)
        pieces = context_pieces(offsets, positions)
        layout = SequenceLayout.of(pieces.query_offsets, CPU, pieces.key_offsets)
        part = attention(
            query[positions], key[pieces.key_positions], value[pieces.key_positions], layout
        )
        output = output.index_copy(0, torch.from_numpy(positions), part)
    expected = attention(
        query.double(), key.double(), value.double(), SequenceLayout.of(offsets, CPU)
    )
    torch.testing.assert_close(output.double(), expected, atol=1e-6, rtol=0)
    weights = torch.randn(output.shape)
    inputs = (query, key, value)
    gradients = torch.autograd.grad((output * weights).sum(), inputs)
    expected_gradients = torch.autograd.grad((expected * weights).sum(), inputs)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, wanted, atol=1e-5, rtol=0)
