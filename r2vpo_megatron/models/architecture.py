"""What tells one decoder architecture from another: its config keys and its tensor names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class HfNames:
    """Tensor names of a Hugging Face checkpoint; those of a layer follow `layer_prefix`."""

    embedding: str = "model.embed_tokens.weight"
    final_norm: str = "model.norm.weight"
    lm_head: str = "lm_head.weight"
    layer_prefix: str = "model.layers.{layer}."
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    output: str = "self_attn.o_proj"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    attention_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    inverse_frequencies: str = "self_attn.rotary_emb.inv_freq"  # of RoPE, where they are stored
    ignored_suffixes: tuple[str, ...] = ("rotary_emb.inv_freq",)  # computed, not learned


@dataclass(frozen=True)
class Architecture:
    """Maps a Hugging Face config and checkpoint to the one decoder that `build` knows.

    That decoder is pre-norm, RMSNorm, rotate-half RoPE, grouped-query attention, SwiGLU without
    bias. What may differ is here.
    """

    model_type: str  # config.json's `model_type`
    # config.json -> (bias on q, k and v; bias on o)
    attention_biases: Callable[[Mapping[str, Any]], tuple[bool, bool]]
    # Config keys that must be absent or have this value, since the decoder lacks the feature.
    required_values: Mapping[str, Any]
    names: HfNames
    # Published checkpoints hold RoPE's inverse frequencies: one fp32 [head_dim / 2] a layer.
    stores_inverse_frequencies: bool = False
