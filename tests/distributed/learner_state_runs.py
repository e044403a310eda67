"""Runs of the learner that are saved, and runs that go on from there, at any layout."""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from r2vpo_megatron.checkpoint.torch_dist import TorchDistReader
from r2vpo_megatron.config import ParallelConfig, RunConfig
from r2vpo_megatron.device import get_platform
from r2vpo_megatron.parallel.state import ParallelState, destroy_parallel
from r2vpo_megatron.records import Trajectory
from tests.distributed.learner_runs import (
    RATIO_PENALTY,
    copied_weights,
    rank_batches,
    run_config,
    start_actor,
)
from tests.distributed.ranks import run_ranks
from tests.distributed.reference_update import POLICY_VERSION
from tests.distributed.tiny_checkpoints import VOCAB_SIZE
from tests.distributed.update_problem import make_mini_batches, save_well_conditioned

VOCABULARY = "embedding.word_embeddings.weight", "output_layer.weight"
SLOW = pytest.mark.slow


@dataclass(frozen=True)
class Layout:
    parallel: ParallelConfig
    distributed: bool = True  # the optimizer
    dtype: str = "float32"
    checkpoint: str = "pangu-untied"

    @property
    def config(self) -> RunConfig:
        return run_config(self.parallel, distributed=self.distributed, dtype=self.dtype)


ONE = Layout(ParallelConfig())
TP2 = Layout(ParallelConfig(tensor=2))
TP2_SP = Layout(ParallelConfig(tensor=2, sequence_parallel=True))
TP4 = Layout(ParallelConfig(tensor=4))
PP2 = Layout(ParallelConfig(pipeline=2))
PP2_VPP2 = Layout(ParallelConfig(pipeline=2, virtual_pipeline=2))
TP2_PP2 = Layout(ParallelConfig(tensor=2, pipeline=2))
DP2 = Layout(ParallelConfig(data=2))
DP3 = Layout(ParallelConfig(data=3))
CP2_DP2 = Layout(ParallelConfig(context=2, data=2))
TP2_DP2 = Layout(ParallelConfig(tensor=2, data=2))


def tied(layout: Layout) -> Layout:
    return replace(layout, checkpoint="pangu-tied")


def replicated(layout: Layout) -> Layout:
    return replace(layout, distributed=False)


def bf16(layout: Layout) -> Layout:
    return replace(layout, dtype="bfloat16")


@dataclass(frozen=True)
class Problem:
    folder: Path  # of the Hugging Face checkpoint
    mini_batches: list[list[Trajectory]]


@dataclass(frozen=True)
class Learned:
    """Of one rank: after the load or the second update, and after the third."""

    weights: list[dict[str, Tensor]]  # the whole model on rank 0, empty elsewhere
    pieces: dict[tuple[str, tuple[int, ...]], Tensor]  # all that was trained, at the end
    metrics: dict[str, float]
    drawn: list[float]  # after the load or the save


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Problem]:
    @cache
    def make(variant: str) -> Problem:
        folder = tmp_path_factory.mktemp(variant)
        return Problem(folder, make_mini_batches(save_well_conditioned(variant, folder)))

    return make


@pytest.fixture(scope="module")
def saved(
    tmp_path_factory: pytest.TempPathFactory, problems: Callable[[str], Problem]
) -> Callable[[Layout], tuple[Path, list[Learned]]]:
    """The folder that a run at a layout saved, and what its ranks learned without interruption."""

    @cache
    def make(layout: Layout) -> tuple[Path, list[Learned]]:
        folder = tmp_path_factory.mktemp("saved")
        problem = problems(layout.checkpoint)
        return folder, run_ranks(layout.parallel.num_ranks, train, layout, problem, folder)

    return make


def learner_state(actor: Any, state: ParallelState) -> Any:
    from r2vpo_megatron.learner.run_state import LearnerState

    return LearnerState(actor._model, state, get_platform("cpu"))


def start(
    rank: int, world_size: int, init_method: str, layout: Layout, problem: Problem
) -> tuple[Any, ParallelState, Any]:
    actor, state = start_actor(rank, world_size, init_method, layout.config, problem.folder)
    return actor, state, learner_state(actor, state)


