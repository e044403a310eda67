"""torch_dist folders: what is written is read back bit for bit, what is hostile is refused."""

from __future__ import annotations

import io
import itertools
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from r2vpo_megatron.checkpoint.torch_dist import (
    TorchDistReader,
    encode_extra_state,
    encode_tensor,
    tensor_buffers,
)
from tests.torch_dist_files import Box, grid, random_tensor, replace_blob, save_one

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64, torch.bool]
FUZZ = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def bits(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


@st.composite
def cut_tensors(draw: st.DrawFn) -> tuple[Tensor, list[Box], list[tuple[int, int]]]:
    """A tensor, boxes that cover it, and a slice."""
    shape = draw(st.lists(st.integers(1, 7), min_size=0, max_size=4))
    ranges = []
    for size in shape:
        cuts = sorted({0, size, *draw(st.lists(st.integers(0, size), max_size=3))})
        ranges.append(list(itertools.pairwise(cuts)))
    boxes = draw(st.permutations(list(itertools.product(*ranges))))
    ends = [sorted(draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in shape]
    return (
        random_tensor(tuple(shape), draw(st.sampled_from(DTYPES))),
        boxes,
        [(a, b) for a, b in ends],
    )


@FUZZ
@given(cut_tensors())
def test_any_cut_and_any_slice_of_it_are_read_back(
    tmp_path_factory: pytest.TempPathFactory,
    case: tuple[Tensor, list[Box], list[tuple[int, int]]],
) -> None:
    tensor, boxes, ranges = case
    with save_one(tmp_path_factory.mktemp("m"), tensor, boxes, num_files=2) as reader:
        stored = reader.tensors["a.weight"]
        assert (stored.shape, stored.dtype) == (tuple(tensor.shape), tensor.dtype)
        assert list(reader.tensors) == ["a.weight"]  # no byte objects
        whole = reader.read("a.weight", [(0, size) for size in tensor.shape])
        assert whole.dtype == tensor.dtype and bits(whole) == bits(tensor)
        expected = tensor[tuple(slice(*part) for part in ranges)]
        part = reader.read("a.weight", ranges)
        assert part.shape == expected.shape and part.is_contiguous()
        assert bits(part) == bits(expected)


def test_a_slice_reads_only_what_it_touches(tmp_path: Path) -> None:
    tensor = random_tensor((6, 4, 5))
    reader = save_one(tmp_path, tensor, grid(tensor.shape, (6, 1, 1)))
    broken = reader.tensors["a.weight"].chunks[3]
    with open(tmp_path / broken.file, "r+b") as file:
        file.seek(broken.position)
        file.write(bytes(broken.length))
    for layers in ((0, 3), (4, 6)):
        part = reader.read("a.weight", [layers, (1, 3), (0, 5)])
        assert torch.equal(part, tensor[slice(*layers), 1:3])
    with pytest.raises(ValueError, match=r"at byte 2,\d+ is not what torch.save writes"):
        reader.read("a.weight", [(3, 4), (0, 4), (0, 5)])


def test_rows_alone_are_read_of_a_large_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensor = random_tensor((1, 1000, 300))
    reader = save_one(tmp_path, tensor, grid(tensor.shape, (1, 1, 1)))
    read_bytes, preadv = [], os.preadv

    def counting(descriptor: int, buffers: list[Any], position: int) -> int:
        count = preadv(descriptor, buffers, position)
        read_bytes.append(count)
        return count

    monkeypatch.setattr(os, "preadv", counting)
    part = reader.read("a.weight", [(0, 1), (500, 510), (0, 300)])
    assert torch.equal(part, tensor[:, 500:510])
    assert 10 * 300 * 4 <= sum(read_bytes) < 10 * 300 * 4 + 20_000


def test_a_slice_is_read_into_a_part_of_a_tensor(tmp_path: Path) -> None:
    tensor = random_tensor((2, 6, 8))
    reader = save_one(tmp_path, tensor, grid(tensor.shape, (2, 3, 2)))
    target = torch.zeros(10, 9)
    out = target[2:6, 1:9].unsqueeze(0)
    reader.read("a.weight", [(1, 2), (1, 5), (0, 8)], out)
    assert torch.equal(target[2:6, 1:9], tensor[1, 1:5])
    assert torch.count_nonzero(target) == torch.count_nonzero(tensor[1, 1:5])


def test_a_slice_outside_the_tensor_is_refused(tmp_path: Path) -> None:
    reader = save_one(tmp_path, random_tensor((3, 4)), grid((3, 4), (1, 1)))
    for ranges in ([(0, 3)], [(0, 4), (0, 4)], [(2, 1), (0, 4)], [(-1, 2), (0, 4)]):
        with pytest.raises(ValueError, match=r"tensor 'a.weight' \[3, 4\]: has no slice"):
            reader.read("a.weight", ranges)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 5), (1, 2, 3), (), (0, 4)])
