"""One layout on one cluster: does it fit, and how long does an iteration take?"""

from __future__ import annotations

from dataclasses import dataclass

from r2vpo_megatron.config import RunConfig
from r2vpo_megatron.models.spec import ModelSpec
from r2vpo_megatron.planning.devices import Device
from r2vpo_megatron.planning.engine_memory import EngineRankMemory, engine_memory
from r2vpo_megatron.planning.learner_memory import LearnerRankMemory, learner_memory
from r2vpo_megatron.planning.learner_time import (
    LearnerTimes,
    learner_times,
    micro_batches_per_rank,
)
from r2vpo_megatron.planning.rollout_time import RolloutTimes, push_seconds, rollout_times
from r2vpo_megatron.planning.workload import Workload

GB = 10**9


@dataclass(frozen=True)
class Cluster:
    """What there is to run on.

    Attributes:
        num_nodes: of the allocation.
        devices_per_node: of each node.
        device: every one of them.
    """

    num_nodes: int
    devices_per_node: int
    device: Device

    @property
    def num_devices(self) -> int:
        """Of all nodes."""
        return self.num_nodes * self.devices_per_node


@dataclass(frozen=True)
class Plan:
    """What a configuration comes to on a cluster.

    Attributes:
        config: of the run.
        cluster: that it is to run on.
        learner: memory of a rank of every pipeline stage.
        engine: memory of a rank of an engine.
        learner_times, rollout_times: stages of an iteration.
        push_seconds: of a weight push.
    """

    config: RunConfig
    cluster: Cluster
    learner: tuple[LearnerRankMemory, ...]
    engine: EngineRankMemory
    learner_times: LearnerTimes
    rollout_times: RolloutTimes
    push_seconds: float

    @property
    def learner_devices(self) -> int:
        """One a rank."""
        return self.config.parallel.num_ranks

    @property
    def rollout_devices(self) -> int:
        """One for each rank of each engine."""
        return self.config.rollout.num_engines * self.config.rollout.tensor_parallel

    @property
    def fullest(self) -> LearnerRankMemory:
        """The learner rank that holds most."""
        return max(self.learner, key=lambda rank: rank.device_bytes)

    @property
    def rollout_seconds(self) -> float:
        """What engines need for an iteration's responses, in the pipeline's mode."""
        times = self.rollout_times
        is_synchronous = self.config.pipeline.mode == "synchronous"
        return times.prefill + (times.decode if is_synchronous else times.steady)

    @property
    def learner_seconds(self) -> float:
        """What the learner needs for an iteration's log-probs and updates."""
        return self.learner_times.logprobs + self.learner_times.updates

    @property
    def iteration_seconds(self) -> float:
        """In turn, or side by side: then the slower of the two sets the pace."""
        if self.config.pipeline.mode == "synchronous":
            return self.rollout_seconds + self.learner_seconds + self.push_seconds
        return max(self.rollout_seconds, self.learner_seconds) + self.push_seconds

    @property
    def missing_bytes(self) -> int:
        """What the fullest device lacks; 0 or below where all fit."""
        available = self.cluster.device.usable_bytes
        lacking = self.fullest.device_bytes - available
        if self.cluster.device.is_cpu and self.config.checkpoint.asynchronous:
            lacking += self.fullest.checkpoint_copy
        return max(lacking, self.engine.missing_bytes)

    @property
    def problems(self) -> list[str]:
        """Why it cannot run as it is, in words; empty where it can."""
        found = []
        needed = self.learner_devices + self.rollout_devices
        if needed > self.cluster.num_devices:
            found.append(
                f"needs {needed} devices ({self.learner_devices} learner + {self.rollout_devices} "
                f"rollout), {self.cluster.num_devices} are there"
            )
        lacking = self.fullest.device_bytes - self.cluster.device.usable_bytes
        if lacking > 0:
            found.append(
                f"the learner's stage {self.fullest.stage} lacks {lacking / GB:.1f} GB at its peak "
                f"({self.fullest.peak.name})"
            )
        elif self.missing_bytes > max(0, self.engine.missing_bytes):
            found.append("the host lacks memory for the copy of an asynchronous checkpoint")
        if self.engine.missing_bytes > 0:
            found.append(
                f"an engine lacks {self.engine.missing_bytes / GB:.1f} GB a rank for weights, "
                f"buckets and one sequence of {self.engine.longest_sequence:,} tokens"
            )
        return found


def make_plan(spec: ModelSpec, config: RunConfig, cluster: Cluster, workload: Workload) -> Plan:
    """Work out memory and time of a configuration.

    Args:
        spec: the model.
        config: of the run.
        cluster: that it is to run on.
        workload: of an iteration.

    Raises:
        ValueError: a layout that does not fit the model.
    """
    device, per_node = cluster.device, cluster.devices_per_node
    num_micro_batches = micro_batches_per_rank(
        workload.samples_per_update, workload.sequence_tokens, config
    )
    engine = engine_memory(spec, config, device)
    return Plan(
        config=config,
        cluster=cluster,
        learner=tuple(learner_memory(spec, config, device, num_micro_batches)),
        engine=engine,
        learner_times=learner_times(spec, config, device, workload, per_node),
        rollout_times=rollout_times(spec, config, device, workload, engine),
        push_seconds=push_seconds(spec, config, device, config.parallel, per_node),
    )
