"""Reading checkpoint folders: values against the safetensors library, and every broken file."""

from __future__ import annotations

import json
import os
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from r2vpo_megatron.checkpoint import safetensors_io
from r2vpo_megatron.checkpoint.safetensors_header import DTYPES
from r2vpo_megatron.checkpoint.safetensors_io import CheckpointReader, save_hf_checkpoint

INDEX = "model.safetensors.index.json"


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape_bytes = (*shape[:-1], shape[-1] * dtype.itemsize) if shape else (dtype.itemsize,)
    raw = torch.randint(0, 2 if dtype is torch.bool else 256, shape_bytes, generator=generator)
    return raw.to(torch.uint8).view(dtype).reshape(shape)


def as_bytes(tensor: Tensor) -> list[int]:
    return tensor.contiguous().flatten().view(torch.uint8).tolist()


def header(fields: Any, values: bytes = b"") -> bytes:
    text = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    return struct.pack("<Q", len(text)) + text + values


def tensor_field(start: int, stop: int, dtype: str = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [stop - start], "data_offsets": [start, stop]}


def sharded(folder: Path, shards: dict[str, dict[str, Tensor]]) -> dict[str, str]:
    for file, tensors in shards.items():
        save_file(tensors, folder / file)
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    (folder / INDEX).write_text(json.dumps({"metadata": {"a": 1}, "weight_map": weight_map}))
    return weight_map


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_is_read_to_the_byte(name: str, tmp_path: Path) -> None:
    dtype = DTYPES[name]
    shapes = {"a": (3, 5), "empty": (0, 4), "scalar": (), "rows": (4, 2, 3)}
    source = {key: random_tensor(dtype, shape) for key, shape in shapes.items()}
    save_file(source, tmp_path / "model.safetensors")
    with CheckpointReader(tmp_path) as reader:
        for key, tensor in source.items():
            read = reader.tensor(key)
            assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
            assert reader.dtype(key) is dtype and reader.shape(key) == tuple(tensor.shape)
            assert reader.nbytes(key) == tensor.nbytes
            assert as_bytes(read) == as_bytes(tensor), key
        assert as_bytes(reader.read_slice("a", 0, 1, 3)) == as_bytes(source["a"][1:3])
        assert as_bytes(reader.read_slice("a", 1, 1, 4)) == as_bytes(source["a"][:, 1:4])
        assert as_bytes(reader.read_slice("rows", 1, 1, 2)) == as_bytes(source["rows"][:, 1:2])


@pytest.mark.parametrize("block_bytes", [1, 20, 47, 1000])
def test_columns_are_cut_from_blocks_of_rows(
    block_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Rows of 20 bytes: a row at a time, uneven blocks, all at once.
    monkeypatch.setattr(safetensors_io, "_BLOCK_BYTES", block_bytes)
    source = {"before": torch.ones(3), "a": torch.arange(35.0).reshape(7, 5)}
    save_file(source, tmp_path / "model.safetensors")
    with CheckpointReader(tmp_path) as reader:
        for start, stop in ((0, 5), (0, 2), (2, 5), (3, 4), (5, 5)):
            part = reader.read_slice("a", 1, start, stop)
            assert part.is_contiguous()
            assert torch.equal(part, source["a"][:, start:stop]), (start, stop)
        for start, stop in ((0, 7), (2, 3), (7, 7)):
            assert torch.equal(reader.read_slice("a", 0, start, stop), source["a"][start:stop])


def test_slices_that_do_not_exist_are_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2, 3), "b": torch.ones(2)}, tmp_path / "model.safetensors")
    with CheckpointReader(tmp_path) as reader:
        for name, dimension, start, stop in (("a", 0, 0, 3), ("a", 1, 2, 1), ("a", 0, -1, 1)):
            with pytest.raises(ValueError, match=rf"'a' \[2, 3\]: has no slice {start}:{stop}"):
                reader.read_slice(name, dimension, start, stop)
        with pytest.raises(ValueError, match=r"tensor 'b' \[2\]: cannot be cut along 1"):
            reader.read_slice("b", 1, 0, 1)


