"""Qwen2 and Qwen2.5 dense: a bias on q, k and v always, none on o."""

from __future__ import annotations

from r2vpo_megatron.models.architecture import Architecture, HfNames

ARCHITECTURE = Architecture(
    model_type="qwen2",
    attention_biases=lambda config: (True, False),
    required_values={"hidden_act": "silu", "use_sliding_window": False},
    names=HfNames(),
)
