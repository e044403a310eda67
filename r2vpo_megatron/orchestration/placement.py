"""What the workers of a run ask of Ray, and on which nodes they are put."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from r2vpo_megatron.config import RunConfig
from r2vpo_megatron.device import get_platform

# Resources of a Ray whose nodes belong to groups, one for each device that a node lends to a group.
LEARNER_GROUP = "learner"
ROLLOUT_GROUP = "rollout"


def needed_resources(config: RunConfig, *, with_learner: bool = True) -> dict[str, int]:
    """What all workers of a run ask of Ray: a CPU slot and their devices each.

    Under `runtime.node_groups` also the groups' own resources.

    Args:
        config: of the run.
        with_learner: False where there are engines only.
    """
    num_ranks = config.parallel.num_ranks if with_learner else 0
    num_engine_devices = config.rollout.num_engines * config.rollout.tensor_parallel
    num_devices = num_ranks + num_engine_devices
    device = get_platform(config.runtime.device).accelerator_resource()
    needed = {"CPU": num_ranks + config.rollout.num_engines}
    if device:
        needed[device] = num_devices
    if config.runtime.node_groups:
        needed |= {LEARNER_GROUP: num_ranks, ROLLOUT_GROUP: num_engine_devices}
    return needed


def actor_options(
    config: RunConfig, env_vars: dict[str, str], num_devices: int = 1, *, group: str
) -> dict[str, Any]:
    """Ray options of one worker: a CPU slot, its devices where there are any, its environment.

    Args:
        config: of the run.
        env_vars: of the worker, beside those of Ray's daemon.
        num_devices: that it uses.
        group: LEARNER_GROUP or ROLLOUT_GROUP; counts under `runtime.node_groups`.
    """
    device = get_platform(config.runtime.device).accelerator_resource()
    if device is None:
        env_vars = {**env_vars, "CUDA_VISIBLE_DEVICES": ""}  # the CPU was asked for
    options: dict[str, Any] = {"num_cpus": 1, "runtime_env": {"env_vars": env_vars}}
    resources = {group: num_devices} if config.runtime.node_groups else {}
    if device == "GPU":
        options["num_gpus"] = num_devices
    elif device is not None:
        resources[device] = num_devices
    if resources:
        options["resources"] = resources
    return options


def rank_placements(config: RunConfig) -> list[dict[str, Any]]:
    """Ray options that say where each learner rank goes; empty ones where Ray decides.

    Under `runtime.node_groups` the learner's nodes are filled one after the other, so ranks that
    talk most, those of one tensor parallel group, are neighbours.

    Raises:
        RuntimeError: the learner's nodes have fewer devices than there are ranks.
    """
    num_ranks = config.parallel.num_ranks
    if not config.runtime.node_groups:
        return [{} for _ in range(num_ranks)]
    return [
        {"scheduling_strategy": NodeAffinitySchedulingStrategy(node_id, soft=False)}
        for node_id in nodes_of_ranks(ray.nodes(), num_ranks)
    ]


def nodes_of_ranks(nodes: Iterable[dict[str, Any]], num_ranks: int) -> list[str]:
    """Ray's id of the node of each rank: nodes in the order of their names, filled in turn.

    Args:
        nodes: as `ray.nodes()` lists them.
        num_ranks: of the learner.

    Raises:
        RuntimeError: the nodes have fewer devices of the learner's than there are ranks.
    """
    alive = sorted((node for node in nodes if node["Alive"]), key=_natural_name)
    slots = [
        node["NodeID"]
        for node in alive
        for _ in range(int(node["Resources"].get(LEARNER_GROUP, 0)))
    ]
    if len(slots) < num_ranks:
        raise RuntimeError(
            f"the learner has {num_ranks} ranks, and the nodes of the Ray cluster lend "
            f"{len(slots)} devices to it (resource {LEARNER_GROUP!r} of `ray start`)"
        )
    return slots[:num_ranks]


def _natural_name(node: dict[str, Any]) -> tuple[list[tuple[int, str]], str]:
    """Orders node2 before node10; nodes of one name, as on one machine, by Ray's id."""
    parts = re.findall(r"\d+|\D+", node["NodeManagerHostname"])
    key = [(int(part), "") if part.isdigit() else (-1, part) for part in parts]
    return key, node["NodeID"]
