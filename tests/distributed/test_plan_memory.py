"""The plan's memory against real ranks: sizes of Megatron's buffers, and peaks of updates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks._learner_cases import LearnerCase, running_learner
from benchmarks._learner_peaks import measure_peaks, modelled_peak
from benchmarks._shapes import Shape
from benchmarks.plan_memory import TOLERANCE, make_cases
from r2vpo_megatron.config import ParallelConfig
from r2vpo_megatron.models.spec import read_model_spec
from r2vpo_megatron.planning.parameters import stage_parameters, total_parameters
from tests.distributed.ranks import run_ranks
from tests.random_checkpoints import make_hf_folder

SMALL = Shape(128, 4, 4, 2, 512, 4096, 32)


def assert_peaks_agree(case: LearnerCase, folder: Path) -> None:
    for rank, peak in enumerate(measure_peaks(case, folder, resident=False)):
        modelled = modelled_peak(case, folder / "model", rank)
        error = modelled.tensor_bytes / peak.tensor_bytes - 1
        assert abs(error) <= TOLERANCE, (case.name, rank, modelled, peak.tensor_bytes)


def test_peak_of_tensor_parallel_ranks(tmp_path: Path) -> None:
    parallel = ParallelConfig(tensor=2, sequence_parallel=True, max_tokens_per_micro_batch=1024)
    assert_peaks_agree(LearnerCase("TP2", SMALL, parallel, (256,) * 4), tmp_path)


def test_peak_of_an_uneven_pipeline_with_recomputation_in_bf16(tmp_path: Path) -> None:
    parallel = ParallelConfig(
        pipeline=2, pipeline_layout="3,1", recompute="mlp", max_tokens_per_micro_batch=512
    )
    case = LearnerCase("PP2", SMALL, parallel, (256,) * 8, dtype="bfloat16")
    assert_peaks_agree(case, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", make_cases(), ids=lambda case: case.name)
def test_peaks_of_the_benchmark(case: LearnerCase, tmp_path: Path) -> None:
    assert_peaks_agree(case, tmp_path)


def _held(
    rank: int, world_size: int, init_method: str, case: LearnerCase, model_dir: Path
) -> dict[str, Any]:
    with running_learner(rank, init_method, case, model_dir) as (actor, batches):
        actor.update(batches, 0.04, policy_version=0)
        chunks, optimizer = actor._model.chunks, actor._model.optimizer
        states = [
            value
            for one in getattr(optimizer, "chained_optimizers", [optimizer])
            for state in one.optimizer.state.values()
            for name, value in state.items()
            if name in ("exp_avg", "exp_avg_sq")
        ]
        return {
            "parameters": sum(p.numel() for chunk in chunks for p in chunk.parameters()),
            "buffers": sum(buffer.numel for chunk in chunks for buffer in chunk.buffers),
            "moments": sum(state.numel() for state in states),
        }


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "sizes",
    [
        {"tensor": 2, "data": 2},
        {"pipeline": 2, "pipeline_layout": "3,1", "data": 2},
        {"pipeline": 2, "virtual_pipeline": 2},
        {"tensor": 3, "context": 2},
    ],
    ids=lambda sizes: "-".join(f"{name[:2]}{size}" for name, size in sizes.items()),
)
def test_parameters_and_buffers_are_megatrons(
    sizes: dict[str, Any], tied: bool, tmp_path: Path
) -> None:
    make_hf_folder(tmp_path / "model", "pangu" if tied else "qwen2", tied=tied)
    parallel = ParallelConfig(max_tokens_per_micro_batch=48, **sizes)
    # Of the shape only the vocabulary counts here: of the tokens that are made up.
    case = LearnerCase("small", Shape(24, 4, 24, 12, 36, 200, 2), parallel, (16,) * 8)
    held = run_ranks(parallel.num_ranks, _held, case, tmp_path / "model")
    stages = stage_parameters(read_model_spec(tmp_path / "model"), parallel)
    shards = parallel.data * parallel.context
    ranks_of_stage = parallel.num_ranks // parallel.pipeline
    for rank, found in enumerate(held):
        chunks = stages[rank // ranks_of_stage]
        assert found["parameters"] == total_parameters(chunks)
        assert found["buffers"] == sum(chunk.buffer_elements(shards) for chunk in chunks)
    for stage, chunks in enumerate(stages):
        # Padding between parameters has no moments; all shards together have one of each.
        ranks = held[stage * ranks_of_stage : (stage + 1) * ranks_of_stage : parallel.tensor]
        assert sum(found["moments"] for found in ranks) == 2 * total_parameters(chunks)
