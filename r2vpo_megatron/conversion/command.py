"""What both converters' command lines have in common."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from r2vpo_megatron.conversion.carry_out import Conversion, carry_out
from r2vpo_megatron.conversion.plan import DTYPES, ConversionPlan, describe
from r2vpo_megatron.conversion.progress import ConversionProgress

# (verify, logits) -> the conversion, ready to be carried out.
Prepare = Callable[[bool, bool | None], Conversion]


def add_output_option(parser: argparse.ArgumentParser) -> None:
    """--output."""
    parser.add_argument(
        "--output", type=Path, required=True, help="folder to make; it appears when it is whole"
    )


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """--dtype, --verify, --verify-logits, --dry-run, --resume."""
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
        help="as --verify, and compare logits whatever the size of the model",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan, write nothing")
    parser.add_argument(
        "--resume", action="store_true", help="go on with a conversion that was stopped"
    )


def run(options: argparse.Namespace, plan: Callable[[], tuple[ConversionPlan, Prepare]]) -> int:
    """Plan, then convert; print the plan alone with --dry-run.

    Args:
        options: of `add_common_options`.
        plan: makes the plan, and what it takes to carry it out.

    Returns:
        The exit code: 0, 2 after an error, 130 after an interrupt.
    """
    try:
        planned, prepare = plan()
        if options.dry_run:
            print(describe(planned))
            return 0
        logits = True if options.verify_logits else None
        conversion = prepare(options.verify or options.verify_logits, logits)
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
