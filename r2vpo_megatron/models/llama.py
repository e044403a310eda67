"""Llama (SmolLM2 and others): attention bias on all four projections or on none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from r2vpo_megatron.models.architecture import Architecture, HfNames


def _attention_biases(config: Mapping[str, Any]) -> tuple[bool, bool]:
    bias = bool(config.get("attention_bias", False))
    return bias, bias


ARCHITECTURE = Architecture(
    model_type="llama",
    attention_biases=_attention_biases,
    required_values={"hidden_act": "silu", "mlp_bias": False},
    names=HfNames(),
)