def test_torch_loads_a_blob_and_equal_tensors_have_equal_bytes(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    tensor = random_tensor(shape, dtype)
    data = encode_tensor(tensor)
    loaded = torch.load(io.BytesIO(data), weights_only=True)
    assert loaded.dtype == dtype and loaded.shape == tensor.shape
    assert bits(loaded) == bits(tensor)
    assert data == encode_tensor(tensor.clone())


def test_the_values_are_not_copied() -> None:
    tensor = torch.zeros(1000)
    buffers = tensor_buffers(tensor)
    tensor.fill_(1.0)
    assert torch.tensor(1.0).numpy().tobytes() * 1000 in b"".join(buffers)


def test_what_cannot_be_written_is_refused() -> None:
    with pytest.raises(ValueError, match="must be contiguous and on the CPU"):
        encode_tensor(torch.zeros(2, 3).T)
    with pytest.raises(ValueError, match=r"dtype = torch.complex64: must be one of bfloat16, "):
        encode_tensor(torch.zeros(2, dtype=torch.complex64))


def test_an_extra_state_is_a_list_of_none() -> None:
    assert torch.load(io.BytesIO(encode_extra_state()), weights_only=True) == [None]


@pytest.mark.parametrize("crc32", [True, False])
@pytest.mark.parametrize("kind", ["plain", "transposed", "view of a larger", "parameter"])
def test_what_torch_saves_is_read(kind: str, crc32: bool, tmp_path: Path) -> None:
    tensor = {
        "plain": random_tensor((4, 6)),
        "transposed": random_tensor((6, 4)).T,
        "view of a larger": random_tensor((3, 4, 6))[1],
        "parameter": torch.nn.Parameter(random_tensor((4, 6))).detach().requires_grad_(),
    }[kind]
    data, crc32_before = io.BytesIO(), torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(crc32)
    try:
        torch.save(tensor, data)
    finally:
        torch.serialization.set_crc32_options(crc32_before)
    reader = replace_blob(
        tmp_path, save_one(tmp_path, random_tensor((4, 6)), grid((4, 6), (1, 1))), data.getvalue()
    )
    assert torch.equal(reader.read("a.weight", [(0, 4), (0, 6)]), tensor)
    assert torch.equal(reader.read("a.weight", [(1, 3), (2, 5)]), tensor[1:3, 2:5])


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torch_s_own_loader_reads_the_folder(tmp_path: Path) -> None:
    tensor = random_tensor((5, 6), torch.bfloat16)
    save_one(tmp_path, tensor, grid((5, 6), (2, 3)), num_files=2)
    state = {"a.weight": torch.zeros(5, 6, dtype=torch.bfloat16)}
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    assert torch.equal(state["a.weight"], tensor)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_what_torch_s_own_saver_wrote_is_read(tmp_path: Path) -> None:
    state = {
        "a": {"weight": random_tensor((5, 6)), "bias": random_tensor((5,), torch.bfloat16)},
        "step": 7,
    }
    dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
    reader = TorchDistReader(tmp_path)
    assert list(reader.tensors) == ["a.weight", "a.bias"]
    assert torch.equal(reader.read("a.weight", [(0, 5), (0, 6)]), state["a"]["weight"])
    assert torch.equal(reader.read("a.bias", [(1, 5)]), state["a"]["bias"][1:])
