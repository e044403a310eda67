"""openPangu-Embedded for Hugging Face transformers, without remote code.

The architecture is Llama's with a bias on the q, k, v AND o projections and none in the MLP, so
the classes below only rename the configuration key (`bias`) and reuse transformers' Llama. The
modelling file that ships with the official checkpoints imports torch_npu unconditionally and is
never needed here.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

PANGU_MODEL_TYPE = "PanguEmbedded"


class PanguEmbeddedConfig(LlamaConfig):  # type: ignore[misc]
    """`config.json` of an openPangu-Embedded checkpoint: Llama's fields plus `bias`."""

    model_type = PANGU_MODEL_TYPE

    def __init__(self, **kwargs: Any) -> None:
        bias = bool(kwargs.pop("bias", kwargs.get("attention_bias", True)))
        kwargs["attention_bias"] = bias
        super().__init__(**kwargs)
        self.bias = bias


class PanguEmbeddedForCausalLM(LlamaForCausalLM):  # type: ignore[misc]
    """The dense openPangu-Embedded language model (1B, 7B)."""

    config_class = PanguEmbeddedConfig


def register_with_transformers() -> None:
    """Let AutoConfig and AutoModelForCausalLM open a checkpoint of model_type PanguEmbedded."""
    AutoConfig.register(PANGU_MODEL_TYPE, PanguEmbeddedConfig, exist_ok=True)
    AutoModelForCausalLM.register(PanguEmbeddedConfig, PanguEmbeddedForCausalLM, exist_ok=True)
