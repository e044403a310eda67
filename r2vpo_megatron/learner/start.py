"""Join the learner's process group and build one rank of it, in the one order that works."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from r2vpo_megatron.config import RunConfig
from r2vpo_megatron.device import get_platform

if TYPE_CHECKING:
    from r2vpo_megatron.learner.megatron_actor import MegatronActor
    from r2vpo_megatron.parallel.state import ParallelState


def start_learner(
    config: RunConfig, model_dir: Path, rank: int, init_method: str
) -> tuple[MegatronActor, ParallelState]:
    """Prepare the platform `runtime.device`, join the other ranks, load the model.

    Collective: every rank must call. `r2vpo_megatron.parallel.state.destroy_parallel` ends it.

    Args:
        config: of the run.
        model_dir: the Hugging Face checkpoint to start from.
        rank: 0..parallel.num_ranks-1.
        init_method: tcp://host:port or file:///path, the same on every rank.
    """
    parallel, runtime = config.parallel, config.runtime
    platform = get_platform(runtime.device)
    platform.prepare()  # before Megatron is imported
    torch.set_num_threads(parallel.threads_per_rank)

    from r2vpo_megatron.learner.megatron_actor import MegatronActor
    from r2vpo_megatron.parallel.state import initialize_parallel

    state = initialize_parallel(
        platform,
        rank=rank,
        world_size=parallel.num_ranks,
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        context=parallel.context,
        virtual_pipeline=parallel.interleaved_chunks,
        pipeline_layout=parallel.pipeline_layout,
        init_method=init_method,
        local_rank=0,  # Ray shows each worker its own devices alone
        timeout_seconds=runtime.timeout_seconds,
        seed=config.train.seed,
    )
    return MegatronActor(config, model_dir, state, platform), state
