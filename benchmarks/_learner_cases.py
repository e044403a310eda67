"""Learners on real ranks of this CPU and the sequences that they get, for checks of the plan."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks._shapes import Shape
from r2vpo_megatron import config as c
from r2vpo_megatron.data.packing import pack_trajectories
from r2vpo_megatron.records import PackedBatch, Trajectory

if TYPE_CHECKING:
    from r2vpo_megatron.learner.megatron_actor import MegatronActor

RATIO_PENALTY = 0.04
PROMPT_SHARE = 8  # an eighth of a sequence is its prompt


@dataclass(frozen=True)
class LearnerCase:
    """A model, a layout and the sequences of one update."""

    name: str
    shape: Shape
    parallel: c.ParallelConfig
    lengths: tuple[int, ...]  # tokens of each sequence of the update
    architecture: str = "pangu"
    dtype: str = "float32"
    distributed: bool = True

    @property
    def config(self) -> c.RunConfig:
        """What the ranks run by."""
        return c.RunConfig(
            model=c.ModelConfig(path="unused", dtype=self.dtype),
            rollout=c.RolloutConfig(max_prompt_tokens=8, max_response_tokens=8),
            optimizer=c.OptimizerConfig(distributed=self.distributed),
            parallel=self.parallel,
            runtime=c.RuntimeConfig(device="cpu"),
        )

    def micro_batches(self) -> list[list[PackedBatch]]:
        """[data parallel rank][micro-batch] of the update."""
        return pack_trajectories(
            make_trajectories(self.lengths, self.shape.vocab),
            max_tokens_per_micro_batch=self.parallel.max_tokens_per_micro_batch,
            num_data_parallel_ranks=self.parallel.data,
            pad_to_multiple_of=self.parallel.tokens_multiple,
        )


def make_trajectories(lengths: Sequence[int], vocab: int) -> list[Trajectory]:
    """Random sequences; log-probs as of a model that is nearly uniform."""
    random = np.random.default_rng(0)
    trajectories = []
    for index, length in enumerate(lengths):
        num_prompt = max(1, length // PROMPT_SHARE)
        num_response = length - num_prompt
        prompt, response = (
            tuple(random.integers(0, vocab, count).tolist()) for count in (num_prompt, num_response)
        )
        logprobs = np.full(num_response, -math.log(vocab), dtype=np.float32)
        trajectories.append(
            Trajectory(
                sample_id=f"{index:05d}",
                group_id="group",
                prompt_token_ids=prompt,
                response_token_ids=response,
                behavior_logprobs=logprobs,
                rollout_logprobs=logprobs,
                reward=0.0,
                advantage=float(random.normal()),
                finish_reason="stop",
                policy_versions=np.zeros(num_response, dtype=np.int64),
                iteration=1,
            )
        )
    return trajectories


@contextmanager
def running_learner(
    rank: int, init_method: str, case: LearnerCase, model_dir: Path
) -> Iterator[tuple[MegatronActor, list[PackedBatch]]]:
    """A started rank and its micro-batches. Collective: every rank must enter and leave."""
    from r2vpo_megatron.learner.start import start_learner
    from r2vpo_megatron.parallel.state import destroy_parallel

    actor, state = start_learner(case.config, model_dir, rank, init_method)
    yield actor, case.micro_batches()[state.data_rank]
    destroy_parallel()


def import_megatron() -> None:
    """In the parent of the ranks, which are forked: one thread, and no device but the CPU."""
    import torch

    from r2vpo_megatron.device import get_platform

    torch.set_num_threads(1)  # OpenMP's do not survive the fork
    get_platform("cpu").prepare()
    import r2vpo_megatron.learner.megatron_actor  # noqa: F401
