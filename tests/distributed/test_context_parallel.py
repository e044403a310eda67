"""Context parallelism in the learner: sequences cut across ranks change nothing.

The pack holds a response that every rank has a part of, and one that a rank has nothing of.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from r2vpo_megatron.config import ParallelConfig
from r2vpo_megatron.data.packing import pack_trajectories
from r2vpo_megatron.parallel.state import destroy_parallel
from r2vpo_megatron.records import PackedBatch, Trajectory
from tests.distributed.learner_runs import (
    Case,
    copied_weights,
    make_trajectories,
    rank_batches,
    run_config,
    start_actor,
)
from tests.distributed.ranks import run_ranks
from tests.distributed.tiny_checkpoints import save_checkpoint

RATIO_PENALTY = 0.3
BUDGET = 40
LENGTHS = ((2, 34), (28, 2), (3, 9), (10, 14))  # (prompt, response) tokens
ADVANTAGES = (-1.2, 0.7, 1.1, -0.4)

LAYOUTS = {
    "cp2": ParallelConfig(context=2),
    "cp4": ParallelConfig(context=4, recompute="core_attn"),
    "tp2_cp2_sp": ParallelConfig(tensor=2, context=2, sequence_parallel=True, recompute="full"),
    "pp2_cp2": ParallelConfig(pipeline=2, context=2),
    "pp2_vpp2_cp2": ParallelConfig(pipeline=2, virtual_pipeline=2, context=2),
    "cp2_dp4_empty": ParallelConfig(context=2, data=4),
}
R2VPO = Case()
TOPR = Case(objective="topr", aggregation="sequence_mean")  # sums over whole responses
CASES = [(R2VPO, "cp2"), (R2VPO, "tp2_cp2_sp"), *((TOPR, layout) for layout in LAYOUTS)]


@dataclass(frozen=True)
class Outcome:
    """What one rank has to show."""

    logprobs: dict[str, np.ndarray]
    updates: list[dict[str, float]]
    weights: dict[str, Tensor]


def learn(
    rank: int,
    world_size: int,
    init_method: str,
    config: Any,
    model_dir: Path,
    trajectories: list[Trajectory],
    save_dir: Path | None,
) -> Outcome:
    """Log-probs, two updates on the same trajectories and the weights after them."""
    actor, state = start_actor(rank, world_size, init_method, config, model_dir)
    batches = rank_batches(trajectories, config.parallel, state)
    logprobs = actor.compute_logprobs(batches)
    updates = [actor.update(batches, RATIO_PENALTY, 1) for _ in range(2)]
    weights = copied_weights(actor)
    if save_dir is not None:
        actor.save_hf(save_dir)
    destroy_parallel()
    return Outcome(logprobs, updates, weights)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pangu-tied")
    save_checkpoint("pangu-tied", folder)
    return folder


@pytest.fixture(scope="module")
def trajectories(checkpoint: Path) -> list[Trajectory]:
    """Behaviour log-probs near the model's: a response's product of ratios is neither 0 nor 1."""
    drawn = make_trajectories(LENGTHS, 0, ADVANTAGES)
    (outcome,) = run_ranks(1, learn, run_config(ParallelConfig()), checkpoint, drawn, None)
    random = np.random.default_rng(1)
    near = []
    for trajectory in drawn:
        logprobs = outcome.logprobs[trajectory.sample_id]
        noise = random.normal(0.05, 0.2, len(logprobs)).astype(np.float32)
        near.append(replace(trajectory, behavior_logprobs=logprobs + noise))
    return near


@pytest.fixture(scope="module")
def on_one_rank(checkpoint: Path, trajectories: list[Trajectory]) -> Callable[[Case, str], Outcome]:
    @functools.cache
    def learn_on_one_rank(case: Case, dtype: str) -> Outcome:
        config = run_config(ParallelConfig(), case, token_budget=BUDGET, dtype=dtype)
        return run_ranks(1, learn, config, checkpoint, trajectories, None)[0]

    return learn_on_one_rank


def packed(trajectories: list[Trajectory], multiple: int) -> list[PackedBatch]:
    return pack_trajectories(
        trajectories,
        max_tokens_per_micro_batch=BUDGET,
        num_data_parallel_ranks=1,
        pad_to_multiple_of=multiple,
    )[0]


@pytest.mark.parametrize("context_size", [2, 4])
def test_the_ranks_micro_batches_are_parts_of_one(context_size: int) -> None:
    from r2vpo_megatron.learner.micro_batch import MicroBatch

    device = torch.device("cpu")
    response_tokens = []  # [micro-batch][rank]
    for batch in packed(make_trajectories(LENGTHS, 0, ADVANTAGES), 2 * context_size):
        whole = MicroBatch.of(batch, device)
        parts = [
            MicroBatch.of(
                batch,
                device,
                context_rank=rank,
                context_size=context_size,
                sum_over_context=torch.clone,  # of one rank alone; added up below
            )
            for rank in range(context_size)
        ]
        response_tokens.append([len(part.target_ids) for part in parts])
        assert {part.token_ids.shape[1] for part in parts} == {
            whole.token_ids.shape[1] // context_size
        }
        assert {part.response_lengths for part in parts} == {whole.response_lengths}
        assert sum(part.num_counted_responses for part in parts) == whole.num_counted_responses
        for part in parts:
            places = part.response_places
            # The token that predicts, and what it predicts, are those of the whole micro-batch.
            for name in ("token_ids", "position_ids"):
                torch.testing.assert_close(
                    getattr(part, name)[0, part.response_positions],
                    getattr(whole, name)[0, whole.response_positions[places]],
                )
            torch.testing.assert_close(part.target_ids, whole.target_ids[places])
            for name in ("behavior_logprobs", "advantages", "sequence_lengths", "sequence_ids"):
                torch.testing.assert_close(
                    getattr(part.tokens, name), getattr(whole.tokens, name)[places]
                )
        by_rank = [torch.cat(part.whole_responses(part.target_ids)) for part in parts]
        assert torch.equal(torch.stack(by_rank).sum(0), whole.target_ids)
    assert any(min(by_rank) > 1 for by_rank in response_tokens)  # a response cut across all
    assert any(0 in by_rank for by_rank in response_tokens)  # and a rank that has nothing


@pytest.mark.parametrize(
    ("case", "layout"),
    [pytest.param(case, layout, id=f"{case.objective}-{layout}") for case, layout in CASES],
)
def test_update_equals_one_ranks(
    case: Case,
    layout: str,
    checkpoint: Path,
    trajectories: list[Trajectory],
    on_one_rank: Callable[[Case, str], Outcome],
    tmp_path: Path,
) -> None:
    expected = on_one_rank(case, "float32")
    config = run_config(LAYOUTS[layout], case, token_budget=BUDGET)
    outcomes = run_ranks(
        config.parallel.num_ranks, learn, config, checkpoint, trajectories, tmp_path / "saved"
    )

    # Whole responses, each on one rank of its data parallel rank.
    ids = [sample_id for outcome in outcomes for sample_id in outcome.logprobs]
    assert sorted(ids) == sorted(expected.logprobs)
    for outcome in outcomes:
        for sample_id, logprobs in outcome.logprobs.items():
            np.testing.assert_allclose(logprobs, expected.logprobs[sample_id], atol=2e-6)
        assert outcome.updates == outcomes[0].updates
    for update, wanted in zip(outcomes[0].updates, expected.updates, strict=True):
        assert update == pytest.approx(wanted, rel=5e-6, abs=1e-6)
    assert all(not outcome.weights for outcome in outcomes[1:])
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert outcomes[0].weights.keys() == expected.weights.keys() == saved.keys()
    for name, weight in expected.weights.items():
        torch.testing.assert_close(outcomes[0].weights[name], weight, rtol=0, atol=1e-6, msg=name)
        assert torch.equal(saved[name], outcomes[0].weights[name])


def test_bf16_gradients_of_keys_are_summed_over_the_ranks(
    checkpoint: Path,
    trajectories: list[Trajectory],
    on_one_rank: Callable[[Case, str], Outcome],
) -> None:
    expected = on_one_rank(R2VPO, "bfloat16")
    config = run_config(LAYOUTS["cp2"], R2VPO, token_budget=BUDGET, dtype="bfloat16")
    outcomes = run_ranks(2, learn, config, checkpoint, trajectories, None)
    for update, wanted in zip(outcomes[0].updates, expected.updates, strict=True):
        for name in ("optimizer/gradient_norm", "ratio/second_moment", "policy/entropy"):
            assert update[name] == pytest.approx(wanted[name], rel=2e-2), name
