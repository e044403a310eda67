"""Train: `python -m r2vpo_megatron.cli.train RECIPE_FILE.py:function [--section.field value]`.

`--resume auto` or `--resume FOLDER` is short for `--checkpoint.resume`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from r2vpo_megatron.cli.command_line import parse_command_line
from r2vpo_megatron.cli.errors import RunFailed, run_command
from r2vpo_megatron.orchestration.interrupts import ignored_requests

PROGRAM = "python -m r2vpo_megatron.cli.train"
_RESUME = re.compile(r"^--resume(=|$)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    with ignored_requests():  # until the loop takes them
        return run_command(_train, arguments)


def _train(arguments: list[str]) -> int:
    arguments = [_RESUME.sub(r"--checkpoint.resume\1", argument) for argument in arguments]
    command = parse_command_line(
        PROGRAM, "Trains a model by a recipe; --resume is --checkpoint.resume.", arguments
    )
    # Torch and Ray come with these: seconds that a wrong field should not have to wait for.
    from r2vpo_megatron.orchestration.inputs import prepare_run
    from r2vpo_megatron.orchestration.run import run_training

    run = prepare_run(command.config, recipe=command.recipe)
    error_file = run.run_dir / "error.txt"
    try:
        run_training(run)
    except Exception as error:
        raise RunFailed(error, error_file, hint=_how_to_go_on(run.run_dir)) from error
    error_file.unlink(missing_ok=True)  # of a failure that the run has gone on from
    return 0


def _how_to_go_on(run_dir: Path) -> str:
    """What is left of a failed run to go on from."""
    from r2vpo_megatron.checkpoint.run_folder import CHECKPOINTS_FOLDER, by_latest

    up_to_latest, beyond = by_latest(run_dir / CHECKPOINTS_FOLDER)
    checkpoints = up_to_latest + beyond
    if not checkpoints:
        return ""
    return f"the last checkpoint is {checkpoints[0]}: --resume {run_dir} goes on from there"


if __name__ == "__main__":
    sys.exit(main())
