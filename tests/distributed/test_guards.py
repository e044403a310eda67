"""Updates with something that is not finite: no rank changes, and the guilty are named."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from r2vpo_megatron.config import ParallelConfig, RunConfig
from r2vpo_megatron.learner.non_finite import NonFiniteUpdate
from r2vpo_megatron.parallel.state import destroy_parallel
from r2vpo_megatron.records import Trajectory
from tests.distributed.learner_runs import (
    RATIO_PENALTY,
    copied_weights,
    make_trajectories,
    rank_batches,
    run_config,
    start_actor,
)
from tests.distributed.ranks import run_ranks
from tests.distributed.tiny_checkpoints import save_checkpoint

SOUND = make_trajectories([(3 + i, 2 + 3 * i) for i in range(6)], seed=0)
LAYOUTS = {
    "tp2": ParallelConfig(tensor=2),
    "pp2": ParallelConfig(pipeline=2),
    "cp2": ParallelConfig(context=2),
    "dp2": ParallelConfig(data=2),
}


def with_logprob(value: float, place: int) -> Callable[[Trajectory], Trajectory]:
    def change(sample: Trajectory) -> Trajectory:
        logprobs = sample.behavior_logprobs.copy()
        logprobs[place] = value
        return replace(sample, behavior_logprobs=logprobs)

    return change


POISONS: dict[str, Callable[[Trajectory], Trajectory]] = {
    "advantage": lambda sample: replace(sample, advantage=math.nan),
    "infinite advantage": lambda sample: replace(sample, advantage=-math.inf),
    "first log-prob": with_logprob(math.nan, 0),
    "last log-prob": with_logprob(-math.inf, -1),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_checkpoint("pangu-untied", folder)
    return folder


Seen = tuple[list[tuple[str, tuple[str, ...]]], bool, dict[str, Tensor], dict[str, float]]


def poisoned_updates(
    rank: int, world_size: int, init_method: str, config: RunConfig, folder: Path
) -> Seen:
    """What each poison led to, whether weights stayed, and what a sound update then makes."""
    actor, state = start_actor(rank, world_size, init_method, config, folder)

    def update(samples: list[Trajectory]) -> dict[str, float]:
        batches = rank_batches(samples, config.parallel, state)
        metrics: dict[str, float] = actor.update(batches, RATIO_PENALTY, 0)
        return metrics

    update(SOUND)  # Adam has moments, and the rate is warming up
    before, refusals = copied_weights(actor), []
    for poison in [*POISONS.values(), None]:
        samples = [poison(s) if poison and i in (1, 4) else s for i, s in enumerate(SOUND)]
        if poison is None:  # finite statistics, infinite gradient
            samples = [replace(sample, advantage=1e30) for sample in SOUND]
        with pytest.raises(NonFiniteUpdate) as caught:
            update(samples)
        refusals.append((caught.value.reason, caught.value.sample_ids))
    stayed = all(torch.equal(before[n], after) for n, after in copied_weights(actor).items())
    metrics = update(SOUND)
    weights = copied_weights(actor)
    destroy_parallel()
    return refusals, stayed, weights, metrics


def sound_updates(
    rank: int, world_size: int, init_method: str, config: RunConfig, folder: Path
) -> tuple[dict[str, Tensor], dict[str, float]]:
    actor, state = start_actor(rank, world_size, init_method, config, folder)
    batches = rank_batches(SOUND, config.parallel, state)
    metrics = [actor.update(batches, RATIO_PENALTY, 0) for _ in range(2)]
    weights = copied_weights(actor)
    destroy_parallel()
    return weights, metrics[-1]


@pytest.mark.parametrize("parallel", LAYOUTS.values(), ids=LAYOUTS)
def test_a_refused_update_leaves_no_trace_on_any_rank(
    parallel: ParallelConfig, folder: Path
) -> None:
    config = run_config(parallel)
    # A refused update that counted all the same would show in the rate of the next.
    config = replace(config, optimizer=replace(config.optimizer, warmup_updates=20))
    poisoned: list[Seen] = run_ranks(2, poisoned_updates, config, folder)
    sound: list[Any] = run_ranks(2, sound_updates, config, folder)
    guilty = (SOUND[1].sample_id, SOUND[4].sample_id)
    for (refusals, stayed, weights, metrics), (expected, expected_metrics) in zip(
        poisoned, sound, strict=True
    ):
        assert stayed
        *by_sample, (reason, suspects) = refusals
        assert by_sample == [("log-probs, advantages or loss are not finite", guilty)] * 4
        assert "gradient norm is not finite" in reason
        assert suspects == tuple(sample.sample_id for sample in SOUND)
        assert weights.keys() == expected.keys()
        assert [n for n in weights if not torch.equal(weights[n], expected[n])] == []
        assert metrics == expected_metrics


def odd_batches(
    rank: int, world_size: int, init_method: str, config: RunConfig, folder: Path
) -> tuple[list[dict[str, float]], dict[str, Any]]:
    """An update and log-probs of batches that have an empty response, or nothing but those."""
    actor, state = start_actor(rank, world_size, init_method, config, folder)
    metrics = []
    for samples in ([SOUND[0], EMPTY, SOUND[3]], [EMPTY], [SOUND[0], SOUND[3]]):
        metrics.append(actor.update(rank_batches(samples, config.parallel, state), 0.0, 0))
    batches = rank_batches([EMPTY, SOUND[3]], config.parallel, state)
    logprobs = actor.compute_logprobs(batches)
    destroy_parallel()
    return metrics, logprobs


EMPTY = replace(
    SOUND[2],
    response_token_ids=(),
    behavior_logprobs=np.zeros(0, np.float32),
    rollout_logprobs=np.zeros(0, np.float32),
    policy_versions=np.zeros(0, np.int64),
)


def test_an_empty_response_is_no_token_and_no_fault(folder: Path) -> None:
    config = run_config(ParallelConfig(tensor=2))
    config = replace(config, optimizer=replace(config.optimizer, lr=0.0))
    for metrics, logprobs in run_ranks(2, odd_batches, config, folder):
        with_empty, alone, without = metrics
        assert with_empty["ratio/tokens"] == without["ratio/tokens"] == 2 + 11
        assert with_empty["ratio/second_moment"] == without["ratio/second_moment"]
        assert with_empty["optimizer/gradient_norm"] == without["optimizer/gradient_norm"] > 0
        assert alone["ratio/tokens"] == 0 and alone["optimizer/gradient_norm"] == 0
        if logprobs:
            assert {name: len(values) for name, values in logprobs.items()} == {
                EMPTY.sample_id: 0,
                SOUND[3].sample_id: 11,
            }
