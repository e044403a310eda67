"""The harness reports what goes wrong in a rank, and ends them all."""

from __future__ import annotations

import os
import time

import pytest

from r2vpo_megatron.device import get_platform
from r2vpo_megatron.parallel.state import (
    destroy_parallel,
    initialize_parallel,
    validate_parallel_sizes,
)
from tests.distributed.ranks import run_ranks


def _behave(rank: int, world_size: int, init_method: str, how: str) -> int:
    if rank == 1 and how == "raise":
        raise KeyError("culprit")
    if rank == 1 and how == "die":
        os._exit(3)
    if how != "return":
        time.sleep(60)
    return rank * 10 + world_size


def test_results_come_by_rank() -> None:
    assert run_ranks(3, _behave, "return") == [3, 13, 23]


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("raise", RuntimeError, r"rank 1 raised:\n(.*\n)*.*KeyError: 'culprit'"),
        ("die", RuntimeError, "rank 1 died without a result, exit code 3"),
        ("hang", TimeoutError, r"ranks \[0, 1\] did not finish in 0.5 s"),
    ],
)
def test_a_bad_rank_is_reported_at_once_and_all_end(
    how: str, error: type[Exception], message: str
) -> None:
    start = time.monotonic()
    with pytest.raises(error, match=message):
        run_ranks(2, _behave, how, timeout_seconds=0.5 if how == "hang" else 50)
    assert time.monotonic() - start < 20


def _grid(rank: int, world_size: int, init_method: str) -> tuple[object, ...]:
    state = initialize_parallel(
        get_platform("cpu"),
        rank=rank,
        world_size=world_size,
        tensor=2,
        pipeline=2,
        init_method=init_method,
    )
    groups = (state.tensor_group, state.pipeline_group, state.data_group, state.model_group)
    import torch.distributed as dist

    members = [dist.get_process_group_ranks(group) for group in groups]
    ranks = (state.tensor_rank, state.pipeline_rank, state.data_rank)
    destroy_parallel()
    return ranks, members, state.is_first_stage, state.is_last_stage, state.is_writer


def test_eight_ranks_make_two_replicas_of_two_stages_of_two() -> None:
    outcomes = run_ranks(8, _grid)
    # tensor fastest, then data, then pipeline
    assert outcomes[0] == ((0, 0, 0), [[0, 1], [0, 4], [0, 2], [0, 1, 4, 5]], True, False, True)
    assert outcomes[7] == ((1, 1, 1), [[6, 7], [3, 7], [5, 7], [2, 3, 6, 7]], False, True, False)


@pytest.mark.parametrize(
    ("world_size", "sizes", "message"),
    [
        (4, {"tensor": 0, "pipeline": 1}, "tensor = 0: must be at least 1"),
        (4, {"tensor": 3, "pipeline": 1}, "world_size = 4: must be a multiple .* = 3 x 1 x 1 = 3"),
        (4, {"tensor": 1, "pipeline": 1, "context": 3}, "must be a multiple .* = 1 x 1 x 3 = 3"),
        (2, {"tensor": 1, "pipeline": 1, "virtual_pipeline": 2}, "virtual_pipeline = 2 with pipel"),
        (2, {"tensor": 1, "pipeline": 2, "virtual_pipeline": 1}, "virtual_pipeline = 1: must be"),
    ],
)
def test_sizes_that_make_no_grid_are_refused(
    world_size: int, sizes: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        validate_parallel_sizes(world_size, **sizes)
