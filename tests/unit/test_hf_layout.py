"""Fused and sharded layouts, by hand; reading and writing checkpoint folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from r2vpo_megatron.checkpoint.layout import (
    Placement,
    interleave_qkv,
    merge_shards,
    placements,
    read_shard,
    shard_shape,
    split_qkv,
)
from r2vpo_megatron.checkpoint.safetensors_io import CheckpointReader, save_hf_checkpoint
from r2vpo_megatron.models.spec import ModelSpec

SPEC = ModelSpec(
    architecture="pangu",
    num_layers=2,
    hidden_size=6,
    num_heads=8,
    num_kv_heads=4,
    head_dim=2,
    ffn_size=8,
    vocab_size=200,
    rope_theta=1e4,
    norm_eps=1e-5,
    max_positions=16,
    qkv_bias=True,
    o_bias=True,
    tied_embeddings=False,
    dtype="float32",
)


def test_qkv_rows_are_interleaved_per_kv_head() -> None:
    # 2 KV heads with 2 query heads each, head_dim 1: q0 q1 k0 v0 q2 q3 k1 v1
    query, key, value = torch.tensor([0, 1, 2, 3]), torch.tensor([10, 11]), torch.tensor([20, 21])
    fused = interleave_qkv(query, key, value, head_dim=1)
    assert fused.tolist() == [0, 1, 10, 20, 2, 3, 11, 21]
    parts = split_qkv(fused, head_dim=1, heads_per_kv_head=2)
    assert [part.flatten().tolist() for part in parts] == [[0, 1, 2, 3], [10, 11], [20, 21]]


def test_gate_and_up_alternate_by_rank_and_columns_are_cut() -> None:
    tensors = {"gate": torch.arange(8)[:, None], "up": torch.arange(8)[:, None] + 100}
    placement = Placement("fc1", {"gate": (8, 1), "up": (8, 1)}, "gate_up", 0)
    shard = read_shard(placement, SPEC, 1, 2, lambda n, d, a, b: tensors[n][a:b])
    assert shard.flatten().tolist() == [4, 5, 6, 7, 104, 105, 106, 107]
    row = Placement("fc2", {"down": (1, 8)}, "row", 0)
    shard = read_shard(
        row, SPEC, 1, 4, lambda n, d, a, b: torch.arange(8)[None].narrow(d, a, b - a)
    )
    assert shard.tolist() == [[2, 3]]


def test_placements_cover_the_fourteen_tensors_of_an_openpangu_layer() -> None:
    names = [name for group in placements(SPEC) for p in group for name in p.hf_shapes]
    # 479 of the 7B checkpoint = 3 + 34 x 14, one of the 14 being the computed inv_freq
    assert len(names) == len(set(names)) == 3 + SPEC.num_layers * 13


@pytest.mark.parametrize("tensor_size", [1, 2, 4])
def test_shards_merge_to_the_source(tensor_size: int, tmp_path: Path) -> None:
    shapes = {n: s for group in placements(SPEC) for p in group for n, s in p.hf_shapes.items()}
    source = {name: torch.randn(shape) for name, shape in shapes.items()}
    save_file(source, tmp_path / "model.safetensors")
    with CheckpointReader(tmp_path) as reader:
        for placement in (p for group in placements(SPEC) for p in group):
            shards = [
                read_shard(placement, SPEC, rank, tensor_size, reader.read_slice)
                for rank in range(tensor_size)
            ]
            assert {s.shape for s in shards} == {shard_shape(placement, SPEC, tensor_size)}
            for name, pieces in merge_shards(placement, SPEC, shards).items():
                whole = source[name]
                assert (pieces.shape, pieces.dtype) == (tuple(whole.shape), whole.dtype)
                assert (pieces.numel(), pieces.element_size()) == (whole.numel(), 4)
                assert torch.equal(pieces.whole(), whole) and pieces.whole().is_contiguous(), name
                place = torch.full(whole.shape, float("nan"))
                pieces.copy_into(place)
                assert torch.equal(place, whole), name


def reference(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text('{ "dtype":  "bfloat16"}')  # odd spaces, to be kept
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "optimizer.pt").write_text("not copied")
    return folder


def test_sharded_checkpoint_has_an_exact_index(tmp_path: Path) -> None:
    tensors = [(name, torch.full((4,), i, dtype=torch.bfloat16)) for i, name in enumerate("abc")]
    source = reference(tmp_path / "reference")
    save_hf_checkpoint(tensors, tmp_path / "out", source, max_shard_bytes=16)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    assert index["metadata"] == {"total_size": 24}  # three tensors of 8 bytes
    assert index["weight_map"] == {"a": first, "b": first, "c": second}
    assert load_file(tmp_path / "out" / second)["c"].tolist() == [2.0] * 4
    assert (tmp_path / "out" / "config.json").read_text() == '{ "dtype":  "bfloat16"}'
    assert (tmp_path / "out" / "chat_template.jinja").is_file()
    assert not (tmp_path / "out" / "optimizer.pt").exists()
    with CheckpointReader(tmp_path / "out") as reader:
        assert reader.names() == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"a": 1, "dtype": "bfloat16", "z": "\u00e9"}, {"a": 1, "dtype": "float32", "z": "\u00e9"}),
        ({"torch_dtype": "bfloat16", "a": 1}, {"torch_dtype": "float32", "a": 1}),
        ({"a": 1}, {"a": 1, "dtype": "float32"}),
    ],
)
def test_config_states_the_dtype_that_was_written(
    config: dict[str, object], expected: dict[str, object], tmp_path: Path
) -> None:
    source = reference(tmp_path / "reference")
    (source / "config.json").write_text(json.dumps(config))
    # What is copied from the reference does not count, nor do integers.
    save_file(
        {"rotary_emb.inv_freq": torch.ones(2, dtype=torch.bfloat16)}, source / "model.safetensors"
    )
    tensors = [("a", torch.ones(2)), ("b", torch.ones(2, dtype=torch.int64))]
    save_hf_checkpoint(tensors, tmp_path / "out", source)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert list(written.items()) == list(expected.items())


def test_config_is_kept_where_no_one_dtype_was_written(tmp_path: Path) -> None:
    source = reference(tmp_path / "reference")
    tensors = [("a", torch.ones(2)), ("b", torch.ones(2, dtype=torch.float16))]
    save_hf_checkpoint(tensors, tmp_path / "out", source)
    assert (tmp_path / "out" / "config.json").read_bytes() == (source / "config.json").read_bytes()


def test_views_and_later_changes_do_not_reach_the_file(tmp_path: Path) -> None:
    base = torch.arange(8.0)

    def stream() -> object:
        yield "a", base[:4]
        base.zero_()
        yield "b", base[4:]

    save_hf_checkpoint(stream(), tmp_path / "out", reference(tmp_path / "reference"))  # type: ignore[arg-type]
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert saved["a"].tolist() == [0, 1, 2, 3] and saved["b"].tolist() == [0, 0, 0, 0]


def test_a_failed_save_leaves_nothing(tmp_path: Path) -> None:
    source = reference(tmp_path / "reference")

    def stream() -> object:
        yield "a", torch.zeros(1)
        raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        save_hf_checkpoint(stream(), tmp_path / "out", source)  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["reference"]


def test_save_refuses_a_used_folder_a_bad_reference_and_a_none(tmp_path: Path) -> None:
    source = reference(tmp_path / "reference")
    nothing: list[tuple[str, Tensor | None]] = [("a", None)]
    with pytest.raises(ValueError, match="exists and is not empty"):
        save_hf_checkpoint([], source, source)
    with pytest.raises(ValueError, match="has no config.json"):
        save_hf_checkpoint([], tmp_path / "out", tmp_path)
    with pytest.raises(ValueError, match="tensor a is None: only the writing rank"):
        save_hf_checkpoint(nothing, tmp_path / "out", source)


def test_reader_names_what_is_wrong_with_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has neither model.safetensors nor"):
        CheckpointReader(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x01" * 20)
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        CheckpointReader(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "gone.safetensors"}}')
    with pytest.raises(ValueError, match=r"names files that are missing: gone\.safetensors"):
        CheckpointReader(tmp_path)
    index.write_text("{}")
    with pytest.raises(ValueError, match="is not a safetensors index"):
        CheckpointReader(tmp_path)
