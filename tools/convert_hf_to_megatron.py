"""Convert a Hugging Face checkpoint to Megatron-core's torch_dist format, at any layout.

python tools/convert_hf_to_megatron.py --hf DIR --output DIR --tensor-parallel 2 --verify
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works before installation, too

from r2vpo_megatron.conversion.command import (
    Prepare,
    add_common_options,
    add_output_option,
    run,
)
from r2vpo_megatron.conversion.megatron_pieces import ParallelLayout
from r2vpo_megatron.conversion.plan import ConversionPlan
from r2vpo_megatron.conversion.to_megatron import (
    conversion_to_megatron,
    plan_to_megatron,
)


def main(arguments: list[str] | None = None) -> int:
    """Plan, then convert; print the plan alone with --dry-run."""
    options = _parser().parse_args(arguments)
    layout = ParallelLayout(
        options.tensor_parallel,
        options.pipeline_parallel,
        options.virtual_pipeline,
        options.pipeline_layout,
    )

    def plan() -> tuple[ConversionPlan, Prepare]:
        planned = plan_to_megatron(options.hf, options.output, layout, options.dtype)
        return planned, lambda verify, logits: conversion_to_megatron(
            planned, layout, verify=verify, logits=logits
        )

    return run(options, plan)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--hf", type=Path, required=True, help="Hugging Face folder (safetensors)")
    add_output_option(parser)
    parser.add_argument("--tensor-parallel", type=int, default=1, help="ranks a layer is cut over")
    parser.add_argument("--pipeline-parallel", type=int, default=1, help="stages")
    parser.add_argument(
        "--virtual-pipeline", type=int, default=None, help="chunks of layers on each stage"
    )
    parser.add_argument(
        "--pipeline-layout",
        default="",
        metavar="9,8,8,9",
        help="layers of each chunk, from the bottom up; default: as many in each",
    )
    add_common_options(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
