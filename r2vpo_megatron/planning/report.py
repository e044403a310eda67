"""A plan in words and tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

from r2vpo_megatron.config import ParallelConfig, RunConfig
from r2vpo_megatron.planning.learner_memory import LearnerRankMemory
from r2vpo_megatron.planning.plan import GB, Plan
from r2vpo_megatron.planning.search import Found


def describe_layout(config: RunConfig) -> str:
    """The grid and what saves memory, in one line."""
    parallel, rollout = config.parallel, config.rollout
    learner = (
        f"TP {parallel.tensor} PP {parallel.pipeline} CP {parallel.context} DP {parallel.data}"
    )
    if parallel.virtual_pipeline > 1:
        learner += f" VPP {parallel.virtual_pipeline}"
    return (
        f"{learner}, recompute {parallel.recompute}, {parallel.max_tokens_per_micro_batch:,} "
        f"tokens; {rollout.num_engines} engines of TP {rollout.tensor_parallel}"
    )


def memory_table(plan: Plan) -> list[str]:
    """Memory of the fullest learner rank of every stage, and of an engine's rank, in GB."""
    device = plan.cluster.device
    available = device.usable_bytes
    names = ("weights", "gradients", "optimizer", "activations", "workspace", "buffers", "reserved")
    header = "".join(f"{name:>13}" for name in (*names, "total", "left"))
    lines = [f"  {'GB a rank':<18}{header}"]
    for rank in _distinct(plan.learner):
        activations = rank.peak.activations, rank.peak.workspace
        numbers = [rank.weights, rank.gradients, rank.optimizer, *activations]
        numbers += [rank.buffers, rank.reserved, rank.device_bytes, available - rank.device_bytes]
        lines.append(_row(f"learner stage {rank.stage}", numbers))
    lines.append(f"  {'':18}peak of the learner: {plan.fullest.peak.name}")
    engine = plan.engine
    lines.append(
        f"  engine rank       weights {engine.weights / GB:.2f}, workspace "
        f"{engine.workspace / GB:.2f}, KV cache {engine.kv_cache / GB:.2f} "
        f"({engine.cached_tokens:,} tokens), push buckets {engine.buckets / GB:.2f}, reserved "
        f"{engine.reserved / GB:.2f}: {engine.device_bytes / GB:.2f} of "
        f"{device.memory_bytes / GB:.2f}"
    )
    copy = max(rank.checkpoint_copy for rank in plan.learner)
    lines.append(
        f"  host memory       {copy / GB:.2f} GB a learner rank while a checkpoint is written"
    )
    return lines


def time_table(plan: Plan) -> list[str]:
    """Seconds of an iteration by stage."""
    learner, rollout = plan.learner_times, plan.rollout_times
    per_iteration = "of all updates of an iteration"
    rows = [
        ("prefill", rollout.prefill, ""),
        (
            "decode",
            plan.rollout_seconds - rollout.prefill,
            f"{rollout.concurrency} responses an engine, {rollout.tokens_per_second:,.0f} tokens/s "
            "when all are full",
        ),
        ("log-probs", learner.logprobs, "of the fresh responses by the learner"),
        ("forward", learner.forward, per_iteration),
        ("backward", learner.backward, ""),
        ("recompute", learner.recompute, ""),
        ("pipeline idle", learner.idle, f"{learner.micro_batches} micro-batches an update"),
        ("reduction", learner.reduction, "of gradients, and the weights' way back"),
        ("optimizer", learner.step, ""),
        ("weight push", plan.push_seconds, ""),
    ]
    lines = [f"  {name:<16}{seconds:>10.2f} s  {note}".rstrip() for name, seconds, note in rows]
    mode = "in turn" if plan.config.pipeline.mode == "synchronous" else "side by side"
    lines.append(
        f"  {'iteration':<16}{plan.iteration_seconds:>10.2f} s  {mode}: rollout "
        f"{plan.rollout_seconds:.1f} s, learner {plan.learner_seconds:.1f} s"
    )
    return lines


def ranking(found: Found, limit: int) -> list[str]:
    """The fastest layouts that fit, one line each, and the options of the first."""
    if not found.ranked:
        return []
    header = f"  {'':>3}{'s/iteration':>12}{'rollout':>10}{'learner':>10}{'GB left':>9}"
    lines = [f"{header}  learner : rollout devices, layout"]
    for number, plan in enumerate(found.ranked[:limit], start=1):
        left = (plan.cluster.device.usable_bytes - plan.fullest.device_bytes) / GB
        lines.append(
            f"  {number:>2}.{plan.iteration_seconds:>12.1f}{plan.rollout_seconds:>10.1f}"
            f"{plan.learner_seconds:>10.1f}{left:>9.1f}  {plan.learner_devices} : "
            f"{plan.rollout_devices}, {describe_layout(plan.config)}"
        )
    return [*lines, "  the first as options:", f"    {' '.join(options(found.ranked[0]))}"]


def nothing_fits(found: Found) -> list[str]:
    """The layout that lacks least, and what it lacks."""
    if found.nearest is None:
        return [
            "nothing fits: learner and rollout take devices of their own, at least one each, and "
            "a tensor parallel size that divides the KV heads"
        ]
    lines = [f"nothing fits, of {found.num_tried} layouts; the nearest miss:"]
    lines.append(f"  {describe_layout(found.nearest.config)}")
    return [*lines, *(f"    {text}" for text in found.nearest.problems)]


def options(plan: Plan) -> list[str]:
    """What the command line needs for this layout, where it is not a field's default."""
    parallel, rollout = plan.config.parallel, plan.config.rollout
    defaults = ParallelConfig(max_tokens_per_micro_batch=1)
    words = []
    for field in fields(parallel):
        value = getattr(parallel, field.name)
        if value != getattr(defaults, field.name):
            words += [f"--parallel.{field.name.replace('_', '-')}", str(value).lower()]
    words += ["--rollout.num-engines", str(rollout.num_engines)]
    return [*words, "--rollout.tensor-parallel", str(rollout.tensor_parallel)]


def _distinct(ranks: Sequence[LearnerRankMemory]) -> list[LearnerRankMemory]:
    """First, last and the fullest of the stages between."""
    if len(ranks) <= 3:
        return list(ranks)
    middle = max(ranks[1:-1], key=lambda rank: rank.device_bytes)
    return [ranks[0], middle, ranks[-1]]


def _row(name: str, numbers: Sequence[int]) -> str:
    return f"  {name:<18}" + "".join(f"{number / GB:>13.2f}" for number in numbers)
