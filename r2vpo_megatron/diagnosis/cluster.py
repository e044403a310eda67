"""Nodes and ranks of a Ray cluster, looked at side by side, from the driver."""

from __future__ import annotations

import contextlib
import secrets
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from r2vpo_megatron.config import RunConfig
from r2vpo_megatron.device import get_platform
from r2vpo_megatron.diagnosis.findings import Finding, fault, ok
from r2vpo_megatron.diagnosis.judgement import named
from r2vpo_megatron.diagnosis.node import NodeReport, examine_node
from r2vpo_megatron.orchestration.cluster import NoAnswer, free_tcp_address, get_in_time
from r2vpo_megatron.orchestration.placement import (
    LEARNER_GROUP,
    actor_options,
    rank_placements,
)

NODE_SECONDS = 120.0  # for Ray to start a worker, torch to load, 64 MiB to be written
CONNECT_SECONDS = 10.0
COLLECTIVE_SECONDS = 300.0  # first collectives of many devices set up their rings
REDUCED_BYTES = 64 << 20
_REPEATS = 3


class NodeProbe:
    """Ray actor: looks at its node and speaks to the others."""

    def clock(self) -> float:
        """The node's wall clock."""
        return time.time()

    def examine(self, *args: Any) -> NodeReport:
        """See `examine_node`."""
        return examine_node(*args)

    def listen(self) -> tuple[str, int]:
        """Accept connections at this node's address, on a free port."""
        address = str(ray.util.get_node_ip_address())
        self._listener = socket.create_server((address, 0))
        return address, int(self._listener.getsockname()[1])

    def reach(self, addresses: Sequence[tuple[str, int]]) -> list[str]:
        """Why each address cannot be reached; empty where it can."""
        return [_connect(address) for address in addresses]


class RankProbe:
    """Ray actor: one rank of a group like the learner's, on a device like the learner's."""

    def address(self) -> str:
        """A free address on this rank's node."""
        return free_tcp_address()

    def reduce(self, platform_name: str, rank: int, size: int, init_method: str) -> float:
        """Seconds that an all-reduce of REDUCED_BYTES takes, the fastest of a few.

        Collective: every rank must call.

        Raises:
            RuntimeError: the group does not come about, or the sum is wrong.
        """
        import torch
        import torch.distributed as dist

        platform = get_platform(platform_name)
        platform.prepare()
        device = platform.torch_device(0)  # Ray shows each worker its own devices alone
        dist.init_process_group(
            platform.collective_backend,
            init_method=init_method,
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=COLLECTIVE_SECONDS),
        )
        try:
            seconds = []
            for _ in range(1 + _REPEATS):  # the first one sets up connections
                values = torch.ones(REDUCED_BYTES // 4, dtype=torch.float32, device=device)
                platform.synchronize()
                start = time.perf_counter()
                dist.all_reduce(values)
                platform.synchronize()
                seconds.append(time.perf_counter() - start)
                if not bool((values == size).all()):
                    raise RuntimeError(f"an all-reduce of ones over {size} ranks is not {size}")
            return min(seconds[1:])
        finally:
            dist.destroy_process_group()


@dataclass(frozen=True)
class ClusterReport:
    """What was seen of all nodes.

    Attributes:
        nodes: that answered.
        skews: seconds by which a node's clock is at least off the driver's, by name.
        findings: of nodes that did not answer, or do not reach each other.
    """

    nodes: list[NodeReport]
    skews: dict[str, float]
    findings: list[Finding]


def examine_cluster(config: RunConfig, model_dir: Path, folders: Sequence[Path]) -> ClusterReport:
    """Look at all nodes of the Ray cluster that this process has joined.

    Args:
        config: of the run to come, its device resolved.
        model_dir: that all ranks read.
        folders: that a run writes to; made if missing.
    """
    addresses = {
        node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]
    }
    probe = ray.remote(num_cpus=0, max_restarts=0)(NodeProbe)
    probes = {
        node_id: probe.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)
        ).remote()
        for node_id in addresses
    }
    try:
        with _marked(folders) as mark:
            arguments = (config.runtime.device, [str(path) for path in folders], str(model_dir))
            asked = {id_: probe.examine.remote(*arguments, mark) for id_, probe in probes.items()}
            nodes, findings = {}, []
            for node_id, reference in asked.items():
                try:
                    nodes[node_id] = get_in_time(reference, NODE_SECONDS, "node")
                except (NoAnswer, RayError) as error:
                    text = f"{addresses[node_id]} does not answer: {str(error).splitlines()[0]}"
                    remedy = "look at Ray's logs on that node, or leave it out"
                    findings.append(fault("nodes", text, remedy))
        alive = {node_id: probes[node_id] for node_id in nodes}
        names = {node_id: node.name for node_id, node in nodes.items()}
        skews = {names[node_id]: _skew(probe) for node_id, probe in alive.items()}
        if len(alive) > 1:
            findings.append(_check_reach(alive, names))
        return ClusterReport(list(nodes.values()), skews, findings)
    finally:
        for probe in probes.values():
            ray.kill(probe)


