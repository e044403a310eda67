"""Where this process stands in the grid of ranks, as one frozen value with explicit groups."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from r2vpo_megatron.device.base import Platform

ProcessGroup = dist.ProcessGroup


@dataclass(frozen=True)
class ParallelState:
    """Ranks, sizes and process groups of one learner process.

    Ranks are laid out as Megatron does: tensor fastest, then context, data, pipeline.
    """

    rank: int
    world_size: int
    device: torch.device

    tensor_rank: int
    tensor_size: int
    tensor_group: ProcessGroup
    pipeline_rank: int
    pipeline_size: int
    pipeline_group: ProcessGroup
    context_rank: int
    context_size: int
    context_group: ProcessGroup
    data_rank: int
    data_size: int
    data_group: ProcessGroup

    data_context_group: ProcessGroup  # data x context: over which losses and counts are summed
    model_group: ProcessGroup  # tensor x pipeline: one replica of the model
    embedding_group: ProcessGroup | None  # first and last stage; None on the stages between
    virtual_pipeline_size: int | None = None
    pipeline_layout: str = ""  # layers of each model chunk, see models/pipeline.py; empty: even

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank holds the embedding."""
        return self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the final norm and the LM head."""
        return self.pipeline_rank == self.pipeline_size - 1

    @property
    def is_writer(self) -> bool:
        """Whether this is the one rank that writes files and gets whole tensors."""
        return self.rank == 0


def validate_parallel_sizes(
    world_size: int,
    *,
    tensor: int,
    pipeline: int,
    context: int = 1,
    virtual_pipeline: int | None = None,
) -> None:
    """Check that a grid of these sizes exists.

    Raises:
        ValueError: naming the field, its value and what is valid.
    """
    sizes = {"tensor": tensor, "pipeline": pipeline, "context": context}
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} = {size}: must be at least 1")
    replica = tensor * pipeline * context
    if world_size < 1 or world_size % replica:
        raise ValueError(
            f"world_size = {world_size}: must be a multiple of tensor x pipeline x context = "
            f"{tensor} x {pipeline} x {context} = {replica}"
        )
    if virtual_pipeline is None:
        return
    if virtual_pipeline < 2:
        raise ValueError(f"virtual_pipeline = {virtual_pipeline}: must be at least 2, or None")
    if pipeline < 2:
        raise ValueError(
            f"virtual_pipeline = {virtual_pipeline} with pipeline = {pipeline}: model chunks are "
            "interleaved between at least 2 stages; set virtual_pipeline to None"
        )


def initialize_parallel(
    platform: Platform,
    *,
    rank: int,
    world_size: int,
    tensor: int = 1,
    pipeline: int = 1,
    context: int = 1,
    init_method: str,
    timeout_seconds: float = 600.0,
    virtual_pipeline: int | None = None,
    pipeline_layout: str = "",
    local_rank: int | None = None,
    seed: int = 0,
) -> ParallelState:
    """Join the process group and cut it into tensor, pipeline, context and data groups.

    Collective: every one of the `world_size` processes must call, with equal sizes.

    Args:
        platform: gives the collective back end and the device; prepared here if it is not yet.
        rank: 0..world_size-1.
        world_size: all learner processes; data parallelism gets what the sizes leave.
        tensor: tensor-parallel size.
        pipeline: pipeline stages.
        context: context-parallel size.
        init_method: tcp://host:port or file:///path, the same on every rank.
        timeout_seconds: after which a collective that hangs raises.
        virtual_pipeline: model chunks per stage, None for one.
        pipeline_layout: layers of each model chunk, such as "9,8,8,9"; empty for an even split.
            Whether it fits is known when the model is built.
        local_rank: rank on this node; None reads LOCAL_RANK, else takes 0.
        seed: of torch's and Megatron's generators; nothing here draws from them but dropout.

    Raises:
        ValueError: sizes that do not fit, or a rank outside the world.
    """
    validate_parallel_sizes(
        world_size,
        tensor=tensor,
        pipeline=pipeline,
        context=context,
        virtual_pipeline=virtual_pipeline,
    )
    if not 0 <= rank < world_size:
        raise ValueError(f"rank = {rank}: must be in 0..{world_size - 1}")
    platform.prepare()
    if local_rank is None:
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = platform.torch_device(local_rank)
    dist.init_process_group(
        platform.collective_backend,
        init_method=init_method,
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_seconds),
    )
    _initialize_megatron(tensor, pipeline, context, virtual_pipeline, timeout_seconds)
    _seed(platform, seed)
    return _state_from_megatron(rank, world_size, device, virtual_pipeline, pipeline_layout)


def _initialize_megatron(
    tensor: int,
    pipeline: int,
    context: int,
    virtual_pipeline: int | None,
    timeout_seconds: float,
) -> None:
    from megatron.core import parallel_state as mpu

    mpu.initialize_model_parallel(
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        virtual_pipeline_model_parallel_size=virtual_pipeline,
        context_parallel_size=context,
        distributed_timeout_minutes=max(1, math.ceil(timeout_seconds / 60)),
    )


def _seed(platform: Platform, seed: int) -> None:
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    platform.seed(seed)
    # Sequence parallelism forks Megatron's own generators even where there is no dropout.
    model_parallel_cuda_manual_seed(seed)


def _state_from_megatron(
    rank: int,
    world_size: int,
    device: torch.device,
    virtual_pipeline: int | None,
    pipeline_layout: str,
) -> ParallelState:
    from megatron.core import parallel_state as mpu

    return ParallelState(
        rank=rank,
        world_size=world_size,
        device=device,
        tensor_rank=mpu.get_tensor_model_parallel_rank(),
        tensor_size=mpu.get_tensor_model_parallel_world_size(),
        tensor_group=mpu.get_tensor_model_parallel_group(),
        pipeline_rank=mpu.get_pipeline_model_parallel_rank(),
        pipeline_size=mpu.get_pipeline_model_parallel_world_size(),
        pipeline_group=mpu.get_pipeline_model_parallel_group(),
        context_rank=mpu.get_context_parallel_rank(),
        context_size=mpu.get_context_parallel_world_size(),
        context_group=mpu.get_context_parallel_group(),
        data_rank=mpu.get_data_parallel_rank(),
        data_size=mpu.get_data_parallel_world_size(),
        data_group=mpu.get_data_parallel_group(),
        data_context_group=mpu.get_data_parallel_group(with_context_parallel=True),
        model_group=mpu.get_model_parallel_group(),
        embedding_group=mpu.get_embedding_group(check_initialized=False),
        virtual_pipeline_size=virtual_pipeline,
        pipeline_layout=pipeline_layout,
    )


def destroy_parallel() -> None:
    """Leave the groups. Collective: every rank must call; harmless when nothing was joined."""
    if not dist.is_initialized():
        return
    from megatron.core import parallel_state as mpu

    mpu.destroy_model_parallel()
    dist.destroy_process_group()
