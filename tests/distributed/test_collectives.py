"""Each collective is called by every rank of its group, whatever data the rank has."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from r2vpo_megatron.config import ParallelConfig, RunConfig
from r2vpo_megatron.parallel.state import destroy_parallel
from tests.distributed.collective_log import (
    CollectiveLog,
    Ranks,
    RecordCollectives,
    disagreements,
)
from tests.distributed.learner_runs import (
    RATIO_PENALTY,
    Case,
    make_trajectories,
    rank_batches,
    run_config,
    start_actor,
)
from tests.distributed.ranks import run_ranks
from tests.distributed.tiny_checkpoints import save_checkpoint

LAYOUTS = {
    "tp2_sp_dp3": ParallelConfig(tensor=2, sequence_parallel=True, data=3),
    "pp2_dp3": ParallelConfig(pipeline=2, data=3),
    "cp2_dp3": ParallelConfig(context=2, data=3, recompute="full"),
}
# TOPR sums over whole responses, which context parallel ranks share. The second response is so
# short that one of two context ranks has none of it.
CASE = Case("topr", "sequence_mean")
LENGTHS = ((7, 16), (10, 1))


def work_while_recording(
    rank: int, world_size: int, init_method: str, config: RunConfig, model_dir: Path
) -> tuple[int, CollectiveLog]:
    """Number of this rank's samples, and its calls during all that a learner rank does."""
    actor, state = start_actor(rank, world_size, init_method, config, model_dir)
    batches = rank_batches(make_trajectories(LENGTHS, seed=0), config.parallel, state)
    with RecordCollectives() as recorder:
        actor.compute_logprobs(batches)
        actor.update(batches, RATIO_PENALTY, policy_version=1)
        for _ in actor.hf_weights():
            pass
    destroy_parallel()
    return sum(len(batch.sample_ids) for batch in batches), recorder.log


def between_stages(pair: tuple[int, int], parallel: ParallelConfig) -> bool:
    """Ranks of one tensor-parallel group have messages too, when weights are exported."""
    sender, receiver = (rank // parallel.tensor for rank in pair)
    return sender != receiver


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_of_a_group_make_the_same_calls(layout: str, tmp_path: Path) -> None:
    parallel = LAYOUTS[layout]
    save_checkpoint("pangu-untied", tmp_path)
    results = run_ranks(
        parallel.num_ranks, work_while_recording, run_config(parallel, CASE), tmp_path
    )
    samples, logs = zip(*results, strict=True)
    assert sorted(set(samples)) == [0, 1]  # some ranks have nothing to do
    assert list(disagreements(logs)) == []

    everyone: Ranks = tuple(range(parallel.num_ranks))
    for log in logs:
        assert log.collectives[everyone]
        sizes = {len(ranks) for ranks in log.collectives}
        assert sizes >= {2, parallel.num_ranks}  # the model's groups as well as the whole
        for messages in (log.sent, log.received):
            assert any(between_stages(pair, parallel) for pair in messages) == (
                parallel.pipeline > 1
            )


GATHER = ("allgather_", ((3,), torch.float32))
REDUCE = ("allreduce_", ((3,), torch.float32))
LONGER = ("allreduce_", ((4,), torch.float32))


@pytest.mark.parametrize(
    "calls",
    [[GATHER], [], [REDUCE, GATHER], [GATHER, LONGER]],
    ids=["one less", "none", "other order", "other shape"],
)
def test_a_rank_out_of_step_is_found(calls: list[tuple[object, ...]]) -> None:
    in_step = CollectiveLog({(0, 1): [GATHER, REDUCE]})
    assert list(disagreements([in_step, in_step])) == []
    out_of_step = CollectiveLog({(0, 1): calls} if calls else {})
    (first, *_) = disagreements([in_step, out_of_step])
    assert "rank 1" in first
    assert list(disagreements([out_of_step, in_step]))


def test_a_message_that_nobody_receives_is_found() -> None:
    message = [((3,), torch.float32)]
    sender = CollectiveLog(sent={(0, 1): [message]})
    assert list(disagreements([sender, CollectiveLog(received={(0, 1): [message]})])) == []
    assert list(disagreements([sender, CollectiveLog()]))
    assert list(
        disagreements([CollectiveLog(sent={}), CollectiveLog(received={(0, 1): [message]})])
    )
