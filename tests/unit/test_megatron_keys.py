"""The view of a torch_dist folder gives the Hugging Face tensors, or says what lacks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from r2vpo_megatron.checkpoint.layout import placements
from r2vpo_megatron.checkpoint.megatron_keys import (
    MegatronCheckpoint,
    open_checkpoint,
    stored_key,
)
from r2vpo_megatron.checkpoint.safetensors_io import CheckpointReader
from r2vpo_megatron.models.spec import ModelSpec, read_model_spec
from tests.torch_dist_files import Form, write_megatron

# Divide by 1, 2, 3 and 4.
SIZES = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 24,
    "num_key_value_heads": 12,
    "head_dim": 2,
    "intermediate_size": 36,
    "vocab_size": 200,
    "max_position_embeddings": 16,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "dtype": "float32",
}
CONFIGS: dict[str, dict[str, Any]] = {
    "pangu-tied": {"model_type": "PanguEmbedded", "bias": True, "tie_word_embeddings": True},
    "pangu-untied": {"model_type": "PanguEmbedded", "bias": True},
    "qwen2": {"model_type": "qwen2"},
    "llama": {"model_type": "llama"},
}
FORMS = {
    "tp1": Form(),
    "tp2_pp3": Form(tensor=2, pipeline=3),
    "tp3": Form(tensor=3, padded_vocab=384),
    "tp4_pp2": Form(tensor=4, pipeline=2, padded_vocab=512),
    "no_padding": Form(tensor=2, padded_vocab=200),
    "without_te": Form(tensor=2, fused_norms=False),
    "not_stacked": Form(tensor=2, stacked=False),
    "not_stacked_without_te": Form(tensor=4, stacked=False, fused_norms=False),
    "wrapped": Form(tensor=2, prefix="module."),
}


def make_hf(folder: Path, config: dict[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    """A config.json, and random tensors that fit it."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(SIZES | config))
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator).to(dtype)
        for group in placements(read_model_spec(folder))
        for placement in group
        for name, shape in placement.hf_shapes.items()
    }


