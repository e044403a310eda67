"""The layouts of a cluster that fit, ranked by the time of an iteration.

Learner and engines do not share devices and, but for the number of those that are left, one does
not ask what the other does: so each number of learner devices gets its fastest learner, the rest
its fastest engines, and the pairs are ranked.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from r2vpo_megatron.config import ParallelConfig, RunConfig
from r2vpo_megatron.models.pipeline import balanced_layout
from r2vpo_megatron.models.spec import ModelSpec, valid_tensor_sizes
from r2vpo_megatron.planning.plan import Cluster, Plan, make_plan
from r2vpo_megatron.planning.workload import Workload

_PIPELINES = (1, 2, 4, 8)
_CONTEXTS = (1, 2, 4, 8)
# From the fastest to the one that needs least memory.
_RECOMPUTE = ("none", "core_attn", "mlp", "full")
_MOST_SPLITS, _MANY_NODES = 15, 4


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        ranked: plans that fit, the fastest first, one for each split between learner and rollout.
        nearest: of those that do not fit, the one that lacks least; None where none was tried.
        num_tried: layouts.
    """

    ranked: tuple[Plan, ...]
    nearest: Plan | None
    num_tried: int


def search(spec: ModelSpec, config: RunConfig, cluster: Cluster, workload: Workload) -> Found:
    """Try the layouts of learner and engines.

    Args:
        spec: the model.
        config: all but `parallel` and the engines' number and size are kept; the budget of a
            micro-batch is tried as it is and as small as the longest sequence allows.
        cluster: to run on.
        workload: of an iteration.
    """
    ranked: list[Plan] = []
    nearest: Plan | None = None
    num_tried = 0
    for learner_devices in _splits(cluster):
        engines = _engines(spec, config, cluster, cluster.num_devices - learner_devices)
        engine_config = _fastest_engines(spec, engines, cluster, workload)
        best: Plan | None = None
        for parallel in _learners(spec, engine_config, cluster, learner_devices):
            plan = make_plan(spec, replace(engine_config, parallel=parallel), cluster, workload)
            num_tried += 1
            if plan.problems:
                if nearest is None or plan.missing_bytes < nearest.missing_bytes:
                    nearest = plan
            elif best is None or plan.learner_seconds < best.learner_seconds:
                best = plan
        if best is not None:
            ranked.append(best)
    ranked.sort(key=lambda plan: plan.iteration_seconds)
    return Found(tuple(ranked), nearest, num_tried)


def _splits(cluster: Cluster) -> list[int]:
    """Numbers of learner devices: whole nodes where there are many, else parts of them."""
    per_node = cluster.devices_per_node
    unit = per_node if cluster.num_nodes >= _MANY_NODES else max(1, per_node // 4)
    num_units = cluster.num_devices // unit
    if num_units < 2:
        return []
    numbers = range(1, num_units)
    step = max(1, -(-len(numbers) // _MOST_SPLITS))
    return [unit * number for number in numbers if number % step == 0 or number == 1]


def _engines(
    spec: ModelSpec, config: RunConfig, cluster: Cluster, num_devices: int
) -> Iterator[RunConfig]:
    """The run with engines of every size that share the devices out."""
    for tensor in valid_tensor_sizes(spec):
        if tensor <= cluster.devices_per_node and num_devices % tensor == 0:
            rollout = replace(
                config.rollout, tensor_parallel=tensor, num_engines=num_devices // tensor
            )
            yield replace(config, rollout=rollout)


def _fastest_engines(
    spec: ModelSpec, engines: Iterator[RunConfig], cluster: Cluster, workload: Workload
) -> RunConfig:
    """Of those that fit, the fastest; where none does, the one that lacks least."""
    plans = [make_plan(spec, _plain(config), cluster, workload) for config in engines]
    fitting = [plan for plan in plans if plan.engine.missing_bytes <= 0]
    if fitting:
        chosen = min(fitting, key=lambda plan: plan.rollout_seconds)
    else:
        chosen = min(plans, key=lambda plan: plan.engine.missing_bytes)
    return chosen.config


def _plain(config: RunConfig) -> RunConfig:
    """The run on one learner rank, for a look at its engines alone."""
    tokens = config.parallel.max_tokens_per_micro_batch
    return replace(config, parallel=ParallelConfig(max_tokens_per_micro_batch=tokens))


def _learners(
    spec: ModelSpec, config: RunConfig, cluster: Cluster, num_devices: int
) -> Iterator[ParallelConfig]:
    """Every grid of the devices, with every way to save memory."""
    sizes = itertools.product(valid_tensor_sizes(spec), _PIPELINES, _CONTEXTS)
    for tensor, pipeline, context in sizes:
        data, rest = divmod(num_devices, tensor * pipeline * context)
        if rest or data < 1 or data > config.train.mini_batch_samples:
            continue
        if tensor > cluster.devices_per_node or pipeline > spec.num_layers:
            continue
        is_even = spec.num_layers % pipeline == 0
        layout = "" if is_even else balanced_layout(spec.num_layers, pipeline)
        for tokens, recompute in itertools.product(_budgets(config, tensor, context), _RECOMPUTE):
            yield ParallelConfig(
                tensor=tensor,
                pipeline=pipeline,
                pipeline_layout=layout,
                context=context,
                data=data,
                sequence_parallel=tensor > 1,
                max_tokens_per_micro_batch=tokens,
                recompute=recompute,
                threads_per_rank=config.parallel.threads_per_rank,
            )


def _budgets(config: RunConfig, tensor: int, context: int) -> list[int]:
    """Token budgets of a micro-batch, at the multiple that the grid asks for."""
    multiple = tensor * (2 * context if context > 1 else 1)
    longest = config.max_sequence_tokens
    wanted = {max(config.parallel.max_tokens_per_micro_batch, longest), longest}
    return sorted({-(-tokens // multiple) * multiple for tokens in wanted})
