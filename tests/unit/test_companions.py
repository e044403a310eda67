"""What goes with the weights; openPangu served as Llama."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from r2vpo_megatron.checkpoint.companions import (
    copy_companions,
    list_companions,
    llama_config,
    not_copied,
    state_dtype,
)
from r2vpo_megatron.models.pangu_hf import PanguEmbeddedConfig, PanguEmbeddedForCausalLM
from r2vpo_megatron.models.spec import read_model_spec

COPIED = (
    "LICENSE",
    "NOTICE.md",
    "Open Source Software Notice",
    "README_EN.md",
    "added_tokens.json",
    "bpe.codes.bpe",
    "chat_template.jinja",
    "chat_templates/tool_use.jinja",
    "config.json",
    "generation_config.json",
    "merges.txt",
    "model_args.yaml",
    "modeling_openpangu_dense.py",
    "prompt.yml",
    "qwen.tiktoken",
    "sentencepiece.vocab",
    "special.tokens",
    "tokenizer.json",
    "tokenizer.model",
)
LEFT_OUT = (
    ".gitattributes",
    "adapter.msgpack",
    "chat_templates/.hidden.jinja",
    "conversion.json",
    "flax.h5",
    "logo.png",
    "model-00001-of-00002.safetensors",
    "model.gguf",
    "model.onnx",
    "model.safetensors.index.json",
    "optimizer.pt",
    "pytorch_model.BIN",
    "pytorch_model.bin.index.json",
    "readme.pth",
)


def fill(folder: Path, names: tuple[str, ...]) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"{name}\r\n\xff".encode("latin-1"))  # not text that survives decoding


def test_companions_are_copied_and_the_rest_is_named(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "new" / "target"
    fill(source, (*COPIED, *LEFT_OUT, "original/params.json"))
    done = copy_companions(source, target)
    assert sorted(done.copied) == list(COPIED)
    assert sorted(done.left_out) == sorted([*LEFT_OUT, "original/"])
    written = {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()}
    assert written == set(COPIED)
    for name in COPIED:
        assert (target / name).read_bytes() == (source / name).read_bytes()
    assert copy_companions(source, target) == done  # as when a conversion goes on


def test_what_is_left_behind_is_told_before_anything_is_written(tmp_path: Path) -> None:
    source = tmp_path / "source"
    fill(source, (*COPIED, *LEFT_OUT, "original/params.json", "remote/modeling.py"))
    before = sorted(tmp_path.rglob("*"))
    told = not_copied(source)
    assert list_companions(source) == copy_companions(source, tmp_path / "target")
    silent = {name for name in LEFT_OUT if "/." in f"/{name}" or "safetensors" in name}
    assert set(told) == {*LEFT_OUT, "original/", "remote/"} - silent - {"conversion.json"}
    assert {"logo.png", "optimizer.pt", "pytorch_model.bin.index.json"} < set(told)
    assert sorted((tmp_path / "source").rglob("*")) == before[1:]
    with pytest.raises(ValueError, match=f"model folder {tmp_path}/gone: does not exist"):
        not_copied(tmp_path / "gone")


def test_links_are_followed_to_regular_files_only(tmp_path: Path) -> None:
    source, blobs = tmp_path / "snapshot", tmp_path / "blobs"
    fill(blobs, ("0123", "templates/x.jinja"))
    source.mkdir()
    (source / "config.json").symlink_to("../blobs/0123")
    (source / "broken.json").symlink_to("../blobs/gone")
    (source / "device.json").symlink_to("/dev/null")
    (source / "chat_templates").symlink_to("../blobs/templates")
    os.mkfifo(source / "pipe.json")
    done = copy_companions(source, tmp_path / "target")
    assert done.copied == ("config.json",)
    assert done.left_out == ("broken.json", "chat_templates/", "device.json", "pipe.json")
    copy = tmp_path / "target" / "config.json"
    assert not copy.is_symlink() and copy.read_bytes() == (blobs / "0123").read_bytes()


def test_a_source_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"model folder {tmp_path}/gone: does not exist"):
        copy_companions(tmp_path / "gone", tmp_path / "target")
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"a":  1,"dtype": "bfloat16"}', {"a": 1, "dtype": "float32"}),
        (
            '{"torch_dtype": "bfloat16", "dtype": "float32"}',
            dict.fromkeys(("torch_dtype", "dtype"), "float32"),
        ),
        ('{"a": 1}', {"a": 1, "dtype": "float32"}),
    ],
)
def test_config_states_a_dtype(text: str, expected: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    state_dtype(path, "float32")
    assert list(json.loads(path.read_text()).items()) == list(expected.items())
    odd = path.read_text().replace(": ", ":   ")
    path.write_text(odd)
    state_dtype(path, "float32")
    assert path.read_text() == odd  # right already: not a byte is changed


def pangu(folder: Path, *, tied: bool, **changes: Any) -> PanguEmbeddedForCausalLM:
    """A model with random biases and norms, and a config.json as the published ones."""
    torch.manual_seed(1)
    config = PanguEmbeddedConfig(
        vocab_size=96,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,  # not hidden_size / heads
        intermediate_size=40,
        rms_norm_eps=1e-3,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": 50.0},
        bias=True,
        dtype="float32",
        bos_token_id=1,
        eos_token_id=[7, 8],
        pad_token_id=0,
    )
    model = PanguEmbeddedForCausalLM(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(mean=1.0 if "norm" in name else 0.0, std=0.2)
    model.save_pretrained(folder)
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    raw.pop("rope_parameters")
    raw.pop("attention_bias", None)
    raw.update(rope_theta=50.0, auto_map={"AutoModelForCausalLM": "modeling.X"}, **changes)
    path.write_text(json.dumps(raw))
    return model


def write_as_llama(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    config = llama_config(json.loads(path.read_text()), read_model_spec(folder))
    path.write_text(json.dumps(config))
    return config


@pytest.mark.parametrize("tied", [True, False])
def test_pangu_weights_serve_as_llama(tied: bool, tmp_path: Path) -> None:
    model = pangu(tmp_path, tied=tied)
    before = read_model_spec(tmp_path)
    config = write_as_llama(tmp_path)
    after = read_model_spec(tmp_path)
    assert after.architecture == "llama"
    assert {**vars(after), "architecture": "pangu"} == vars(before)
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 50.0
    assert config["dtype"] == config["torch_dtype"] == "float32"
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, [7, 8])
    assert config["initializer_range"] == 0.02
    assert config.keys().isdisjoint({"auto_map", "bias"})

    llama = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(llama) is LlamaForCausalLM and llama.dtype is torch.float32
    ids = torch.arange(40).reshape(2, 20) * 7 % 96
    with torch.no_grad():
        expected, served = model(ids).logits, llama(ids).logits
    assert expected.std() > 0.1
    assert torch.allclose(served, expected, rtol=0, atol=1e-6)


def test_either_key_of_the_rope_base_is_enough(tmp_path: Path) -> None:
    # Older releases of transformers know rope_theta only, newer ones write rope_parameters.
    pangu(tmp_path, tied=True)
    config = write_as_llama(tmp_path)
    for dropped in ("rope_theta", "rope_parameters"):
        rest = {key: value for key, value in config.items() if key != dropped}
        (tmp_path / "config.json").write_text(json.dumps(rest))
        assert AutoConfig.from_pretrained(tmp_path).rope_parameters["rope_theta"] == 50.0


def test_config_without_dtype_states_none(tmp_path: Path) -> None:
    pangu(tmp_path, tied=True, dtype=None)
    assert write_as_llama(tmp_path).keys().isdisjoint({"dtype", "torch_dtype"})


def test_a_bias_on_some_projections_only_is_refused(tmp_path: Path) -> None:
    pangu(tmp_path, tied=True, model_type="qwen2")
    with pytest.raises(ValueError, match="a qwen2 model cannot be written as Llama: .*q, k and v"):
        write_as_llama(tmp_path)
