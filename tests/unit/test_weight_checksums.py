"""Checksums of weight buckets: what they must notice, in host and in device memory."""

from __future__ import annotations

import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from r2vpo_megatron.weight_sync import checksums
from r2vpo_megatron.weight_sync.checksums import (
    WORDS_PER_BLOCK,
    begin_digest,
    block_sums,
    bucket_checksum,
    finish_digests,
)
from r2vpo_megatron.weight_sync.protocol import TensorMeta

MASK = 2**64 - 1
BLOCK_BYTES = 4 * WORDS_PER_BLOCK


def device_digest(data: torch.Tensor) -> int:
    """The digest of device memory, computed on the CPU's."""
    (digest,) = finish_digests([block_sums(data)])
    return digest


def random_bytes(num_bytes: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, generator=generator)


def weight(position: int) -> int:
    """By the definition, in Python's integers."""
    random_bits = xxhash.xxh3_64_intdigest(position.to_bytes(8, "little"))
    return (random_bits & ~0x1FFF & MASK) | (2 * position + 1)


def test_weights_are_odd_and_differ_modulo_2_to_the_33() -> None:
    weights = [weight(position) for position in range(WORDS_PER_BLOCK)]
    assert checksums._weights(torch.device("cpu")).tolist() == [
        w - 2**64 if w >> 63 else w for w in weights
    ]
    assert all(w % 2 for w in weights)
    assert len({w % 2**33 for w in weights}) == WORDS_PER_BLOCK


@pytest.mark.parametrize(
    "num_bytes", [0, 1, 3, 4, 30, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 2]
)
def test_block_sums_are_those_of_python_integers(
    num_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checksums, "_BLOCKS_PER_STEP", 1)
    data = random_bytes(num_bytes)
    raw = data.numpy().tobytes()
    raw += bytes(-len(raw) % BLOCK_BYTES)
    words = [
        int.from_bytes(raw[at : at + 4], "little", signed=True) for at in range(0, len(raw), 4)
    ]
    expected = [
        sum(word * weight(i) for i, word in enumerate(words[at : at + WORDS_PER_BLOCK])) & MASK
        for at in range(0, len(words), WORDS_PER_BLOCK)
    ]
    assert [total & MASK for total in block_sums(data).tolist()] == expected


@settings(max_examples=40, deadline=None)
@given(bit=st.integers(0, 8 * 70_000 - 1), tail=st.integers(1, 70_000))
def test_any_flipped_bit_changes_the_digest(bit: int, tail: int) -> None:
    data = random_bytes(70_000)[-tail:].clone()
    before = device_digest(data), *finish_digests([begin_digest(data)])
    bit %= 8 * tail
    data[bit // 8] ^= 1 << bit % 8
    after = device_digest(data), *finish_digests([begin_digest(data)])
    assert before[0] != after[0] and before[1] != after[1]


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(st.integers(0, 63), min_size=2, max_size=2, unique=True))
def test_rows_that_change_places_change_the_digest(rows: list[int]) -> None:
    matrix = torch.randn(64, 600, generator=torch.Generator().manual_seed(1)).bfloat16()
    swapped = matrix.clone()
    swapped[rows] = matrix[rows[::-1]]
    a, b = (x.view(-1).view(torch.uint8) for x in (matrix, swapped))
    assert device_digest(a) != device_digest(b)
    assert finish_digests([begin_digest(a)]) != finish_digests([begin_digest(b)])


def test_words_that_differ_in_their_sign_bit_alone_cannot_change_places() -> None:
    """Where a sum of plain products modulo 2^64 of 64-bit words would be blind."""
    words = torch.zeros(WORDS_PER_BLOCK, dtype=torch.int32)
    seen = set()
    for position in range(0, WORDS_PER_BLOCK, 7):
        words.zero_()
        words[position] = -(2**31)
        seen.add(device_digest(words.view(torch.uint8)))
    assert len(seen) == len(range(0, WORDS_PER_BLOCK, 7))


def test_blocks_that_change_places_change_the_digest() -> None:
    data = random_bytes(2 * BLOCK_BYTES)
    swapped = torch.cat([data[BLOCK_BYTES:], data[:BLOCK_BYTES]])
    assert device_digest(data) != device_digest(swapped)


def test_in_host_memory_the_digest_is_xxh3_and_both_kinds_may_be_mixed() -> None:
    data = random_bytes(1000)
    host = xxhash.xxh3_64_intdigest(data.numpy().tobytes())
    sums = [block_sums(random_bytes(n)) for n in (40_000, 5)]
    separate = [device_digest(random_bytes(n)) for n in (40_000, 5)]
    assert finish_digests([sums[0], begin_digest(data), sums[1]]) == [
        separate[0],
        host,
        separate[1],
    ]


def test_a_buckets_checksum_covers_the_description_and_the_order() -> None:
    metas = [TensorMeta("a", (2, 3), "float32", 0, 24), TensorMeta("b", (6,), "float32", 64, 24)]
    text = f"a:float32:(2, 3):{5:016x};b:float32:(6,):{7:016x};"
    assert bucket_checksum(metas, [5, 7]) == xxhash.xxh3_64_intdigest(text.encode())
    variants = {
        bucket_checksum(metas, [5, 7]),
        bucket_checksum(metas, [7, 5]),
        bucket_checksum(metas[::-1], [5, 7]),
        bucket_checksum([TensorMeta("a", (3, 2), "float32", 0, 24), metas[1]], [5, 7]),
        bucket_checksum([TensorMeta("a", (2, 3), "int32", 0, 24), metas[1]], [5, 7]),
    }
    assert len(variants) == 5
