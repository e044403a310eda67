"""Projects an iteration of the paper's settings from 8 to 1,024 devices by the model of `cli.plan`.

Nothing is measured here: the fastest layout that the search finds is printed for every size of a
cluster. `--write docs/scaling.md` puts the tables between that file's marks.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from r2vpo_megatron.config import (
    AlgorithmConfig,
    ModelConfig,
    ParallelConfig,
    PipelineConfig,
    ReplayConfig,
    RolloutConfig,
    RunConfig,
    TrainConfig,
)
from r2vpo_megatron.models.spec import ModelSpec
from r2vpo_megatron.planning.devices import find_device
from r2vpo_megatron.planning.known_models import KNOWN_MODELS
from r2vpo_megatron.planning.plan import Cluster, Plan
from r2vpo_megatron.planning.search import search
from r2vpo_megatron.planning.workload import Workload

MODELS = ("openpangu-embedded-1b", "openpangu-embedded-7b", "deepseek-r1-distill-qwen-1.5b")
DEVICES = ("ascend-910b-64gb", "h100-80gb")
NUM_DEVICES = (8, 16, 32, 64, 128, 256, 512, 1024)
PER_NODE = 8
MEAN_RESPONSE_TOKENS, MEAN_PROMPT_TOKENS = 6000, 250
BEGIN, END = "<!-- projection: begin -->", "<!-- projection: end -->"


def paper_config() -> RunConfig:
    """Algorithm 2 at the paper's sizes: 128 x 8 responses of up to 16,384 tokens, UTD 2."""
    return RunConfig(
        model=ModelConfig(path="unused"),
        rollout=RolloutConfig(max_prompt_tokens=2048, max_response_tokens=16384),
        algorithm=AlgorithmConfig(),
        replay=ReplayConfig(capacity_iterations=4, update_to_data=2.0),
        train=TrainConfig(
            prompts_per_iteration=128, responses_per_prompt=8, mini_batch_samples=256
        ),
        parallel=ParallelConfig(max_tokens_per_micro_batch=32768),
    )


def side_by_side(config: RunConfig) -> RunConfig:
    """The same with rollout and learner side by side."""
    return replace(
        config,
        algorithm=replace(config.algorithm, behavior_logprobs="rollout"),
        pipeline=PipelineConfig(mode="asynchronous", max_staleness=1),
    )


def best_plan(spec: ModelSpec, config: RunConfig, device: str, num_devices: int) -> Plan | None:
    """The fastest layout of so many devices, None where nothing fits."""
    cluster = Cluster(num_devices // PER_NODE, PER_NODE, find_device(device))
    workload = Workload.of(
        config, prompt_tokens=MEAN_PROMPT_TOKENS, response_tokens=MEAN_RESPONSE_TOKENS
    )
    found = search(spec, config, cluster, workload)
    return found.ranked[0] if found.ranked else None


def table(name: str, device: str) -> Iterator[str]:
    """A Markdown table of one model on one kind of device."""
    spec, config = KNOWN_MODELS[name], paper_config()
    yield f"### {name}, {device}"
    yield ""
    yield (
        "| devices | in turn, s | rollout | learner | push | of linear | learner : rollout "
        "| TP x PP x CP x DP, recompute | engines x TP | peak GB | side by side, s |"
    )
    yield "|---:" * 6 + "|---:|---|---|---:|---:|"
    first: float | None = None
    for num_devices in NUM_DEVICES:
        plan = best_plan(spec, config, device, num_devices)
        if plan is None:
            yield f"| {num_devices:,} | nothing fits |" + " |" * 9
            continue
        first = first or plan.iteration_seconds * num_devices
        other = best_plan(spec, side_by_side(config), device, num_devices)
        yield row(num_devices, plan, first, other)
    yield ""


def row(num_devices: int, plan: Plan, first: float, other: Plan | None) -> str:
    """One line; `first` is the device seconds of the smallest cluster that fits."""
    parallel, rollout = plan.config.parallel, plan.config.rollout
    share = first / (plan.iteration_seconds * num_devices)
    grid = f"{parallel.tensor} x {parallel.pipeline} x {parallel.context} x {parallel.data}"
    cells = (
        f"{num_devices:,}",
        f"{plan.iteration_seconds:,.0f}",
        f"{plan.rollout_seconds:,.0f}",
        f"{plan.learner_seconds:,.0f}",
        f"{plan.push_seconds:.1f}",
        f"{share:.0%}",
        f"{plan.learner_devices} : {plan.rollout_devices}",
        f"{grid}, {parallel.recompute}",
        f"{rollout.num_engines} x {rollout.tensor_parallel}",
        f"{plan.fullest.device_bytes / 1e9:.0f}",
        f"{other.iteration_seconds:,.0f}" if other else "-",
    )
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Print the tables, and write them if asked."""
    parser = argparse.ArgumentParser(description="Projection from 8 to 1,024 devices.")
    parser.add_argument("--write", type=Path, help="Markdown file with the marks to write between")
    args = parser.parse_args()
    lines: list[str] = []
    for device in DEVICES:
        for name in MODELS:
            for line in table(name, device):
                print(line, flush=True)
                lines.append(line)
    if args.write:
        text = args.write.read_text(encoding="utf-8")
        before, rest = text.split(BEGIN)
        after = rest.split(END)[1]
        body = "\n".join(lines)
        args.write.write_text(f"{before}{BEGIN}\n{body}{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
