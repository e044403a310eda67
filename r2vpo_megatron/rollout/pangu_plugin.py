"""vLLM plugin that makes openPangu checkpoints known to it.

vLLM carries the model class PanguEmbeddedForCausalLM but no configuration class for
model_type "PanguEmbedded", so config.json alone does not open. Installed packages announce
`register_openpangu` as an entry point of the group vllm.general_plugins, which vLLM calls in each
of its processes; `VLLMEngine` also calls it, for a source tree that is not installed.
"""

from __future__ import annotations


def register_openpangu() -> None:
    """Register openPangu's configuration class. May be called any number of times."""
    # Imported here: vLLM loads plugins in processes that serve other models too.
    from r2vpo_megatron.models.pangu_hf import register_with_transformers

    register_with_transformers()
