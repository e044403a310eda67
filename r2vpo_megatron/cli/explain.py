"""Explain: print what a recipe's numbers amount to, without running it."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from fractions import Fraction

from r2vpo_megatron.cli.command_line import parse_command_line
from r2vpo_megatron.cli.errors import run_command
from r2vpo_megatron.config import RunConfig

PROGRAM = "python -m r2vpo_megatron.cli.explain"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(_explain, arguments)


def derive_counts(config: RunConfig) -> dict[str, str]:
    """Every count that follows from the configuration, by what it counts."""
    train, replay, parallel = config.train, config.replay, config.parallel
    batch = train.mini_batch_samples
    updates = config.updates_per_iteration
    capacity = replay.capacity_iterations
    most_ages = f"0 to {capacity - 1}, {(capacity - 1) / 2:g} on average" if capacity > 1 else "0"
    sizes = (
        f"tensor {parallel.tensor} x pipeline {parallel.pipeline} x context {parallel.context} "
        f"x data {parallel.data}"
    )
    return {
        "prompts per iteration": f"{train.prompts_per_iteration}",
        "responses per iteration": f"{config.samples_per_iteration} "
        f"({train.responses_per_prompt} per prompt)",
        "updates per iteration": f"{updates}" + _spread(updates),
        "samples per update": f"{batch} ({batch / parallel.data:g} per data parallel rank)",
        "samples in the full buffer": f"{capacity * config.samples_per_iteration} "
        f"({capacity} iterations)",
        "uses of a sample, expected": f"{float(replay.update_to_data_ratio):g}",
        "age of a sample at use": f"{most_ages} (iterations, once the buffer is full)",
        "iterations, updates in all": f"{train.num_iterations}, "
        f"{math.floor(train.num_iterations * updates)}",
        "responses in all": f"{train.num_iterations * config.samples_per_iteration}",
        "longest sequence": f"{config.max_sequence_tokens} tokens; a micro-batch takes "
        f"{parallel.max_tokens_per_micro_batch}",
        "rollout and learner": _turns(config),
        "learner ranks": f"{parallel.num_ranks} ({sizes})",
        "rollout ranks": f"{config.rollout.num_engines * config.rollout.tensor_parallel} "
        f"({config.rollout.num_engines} engines x tensor {config.rollout.tensor_parallel})",
    }


def _spread(updates: Fraction) -> str:
    """What a number of updates that is not whole means for an iteration."""
    if updates.denominator == 1:
        return ""
    return f" on average: {math.floor(updates)} or {math.ceil(updates)}"


def _turns(config: RunConfig) -> str:
    """What the pipeline's mode and bounds come to."""
    pipeline, ahead = config.pipeline, config.iterations_ahead
    parts = ["in turn"]
    if pipeline.mode == "asynchronous":
        parts = [f"side by side, up to {ahead * config.samples_per_iteration} responses ahead"]
    if pipeline.carry_over_fraction > 0:
        num_groups = math.ceil(pipeline.carry_over_fraction * config.train.prompts_per_iteration)
        parts.append(f"up to {num_groups} groups carried over")
    stale = pipeline.max_staleness if config.mixes_versions else 0
    return ", ".join([*parts, f"new samples up to {stale} versions old"])


def _explain(arguments: list[str]) -> int:
    command = parse_command_line(PROGRAM, "Prints what a recipe's numbers amount to.", arguments)
    counts = derive_counts(command.config)
    width = max(map(len, counts))
    print(command.recipe)
    for name, value in counts.items():
        print(f"  {name:{width}}  {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
