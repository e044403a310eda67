"""config.json -> ModelSpec, parameter counts of published models, and layout checks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from r2vpo_megatron.models.spec import (
    ModelSpec,
    padded_vocab_size,
    read_model_spec,
    valid_tensor_sizes,
    validate_layout,
)
from tests.published_models import PANGU_1B, PANGU_7B, QWEN_1P5B, SMOLLM2_135M


def write(folder: Path, config: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def spec_of(tmp_path: Path, config: dict[str, Any]) -> ModelSpec:
    return read_model_spec(write(tmp_path, config))


@pytest.mark.parametrize(
    ("config", "num_parameters"),
    [
        (PANGU_7B, 8_030_887_936),
        (PANGU_1B, 1_155_912_192),
        (QWEN_1P5B, 1_777_088_000),
        (SMOLLM2_135M, 134_515_008),
    ],
    ids=["pangu_7b", "pangu_1b", "qwen_1p5b", "smollm2_135m"],
)
def test_published_models_have_their_published_number_of_parameters(
    tmp_path: Path, config: dict[str, Any], num_parameters: int
) -> None:
    assert spec_of(tmp_path, config).num_parameters == num_parameters


def test_every_field_of_openpangu_7b(tmp_path: Path) -> None:
    assert spec_of(tmp_path, PANGU_7B) == ModelSpec(
        architecture="pangu",
        num_layers=34,
        hidden_size=4096,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,  # no such key: hidden_size / heads
        ffn_size=12800,
        vocab_size=153376,
        rope_theta=16000000.0,
        norm_eps=1e-5,
        max_positions=32768,
        qkv_bias=True,
        o_bias=True,
        tied_embeddings=False,
        dtype="bfloat16",
    )


def test_biases_follow_the_architecture(tmp_path: Path) -> None:
    def biases(config: dict[str, Any]) -> tuple[bool, bool]:
        spec = spec_of(tmp_path, config)
        return spec.qkv_bias, spec.o_bias

    assert biases(PANGU_7B | {"bias": False}) == (False, False)
    assert biases(QWEN_1P5B) == (True, False)
    assert biases(SMOLLM2_135M) == (False, False)
    assert biases(SMOLLM2_135M | {"attention_bias": True}) == (True, True)


def test_rope_theta_is_read_from_either_spelling(tmp_path: Path) -> None:
    assert spec_of(tmp_path, QWEN_1P5B).rope_theta == 10000.0
    assert spec_of(tmp_path, SMOLLM2_135M).rope_theta == 100000.0
    assert spec_of(tmp_path, QWEN_1P5B | {"rope_scaling": None}).rope_theta == 10000.0


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (QWEN_1P5B | {"model_type": "mistral"}, "model_type = 'mistral': must be one of Pangu"),
        (QWEN_1P5B | {"hidden_size": None}, "key 'hidden_size' is missing"),
        (QWEN_1P5B | {"num_hidden_layers": "28"}, "num_hidden_layers = '28': must be a positive"),
        (QWEN_1P5B | {"rope_theta": None}, "key 'rope_theta' is missing"),
        (QWEN_1P5B | {"rms_norm_eps": 0}, "rms_norm_eps = 0: must be a positive number"),
        (QWEN_1P5B | {"rms_norm_eps": float("nan")}, "rms_norm_eps = nan: must be a positive"),
        (QWEN_1P5B | {"rope_theta": float("inf")}, "rope_theta = inf: must be a positive number"),
        (QWEN_1P5B | {"rope_theta": 10**400}, "0: must be a positive number, finite"),
        (QWEN_1P5B | {"rope_scaling": "yarn"}, "rope_scaling = 'yarn': must be an object or null"),
        (QWEN_1P5B | {"rope_scaling": []}, "rope_scaling = []: must be an object or null"),
        (SMOLLM2_135M | {"rope_parameters": [1.0]}, "rope_parameters = [1.0]: must be an object"),
        (QWEN_1P5B | {"use_sliding_window": True}, "use_sliding_window = True: only False"),
        (QWEN_1P5B | {"hidden_act": "gelu"}, "hidden_act = 'gelu': only 'silu'"),
        (SMOLLM2_135M | {"mlp_bias": True}, "mlp_bias = True: only False"),
        (QWEN_1P5B | {"num_key_value_heads": 5}, "num_key_value_heads = 5: must divide"),
        (QWEN_1P5B | {"torch_dtype": "int8"}, "dtype = 'int8': must be one of float32"),
        (
            QWEN_1P5B | {"rope_scaling": {"type": "yarn", "factor": 4.0}},
            "rope_scaling asks for RoPE scaling 'yarn'; only 'default'",
        ),
        (
            SMOLLM2_135M | {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1.0}},
            "rope_parameters asks for RoPE scaling 'llama3'",
        ),
    ],
)
def test_what_cannot_be_built_is_refused_by_file_and_key(
    tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError) as refusal:
        spec_of(tmp_path, config)
    assert str(refusal.value).startswith(f"{tmp_path / 'config.json'}: ")
    assert message in str(refusal.value)


def test_missing_folder_and_file_and_broken_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere: does not exist"):
        read_model_spec(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="has no config.json"):
        read_model_spec(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json: is not valid JSON"):
        read_model_spec(tmp_path)
    for text in (b"[" * 100_000, b'{"a": "\xff"}', b'{"a": ' + b"9" * 5000 + b"}"):
        (tmp_path / "config.json").write_bytes(text)
        with pytest.raises(ValueError, match=f"{tmp_path}/config.json: is not valid JSON"):
            read_model_spec(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="must hold a JSON object"):
        read_model_spec(tmp_path)


def test_valid_tensor_sizes_of_published_models(tmp_path: Path) -> None:
    assert valid_tensor_sizes(spec_of(tmp_path, PANGU_7B)) == [1, 2, 4, 8]
    assert valid_tensor_sizes(spec_of(tmp_path, PANGU_1B)) == [1, 2, 3, 6]
    assert valid_tensor_sizes(spec_of(tmp_path, QWEN_1P5B)) == [1, 2]
    assert valid_tensor_sizes(spec_of(tmp_path, SMOLLM2_135M)) == [1, 3]


def test_layouts_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, PANGU_1B)
    validate_layout(spec, tensor=6, pipeline=13, virtual_pipeline=2)
    with pytest.raises(ValueError, match="size 4 .* 6 KV heads .* valid sizes: 1, 2, 3, 6"):
        validate_layout(spec, tensor=4, pipeline=1)
    with pytest.raises(ValueError, match="pipeline size 4 .* 26 layers; valid sizes: 1, 2, 13, 26"):
        validate_layout(spec, tensor=1, pipeline=4)
    with pytest.raises(ValueError, match="pipeline x virtual pipeline size 4 "):
        validate_layout(spec, tensor=1, pipeline=2, virtual_pipeline=2)
    validate_layout(spec, tensor=1, pipeline=4, pipeline_layout="6,7,7,6")
    with pytest.raises(
        ValueError, match="pipeline_layout = '9,8': has 2 counts, but pipeline size"
    ):
        validate_layout(spec, tensor=1, pipeline=4, pipeline_layout="9,8")


@pytest.mark.parametrize(
    ("vocab_size", "tensor", "padded"),
    [
        (153376, 1, 153472),
        (153376, 2, 153600),
        (153376, 4, 153600),
        (151936, 1, 151936),
        (151936, 2, 152064),
        (151936, 8, 152576),
    ],
)
def test_vocabulary_padding(vocab_size: int, tensor: int, padded: int) -> None:
    assert padded_vocab_size(vocab_size, tensor) == padded
