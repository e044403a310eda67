"""Train: `python -m r2vpo_megatron.cli.train RECIPE_FILE.py:function [--section.field value]`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from r2vpo_megatron.cli.command_line import parse_command_line
from r2vpo_megatron.cli.errors import RunFailed, run_command

PROGRAM = "python -m r2vpo_megatron.cli.train"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(_train, arguments)


def _train(arguments: list[str]) -> int:
    command = parse_command_line(PROGRAM, "Trains a model by a recipe.", arguments)
    # Torch and Ray come with these: seconds that a wrong field should not have to wait for.
    from r2vpo_megatron.orchestration.inputs import prepare_run
    from r2vpo_megatron.orchestration.run import run_training

    run = prepare_run(command.config, recipe=command.recipe)
    try:
        run_training(run)
    except Exception as error:
        raise RunFailed(error, run.run_dir / "error.txt") from error
    return 0


if __name__ == "__main__":
    sys.exit(main())
