"""Small Hugging Face folders with random weights, written without a modelling library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from r2vpo_megatron.checkpoint.layout import placements
from r2vpo_megatron.models.spec import read_model_spec

MODEL_TYPES = {"pangu": "PanguEmbedded", "qwen2": "qwen2", "llama": "llama"}


def make_hf_folder(
    folder: Path,
    architecture: str = "pangu",
    *,
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
    num_layers: int = 4,
    num_files: int = 1,
    **config: Any,
) -> dict[str, Tensor]:
    """Write config, weights and companions; KV heads, heads and MLP fit TP 1, 2, 3 and 4.

    Returns:
        All tensors by name. openPangu folders also hold inv_freq buffers.
    """
    folder.mkdir(parents=True)
    values = {
        "architectures": ["SomeForCausalLM"],
        "model_type": MODEL_TYPES[architecture],
        "vocab_size": 200,  # not a multiple of 128
        "hidden_size": 24,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 24,
        "num_key_value_heads": 12,
        "head_dim": 2,
        "intermediate_size": 36,
        "max_position_embeddings": 64,
        "rope_theta": 500.0,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": tied,
        "torch_dtype": str(dtype).removeprefix("torch."),
        **({"bias": True} if architecture == "pangu" else {}),
        **config,
    }
    (folder / "config.json").write_text(json.dumps(values, indent=2))
    (folder / "tokenizer.json").write_text('{"version": "1.0", "名": "盘古"}')
    (folder / "modeling_some.py").write_text("raise SystemExit('remote code was run')\n")
    (folder / "LICENSE").write_text("a licence\n")
    spec = read_model_spec(folder)
    generator = torch.Generator().manual_seed(len(architecture) + 2 * tied)
    tensors = {
        name: torch.randn(shape, generator=generator).to(dtype)
        for group in placements(spec)
        for placement in group
        for name, shape in placement.hf_shapes.items()
    }
    if architecture == "pangu":
        for layer in range(num_layers):
            name = f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"
            tensors[name] = torch.rand(spec.head_dim // 2, generator=generator)
    save_tensors(folder, tensors, num_files)
    return tensors


def save_tensors(folder: Path, tensors: dict[str, Tensor], num_files: int = 1) -> None:
    """Write the weights alone, as save_pretrained does: one file, or several and an index."""
    if num_files == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for number in range(num_files):
        name = f"model-{number + 1:05d}-of-{num_files:05d}.safetensors"
        shard = dict(list(tensors.items())[number::num_files])
        save_file(shard, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, name))
    total_size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (folder / "model.safetensors.index.json").write_text(text)
