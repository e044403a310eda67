"""Comparing the two sides of a conversion: digests by hand, and every way to differ."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from r2vpo_megatron.checkpoint.layout import placements
from r2vpo_megatron.conversion import verify
from r2vpo_megatron.conversion.verify import (
    LogitsCheck,
    Verification,
    compare_tensor,
    compare_tensors,
    tensor_blocks,
    tensor_sha256,
)
from r2vpo_megatron.models.spec import ModelSpec

SPEC = ModelSpec(
    architecture="pangu",
    num_layers=2,
    hidden_size=8,
    num_heads=4,
    num_kv_heads=2,
    head_dim=2,
    ffn_size=12,
    vocab_size=20,
    rope_theta=1e4,
    norm_eps=1e-5,
    max_positions=16,
    qkv_bias=True,
    o_bias=True,
    tied_embeddings=True,
    dtype="float32",
)


class InMemory:
    """Tensors by name, as a checkpoint's reader gives them."""

    def __init__(self, folder: str, tensors: dict[str, Tensor]) -> None:
        self.folder = Path(folder)
        self.tensors = tensors
        self.largest_read = 0

    def names(self) -> list[str]:
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def tensor(self, name: str) -> Tensor:
        return self.tensors[name]

    def read_slice(self, name: str, dimension: int, start: int, stop: int) -> Tensor:
        part = self.tensors[name].narrow(dimension, start, stop - start)
        self.largest_read = max(self.largest_read, part.nbytes)
        return part


def random_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {n: s for group in placements(SPEC) for p in group for n, s in p.hf_shapes.items()}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def pair(**changes: Tensor | None) -> tuple[InMemory, InMemory]:
    """Equal sides, but for tensors of the second that are replaced or (None) left out."""
    tensors = random_tensors()
    changed = {name: tensor.clone() for name, tensor in tensors.items()}
    for name, tensor in changes.items():
        if tensor is None:
            del changed[name]
        else:
            changed[name] = tensor
    return InMemory("source", tensors), InMemory("target", changed)


def test_digests_are_those_of_the_row_major_bytes() -> None:
    source, target = pair()
    verified = list(compare_tensors(source, target, SPEC))
    assert [tensor.name for tensor in verified] == source.names()
    for tensor in verified:
        expected = hashlib.sha256(source.tensors[tensor.name].numpy().tobytes()).hexdigest()
        assert tensor.sha256 == tensor.source_sha256 == expected
        assert tensor_sha256(source, tensor.name) == expected
    norm = next(tensor for tensor in verified if tensor.name == "model.norm.weight")
    assert norm.manifest() == {"shape": [8], "dtype": "float32", "sha256": norm.sha256}


def test_nothing_larger_than_a_block_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = {tensor.name: tensor for tensor in compare_tensors(*pair(), SPEC)}
    monkeypatch.setattr(tensor_blocks, "__defaults__", (100,))
    source, target = pair()
    in_blocks = {tensor.name: tensor for tensor in compare_tensors(source, target, SPEC)}
    assert in_blocks == whole
    assert source.largest_read == target.largest_read == 96  # three rows of 8, two of 12
    assert list(tensor_blocks((5, 8), 4)) == [(0, 3), (3, 5)]
    assert list(tensor_blocks((0, 8), 4)) == []
    assert list(tensor_blocks((), 4)) == [(0, 1)]


def test_progress_counts_the_targets_bytes() -> None:
    counted: list[int] = []
    source, target = pair()
    list(compare_tensors(source, target, SPEC, progress=counted.append))
    assert sum(counted) == sum(tensor.nbytes for tensor in target.tensors.values())


@pytest.mark.parametrize("block_bytes", [40, 2**20])
def test_a_changed_bit_is_named_with_its_index(
    block_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_blocks, "__defaults__", (block_bytes,))
    name = "model.layers.1.mlp.down_proj.weight"
    source, target = pair()
    target.tensors[name][5, 7] = 2.5
    target.tensors[name][6, 0] = 3.5
    source.tensors[name][5, 7] = 0.25
    with pytest.raises(ValueError) as refusal:
        list(compare_tensors(source, target, SPEC))
    assert str(refusal.value) == f"{name} differs first at [5, 7]: 0.25 in source, 2.5 in target"


@pytest.mark.parametrize(("first", "second"), [(0.0, -0.0), (math.nan, 1.0)])
def test_bits_are_compared_not_values(first: float, second: float) -> None:
    name = "model.norm.weight"
    source, target = pair()
    source.tensors[name][3], target.tensors[name][3] = first, second
    with pytest.raises(ValueError, match=r"model.norm.weight differs first at \[3\]"):
        list(compare_tensors(source, target, SPEC))
    target.tensors[name][3] = first  # NaN equals itself
    assert len(list(compare_tensors(source, target, SPEC))) == len(source.names())


