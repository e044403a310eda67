"""Planned files against what the safetensors library and transformers write."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from r2vpo_megatron.checkpoint.companions import copy_companions
from r2vpo_megatron.checkpoint.safetensors_header import DTYPES
from r2vpo_megatron.checkpoint.safetensors_io import CheckpointReader, save_hf_checkpoint
from r2vpo_megatron.checkpoint.safetensors_stream import (
    SafetensorsFile,
    TensorEntry,
    index_json,
    make_file,
    plan_files,
    plan_like,
    tensor_bytes,
)

INDEX = "model.safetensors.index.json"


def entries_of(tensors: Mapping[str, Tensor]) -> list[TensorEntry]:
    return [TensorEntry(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()]


def write(
    files: Iterable[SafetensorsFile], tensors: Mapping[str, Tensor], folder: Path, index: str | None
) -> None:
    folder.mkdir()
    for file in files:
        with open(folder / file.name, "wb") as stream:
            stream.write(file.header)
            for entry in file.entries:
                stream.write(tensor_bytes(tensors[entry.name]))
        assert (folder / file.name).stat().st_size == file.nbytes
    if index is not None:
        (folder / INDEX).write_text(index, encoding="utf-8")


def digests(folder: Path) -> dict[str, str]:
    paths = sorted(folder.glob("*.safetensors*"))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def tiny_llama(folder: Path, max_shard_size: str, dtype: torch.dtype = torch.float32) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=24,
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)


def test_header_is_the_librarys(tmp_path: Path) -> None:
    # In its order: by dtype, then name. A quote, a control character, not ASCII; a scalar; empty.
    tensors = {
        "big": torch.ones(2, 3, dtype=torch.float64),
        'a"\n\u00e9': torch.ones(2),
        "b": torch.ones(0, 7),
        "c": torch.tensor(1.0),
        "d": torch.ones(3, dtype=torch.bfloat16),
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    with safe_open(tmp_path / "x.safetensors", "pt") as library:
        order = library.offset_keys()
    file = make_file("y.safetensors", entries_of({name: tensors[name] for name in order}))
    write([file], tensors, tmp_path / "out", None)
    written = (tmp_path / "out" / "y.safetensors").read_bytes()
    assert written == (tmp_path / "x.safetensors").read_bytes()
    assert len(file.header) % 8 == 0


@pytest.mark.parametrize("dtype", DTYPES.values())
def test_files_are_read_by_the_library(dtype: torch.dtype, tmp_path: Path) -> None:
    # An odd number of bytes first, so that the rest is not aligned.
    raw = torch.arange(6 * dtype.itemsize, dtype=torch.uint8)
    if dtype is torch.bool:
        raw = raw % 2
    tensors = {"z": torch.ones(1, dtype=torch.uint8), "a": raw.view(dtype).reshape(2, 3)}
    file = make_file("model.safetensors", entries_of(tensors))
    write([file], tensors, tmp_path / "out", None)
    loaded = load_file(tmp_path / "out" / "model.safetensors")["a"]
    assert (loaded.dtype, loaded.shape) == (dtype, (2, 3))
    assert loaded.clone().flatten().view(torch.uint8).tolist() == raw.tolist()
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as library:
        assert library.offset_keys() == ["z", "a"]
        assert library.metadata() == {"format": "pt"}


def test_bytes_of_a_view_are_its_own() -> None:
    base = torch.arange(6, dtype=torch.int16).reshape(2, 3)
    assert bytes(tensor_bytes(base.T)) == base.T.contiguous().numpy().tobytes()
    assert bytes(tensor_bytes(base.flatten()[::2])) == b"\0\0\2\0\4\0"
    assert bytes(tensor_bytes(base[1])) == base[1].numpy().tobytes()
    assert bytes(tensor_bytes(torch.tensor(1.5, requires_grad=True))) == b"\0\0\xc0\x3f"


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (100, ["abcd"]),
        (26, ["abcd"]),
        (25, ["abc", "d"]),
        (20, ["ab", "cd"]),  # greedy: c would exceed it, though a, b and d would not
        (7, ["a", "b", "c", "d"]),  # each tensor alone exceeds it but the last
    ],
)
def test_files_end_before_they_exceed_the_limit(limit: int, expected: list[str]) -> None:
    sizes = {"a": 8, "b": 8, "c": 8, "d": 2}
    entries = [TensorEntry(name, torch.uint8, (size,)) for name, size in sizes.items()]
    files = plan_files(entries, limit)
    assert ["".join(entry.name for entry in file.entries) for file in files] == expected
    count = len(expected)
    names = [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    assert [file.name for file in files] == (names if count > 1 else ["model.safetensors"])
    index = index_json(files)
    if count == 1:
        assert index is None
    else:
        assert index is not None and index.endswith("}\n")
        assert json.loads(index) == {
            "metadata": {"total_size": 26},
            "weight_map": {n: name for name, ns in zip(names, expected, strict=True) for n in ns},
        }


def test_bad_plans_are_refused() -> None:
    entry = TensorEntry("a", torch.float32, (2,))
    with pytest.raises(ValueError, match="max_shard_bytes = 0: must be at least 1 byte"):
        plan_files([entry], 0)
    with pytest.raises(ValueError, match="model.safetensors: tensor 'a' occurs twice"):
        plan_files([entry, entry], 100)
    with pytest.raises(ValueError, match="'a' is in two files: model-00001-of-00002"):
        plan_files([entry, entry], 8)
    with pytest.raises(ValueError, match="'a' has dtype torch.complex128, which safetensors"):
        plan_files([TensorEntry("a", torch.complex128, (2,))], 100)
    with pytest.raises(ValueError, match="'__metadata__' occurs twice .or has a reserved name"):
        plan_files([TensorEntry("__metadata__", torch.float32, (2,))], 100)


@pytest.mark.parametrize("max_shard_size", ["5GB", "6KB"])
def test_export_like_the_reference_is_the_reference_to_the_byte(
    max_shard_size: str, tmp_path: Path
) -> None:
    tiny_llama(tmp_path / "reference", max_shard_size)
    with CheckpointReader(tmp_path / "reference") as reader:
        tensors = {name: reader.tensor(name) for name in sorted(reader.names(), reverse=True)}
        files = plan_like(reader, entries_of(tensors))
        write(files, tensors, tmp_path / "out", index_json(files, reader))
        # The library sorts tensors within a file; had we planned it, it would look otherwise.
        own = plan_files(entries_of(tensors), 6000)
    expected = digests(tmp_path / "reference")
    assert digests(tmp_path / "out") == expected
    assert len(expected) == (1 if max_shard_size == "5GB" else len(files) + 1)
    assert {file.header for file in own}.isdisjoint(file.header for file in files)


def test_header_of_another_writer_is_kept_where_it_is_true(tmp_path: Path) -> None:
    # Spaces, no padding, metadata of its own, names in another order than the bytes.
    text = (
        b'{ "b": {"data_offsets": [2, 4], "shape": [2], "dtype": "U8"},'
        b' "a": {"dtype": "BF16", "shape": [1], "data_offsets": [0, 2]},'
        b' "__metadata__": {"format": "pt", "by": "hand"} }'
    )
    whole = len(text).to_bytes(8, "little") + text + b"\x80\x3f\x07\x08"
    (tmp_path / "model.safetensors").write_bytes(whole)
    with CheckpointReader(tmp_path) as reader:
        assert reader.names() == ["a", "b"]
        tensors = {name: reader.tensor(name) for name in ("b", "a")}
        assert (tensors["a"].tolist(), tensors["b"].tolist()) == ([1.0], [7, 8])
        (file,) = plan_like(reader, entries_of(tensors))
        write([file], tensors, tmp_path / "out", index_json([file], reader))
        assert (tmp_path / "out" / "model.safetensors").read_bytes() == whole
        changed = {**tensors, "a": tensors["a"].float()}
        (file,) = plan_like(reader, entries_of(changed))
    write([file], changed, tmp_path / "changed", None)
    with safe_open(tmp_path / "changed" / "model.safetensors", "pt") as library:
        assert library.offset_keys() == ["a", "b"]
        assert library.metadata() == {"format": "pt"}


def test_export_of_another_dtype_keeps_files_and_order(tmp_path: Path) -> None:
    tiny_llama(tmp_path / "reference", "6KB")
    with CheckpointReader(tmp_path / "reference") as reader:
        tensors = {name: reader.tensor(name).bfloat16() for name in reader.names()}
        last = reader.names()[-1]
        tensors[last] = tensors[last].float()
        files = plan_like(reader, entries_of(tensors))
        index = index_json(files, reader)
        write(files, tensors, tmp_path / "out", index)
        assert index is not None
        theirs = json.loads((tmp_path / "reference" / INDEX).read_text())
        metadata = {
            "total_parameters": theirs["metadata"]["total_parameters"],
            "total_size": sum(tensor.nbytes for tensor in tensors.values()),
        }
        assert json.loads(index) == {**theirs, "metadata": metadata}
        unknown = index_json(files)
        assert unknown is not None and "total_parameters" not in unknown
        with CheckpointReader(tmp_path / "out") as written:
            assert written.names() == reader.names() and written.files() == reader.files()
            for name in written.names():
                assert torch.equal(written.tensor(name), tensors[name])
    copy_companions(tmp_path / "reference", tmp_path / "out")
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).state_dict()
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensor.float()) for name, tensor in tensors.items())


def test_index_metadata_that_is_not_true_is_left_out(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors")
    metadata = {"total_parameters": 2, "total_size": 999, "recipe": "merged"}
    index = {"metadata": metadata, "weight_map": {"a": "x.safetensors"}}
    (tmp_path / INDEX).write_text(json.dumps(index))
    with CheckpointReader(tmp_path) as reader:
        for shape, expected in (
            ((2,), {"total_parameters": 2, "total_size": 8}),
            ((3,), {"total_size": 12}),
        ):
            files = plan_like(reader, [TensorEntry("a", torch.float32, shape)])
            text = index_json(files, reader)
            assert text is not None and json.loads(text)["metadata"] == expected


def test_other_tensors_than_the_references_are_listed(tmp_path: Path) -> None:
    names = [f"layer{n}" for n in range(10)]
    save_file({name: torch.ones(1) for name in [*names, "both"]}, tmp_path / "model.safetensors")
    with CheckpointReader(tmp_path) as reader:
        both, new = (TensorEntry(name, torch.float32, (1,)) for name in ("both", "new"))
        message = re.escape(
            f"reference checkpoint {tmp_path}: not in the reference: new; only in the reference: "
            "layer0, layer1, layer2, layer3, layer4, layer5, layer6, layer7 and 2 more"
        )
        with pytest.raises(ValueError, match=message):
            plan_like(reader, [new, both])
        with pytest.raises(ValueError, match="tensor 'both' is to be written twice"):
            plan_like(reader, [both, both])


def test_saved_checkpoint_opens_in_transformers(tmp_path: Path) -> None:
    tiny_llama(tmp_path / "reference", "5GB")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "reference")
    weights = list(model.state_dict().items())
    save_hf_checkpoint(weights, tmp_path / "out", tmp_path / "reference", max_shard_bytes=6000)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    saved = LlamaForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert saved.keys() == dict(weights).keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in weights)
    with CheckpointReader(tmp_path / "out") as reader:
        assert reader.names() == [name for name, _ in weights]
