"""Plan: does a recipe fit a cluster, how long will an iteration take, which layout is best?

`python -m r2vpo_megatron.cli.plan RECIPE --nodes N --devices-per-node 8 --device-memory 64GB`
`[--device NAME] [--section.field value]`. Nothing is started and no device is needed.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r2vpo_megatron.cli.command_line import parse_command_line
from r2vpo_megatron.cli.errors import EXIT_FAILED, run_command
from r2vpo_megatron.config import RunConfig
from r2vpo_megatron.config.checks import require

if TYPE_CHECKING:
    from r2vpo_megatron.models.spec import ModelSpec
    from r2vpo_megatron.planning.devices import Device
    from r2vpo_megatron.planning.plan import Cluster
    from r2vpo_megatron.planning.workload import Workload

PROGRAM = "python -m r2vpo_megatron.cli.plan"
_BY_PLATFORM = {"npu": "ascend-910b-64gb", "cuda": "h100-80gb", "cpu": "cpu"}
_DEFAULT_DEVICE = "ascend-910b-64gb"
_HELP = """
options of the plan:
  --nodes N                    nodes of the allocation (required)
  --devices-per-node N         default 8
  --device NAME                ascend-910b-64gb, h100-80gb, a100-80gb or cpu; by default what
                               runtime.device says, else ascend-910b-64gb
  --device-memory SIZE         such as 64GB or 80GiB; by default the device's
  --peak-tflops X              dense products, in 10^12 operations a second
  --memory-gb-per-second X     of a device's memory
  --node-gb-per-second X       that a device sends within its node
  --network-gb-per-second X    that a device sends to other nodes
  --matmul-efficiency X        share of the peak that large products reach
  --mean-prompt-tokens X       by default an eighth of rollout.max_prompt_tokens
  --mean-response-tokens X     by default half of rollout.max_response_tokens
  --model-shape NAME           of a published model, where model.path is not at hand
  --top N                      layouts to list, default 5; 0 checks the recipe's own alone
Any field of the recipe can be overridden (cli.train RECIPE --help lists them).
Exit code 0: something fits; 1: nothing does; 2: the input is at fault.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(_plan, arguments)


@dataclass(frozen=True)
class _Options:
    """The plan's own options, which come before or between those of the recipe."""

    nodes: int = 0
    devices_per_node: int = 8
    device: str = ""
    device_memory: str = ""
    peak_tflops: float = 0.0
    memory_gb_per_second: float = 0.0
    node_gb_per_second: float = 0.0
    network_gb_per_second: float = 0.0
    matmul_efficiency: float = 0.0
    mean_prompt_tokens: float = 0.0
    mean_response_tokens: float = 0.0
    model_shape: str = ""
    top: int = 5

    def __post_init__(self) -> None:
        require(self.nodes >= 1, "--nodes", self.nodes, "at least 1; it must be given")
        per_node = self.devices_per_node
        require(per_node >= 1, "--devices-per-node", per_node, "at least 1")
        require(self.top >= 0, "--top", self.top, "at least 0")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float):
                require(0 <= value < float("inf"), _flag(field.name), value, "above 0 and finite")
        share = self.matmul_efficiency
        require(share <= 1, "--matmul-efficiency", share, "above 0 and at most 1")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _split_arguments(arguments: list[str]) -> tuple[_Options, list[str]]:
    """Take the plan's own options out of a command line.

    Raises:
        ValueError: an option without a value, or with one that it does not take.
    """
    readers: dict[str, Callable[[str], Any]] = {"int": int, "float": float, "str": str}
    known = {_flag(field.name): field for field in dataclasses.fields(_Options)}
    values: dict[str, Any] = {}
    others: list[str] = []
    remaining = list(arguments)
    while remaining:
        argument = remaining.pop(0)
        flag, has_equals, text = argument.partition("=")
        if flag not in known:
            others.append(argument)
            continue
        if not has_equals:
            require(bool(remaining), flag, "", "a value after it")
            text = remaining.pop(0)
        kind = str(known[flag].type)
        try:
            values[known[flag].name] = readers[kind](text)
        except ValueError:
            raise ValueError(f"{flag} {text}: not valid, must be a number") from None
    return _Options(**values), others


