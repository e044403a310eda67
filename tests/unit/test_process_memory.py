"""Tensors of another process: every element comes from where it lies, and a lost process shows."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from r2vpo_megatron.device import process_memory
from r2vpo_megatron.device.process_memory import MemoryOffer, OfferedMemory, RemoteTensor

FORK = multiprocessing.get_context("fork")
SHAPE = (6, 8, 5)
DTYPES = (torch.float32, torch.bfloat16)
VIEWS: dict[str, Callable[[Any], Any]] = {
    "whole": lambda t: t,
    "rows": lambda t: t[1:4],
    "no rows": lambda t: t[6:],
    "half": lambda t: t.chunk(2)[1],
    "columns": lambda t: t.split([3, 1, 4], 1)[2],
    "heads": lambda t: t.reshape(3, 16, 5).split([12, 4], 1)[1],
    "rows of columns": lambda t: t.split([3, 5], 1)[1][2:5],
}


def source(dtype: torch.dtype) -> Tensor:
    return torch.arange(240, dtype=torch.float32).view(SHAPE).to(dtype)


def own(pipe: Connection, reader_pid: int) -> None:
    memory = OfferedMemory(reader_pid)
    tensors = {dtype: source(dtype) for dtype in DTYPES}
    pipe.send((memory.offer, {dtype: tensor.data_ptr() for dtype, tensor in tensors.items()}))
    pipe.recv()


@dataclasses.dataclass
class Owner:
    """Another process, which has `source` of each dtype."""

    offer: MemoryOffer
    addresses: dict[torch.dtype, int]
    end: Callable[[], None]

    def tensor(self, dtype: torch.dtype) -> RemoteTensor:
        view = torch.empty(SHAPE, dtype=dtype, device="meta")
        return RemoteTensor(self.offer.pid, self.addresses[dtype], view)


@pytest.fixture
def owner() -> Iterator[Owner]:
    ours, theirs = FORK.Pipe()
    process = FORK.Process(target=own, args=(theirs, os.getpid()))
    process.start()

    def end() -> None:
        if process.is_alive():
            ours.send("end")
            process.join()

    yield Owner(*ours.recv(), end)
    end()


@pytest.mark.parametrize("limits", [(1024, 1 << 20), (3, 32)], ids=["one call", "many calls"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_view_is_read_into_memory_of_any_strides(
    owner: Owner, dtype: torch.dtype, limits: tuple[int, int]
) -> None:
    with (
        patch.object(process_memory, "_MOST_PIECES", limits[0]),
        patch.object(process_memory, "_MOST_BYTES", limits[1]),
    ):
        for name, view in VIEWS.items():
            there, expected = view(owner.tensor(dtype)), view(source(dtype))
            assert there.shape == expected.shape and len(there) == len(expected), name
            assert torch.equal(there.contiguous(), expected), name
            room = torch.full((9, 20, 7), -1.0, dtype=dtype)
            places = [
                room[: expected.shape[0], 2 : 2 + expected.shape[1], 1:6],
                room.transpose(0, 1)[: expected.shape[0], : expected.shape[1], :5],
            ]
            for place in places:
                around = int((room == -1).sum())
                there.copy_into(place)
                assert torch.equal(place, expected), name
                assert int((room == -1).sum()) == around - expected.numel(), name
                room.fill_(-1)


def test_a_process_that_has_gone_is_named(owner: Owner) -> None:
    tensor = owner.tensor(torch.float32)
    assert owner.offer.is_readable()
    owner.end()
    assert not owner.offer.is_readable()
    with pytest.raises(RuntimeError, match=f"memory of process {owner.offer.pid} cannot be read"):
        tensor.contiguous()


def test_memory_that_is_not_there_is_an_error_not_zeros(owner: Owner) -> None:
    unmapped = dataclasses.replace(owner.tensor(torch.float32), address=8)
    with pytest.raises(RuntimeError, match="Bad address"):
        unmapped.contiguous()
    # A part that is there does not hide one that is not.
    long = torch.empty(1 << 40, dtype=torch.uint8, device="meta")
    there = dataclasses.replace(owner.tensor(torch.float32), view=long[: 1 << 30])
    with pytest.raises(RuntimeError, match="cannot be read"):
        there.contiguous()


def test_another_hosts_process_of_the_same_id_is_not_taken_for_it(owner: Owner) -> None:
    proof = bytes(byte ^ 1 for byte in owner.offer.proof)
    assert not dataclasses.replace(owner.offer, proof=proof).is_readable()
    assert not dataclasses.replace(owner.offer, pid=2**22 + 1).is_readable()
