"""Learner updates on fixed trajectories, without rollouts: what runs are compared by.

Two runs of the same code and configuration give the same bits. So where two commits or two
configurations part, and by how much, is what a change did.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from r2vpo_megatron.config import RunConfig
from r2vpo_megatron.data.packing import pack_trajectories
from r2vpo_megatron.learner.start import start_learner
from r2vpo_megatron.models.spec import read_model_spec
from r2vpo_megatron.orchestration.loop import make_dual
from r2vpo_megatron.parallel.state import ParallelState
from r2vpo_megatron.records import FloatArray, Trajectory

SAMPLES_PER_UPDATE = 6
NUM_MINI_BATCHES = 4  # taken in turn
# Log-ratios of the first update: off-policy enough that every objective's clip is in force
# for some tokens.
LOG_RATIO_STD = 0.25
ENGINE_GAP_STD = 0.02


@dataclass(frozen=True)
class FixedRun:
    """One rank's learner and the trajectories that its updates take in turn."""

    actor: Any  # MegatronActor
    state: ParallelState
    config: RunConfig
    trajectories: list[Trajectory]
    fresh_logprobs: dict[str, FloatArray]  # sample id -> [R] of the checkpoint, before any update

    def updates(self, num_updates: int) -> Iterator[dict[str, float]]:
        """Update on one mini-batch after another; yields each update's metrics.

        Lambda follows the dual controller as in the loop, and is among the metrics as it was used.

        Collective: every rank must iterate; all get the same metrics.
        """
        dual = make_dual(self.config.algorithm)  # lambda
        for update in range(num_updates):
            start = update % NUM_MINI_BATCHES * SAMPLES_PER_UPDATE
            mini_batch = self.trajectories[start : start + SAMPLES_PER_UPDATE]
            batches = _pack(mini_batch, self.state, self.config)
            metrics = self.actor.update(batches, dual.value, policy_version=0)
            yield {**metrics, "ratio/penalty": dual.value}
            dual.step(metrics["ratio/second_moment"])


def start_fixed_run(rank: int, init_method: str, config: RunConfig, model_dir: Path) -> FixedRun:
    """Join the process group on the CPU, build this rank's learner and make its trajectories.

    Collective: every rank must call. `r2vpo_megatron.parallel.state.destroy_parallel` ends it.

    Args:
        rank: 0..parallel.num_ranks-1.
        init_method: tcp://host:port or file:///path, the same on every rank.
        config: of the learner; its model, data and rollout sections are not used, but for the
            dtype and the temperature.
        model_dir: the Hugging Face checkpoint to start from.
    """
    config = replace(config, runtime=replace(config.runtime, device="cpu"))
    actor, state = start_learner(config, model_dir, rank, init_method)
    trajectories = fixed_trajectories(read_model_spec(model_dir).vocab_size)
    parts: list[Any] = [None] * state.world_size
    dist.all_gather_object(parts, actor.compute_logprobs(_pack(trajectories, state, config)))
    fresh = {name: logprobs for part in parts for name, logprobs in part.items()}
    return FixedRun(actor, state, config, with_behavior_logprobs(trajectories, fresh), fresh)


def fixed_trajectories(vocab_size: int, seed: int = 0) -> list[Trajectory]:
    """Prompts and responses of random tokens, all mini-batches end to end; no log-probs yet."""
    random = np.random.default_rng(seed)
    trajectories = []
    for index in range(NUM_MINI_BATCHES * SAMPLES_PER_UPDATE):
        num_prompt, num_response = random.integers(3, 9), random.integers(4, 25)
        zeros: FloatArray = np.zeros(num_response, dtype=np.float32)
        trajectories.append(
            Trajectory(
                sample_id=f"sample-{index:02d}",
                group_id=f"group-{index // 2:02d}",
                prompt_token_ids=tuple(random.integers(0, vocab_size, num_prompt).tolist()),
                response_token_ids=tuple(random.integers(0, vocab_size, num_response).tolist()),
                behavior_logprobs=zeros,
                rollout_logprobs=zeros,
                reward=0.0,
                advantage=float(random.normal()),
                finish_reason="stop",
                policy_versions=np.zeros(num_response, dtype=np.int64),
                iteration=1,
            )
        )
    return trajectories


def with_behavior_logprobs(
    trajectories: Sequence[Trajectory], fresh: Mapping[str, FloatArray], seed: int = 1
) -> list[Trajectory]:
    """A behaviour policy a fixed noise away from the one that gave `fresh`."""
    random = np.random.default_rng(seed)
    result = []
    for trajectory in trajectories:
        logprobs = fresh[trajectory.sample_id]
        shift, gap = random.normal(size=(2, len(logprobs))).astype(np.float32)
        behavior = np.minimum(logprobs + np.float32(LOG_RATIO_STD) * shift, np.float32(0.0))
        rollout = np.minimum(behavior + np.float32(ENGINE_GAP_STD) * gap, np.float32(0.0))
        result.append(replace(trajectory, behavior_logprobs=behavior, rollout_logprobs=rollout))
    return result


def _pack(trajectories: Sequence[Trajectory], state: ParallelState, config: RunConfig) -> Any:
    """This rank's micro-batches."""
    return pack_trajectories(
        trajectories,
        max_tokens_per_micro_batch=config.parallel.max_tokens_per_micro_batch,
        num_data_parallel_ranks=config.parallel.data,
        pad_to_multiple_of=config.parallel.tokens_multiple,
    )[state.data_rank]
