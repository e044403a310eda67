"""Checksums of tensors' bytes, as fast as memory, wherever the memory is.

In host memory a tensor's digest is xxh3_64 of its bytes (13 GB/s on one core here, where zlib's
crc32 has 2.2). In device memory the bytes do not leave the device: they are read as words of 32
bits, each multiplied by an odd weight of its own and summed in blocks, modulo 2^64; the digest is
xxh3_64 of the sums. A flipped bit changes its block's sum for certain (an odd weight times a power
of two below 2^32 is not 0), and so do two words that change places within a block (the weights
differ modulo 2^33); the order of the blocks is part of what is hashed. Anything else that is
damaged passes with a probability of about 2^-64. This is no protection against an adversary.

Sender and receiver of one bucket hold it in memory of one kind, so they agree.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
import xxhash
from torch import Tensor

if TYPE_CHECKING:
    from r2vpo_megatron.weight_sync.protocol import TensorMeta

WORDS_PER_BLOCK = 4096
# Words are widened to 64 bits for the product; so many at a time bound what that takes.
_BLOCKS_PER_STEP = 512


def begin_digest(data: Tensor) -> int | Tensor:
    """Digest of some bytes, for `finish_digests`; on a device it is not waited for.

    Args:
        data: uint8 [num_bytes], contiguous, from a 4-byte boundary on.
    """
    if data.device.type == "cpu":
        return int(xxhash.xxh3_64_intdigest(data.numpy().data))
    return block_sums(data)


def finish_digests(begun: Sequence[int | Tensor]) -> list[int]:
    """The digests as integers of 64 bits; one copy from the device for all of them."""
    sums = [digest for digest in begun if isinstance(digest, Tensor)]
    if not sums:
        return [digest for digest in begun if isinstance(digest, int)]
    on_host = iter(torch.cat(sums).cpu().split([len(part) for part in sums]))
    return [
        int(xxhash.xxh3_64_intdigest(next(on_host).numpy().data))
        if isinstance(digest, Tensor)
        else digest
        for digest in begun
    ]


def bucket_checksum(metas: Iterable[TensorMeta], digests: Iterable[int]) -> int:
    """Checksum of a bucket: of names, dtypes, shapes and bytes, in their order.

    So two tensors cannot change places unnoticed.
    """
    checksum = xxhash.xxh3_64()
    for meta, digest in zip(metas, digests, strict=True):
        checksum.update(f"{meta.name}:{meta.dtype}:{meta.shape}:{digest:016x};".encode())
    return int(checksum.intdigest())


def block_sums(data: Tensor) -> Tensor:
    """Weighted sums of the blocks of some bytes, int64 [ceil(num_bytes / 4 / WORDS_PER_BLOCK)].

    The last block is as if filled up with zeros.

    Args:
        data: uint8 [num_bytes], contiguous, from a 4-byte boundary on.
    """
    num_words = data.numel() // 4
    whole_blocks = num_words // WORDS_PER_BLOCK
    words = data[: num_words * 4].view(torch.int32)
    weights = _weights(data.device)
    sums = []
    for step in words[: whole_blocks * WORDS_PER_BLOCK].split(_BLOCKS_PER_STEP * WORDS_PER_BLOCK):
        blocks = step.view(-1, WORDS_PER_BLOCK).to(torch.int64)
        sums.append(blocks.mul_(weights).sum(dim=1))
    tail = data[whole_blocks * WORDS_PER_BLOCK * 4 :]
    if tail.numel() > 0:
        last = torch.zeros(WORDS_PER_BLOCK * 4, dtype=torch.uint8, device=data.device)
        last[: tail.numel()] = tail
        sums.append(last.view(torch.int32).to(torch.int64).mul_(weights).sum(dim=0, keepdim=True))
    return torch.cat(sums) if sums else words.new_zeros(0, dtype=torch.int64)


@functools.cache
def _weights(device: torch.device) -> Tensor:
    """Odd, different modulo 2^33, and without a pattern: int64 [WORDS_PER_BLOCK]."""
    weights = []
    for position in range(WORDS_PER_BLOCK):
        random_bits = xxhash.xxh3_64_intdigest(position.to_bytes(8, "little"))
        # The low 13 bits name the position; those above are random.
        weights.append((random_bits >> 13 << 13) | (2 * position + 1))
    signed = [weight - 2**64 if weight >= 2**63 else weight for weight in weights]
    return torch.tensor(signed, dtype=torch.int64).to(device)
