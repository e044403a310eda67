r"""Compare logits of transformers and of Megatron, in a process of its own; see verify.py.

python -m r2vpo_megatron.conversion.logits_check HF_FOLDER MEGATRON_FOLDER RESULT.json \
    [--config FOLDER]
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from r2vpo_megatron.checkpoint.megatron_keys import COMPANIONS, MegatronCheckpoint
from r2vpo_megatron.conversion.verify import LogitsCheck
from r2vpo_megatron.device import get_platform

NUM_TOKENS = 16


def transformers_logits(hf_folder: Path, megatron_folder: Path, token_ids_T: Tensor) -> Tensor:
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
    with torch.no_grad(), MegatronCheckpoint(megatron_folder) as checkpoint:
        for name, parameter in model.named_parameters():
            parameter.copy_(parameter.to(checkpoint.dtype(name)))
        logits: Tensor = model(token_ids_T[None], use_cache=False).logits[0]
    return logits


def megatron_logits(megatron_folder: Path, token_ids_T: Tensor) -> Tensor:
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
        with MegatronCheckpoint(megatron_folder) as checkpoint:
            spec = checkpoint.spec
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


@contextmanager
def with_config(megatron_folder: Path, config_folder: Path | None) -> Iterator[Path]:
    """A torch_dist folder that holds hf/: the one given, or one of links to it and to the config.

    Args:
        megatron_folder: torch_dist checkpoint; a training run's has no hf/.
        config_folder: holds the model's config.json; None where the checkpoint has its own.
    """
    if config_folder is None or (megatron_folder / COMPANIONS / "config.json").is_file():
        yield megatron_folder
        return
    with tempfile.TemporaryDirectory(prefix="logits-") as scratch:
        for path in megatron_folder.resolve().iterdir():
            if path.is_file():
                (Path(scratch) / path.name).symlink_to(path)
        (Path(scratch) / COMPANIONS).symlink_to(config_folder.resolve())
        yield Path(scratch)


def compare_logits(
    hf_folder: Path, megatron_folder: Path, config_folder: Path | None = None
) -> LogitsCheck:
    """Make both logits of a few random tokens, one model after the other; see with_config."""
    with with_config(megatron_folder, config_folder) as folder:
        return _compare(hf_folder, folder)


def _compare(hf_folder: Path, megatron_folder: Path) -> LogitsCheck:
    with MegatronCheckpoint(megatron_folder) as checkpoint:
        vocab_size = checkpoint.spec.vocab_size
    generator = torch.Generator().manual_seed(0)
    token_ids_T = torch.randint(0, vocab_size, (NUM_TOKENS,), generator=generator)
    expected = transformers_logits(hf_folder, megatron_folder, token_ids_T)
    gc.collect()  # models hold themselves in cycles
    logits = megatron_logits(megatron_folder, token_ids_T)
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
