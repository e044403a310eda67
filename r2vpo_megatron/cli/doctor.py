"""Doctor: is all that a run needs there, and does this installation compute what it should?

    python -m r2vpo_megatron.cli.doctor [RECIPE_FILE.py:name] [--section.field value]
    python -m r2vpo_megatron.cli.doctor --self-test [RECIPE_FILE.py:name] [--section.field value]

The first looks at devices, drivers, packages, folders, clocks, ports and collectives of all nodes
(`--runtime.ray-address`), and at model, tokenizer and prompts; it starts no run.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from r2vpo_megatron.cli.command_line import CommandLine, parse_command_line
from r2vpo_megatron.cli.errors import EXIT_FAILED, RunFailed, run_command
from r2vpo_megatron.config import RunConfig

PROGRAM = "python -m r2vpo_megatron.cli.doctor"
SELF_TEST_FLAG = "--self-test"
DEFAULT_RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "tiny_cpu.py"
DEFAULT_FUNCTION = "self_test"
PURPOSE = (
    "Looks at all that a run by this recipe needs, node by node. With --self-test: trains by it "
    "with a learning rate of 0, synchronously and asynchronously, and checks that the ratio of "
    "policies stays 1; nothing of that is kept unless it fails."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(_doctor, arguments)


def _doctor(arguments: list[str]) -> int:
    is_self_test = SELF_TEST_FLAG in arguments
    command = _parse([argument for argument in arguments if argument != SELF_TEST_FLAG])
    return _self_test(command) if is_self_test else _diagnose(command)


def _parse(arguments: list[str]) -> CommandLine:
    """The recipe and its overrides; without a recipe, that of the tiny model."""
    if not arguments or arguments[0].startswith("-"):
        if not DEFAULT_RECIPE.exists():
            raise ValueError(
                f"no recipe given, and {DEFAULT_RECIPE} is not there: {PROGRAM} RECIPE_FILE.py:name"
            )
        arguments = [f"{DEFAULT_RECIPE}:{DEFAULT_FUNCTION}", *arguments]
    return parse_command_line(PROGRAM, PURPOSE, arguments)


def _diagnose(command: CommandLine) -> int:
    # Torch and Ray come with these: seconds that a wrong field should not have to wait for.
    from r2vpo_megatron.diagnosis.diagnose import diagnose
    from r2vpo_megatron.diagnosis.findings import FAULT, summarize

    findings = []
    for finding in diagnose(command.config):
        print(finding, flush=True)
        findings.append(finding)
    print(summarize(findings))
    return EXIT_FAILED if any(finding.level == FAULT for finding in findings) else 0


def _self_test(command: CommandLine) -> int:
    # Torch and Ray come with these: seconds that a wrong field should not have to wait for.
    from r2vpo_megatron.orchestration.inputs import prepare_run
    from r2vpo_megatron.orchestration.run import run_training
    from r2vpo_megatron.orchestration.self_test import run_self_test

    folder = Path(tempfile.mkdtemp(prefix="r2vpo-self-test-"))

    def train(config: RunConfig) -> Path:
        config = replace(config, output=replace(config.output, dir=str(folder)))
        run = prepare_run(config, command.recipe)
        try:
            run_training(run)
        except Exception as error:
            raise RunFailed(error, run.run_dir / "error.txt") from error
        return run.run_dir

    try:
        results = run_self_test(command.config, train)
    except RunFailed:
        raise  # its traceback lies there
    except BaseException:
        shutil.rmtree(folder)
        raise
    print("\nself-test with a learning rate of 0:")
    for result in results:
        print(f"  {result.row()}")
    if any(result.faults for result in results):
        print(f"the runs' folders are kept: {folder}")
        return EXIT_FAILED
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