def make_megatron(
    folder: Path,
    config: str,
    form: Form | None = None,
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> tuple[dict[str, Tensor], ModelSpec]:
    hf = make_hf(folder / "hf", CONFIGS[config], dtype)
    spec = read_model_spec(folder / "hf")
    write_megatron(folder, hf, spec, form, **changes)
    return hf, spec


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("config", CONFIGS)
def test_every_tensor_is_the_source_s(config: str, form: Form, tmp_path: Path) -> None:
    hf, spec = make_megatron(tmp_path / "m", config, form)
    with MegatronCheckpoint(tmp_path / "m") as checkpoint:
        assert checkpoint.spec == spec
        assert checkpoint.unmapped == []
        assert sorted(checkpoint.names()) == sorted(hf)
        for name, expected in hf.items():
            assert checkpoint.shape(name) == expected.shape
            assert checkpoint.dtype(name) == torch.float32
            tensor = checkpoint.tensor(name)
            assert torch.equal(tensor, expected), name
            assert tensor.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_not_touched(dtype: torch.dtype, tmp_path: Path) -> None:
    hf, _ = make_megatron(tmp_path / "m", "pangu-untied", Form(tensor=2), dtype)
    with MegatronCheckpoint(tmp_path / "m") as checkpoint:
        for name, expected in hf.items():
            tensor = checkpoint.tensor(name)
            assert tensor.dtype == checkpoint.dtype(name) == dtype
            assert torch.equal(tensor.view(torch.int16), expected.view(torch.int16)), name


@pytest.mark.parametrize("form", [FORMS["tp1"], FORMS["tp3"], FORMS["not_stacked"]])
def test_slices_across_parts_are_the_source_s(form: Form, tmp_path: Path) -> None:
    hf, _ = make_megatron(tmp_path / "m", "pangu-untied", form)
    with MegatronCheckpoint(tmp_path / "m") as checkpoint:
        for name, expected in hf.items():
            for dimension, size in enumerate(expected.shape):
                for start, stop in ((0, 1), (size // 3, size // 2 + 2), (size - 1, size), (5, 5)):
                    part = checkpoint.read_slice(name, dimension, start, stop)
                    assert torch.equal(part, expected.narrow(dimension, start, stop - start)), name
                    assert part.is_contiguous()


def test_names_have_the_order_of_the_stream_from_live_ranks(tmp_path: Path) -> None:
    make_megatron(tmp_path / "m", "qwen2")
    with MegatronCheckpoint(tmp_path / "m") as checkpoint:
        names = checkpoint.names()
    attention = [
        f"model.layers.0.self_attn.{part}_proj.{kind}"
        for part in "qkv"
        for kind in ("weight", "bias")
    ]
    assert names[:7] == ["model.embed_tokens.weight", *attention]
    assert names[-2:] == ["model.norm.weight", "lm_head.weight"]


def test_a_slice_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    make_megatron(tmp_path / "m", "llama")
    with MegatronCheckpoint(tmp_path / "m") as checkpoint:
        for dimension, start, stop in ((0, 0, 201), (0, 3, 2), (1, -1, 2)):
            with pytest.raises(ValueError, match=r"\[200, 24\]: has no slice"):
                checkpoint.read_slice("model.embed_tokens.weight", dimension, start, stop)
        with pytest.raises(ValueError, match=r"\[24\]: cannot be cut along 1"):
            checkpoint.read_slice("model.norm.weight", 1, 0, 1)


def test_keys_of_the_format(tmp_path: Path) -> None:
    make_hf(tmp_path / "hf", CONFIGS["pangu-untied"], torch.float32)
    keys = [
        stored_key(placement)
        for group in placements(read_model_spec(tmp_path / "hf"))
        for placement in group
    ]
    layer = [
        "decoder.layers.self_attention.linear_qkv.weight",
        "decoder.layers.self_attention.linear_qkv.bias",
        "decoder.layers.self_attention.linear_proj.weight",
        "decoder.layers.self_attention.linear_proj.bias",
        "decoder.layers.mlp.linear_fc1.weight",
        "decoder.layers.mlp.linear_fc2.weight",
        "decoder.layers.self_attention.linear_qkv.layer_norm_weight",
        "decoder.layers.mlp.linear_fc1.layer_norm_weight",
    ]
    assert keys == [
        "embedding.word_embeddings.weight",
        *layer * 3,
        "decoder.final_layernorm.weight",
        "output_layer.weight",
    ]


def test_weights_without_a_place_are_reported_and_other_keys_ignored(tmp_path: Path) -> None:
    extra = {
        "decoder.layers.mlp.linear_fc1.bias": torch.zeros(3, 72),
        "module.decoder.layers.7.input_layernorm.weight": torch.zeros(24),
        "decoder.layers.mlp.linear_fc1._extra_state": torch.zeros(3),
        "optimizer.state.exp_avg.decoder.final_layernorm.weight": torch.zeros(24),
        "rng_state": torch.zeros(4),
    }
    make_megatron(tmp_path / "m", "llama", extra=extra)
    with MegatronCheckpoint(tmp_path / "m") as checkpoint:
        assert checkpoint.unmapped == list(extra)[:2]


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    make_megatron(tmp_path / "m", "llama", left_out="decoder.layers.mlp.linear_fc2.weight")
    with pytest.raises(ValueError, match=r"missing: decoder.layers.mlp.linear_fc2.weight$"):
        MegatronCheckpoint(tmp_path / "m")


@pytest.mark.parametrize(
    ("key", "shape", "expected"),
    [
        ("decoder.layers.mlp.linear_fc2.weight", (4, 24, 36), "[3, 24, 36]"),
        ("decoder.final_layernorm.weight", (23,), "[24]"),
        ("output_layer.weight", (199, 24), "at least [200, 24]"),
    ],
)
def test_a_wrong_shape_is_named(
    key: str, shape: tuple[int, ...], expected: str, tmp_path: Path
) -> None:
    make_megatron(tmp_path / "m", "llama", left_out=key, extra={key: torch.zeros(shape)})
    with pytest.raises(ValueError) as refusal:
        MegatronCheckpoint(tmp_path / "m")
    assert str(refusal.value) == (
        f"checkpoint {tmp_path / 'm'} does not fit its config.json (llama): "
        f"wrong shape: {key} {list(shape)}, expected {expected}"
    )


def test_parts_that_are_missing_are_found_before_anything_is_read(tmp_path: Path) -> None:
    make_megatron(tmp_path / "m", "llama", Form(tensor=2))
    (tmp_path / "m" / "__1_0.distcp").unlink()
    with pytest.raises(ValueError, match=r"__1_0.distcp: is missing; it holds a part of tensor"):
        MegatronCheckpoint(tmp_path / "m")


def test_a_folder_is_opened_by_what_it_holds(tmp_path: Path) -> None:
    hf, _ = make_megatron(tmp_path / "m", "llama")
    save_file(hf, tmp_path / "m" / "hf" / "model.safetensors")
    for folder, kind in (
        (tmp_path / "m", MegatronCheckpoint),
        (tmp_path / "m/hf", CheckpointReader),
    ):
        with open_checkpoint(folder) as checkpoint:
            assert type(checkpoint) is kind
            assert torch.equal(checkpoint.tensor("model.norm.weight"), hf["model.norm.weight"])


def test_a_folder_without_a_config_is_opened_as_the_model_that_is_named(tmp_path: Path) -> None:
    hf, spec = make_megatron(tmp_path / "m", "llama")
    other = replace(spec, ffn_size=2 * spec.ffn_size)
    with open_checkpoint(tmp_path / "m", other) as checkpoint:  # its own config counts
        assert checkpoint.shape("model.layers.0.mlp.up_proj.weight")[0] == spec.ffn_size
    (tmp_path / "m" / "hf").rename(tmp_path / "hf")
    with pytest.raises(ValueError, match=r"has no hf/config.json, as a training checkpoint"):
        open_checkpoint(tmp_path / "m")
    with open_checkpoint(tmp_path / "m", spec) as checkpoint:
        assert torch.equal(checkpoint.tensor("model.norm.weight"), hf["model.norm.weight"])
    with pytest.raises(ValueError, match=r"wrong shape: decoder.layers.mlp.linear_fc1.weight"):
        open_checkpoint(tmp_path / "m", other)


def test_a_training_checkpoint_needs_to_be_told_its_model(tmp_path: Path) -> None:
    hf, spec = make_megatron(tmp_path / "m", "llama")
    (tmp_path / "m" / "hf").rename(tmp_path / "hf")
    with pytest.raises(ValueError, match=r"has no hf/config.json, as a training checkpoint"):
        MegatronCheckpoint(tmp_path / "m")
    with MegatronCheckpoint(tmp_path / "m", spec=spec) as checkpoint:
        assert torch.equal(checkpoint.tensor("lm_head.weight"), hf["lm_head.weight"])
