"""Shapes of published models, for plans where the checkpoint itself is not at hand.

Checked by the number of parameters that the checkpoints have. A checkpoint's own config.json
(`models.spec.read_model_spec`) goes before these.
"""

from __future__ import annotations

from r2vpo_megatron.models.spec import ModelSpec

KNOWN_MODELS = {
    "openpangu-embedded-7b": ModelSpec(
        architecture="pangu",
        num_layers=34,
        hidden_size=4096,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        ffn_size=12800,
        vocab_size=153376,
        rope_theta=16e6,
        norm_eps=1e-5,
        max_positions=32768,
        qkv_bias=True,
        o_bias=True,
        tied_embeddings=False,
        dtype="bfloat16",
    ),
    "openpangu-embedded-1b": ModelSpec(
        architecture="pangu",
        num_layers=26,
        hidden_size=1536,
        num_heads=12,
        num_kv_heads=6,
        head_dim=128,
        ffn_size=6144,
        vocab_size=153376,
        rope_theta=4e6,
        norm_eps=1e-5,
        max_positions=32768,
        qkv_bias=True,
        o_bias=True,
        tied_embeddings=True,
        dtype="bfloat16",
    ),
    "deepseek-r1-distill-qwen-1.5b": ModelSpec(
        architecture="qwen2",
        num_layers=28,
        hidden_size=1536,
        num_heads=12,
        num_kv_heads=2,
        head_dim=128,
        ffn_size=8960,
        vocab_size=151936,
        rope_theta=10000.0,
        norm_eps=1e-6,
        max_positions=131072,
        qkv_bias=True,
        o_bias=False,
        tied_embeddings=False,
        dtype="bfloat16",
    ),
}