def test_a_cast_is_repeated_and_both_digests_are_kept() -> None:
    source, target = pair()
    for name, tensor in target.tensors.items():
        target.tensors[name] = tensor.bfloat16()
    verified = list(compare_tensors(source, target, SPEC, dtype=torch.bfloat16))
    entry = verified[0].manifest()
    embedding = source.tensors["model.embed_tokens.weight"]
    narrow = embedding.bfloat16().view(torch.int16).numpy().tobytes()
    assert entry == {
        "shape": [20, 8],
        "dtype": "bfloat16",
        "sha256": hashlib.sha256(narrow).hexdigest(),
        "source_dtype": "float32",
        "source_sha256": hashlib.sha256(embedding.numpy().tobytes()).hexdigest(),
    }
    with pytest.raises(ValueError, match="has dtype bfloat16 in target; float32 was to be"):
        list(compare_tensors(source, target, SPEC))
    target.tensors["model.norm.weight"][0] *= 2
    with pytest.raises(ValueError, match=r"model.norm.weight differs first at \[0\]"):
        list(compare_tensors(source, target, SPEC, dtype=torch.bfloat16))


def test_integers_are_never_cast() -> None:
    source, target = pair()
    counts = torch.arange(4)
    source.tensors["counts.rotary_emb.inv_freq"] = counts
    target.tensors["counts.rotary_emb.inv_freq"] = counts.clone()
    for name in list(random_tensors()):
        target.tensors[name] = target.tensors[name].half()
    verified = list(compare_tensors(source, target, SPEC, dtype=torch.float16))
    assert verified[-1].dtype == torch.int64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.norm.weight": None}, "1 not in target: model.norm.weight"),
        ({"model.extra": torch.zeros(1)}, "1 not in source: model.extra"),
        (
            {"model.norm.weight": torch.zeros(9)},
            r"model.norm.weight has shape \[9\] in target, \[8\] in source",
        ),
    ],
)
def test_other_tensors_are_refused(changes: dict[str, Tensor | None], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(compare_tensors(*pair(**changes), SPEC))


def test_computed_and_tied_tensors_may_be_on_one_side() -> None:
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(1),
        "lm_head.weight": torch.ones(20, 8),
    }
    source, target = pair(**extra)
    assert len(list(compare_tensors(source, target, SPEC))) == len(source.names())
    untied = ModelSpec(**{**SPEC.__dict__, "tied_embeddings": False})
    with pytest.raises(ValueError, match="1 not in source: lm_head.weight"):
        list(compare_tensors(source, target, untied))


def test_a_tensor_may_have_another_name_in_the_source() -> None:
    name, other = "lm_head.weight", "model.embed_tokens.weight"
    source, target = pair()
    target.tensors[name] = target.tensors[other].bfloat16()
    found = compare_tensor(name, source, target, source_name=other, dtype=torch.bfloat16)
    assert (found.name, found.source_dtype, found.dtype) == (name, torch.float32, torch.bfloat16)
    target.tensors[name][4, 1] = 7
    with pytest.raises(ValueError, match=r"lm_head.weight differs first at \[4, 1\]"):
        compare_tensor(name, source, target, source_name=other, dtype=torch.bfloat16)


def fake_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, result: str, code: int) -> None:
    """In place of Python: write `result` to the last argument, complain, end with `code`."""
    script = tmp_path / "python"
    script.write_text(
        f"#!/bin/sh\necho 'what went wrong' >&2\nfor last; do :; done\n"
        f"echo '{result}' > \"$last\"\nexit {code}\n"
    )
    script.chmod(0o755)
    monkeypatch.setattr(verify.sys, "executable", str(script))


@pytest.mark.parametrize("difference", ["2.0e-3", "NaN"])
def test_logits_too_far_apart_are_an_error(
    difference: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = f'{{"num_tokens": 4, "largest_logit": 10.0, "largest_difference": {difference}}}'
    fake_child(tmp_path, monkeypatch, figures, 0)
    with pytest.raises(ValueError, match="logits of m differ from those of h by"):
        verify.verify_logits("h", "m")


def test_logits_within_the_tolerance_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = LogitsCheck(num_tokens=4, largest_logit=10.0, largest_difference=9e-4)
    fake_child(tmp_path, monkeypatch, json.dumps(check.__dict__), 0)
    assert verify.verify_logits("h", "m") == check
    verified = tuple(compare_tensors(*pair(), SPEC))
    num_bytes = sum(tensor.nbytes for tensor in random_tensors().values())
    assert Verification(verified, check).describe() == (
        f"verified: {len(verified)} tensors, {num_bytes:,} bytes, equal to the bit; "
        "logits of 4 tokens within 9.0e-05 of transformers' (1e-04 allowed)"
    )
    assert Verification(verified, None).describe().endswith("; logits not compared")


def test_a_child_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_child(tmp_path, monkeypatch, "", 3)
    with pytest.raises(ChildProcessError, match="process ended with 3\nwhat went wrong"):
        verify.verify_logits("h", "m")
