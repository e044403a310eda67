"""Decoder architectures and how they are built on Megatron-core.

    architecture.py  what an architecture file states       spec.py   config.json -> ModelSpec
    pangu.py qwen2.py llama.py  one architecture each        build.py  ModelSpec -> PolicyModel
    attention.py norm.py rotary.py    parts that Megatron's local spec lacks on every platform, or
                                has only as a fused CUDA kernel; their kernels are the platform's
    policy_model.py             the decoder without its LM head

This file and spec.py do not import torch or Megatron.
"""

from __future__ import annotations

from r2vpo_megatron.models import llama, pangu, qwen2

ARCHITECTURES = {
    "pangu": pangu.ARCHITECTURE,
    "qwen2": qwen2.ARCHITECTURE,
    "llama": llama.ARCHITECTURE,
}
