r"""Compare logits of transformers and of Megatron, in a process of its own; see verify.py.

python -m r2vpo_megatron.conversion.logits_check HF_FOLDER MEGATRON_FOLDER RESULT.json \
    [--config FOLDER]
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from r2vpo_megatron.checkpoint.megatron_keys import COMPANIONS, MegatronCheckpoint
from r2vpo_megatron.conversion.verify import LogitsCheck
from r2vpo_megatron.device import get_platform
from r2vpo_megatron.models.spec import ModelSpec, read_model_spec

NUM_TOKENS = 16


def transformers_logits(
    hf_folder: Path, megatron_folder: Path, spec: ModelSpec, token_ids_T: Tensor
) -> Tensor:
    """[T, vocab] fp32, with weights rounded to the dtype of the Megatron folder."""
    from transformers import AutoModelForCausalLM

    from r2vpo_megatron.models.pangu_hf import register_with_transformers

    register_with_transformers()
    model = AutoModelForCausalLM.from_pretrained(
        hf_folder,
        dtype=torch.float32,
        attn_implementation="eager",
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
    ).eval()
    with torch.no_grad(), MegatronCheckpoint(megatron_folder, spec=spec) as checkpoint:
        for name, parameter in model.named_parameters():
            parameter.copy_(parameter.to(checkpoint.dtype(name)))
        logits: Tensor = model(token_ids_T[None], use_cache=False).logits[0]
    return logits


def megatron_logits(megatron_folder: Path, spec: ModelSpec, token_ids_T: Tensor) -> Tensor:
    """[T, vocab] fp32 of one live rank; joins and leaves a process group of one."""
    platform = get_platform("cpu")
    platform.prepare()  # before Megatron is imported

    from r2vpo_megatron.checkpoint.hf_bridge import load_hf_weights
    from r2vpo_megatron.models.attention import pack_sequences
    from r2vpo_megatron.models.build import build_model
    from r2vpo_megatron.parallel.state import destroy_parallel, initialize_parallel

    with tempfile.TemporaryDirectory(prefix="logits-") as scratch:
        rendezvous = f"file://{Path(scratch) / 'rendezvous'}"
        state = initialize_parallel(platform, rank=0, world_size=1, init_method=rendezvous)
        chunks = build_model(spec, state, platform)
        load_hf_weights(chunks, spec, state, megatron_folder)
        num_tokens = len(token_ids_T)
        with torch.no_grad():
            hidden = chunks[0](
                token_ids_T[None],
                torch.arange(num_tokens)[None],
                None,
                packed_seq_params=pack_sequences([0, num_tokens], state.device),
            )
            logits: Tensor = chunks[0].compute_logits(hidden)[:, 0]
        destroy_parallel()
    return logits


def compare_logits(
    hf_folder: Path, megatron_folder: Path, config_folder: Path | None = None
) -> LogitsCheck:
    """Make both logits of a few random tokens, one model after the other.

    Args:
        hf_folder: Hugging Face checkpoint.
        megatron_folder: torch_dist checkpoint; its own config counts where it has one.
        config_folder: holds config.json, for one that has none.
    """
    companions = megatron_folder / COMPANIONS
    if config_folder is None or (companions / "config.json").is_file():
        config_folder = companions
    spec = read_model_spec(config_folder)
    generator = torch.Generator().manual_seed(0)
    token_ids_T = torch.randint(0, spec.vocab_size, (NUM_TOKENS,), generator=generator)
    expected = transformers_logits(hf_folder, megatron_folder, spec, token_ids_T)
    gc.collect()  # models hold themselves in cycles
    logits = megatron_logits(megatron_folder, spec, token_ids_T)
    return LogitsCheck(
        num_tokens=NUM_TOKENS,
        largest_logit=expected.abs().max().item(),
        largest_difference=(logits - expected).abs().max().item(),
    )


def main() -> None:
    """Compare and write the figures."""
    parser = argparse.ArgumentParser(description="Compare logits of a conversion's two folders.")
    for name in ("hf_folder", "megatron_folder", "result"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--config", type=Path, default=None, help="folder with config.json")
    args = parser.parse_args()
    check = compare_logits(args.hf_folder, args.megatron_folder, args.config)
    args.result.write_text(json.dumps(asdict(check)), encoding="utf-8")


if __name__ == "__main__":
    main()
