"""Hostile and broken torch_dist folders are refused with ValueError, and run no code."""

from __future__ import annotations

import io
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import Metadata

from r2vpo_megatron.checkpoint.torch_dist import (
    StoredChunk,
    StoredTensor,
    TorchDistReader,
    encode_extra_state,
    encode_tensor,
    is_torch_dist,
    write_metadata,
)
from tests.torch_dist_files import grid, random_tensor, replace_blob, save_one

FUZZ = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


class Calls:
    """Pickled as a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_one(tmp_path / "m", random_tensor((4, 6)), grid((4, 6), (2, 2)), num_files=2)
    return tmp_path / "m"


def edited(folder: Path, change: Callable[[Metadata], None]) -> None:
    """Change .metadata as an object and write it back."""
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))


@pytest.mark.parametrize("where", ["whole", "planner data", "file name", "dtype"])
def test_code_in_metadata_is_refused_and_does_not_run(
    where: str, folder: Path, tmp_path: Path
) -> None:
    evil: Any = Calls(os.system, f"touch {tmp_path / 'ran'}")

    def change(metadata: Metadata) -> None:
        if where == "planner data":
            metadata.planner_data = {"a": evil}
        elif where == "file name":
            next(iter(metadata.storage_data.values())).relative_path = evil
        else:
            metadata.state_dict_metadata["a.weight"].properties.dtype = evil  # type: ignore[union-attr]

    if where == "whole":
        (folder / ".metadata").write_bytes(pickle.dumps(evil))
    else:
        edited(folder, change)
    with pytest.raises(ValueError, match=r"it names '(posix|nt).system', which has no place here"):
        TorchDistReader(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("function", [eval, torch.load, pickle.loads, torch.nn.Linear, getattr])
def test_other_names_are_refused(function: Callable[..., Any], folder: Path) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(Calls(function, "1")))
    with pytest.raises(ValueError, match="which has no place here"):
        TorchDistReader(folder)


BOMBS = {
    "memo slot 4 billion": b"\x80\x04Nr\xff\xff\xff\xff.",
    "bytearray of 2^62": b"\x80\x05\x96" + (2**62).to_bytes(8, "little") + b".",
    "frame of 2^62": b"\x80\x04\x95" + (2**62).to_bytes(8, "little") + b"N.",
    "text of 2^31": b"\x80\x04X\xff\xff\xff\x7f.",
    "deep key": b"\x80\x04})" + b"\x85" * 200_000 + b"Ns.",
    "deep value": b"\x80\x04)" + b"\x85" * 200_000 + b".",
    "stack underflow": b"\x80\x04R.",
    "extension code": b"\x80\x04\x82\x01.",
    "old text opcode": b"cos\nsystem\n(S'true'\ntR.",
    "items of a list": b"\x80\x04](NNu.",
    "call of a text": b"\x80\x04X\x01\x00\x00\x00a)R.",
    "state of a class": b"\x80\x02ctorch\nSize\n}X\x01\x00\x00\x00aNsb.",
    "no object": b"\x80\x04N.",
    "empty": b"",
}


@pytest.mark.parametrize("data", BOMBS.values(), ids=BOMBS)
def test_pickles_that_break_pickle_are_refused(data: bytes, folder: Path) -> None:
    (folder / ".metadata").write_bytes(data)
    with pytest.raises(ValueError, match=r"\.metadata: "):
        TorchDistReader(folder)


def read_all(folder: Path) -> bool:
    """Whether the folder can be read; ValueError says that not, and nothing else may be raised."""
    try:
        with TorchDistReader(folder) as reader:
            for key, tensor in reader.tensors.items():
                reader.read(key, [(0, size) for size in tensor.shape])
    except ValueError:
        return False
    return True


@FUZZ
@given(st.binary(max_size=200))
def test_random_metadata_is_refused(folder: Path, data: bytes) -> None:
    (folder / ".metadata").write_bytes(data)
    assert not read_all(folder)


def test_metadata_cut_short_is_refused(folder: Path) -> None:
    data = (folder / ".metadata").read_bytes()
    for length in range(0, len(data), 7):
        (folder / ".metadata").write_bytes(data[:length])
        assert not read_all(folder)


@FUZZ
@given(st.data())
def test_damaged_files_are_read_or_refused(folder: Path, data: st.DataObject) -> None:
    path = folder / data.draw(st.sampled_from([".metadata", "__0_0.distcp"]))
    whole = path.read_bytes()
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    try:
        path.write_bytes(damaged)
        read_all(folder)
    finally:
        path.write_bytes(whole)
    assert read_all(folder)


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../m/__0_0.distcp", "a/../../b", "", "a\0b", "//x", "..", "..\\a"]
)
def test_files_outside_the_folder_are_refused(name: str, folder: Path) -> None:
    def change(metadata: Metadata) -> None:
        for info in metadata.storage_data.values():
            info.relative_path = name

    edited(folder, change)
    with pytest.raises(ValueError, match="must be a path inside the folder"):
        TorchDistReader(folder)


def info_of(metadata: Metadata, offset: tuple[int, ...]) -> Any:
    return next(
        info
        for index, info in metadata.storage_data.items()
        if index.offset is not None and tuple(index.offset) == offset
    )


def chunks_of(metadata: Metadata) -> Any:
    return metadata.state_dict_metadata["a.weight"].chunks  # type: ignore[union-attr]


FAULTS: dict[str, tuple[Callable[[Metadata], Any], str]] = {
    "a chunk is missing": (
        lambda m: chunks_of(m).pop(),
        r"\[4, 6\]: its chunks hold 18 values, not 24; some are missing",
    ),
    "a chunk is there twice": (
        lambda m: chunks_of(m).append(chunks_of(m)[0]),
        "its chunks hold 30 values, not 24; some overlap",
    ),
    "chunks overlap, and as much is missing": (
        lambda m: chunks_of(m).__setitem__(3, chunks_of(m)[2]),
        "its chunks overlap, and some are missing",
    ),
    "a chunk is beyond the tensor": (
        lambda m: setattr(chunks_of(m)[3], "sizes", torch.Size([3, 3])),
        r"the chunk at \[2, 3\] of \[3, 3\] is not within the tensor",
    ),
    "a chunk has other dimensions": (
        lambda m: setattr(chunks_of(m)[3], "sizes", torch.Size([2, 3, 1])),
        "is not within the tensor",
    ),
    "a chunk has no place": (
        lambda m: m.storage_data.clear(),
        r"does not say where the chunk at \[0, 0\] lies",
    ),
    "a length is beyond the file": (
        lambda m: setattr(info_of(m, (2, 3)), "length", 10**6),
        "the file is cut short",
    ),
    "a position is beyond all files": (
        lambda m: setattr(info_of(m, (2, 3)), "offset", 2**62),
        "the file is cut short",
    ),
    "a position is negative": (
        lambda m: setattr(info_of(m, (2, 3)), "offset", -1),
        "place of 'a.weight': must be in 0",
    ),
    "a position is a text": (
        lambda m: setattr(info_of(m, (2, 3)), "offset", "1"),
        "place of 'a.weight': must be integers",
    ),
    "a length is too short": (
        lambda m: setattr(info_of(m, (2, 3)), "length", 100),
        "is not what torch.save writes",
    ),
    "a position is that of another chunk": (
        lambda m: setattr(chunks_of(m)[3], "sizes", torch.Size([2, 0])),
        "some are missing",
    ),
    "another file": (
        lambda m: setattr(info_of(m, (2, 3)), "relative_path", "none.distcp"),
        "none.distcp: is missing; it holds a part of tensor 'a.weight'",
    ),
    "another dtype": (
        lambda m: setattr(
            m.state_dict_metadata["a.weight"].properties,  # type: ignore[union-attr]
            "dtype",
            torch.bfloat16,
        ),
        r"is torch.float32 \[2, 3\], not torch.bfloat16 \[2, 3\] as .metadata says",
    ),
    "compression": (
        lambda m: setattr(info_of(m, (2, 3)), "transform_descriptors", ["zstd"]),
        "is compressed or encrypted",
    ),
    "no storage": (lambda m: setattr(m, "storage_data", None), "storage_data: is of an unexpected"),
}


@pytest.mark.parametrize(("change", "message"), FAULTS.values(), ids=FAULTS)
def test_what_does_not_fit_is_named(
    change: Callable[[Metadata], None], message: str, folder: Path
) -> None:
    edited(folder, change)
    with pytest.raises(ValueError, match=message), TorchDistReader(folder) as reader:
        reader.read("a.weight", [(0, 4), (0, 6)])


def test_a_blob_that_is_not_one_tensor_is_refused(folder: Path, tmp_path: Path) -> None:
    one = save_one(tmp_path / "one", random_tensor((2, 2)), grid((2, 2), (1, 1)))
    evil = io.BytesIO()
    torch.save(Calls(os.system, f"touch {tmp_path / 'ran'}"), evil)
    wrong = {
        encode_extra_state(): "does not hold a tensor",
        evil.getvalue(): "which has no place here",
        encode_tensor(random_tensor((4,))): r"is torch.float32 \[4\], not torch.float32 \[2, 2\]",
        b"nothing of the kind": "is not what torch.save writes",
        encode_tensor(random_tensor((2, 2))).replace(b"little", b"big!!!"): "the other byte order",
    }
    for data, message in wrong.items():
        reader = replace_blob(tmp_path / "one", one, data)
        with pytest.raises(ValueError, match=message):
            reader.read("a.weight", [(0, 2), (0, 2)])
    assert not (tmp_path / "ran").exists()


def test_tensors_that_are_not_covered_are_not_written(tmp_path: Path) -> None:
    chunk = StoredChunk((0,), (3,), "__0_0.distcp", 0, 100)
    with pytest.raises(ValueError, match="its chunks hold 3 values, not 4; some are missing"):
        write_metadata(tmp_path, [StoredTensor("a", (4,), torch.float32, (chunk,))], [])
    assert list(tmp_path.iterdir()) == []


def test_common_holds_plain_values_alone_unless_it_is_trusted(folder: Path, tmp_path: Path) -> None:
    common = TorchDistReader(folder).common()
    assert common == {"checkpoint_version": 3.0, "iteration": 0}
    torch.save({"args": Calls(os.system, f"touch {tmp_path / 'ran'}")}, folder / "common.pt")
    with pytest.raises(ValueError, match=r"common.pt: cannot be read as plain values \("):
        TorchDistReader(folder).common()
    assert not (tmp_path / "ran").exists()
    assert TorchDistReader(folder, trust_pickle=True).common() == {"args": 0}
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("data", [b"", b"garbage", b"\x80\x02N.", b"PK\x03\x04"])
def test_a_broken_common_is_refused(data: bytes, folder: Path) -> None:
    (folder / "common.pt").write_bytes(data)
    with pytest.raises(ValueError, match=r"common.pt: "):
        TorchDistReader(folder).common()
    (folder / "common.pt").unlink()
    with pytest.raises(ValueError, match=r"common.pt: is missing"):
        TorchDistReader(folder).common()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_common_with_a_changed_byte_is_read_or_refused(folder: Path) -> None:
    path = folder / "common.pt"
    data = path.read_bytes()
    start = data.index(b"\x80\x02}")  # the pickle within the archive
    for position in range(start, data.index(b".", start) + 1):
        for value in (0x00, 0x2E, 0x30, 0x52, 0x68, 0x75, 0xFF):
            path.write_bytes(data[:position] + bytes([value]) + data[position + 1 :])
            try:
                TorchDistReader(folder).common()
            except ValueError as error:
                assert str(error).startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        (".metadata", b"", True),
        ("__0_0.distcp", b"", True),
        ("metadata.json", b'{"sharded_backend": "zarr"}', True),
        ("metadata.json", b'{"author": "someone"}', False),
        ("metadata.json", b'["sharded_backend"]', False),
        ("metadata.json", b"{", False),
        ("metadata.json", b"\xff", False),
        ("metadata.json", b"[" * 100_000, False),
        ("model.safetensors", b"", False),
    ],
)
def test_other_programs_have_a_metadata_json_too(
    name: str, content: bytes, expected: bool, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    assert is_torch_dist(tmp_path) is expected


def test_the_folder_says_what_it_is(folder: Path, tmp_path: Path) -> None:
    config = folder / "metadata.json"
    assert json.loads(config.read_text()) == {
        "sharded_backend": "torch_dist",
        "sharded_backend_version": 1,
        "common_backend": "torch",
        "common_backend_version": 1,
    }
    assert is_torch_dist(folder) and not is_torch_dist(tmp_path)
    for text, message in (
        ('{"sharded_backend": "zarr"}', "sharded_backend = 'zarr': must be 'torch_dist'"),
        ("[]", "is not a JSON object"),
        ("[" * 100_000, "is not a JSON object"),
    ):
        config.write_text(text)
        with pytest.raises(ValueError, match=message):
            TorchDistReader(folder)
    with pytest.raises(ValueError, match="has no .metadata"):
        TorchDistReader(tmp_path)
    with pytest.raises(ValueError, match="does not exist or is not a folder"):
        TorchDistReader(tmp_path / "none")