def _plan(arguments: list[str]) -> int:
    if any(argument in ("-h", "--help") for argument in arguments):
        print(__doc__, _HELP, sep="")
        return 0
    options, others = _split_arguments(arguments)
    command = parse_command_line(PROGRAM, "Plans a recipe for a cluster.", others)
    # Torch comes with these: a second or two that a wrong field should not have to wait for.
    from r2vpo_megatron.planning.plan import Cluster
    from r2vpo_megatron.planning.report import nothing_fits, ranking
    from r2vpo_megatron.planning.search import search
    from r2vpo_megatron.planning.workload import Workload

    config = command.config
    cluster = Cluster(options.nodes, options.devices_per_node, _device(config, options))
    spec = _model_spec(config, options)
    workload = Workload.of(
        config,
        prompt_tokens=options.mean_prompt_tokens or None,
        response_tokens=options.mean_response_tokens or None,
    )
    _print_assumptions(command.recipe, spec, cluster, workload)
    is_own_sound = _check_own_layout(spec, config, cluster, workload)
    if not options.top:
        return 0 if is_own_sound else EXIT_FAILED
    found = search(spec, config, cluster, workload)
    if found.ranked:
        print(f"\nlayouts that fit, the best of {found.num_tried} for every split of the devices:")
        print("\n".join(ranking(found, options.top)))
    elif not is_own_sound:
        print("\n".join(["", *nothing_fits(found)]))
        return EXIT_FAILED
    return 0


def _check_own_layout(
    spec: ModelSpec, config: RunConfig, cluster: Cluster, workload: Workload
) -> bool:
    """Print what the recipe's own layout comes to; whether it fits."""
    from r2vpo_megatron.planning.plan import make_plan
    from r2vpo_megatron.planning.report import describe_layout, memory_table, time_table

    print(f"\nthe recipe's layout: {describe_layout(config)}")
    try:
        own = make_plan(spec, config, cluster, workload)
    except ValueError as error:
        print(f"  NOT VALID: {error}")
        return False
    print("\n".join([*memory_table(own), "", *time_table(own)]))
    print("\n".join(f"  DOES NOT FIT: {text}" for text in own.problems) or "  it fits")
    return not own.problems


def _print_assumptions(recipe: str, spec: ModelSpec, cluster: Cluster, workload: Workload) -> None:
    device = cluster.device
    print(f"{recipe}: {spec.architecture}, {spec.num_parameters:,} parameters")
    print(
        f"{cluster.num_nodes} nodes x {cluster.devices_per_node} {device.name}: "
        f"{device.memory_bytes / 1e9:g} GB, {device.peak_flops / 1e12:g} TFLOP/s "
        f"({device.matmul_efficiency:.0%} reached), memory {device.memory_bandwidth / 1e9:g} GB/s, "
        f"links {device.node_bandwidth / 1e9:g} and {device.network_bandwidth / 1e9:g} GB/s"
    )
    print(
        f"an iteration: {workload.num_responses} responses of {workload.response_tokens:,.0f} "
        f"tokens on average, at most {workload.longest_response:,}, prompts of "
        f"{workload.prompt_tokens:,.0f}; {workload.updates:g} updates of "
        f"{workload.samples_per_update} responses"
    )
    print("a model, not a measurement: times rest on assumed efficiencies (docs/scaling.md)")


def _device(config: RunConfig, options: _Options) -> Device:
    """The named device, with what the user overrides.

    Raises:
        ValueError: unknown name, or a size that does not read.
    """
    from r2vpo_megatron.planning.devices import find_device, parse_bytes

    device = find_device(options.device or _BY_PLATFORM.get(config.runtime.device, _DEFAULT_DEVICE))
    changes: dict[str, Any] = {}
    if options.device_memory:
        changes["memory_bytes"] = parse_bytes(options.device_memory, "--device-memory")
    for field, value in (
        ("peak_flops", options.peak_tflops * 1e12),
        ("memory_bandwidth", options.memory_gb_per_second * 1e9),
        ("node_bandwidth", options.node_gb_per_second * 1e9),
        ("network_bandwidth", options.network_gb_per_second * 1e9),
        ("matmul_efficiency", options.matmul_efficiency),
    ):
        if value:
            changes[field] = value
    return dataclasses.replace(device, **changes)


def _model_spec(config: RunConfig, options: _Options) -> ModelSpec:
    """The shape of the model: of a published one by name, the checkpoint's, or the testbed's.

    Raises:
        ValueError: an unknown name, or no checkpoint to read.
    """
    from r2vpo_megatron.models.spec import read_model_spec
    from r2vpo_megatron.planning.known_models import KNOWN_MODELS

    name = options.model_shape
    require(not name or name in KNOWN_MODELS, "--model-shape", name, ", ".join(KNOWN_MODELS))
    if name:
        return KNOWN_MODELS[name]
    if config.model.testbed:
        from r2vpo_megatron.testbed.tiny_model import ensure_tiny_model

        cache = Path(config.output.cache_dir)
        return read_model_spec(ensure_tiny_model(cache, config.model.testbed, warm_start=False))
    try:
        return read_model_spec(config.model.path)
    except ValueError as error:
        shapes = ", ".join(KNOWN_MODELS)
        raise ValueError(f"{error}; or plan without it: --model-shape {shapes}") from error


if __name__ == "__main__":
    sys.exit(main())
