"""Explain: print what a recipe's numbers amount to, without running it."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from fractions import Fraction

from r2vpo_megatron.cli.command_line import parse_command_line
from r2vpo_megatron.cli.errors import run_command
from r2vpo_megatron.config import RunConfig

NODE_DEVICES = 8  # of an Ascend 910B or a DGX node
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
    micro_batches = _micro_batches(config)
    return {
        "prompts per iteration": f"{train.prompts_per_iteration}",
        "responses per iteration": f"{config.samples_per_iteration} "
        f"({train.responses_per_prompt} per prompt)",
        "updates per iteration": f"{updates}" + _spread(updates),
        "samples per update": f"{batch} ({batch / parallel.data:g} per data parallel rank)",
        "tokens per update": f"at most {batch * config.max_sequence_tokens:,}, "
        f"{config.max_sequence_tokens:,} of each sample",
        "micro-batches per update": f"at most {micro_batches} on each data parallel rank; one has "
        f"{parallel.max_tokens_per_micro_batch:,} tokens"
        + (f", {parallel.context} ranks share them" if parallel.context > 1 else ""),
        "samples in the full buffer": f"{capacity * config.samples_per_iteration} "
        f"({capacity} iterations)",
        "uses of a sample, expected": f"{float(replay.update_to_data_ratio):g}",
        "age of a sample at use": f"{most_ages} (iterations, once the buffer is full)",
        "iterations, updates in all": f"{train.num_iterations}, "
        f"{math.floor(train.num_iterations * updates)}",
        "responses in all": f"{train.num_iterations * config.samples_per_iteration}",
        "longest sequence": f"{config.max_sequence_tokens:,} tokens: "
        f"{config.rollout.max_prompt_tokens:,} of the prompt, "
        f"{config.rollout.max_response_tokens:,} of the response",
        "rollout and learner": _turns(config),
        "learner ranks": f"{parallel.num_ranks} ({sizes})",
        "rollout ranks": f"{config.rollout.num_engines * config.rollout.tensor_parallel} "
        f"({config.rollout.num_engines} engines x tensor {config.rollout.tensor_parallel})",
        **_nodes(config),
    }


def _micro_batches(config: RunConfig) -> int:
    """Of an update whose samples are all of maximal length, on one data parallel rank."""
    per_rank = math.ceil(config.train.mini_batch_samples / config.parallel.data)
    at_a_time = config.parallel.max_tokens_per_micro_batch // config.max_sequence_tokens
    return math.ceil(per_rank / at_a_time)


def _nodes(config: RunConfig) -> dict[str, str]:
    """What lies on which node, if nodes have 8 devices and each group has its own."""
    parallel, rollout = config.parallel, config.rollout
    num_learning = math.ceil(parallel.num_ranks / NODE_DEVICES)
    per_node = max(1, NODE_DEVICES // rollout.tensor_parallel)
    num_sampling = math.ceil(rollout.num_engines / per_node)
    tensor_group = f"tensor parallel groups are {_span(parallel.tensor)}"
    stage_ranks = parallel.num_ranks // parallel.pipeline
    stages = "; ".join(
        f"stage {stage}: {_of_nodes(stage * stage_ranks, (stage + 1) * stage_ranks - 1)}"
        for stage in range(parallel.pipeline)
    )
    if parallel.pipeline == 1:
        stages = _of_nodes(0, parallel.num_ranks - 1)
    return {
        f"nodes of {NODE_DEVICES} devices": f"{num_learning} learn, {num_sampling} sample",
        "learner ranks on nodes": f"{stages}; {tensor_group}",
        "engines on nodes": f"{min(per_node, rollout.num_engines)} on each of {num_sampling}",
    }


def _span(num_ranks: int) -> str:
    return "within a node" if NODE_DEVICES % num_ranks == 0 else "across nodes"


def _of_nodes(first_rank: int, last_rank: int) -> str:
    first, last = first_rank // NODE_DEVICES + 1, last_rank // NODE_DEVICES + 1
    nodes = f"node {first}" if first == last else f"nodes {first} to {last}"
    last_named = "" if first_rank == last_rank else f" to {last_rank}"
    return f"ranks {first_rank}{last_named} on {nodes}"


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
