"""Convert a torch_dist checkpoint of Megatron-core, a run's or a converted one, to Hugging Face.

python tools/convert_megatron_to_hf.py --megatron DIR --output DIR --hf-reference DIR --verify
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works before installation, too

from r2vpo_megatron.conversion.command import (
    Prepare,
    add_common_options,
    add_output_option,
    run,
)
from r2vpo_megatron.conversion.hf_export import HfExport
from r2vpo_megatron.conversion.plan import ConversionPlan
from r2vpo_megatron.conversion.to_hf import conversion_to_hf, plan_to_hf

_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?)(i?)B?", re.IGNORECASE)


def main(arguments: list[str] | None = None) -> int:
    """Plan, then convert; print the plan alone with --dry-run."""
    options = _parser().parse_args(arguments)
    export = HfExport(
        options.megatron,
        options.output,
        options.hf_reference,
        options.as_llama,
        options.max_shard_size,
        options.dtype,
    )

    def plan() -> tuple[ConversionPlan, Prepare]:
        planned = plan_to_hf(export)
        return planned, lambda verify, logits: conversion_to_hf(
            export, planned, verify=verify, logits=logits
        )

    return run(options, plan)


def size_in_bytes(text: str) -> int:
    """Bytes of "5GB" (powers of 1000), "5GiB" (powers of 1024) or "5000000000"."""
    match = _SIZE.fullmatch(text.strip())
    num_bytes = 0
    if match is not None:
        base = 1024 if match[3] else 1000
        num_bytes = int(float(match[1]) * base ** " KMGT".index(match[2].upper() or " "))
    if num_bytes < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a size such as 5GB, 512MiB or 1000000")
    return num_bytes


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--megatron",
        type=Path,
        required=True,
        help="torch_dist folder, or the folder of a run that names its latest iteration",
    )
    add_output_option(parser)
    parser.add_argument(
        "--hf-reference",
        type=Path,
        default=None,
        metavar="DIR",
        help="model that the checkpoint came from: its config, tokenizer, files and sharding, and "
        "the buffers that Megatron does not hold; default: what lies in MEGATRON/hf",
    )
    parser.add_argument(
        "--as-llama",
        action="store_true",
        help="write a config with which the same weights serve as LlamaForCausalLM",
    )
    parser.add_argument(
        "--max-shard-size",
        type=size_in_bytes,
        default=size_in_bytes("5GB"),
        metavar="5GB",
        help="of a file, where no reference says how to cut",
    )
    add_common_options(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