def test_folder_of_several_files(tmp_path: Path) -> None:
    shards = {
        "model-00001-of-00002.safetensors": {
            "z": torch.ones(3),
            "a": torch.zeros(2, dtype=torch.int8),
        },
        "model-00002-of-00002.safetensors": {"m": torch.full((2, 2), 7.0)},
    }
    weight_map = sharded(tmp_path, shards)
    with CheckpointReader(tmp_path) as reader:
        assert reader.files() == sorted(shards)
        assert reader.names() == ["z", "a", "m"]  # by file, then as the bytes lie
        assert {name: reader.file_of(name) for name in reader.names()} == weight_map
        assert reader.index_metadata == {"a": 1}
        assert reader.tensor("m").tolist() == [[7, 7], [7, 7]]
        for file in shards:
            data = (tmp_path / file).read_bytes()
            assert data.startswith(reader.header_bytes(file))
            values = sum(entry.nbytes for entry in reader.entries(file))
            assert len(data) == len(reader.header_bytes(file)) + values


def open_files(folder: Path) -> int:
    links = [Path(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
    return sum(link.exists() and folder in link.resolve().parents for link in links)


def test_files_are_read_not_mapped_and_closed(tmp_path: Path) -> None:
    sharded(tmp_path, {f"{n}.safetensors": {str(n): torch.full((9,), n)} for n in range(5)})
    with CheckpointReader(tmp_path) as reader:
        kept = [reader.tensor(str(n)) for n in range(5)]
        assert open_files(tmp_path) == 5
        assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    assert open_files(tmp_path) == 0
    assert [tensor.unique().tolist() for tensor in kept] == [[n] for n in range(5)]
    (tmp_path / "4.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError):
        CheckpointReader(tmp_path)
    assert open_files(tmp_path) == 0


def test_threads_read_at_once(tmp_path: Path) -> None:
    source = {str(n): torch.arange(n, n + 40_000).reshape(200, 200) for n in range(8)}
    save_file(source, tmp_path / "model.safetensors")
    with CheckpointReader(tmp_path) as reader, ThreadPoolExecutor(8) as pool:
        names = sorted(source) * 10
        for name, read in zip(names, pool.map(reader.tensor, names), strict=True):
            assert torch.equal(read, source[name])
        for name, read in zip(
            names, pool.map(lambda n: reader.read_slice(n, 1, 50, 150), names), strict=True
        ):
            assert torch.equal(read, source[name][:, 50:150])


def test_a_file_that_shrinks_while_open_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(1000)}, path)
    with CheckpointReader(tmp_path) as reader:
        os.truncate(path, 2000)
        with pytest.raises(ValueError, match="model.safetensors: ends within tensor 'a'"):
            reader.tensor("a")


TWO = {"a": tensor_field(0, 2), "b": tensor_field(2, 4)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a whole safetensors file .a header of 0 bytes in a file of 0"),
        (header(TWO, b"1234")[:-1], "not a whole safetensors file .*not fully covered"),
        (header(TWO, b"1234")[:40], "not a whole safetensors file .a header of"),
        (header(TWO, b"12345"), "not a whole safetensors file .*not fully covered"),
        (struct.pack("<Q", 2**62) + b"{}", f"a header of {2**62} bytes in a file of 10"),
        (header(b'{"a\xff": 1}'), "not a whole safetensors file .*can't decode byte 0xff"),
        (header(b"{"), "not a whole safetensors file .Expecting"),
        (header(b"[" * 5000), "not a whole safetensors file .*recursion"),
        (header(b"[]"), "must hold a JSON object"),
        (header({"a": 7}), "tensor 'a' has dtype None; valid: F64, F32"),
        (header({"a": tensor_field(0, 2, "F4")}, b"12"), "tensor 'a' has dtype 'F4'; valid: F64"),
        (header({**TWO, "b": tensor_field(1, 3)}, b"123"), "invalid offset for tensor `b`"),
        (header({**TWO, "b": tensor_field(3, 5)}, b"12345"), "invalid offset for tensor `b`"),
        (header({"a": tensor_field(0, 2, "F32")}, b"12"), "not a whole safetensors file"),
        (
            header(b'{"a":' + json.dumps(tensor_field(0, 1)).encode() + b',"a":0}', b"1"),
            "'a' occurs twice",
        ),
        (
            header({"a": {"dtype": "U8", "shape": [0, 2**40, 2**40], "data_offsets": [0, 0]}}),
            "tensor 'a' has shape .* too large",
        ),
    ],
)
def test_broken_files_are_named(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=f"{tmp_path}/model.safetensors: .*{message}"):
        CheckpointReader(tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (b"", "is not a safetensors index .Expecting value"),
        (b"\xff", "is not a safetensors index .*can't decode"),
        (b"[]", "is not a safetensors index .must hold a JSON object"),
        (b"[" * 100_000, "is not a safetensors index .*recursion"),
        (b'{"weight_map": ' + b"9" * 5000 + b"}", "is not a safetensors index .*digits"),
        (b'{"weight_map": {}}', "weight_map must map tensor names to file names"),
        (b'{"weight_map": {"a": "x.safetensors"}, "metadata": 1}', "metadata must be an object"),
        (b'{"weight_map": {"a": "x.safetensors", "a": "x.safetensors"}}', "'a' occurs twice"),
        ({"a": 3}, "tensor 'a' is in 3; must be the name of a .safetensors file"),
        ({"a": "../x.safetensors"}, "tensor 'a' is in '../x.safetensors'; must be the name"),
        ({"a": "/x.safetensors"}, "tensor 'a' is in '/x.safetensors'; must be the name"),
        ({"a": "sub/../../x.safetensors"}, "tensor 'a' is in 'sub/../.*'; must be the name"),
        ({"a": "..\\x.safetensors"}, "must be the name"),
        ({"a": "x.safetensors\0.safetensors"}, "must be the name"),
        ({"a": ".."}, "must be the name"),
        ({"a": "config.json"}, "tensor 'a' is in 'config.json'; must be the name"),
        ({"a": "folder.safetensors"}, "names files that are missing: folder.safetensors"),
        ({"a": "x" * 5000 + ".safetensors"}, "names files that are missing: xxx"),
        ({"a": "x.safetensors", "b": "y.safetensors", "c": "x.safetensors"}, "names tensor 'c'"),
        ({"a": "y.safetensors", "b": "x.safetensors"}, "tensor 'a' is in y.*it is in x"),
    ],
)
def test_broken_indexes_are_named(
    index: bytes | dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    (folder / "folder.safetensors").mkdir(parents=True)
    for path, name in ((folder / "x", "a"), (folder / "y", "b"), (tmp_path / "x", "a")):
        save_file({name: torch.ones(1)}, path.with_suffix(".safetensors"))
    text = index if isinstance(index, bytes) else json.dumps({"weight_map": index}).encode()
    (folder / INDEX).write_bytes(text)
    with pytest.raises(ValueError, match=f"{folder}/{INDEX}: .*{message}"):
        CheckpointReader(folder)


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors")
    save_file({"a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "y.safetensors")
    weight_map = {"a": "x.safetensors", "b": "y.safetensors"}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match="y.safetensors: tensor 'a' is in x.safetensors as well"):
        CheckpointReader(tmp_path)


def test_a_tensor_that_the_index_does_not_name_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1), "b": torch.ones(1), "c": torch.ones(1)}, tmp_path / "x.part")
    (tmp_path / "x.part").rename(tmp_path / "x.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"b": "x.safetensors"}}))
    message = f"{tmp_path}/{INDEX}: does not name all of x.safetensors: a, c$"
    with pytest.raises(ValueError, match=message):
        CheckpointReader(tmp_path)


def test_a_single_file_beside_an_index_of_others_is_refused(tmp_path: Path) -> None:
    # transformers would load the single file.
    sharded(tmp_path, {"x.safetensors": {"a": torch.ones(1)}})
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    message = f"{tmp_path}/{INDEX}: does not name model.safetensors beside it"
    with pytest.raises(ValueError, match=message):
        CheckpointReader(tmp_path)
    sharded(tmp_path, {"model.safetensors": {"a": torch.zeros(1)}})  # names it: the same model
    with CheckpointReader(tmp_path) as reader:
        assert reader.tensor("a").tolist() == [0.0]


def test_a_saved_checkpoint_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference, output = tmp_path / "reference", tmp_path / "out"
    (reference / "chat_templates").mkdir(parents=True)
    (reference / "config.json").write_text("{}")
    (reference / "chat_templates" / "tool.jinja").write_text("x")
    synchronized: dict[bool, set[tuple[int, int]]] = {False: set(), True: set()}
    fsync = os.fsync

    def noting(descriptor: int) -> None:
        status = os.fstat(descriptor)
        synchronized[output.exists()].add((status.st_ino, status.st_size))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noting)
    tensors = [(name, torch.ones(4)) for name in "ab"]
    save_hf_checkpoint(tensors, output, reference, max_shard_bytes=16)
    written = {str(path.relative_to(output)): path.stat() for path in output.rglob("*")}
    assert {"model-00002-of-00002.safetensors", INDEX, "config.json", "chat_templates"} < set(
        written
    )
    for name, status in {**written, ".": output.stat()}.items():
        assert (status.st_ino, status.st_size) in synchronized[False], name
    assert {inode for inode, _ in synchronized[True]} == {tmp_path.stat().st_ino}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)
