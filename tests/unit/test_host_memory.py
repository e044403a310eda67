"""Memory lanes: every tensor arrives, none is overwritten early, no end waits for a lost one."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from r2vpo_megatron.device.host_memory import LaneOffer, MemoryLane, join_lane, reach_lane


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    before = descriptors()
    yield
    gc.collect()
    assert descriptors() == before
    assert "/memfd:r2vpo" not in Path("/proc/self/maps").read_text()


def make_lane(capacity_bytes: int) -> tuple[MemoryLane, MemoryLane]:
    offer = LaneOffer()
    line = reach_lane(offer.address)
    writer = offer.accept(capacity_bytes)
    offer.close()
    return writer, join_lane(line)


def test_every_tensor_arrives_though_the_memory_is_used_again() -> None:
    writer, reader = make_lane(256)
    tensors = [torch.full((1 + i * 7 % 64,), float(i)) for i in range(200)]
    tensors += [torch.arange(6).view(2, 3).t(), torch.zeros(0), torch.ones(3, dtype=torch.bfloat16)]
    thread = threading.Thread(target=lambda: [writer.write(tensor) for tensor in tensors])
    thread.start()
    for tensor in tensors:
        reader.make_room(tensor)
        received = reader.read(tensor)
        assert received.dtype == tensor.dtype and torch.equal(received, tensor)
    thread.join(30)


def test_what_was_read_stays_until_room_is_made_again() -> None:
    writer, reader = make_lane(256)
    tensors = [torch.full((32,), float(i)) for i in range(3)]  # two of 128 bytes fill it
    thread = threading.Thread(target=lambda: [writer.write(tensor) for tensor in tensors])
    thread.start()
    first, second = (reader.read(tensor) for tensor in tensors[:2])
    thread.join(0.2)
    assert thread.is_alive()  # the third would overwrite the first
    assert torch.equal(first, tensors[0]) and torch.equal(second, tensors[1])
    reader.make_room(tensors[2])
    assert torch.equal(reader.read(tensors[2]), tensors[2])
    thread.join(30)


def test_an_end_that_has_gone_is_noticed() -> None:
    writer, reader = make_lane(64)
    del writer
    with pytest.raises(RuntimeError, match="the other end of a memory lane has gone"):
        reader.read(torch.zeros(1))
    writer, reader = make_lane(64)
    del reader
    with pytest.raises(RuntimeError, match="the other end of a memory lane has gone"):
        for _ in range(3):
            writer.write(torch.zeros(16))


def test_an_address_of_another_host_leads_nowhere() -> None:
    offer = LaneOffer()
    offer.close()
    with pytest.raises(OSError):
        reach_lane(offer.address)
