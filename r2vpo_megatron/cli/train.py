"""Train: `python -m r2vpo_megatron.cli.train RECIPE_FILE.py:function [--section.field value]`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from r2vpo_megatron.cli.command_line import parse_command_line
from r2vpo_megatron.cli.errors import keep_traceback, run_command

PROGRAM = "python -m r2vpo_megatron.cli.train"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(_train, arguments)


def _train(arguments: list[str]) -> int:
    command = parse_command_line(PROGRAM, "Trains a model by a recipe.", arguments)
    try:
        # Torch, Ray and vLLM come with it: seconds that bad input should not have to wait for.
        from r2vpo_megatron.orchestration.run import run_training

        return run_training(command.config, recipe=command.recipe)
    except Exception as error:
        keep_traceback(error, Path(command.config.output.dir) / "last_error.txt")
        raise


if __name__ == "__main__":
    sys.exit(main())