sizes = st.integers(0, 9) | st.sampled_from([2**31, 2**62, 2**63, 2**64 - 1, 2**64, -1])
fields = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*DTYPES, "F4", "F8_E8M0"]) | json_values,
        "shape": st.lists(sizes, max_size=5) | json_values,
        "data_offsets": st.tuples(sizes, sizes) | json_values,
    }
)
headers = st.dictionaries(
    st.sampled_from(["a", "b", "__metadata__"]) | st.text(max_size=4),
    st.builds(tensor_field, st.integers(0, 4), st.integers(0, 8)) | fields | json_values,
    max_size=4,
)
fuzz = settings(
    max_examples=400,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def read_all(folder: Path) -> None:
    """Read all there is; anything but a ValueError or OSError fails the test."""
    try:
        with CheckpointReader(folder) as reader:
            for name in reader.names():
                read = reader.tensor(name)
                assert read.nbytes == reader.nbytes(name)
                if read.dim() > 1:
                    assert reader.read_slice(name, 1, 0, read.shape[1]).shape == read.shape
    except (ValueError, OSError) as error:
        assert str(error)
        return
    for file in folder.glob("*.safetensors"):  # what we take, the library takes
        with safe_open(file, framework="numpy"):
            pass


@fuzz
@given(
    fields=headers,
    values=st.binary(max_size=16),
    cut=st.none() | st.integers(0, 60),
    change=st.none() | st.tuples(st.integers(0, 200), st.integers(0, 255)),
)
def test_fuzzed_files_only_raise_errors_that_say_why(
    tmp_path: Path,
    fields: dict[str, Any],
    values: bytes,
    cut: int | None,
    change: tuple[int, int] | None,
) -> None:
    content = bytearray(header(fields, values))
    if change is not None:
        content[change[0] % len(content)] = change[1]
    (tmp_path / "model.safetensors").write_bytes(content if cut is None else content[:-cut])
    read_all(tmp_path)


@fuzz
@given(
    weight_map=st.dictionaries(
        st.sampled_from(["a", "b"]) | st.text(max_size=4),
        st.sampled_from(["x.safetensors", "y.safetensors", "../x.safetensors"])
        | st.text(max_size=6).map(lambda text: text + ".safetensors")
        | json_values,
        max_size=3,
    )
    | json_values,
    change=st.none() | st.tuples(st.integers(0, 200), st.integers(0, 255)),
)
def test_fuzzed_indexes_only_raise_errors_that_say_why(
    tmp_path: Path, weight_map: Any, change: tuple[int, int] | None
) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors")
    save_file({"b": torch.ones(1)}, tmp_path / "y.safetensors")
    content = bytearray(json.dumps({"weight_map": weight_map, "metadata": {}}).encode())
    if change is not None:
        content[change[0] % len(content)] = change[1]
    (tmp_path / INDEX).write_bytes(content)
    read_all(tmp_path)