def time_all_reduce(config: RunConfig) -> Finding:
    """Form the learner's process group on its devices, and time an all-reduce over all of it."""
    size = config.parallel.num_ranks
    worker = ray.remote(RankProbe)
    options = actor_options(config, {}, group=LEARNER_GROUP)
    ranks = [worker.options(**options, **place).remote() for place in rank_placements(config)]
    platform = get_platform(config.runtime.device)
    subject = f"all-reduce ({platform.collective_backend})"
    try:
        init_method = get_in_time(ranks[0].address.remote(), NODE_SECONDS, "start of a rank")
        calls = [
            rank.reduce.remote(platform.name, number, size, init_method)
            for number, rank in enumerate(ranks)
        ]
        seconds = max(get_in_time(calls, COLLECTIVE_SECONDS, "all-reduce"))
    except (NoAnswer, RayError, RuntimeError) as error:
        cause = getattr(error, "cause", None) or error
        return fault(
            subject,
            f"{size} ranks: {type(cause).__name__}: {str(cause).splitlines()[0]}",
            "see that the interface is the right one on every node (HCCL_SOCKET_IFNAME, "
            "NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME) and that no firewall is between them",
        )
    finally:
        for rank in ranks:
            ray.kill(rank)
    bandwidth = 2 * (size - 1) / size * REDUCED_BYTES / seconds
    return ok(
        subject,
        f"{size} ranks, {REDUCED_BYTES >> 20} MiB in {seconds * 1e3:.1f} ms"
        + (f", {bandwidth / 1e9:.1f} GB/s of each rank" if size > 1 else ""),
    )


@contextlib.contextmanager
def _marked(folders: Sequence[Path]) -> Iterator[str]:
    """A file of the driver's in each folder, gone with the block; the beginning of its name."""
    mark = f".doctor-{secrets.token_hex(4)}"
    marks = []
    try:
        for folder in folders:
            with contextlib.suppress(OSError):  # nodes will say so
                folder.mkdir(parents=True, exist_ok=True)
                path = folder / f"{mark}.driver"
                path.touch()
                marks.append(path)
        yield mark
    finally:
        for path in marks:
            path.unlink(missing_ok=True)


def _skew(probe: Any) -> float:
    """Seconds by which a node's clock is at least off this one's; the way takes time, too."""
    before = time.time()
    there = float(get_in_time(probe.clock.remote(), NODE_SECONDS, "clock"))
    after = time.time()
    return there - min(max(there, before), after)


def _check_reach(probes: dict[str, Any], names: dict[str, str]) -> Finding:
    """Let every node connect to every other one."""
    listening = {
        node_id: get_in_time(probe.listen.remote(), NODE_SECONDS, "listen")
        for node_id, probe in probes.items()
    }
    targets = list(listening.values())
    asked = {node_id: probe.reach.remote(targets) for node_id, probe in probes.items()}
    errors = []
    for node_id, reference in asked.items():
        reasons = get_in_time(reference, NODE_SECONDS, "connect")
        errors += [
            f"{names[node_id]} to {names[target]} ({address}): {reason}"
            for (target, (address, _)), reason in zip(listening.items(), reasons, strict=True)
            if reason
        ]
    if errors:
        return fault(
            "ports",
            named(errors),
            "open the ephemeral ports (net.ipv4.ip_local_port_range) between the nodes",
        )
    return ok("ports", f"{len(probes)} nodes reach each other on ephemeral ports")


def _connect(address: tuple[str, int]) -> str:
    try:
        with socket.create_connection(address, CONNECT_SECONDS):
            return ""
    except OSError as error:
        return error.strerror or str(error)
