"""openPangu-Embedded dense: Llama with a bias on q, k, v and o under the config key `bias`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from r2vpo_megatron.models.architecture import Architecture, HfNames


def _attention_biases(config: Mapping[str, Any]) -> tuple[bool, bool]:
    bias = bool(config.get("bias", config.get("attention_bias", True)))
    return bias, bias


ARCHITECTURE = Architecture(
    model_type="PanguEmbedded",
    attention_biases=_attention_biases,
    required_values={"hidden_act": "silu", "mlp_bias": False},
    names=HfNames(),
    stores_inverse_frequencies=True,
)