def update(
    actor: Any, state: ParallelState, layout: Layout, mini_batch: Sequence[Trajectory]
) -> dict[str, float]:
    batches = rank_batches(mini_batch, layout.config.parallel, state)
    metrics: dict[str, float] = actor.update(batches, RATIO_PENALTY, POLICY_VERSION)
    return metrics


def trained_pieces(saver: Any) -> dict[tuple[str, tuple[int, ...]], Tensor]:
    """Views of all that this rank's updates change."""
    from r2vpo_megatron.learner.run_state import _adam_moments

    pieces = saver._pieces(_adam_moments(saver._optimizers))
    return {(piece.key, piece.offsets): piece.values for piece in pieces}


def cloned(tensors: dict[Any, Tensor]) -> dict[Any, Tensor]:
    return {key: tensor.clone() for key, tensor in tensors.items()}


def seed_generators(seed: int) -> None:
    """Each on its own way."""
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    with get_cuda_rng_tracker().fork():
        torch.rand(seed)


def draw() -> list[float]:
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    with get_cuda_rng_tracker().fork():
        tracked = torch.rand(1).item()
    return [random.random(), float(np.random.normal()), torch.rand(1).item(), tracked]


@contextmanager
def writing_held_back() -> Iterator[threading.Event]:
    """No file is written before the event is set."""
    from r2vpo_megatron.learner import run_state

    write, let_go = run_state._write, threading.Event()

    def write_later(*args: Any) -> Any:
        assert let_go.wait(timeout=60.0)
        return write(*args)

    with mock.patch.object(run_state, "_write", write_later):
        yield let_go


def train(
    rank: int, world_size: int, init_method: str, layout: Layout, problem: Problem, folder: Path
) -> Learned:
    """Three updates; the state after two is saved, in a file that is written after the third."""
    actor, state, saver = start(rank, world_size, init_method, layout, problem)
    for mini_batch in problem.mini_batches[:2]:
        update(actor, state, layout, mini_batch)
    weights = copied_weights(actor)
    seed_generators(100 + rank)
    with writing_held_back() as let_go:
        saver.begin_save(folder, {"num_updates": 2})
        drawn = draw()
        metrics = update(actor, state, layout, problem.mini_batches[2])
        assert not saver.is_saved()
        let_go.set()
        saver.finish_save()
    assert saver.is_saved()
    learned = Learned(
        [weights, copied_weights(actor)], cloned(trained_pieces(saver)), metrics, drawn
    )
    destroy_parallel()
    return learned


def go_on(
    rank: int,
    world_size: int,
    init_method: str,
    layout: Layout,
    problem: Problem,
    folder: Path,
    saved_again: Path,
) -> Learned:
    """Load, save again, and make the third update."""
    actor, state, saver = start(rank, world_size, init_method, layout, problem)
    for values in trained_pieces(saver).values():
        values.fill_(math.nan)  # what is not loaded must show
    counters = saver.load(folder)
    assert counters == {"num_updates": 2}
    actor._num_updates = counters["num_updates"]
    weights, drawn = copied_weights(actor), draw()
    saver.begin_save(saved_again, counters)
    saver.finish_save()
    metrics = update(actor, state, layout, problem.mini_batches[2])
    learned = Learned(
        [weights, copied_weights(actor)], cloned(trained_pieces(saver)), metrics, drawn
    )
    destroy_parallel()
    return learned


def assert_equal_bits(tensors: dict[Any, Tensor], expected: dict[Any, Tensor]) -> None:
    assert tensors.keys() == expected.keys()
    differing = [key for key, tensor in tensors.items() if not torch.equal(tensor, expected[key])]
    assert not differing


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    """All of a checkpoint, without the padding of the vocabulary."""
    with TorchDistReader(folder) as reader:
        whole = {
            key: reader.read(key, [(0, size) for size in tensor.shape])
            for key, tensor in reader.tensors.items()
        }
    return {
        key: tensor[:VOCAB_SIZE] if key.endswith(VOCABULARY) else tensor
        for key, tensor in whole.items()
    }
