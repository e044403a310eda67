"""Convert a Hugging Face checkpoint to Megatron-core's torch_dist format, at any layout.

python tools/convert_hf_to_megatron.py --hf DIR --output DIR --tensor-parallel 2 --verify
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works before installation, too

from r2vpo_megatron.conversion.carry_out import carry_out
from r2vpo_megatron.conversion.megatron_pieces import ParallelLayout
from r2vpo_megatron.conversion.plan import DTYPES, describe
from r2vpo_megatron.conversion.progress import ConversionProgress
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
    try:
        plan = plan_to_megatron(options.hf, options.output, layout, options.dtype)
        if options.dry_run:
            print(describe(plan))
            return 0
        conversion = conversion_to_megatron(
            plan,
            layout,
            verify=options.verify or options.verify_logits,
            logits=True if options.verify_logits else None,
        )
        found = carry_out(conversion, resume=options.resume, progress=ConversionProgress())
    except KeyboardInterrupt:
        print("interrupted; the same command with --resume goes on", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if found:
        print(found)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--hf", type=Path, required=True, help="Hugging Face folder (safetensors)")
    parser.add_argument(
        "--output", type=Path, required=True, help="folder to make; it appears when it is whole"
    )
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
    parser.add_argument(
        "--dtype", choices=DTYPES, default="keep", help="of the weights; keep: as they are"
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="compare every tensor with the source, bit for bit, and the logits of a small model",
    )
    parser.add_argument(
        "--verify-logits",
        action="store_true",
        help="verify, and compare the logits whatever the model's size",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan, write nothing")
    parser.add_argument(
        "--resume", action="store_true", help="go on with a conversion that was stopped"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
