"""Tiny random Hugging Face checkpoints of each architecture, and the reference's results."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from r2vpo_megatron.models.pangu_hf import PanguEmbeddedConfig, PanguEmbeddedForCausalLM

VOCAB_SIZE = 200  # not a multiple of 128
PACKED_LENGTHS = (7, 12, 5)
SINGLE_LENGTHS = (16,)

VARIANTS = [
    f"{architecture}-{tying}"
    for architecture in ("pangu", "qwen2", "llama")
    for tying in ("tied", "untied")
]


@dataclass(frozen=True)
class Batch:
    """Token ids and next-token targets of one pack."""

    lengths: tuple[int, ...]
    token_ids: Tensor  # [T]
    target_ids: Tensor  # [T]

    @property
    def cumulative_lengths(self) -> list[int]:
        return [0, *np.cumsum(self.lengths).tolist()]

    @property
    def position_ids(self) -> Tensor:
        return torch.cat([torch.arange(length) for length in self.lengths])


def make_batch(lengths: tuple[int, ...], seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCAB_SIZE, (2, sum(lengths)), generator=generator)
    return Batch(lengths, ids[0], ids[1])


BATCHES = (make_batch(PACKED_LENGTHS, 1), make_batch(SINGLE_LENGTHS, 2))


def save_checkpoint(
    variant: str, folder: Path, *, num_heads: int = 4, num_kv_heads: int = 2, num_layers: int = 4
) -> torch.nn.Module:
    """Write a checkpoint whose every parameter, biases and norms included, is random."""
    architecture, tying = variant.split("-")
    config_class, model_class, extra = {
        "pangu": (PanguEmbeddedConfig, PanguEmbeddedForCausalLM, {"bias": True, "head_dim": 16}),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
        "llama": (LlamaConfig, LlamaForCausalLM, {"attention_bias": False}),
    }[architecture]
    config = config_class(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        intermediate_size=48,
        rms_norm_eps=1e-5,
        max_position_embeddings=64,
        tie_word_embeddings=tying == "tied",
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        dtype="float32",
        attn_implementation="eager",
        **extra,
    )
    model = model_class(config).float().eval()
    generator = torch.Generator().manual_seed(VARIANTS.index(variant))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.1, generator=generator)
            if "norm" in name:
                parameter.add_(1.0)
    model.save_pretrained(folder)
    return model


def reference_logits(model: torch.nn.Module, batch: Batch) -> Tensor:
    """[T, vocab]: each sequence on its own, concatenated."""
    sequences = batch.token_ids.split(list(batch.lengths))
    return torch.cat([model(ids.unsqueeze(0)).logits[0] for ids in sequences])


def reference_gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    """d/dw of the mean cross entropy over the tokens of BATCHES."""
    model.zero_grad()
    num_tokens = sum(len(batch.token_ids) for batch in BATCHES)
    for batch in BATCHES:
        loss = torch.nn.functional.cross_entropy(
            reference_logits(model, batch), batch.target_ids, reduction="sum"
        )
        (loss / num_tokens).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}
