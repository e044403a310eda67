"""The learner's rank: the gate at step 0, and the same update whatever the layout.

Every layout takes two updates on the same trajectories from the same checkpoint. Log-probs,
statistics, gradient norm and the weights afterwards must be those of one rank.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from r2vpo_megatron.config import (
    AlgorithmConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
)
from r2vpo_megatron.data.packing import pack_trajectories
from r2vpo_megatron.device import get_platform
from r2vpo_megatron.parallel.state import (
    ParallelState,
    destroy_parallel,
    initialize_parallel,
)
from r2vpo_megatron.records import Trajectory
from tests.distributed.ranks import run_ranks
from tests.distributed.tiny_checkpoints import VOCAB_SIZE, save_checkpoint

NUM_TRAJECTORIES = 6
RATIO_PENALTY = 0.3

LAYOUTS = {
    "tp2": ParallelConfig(tensor=2),
    "tp2_sp": ParallelConfig(tensor=2, sequence_parallel=True, recompute="full"),
    "pp2": ParallelConfig(pipeline=2),
    "tp2_pp2": ParallelConfig(tensor=2, pipeline=2),
    "pp2_vpp2": ParallelConfig(pipeline=2, virtual_pipeline=2),
    "dp2": ParallelConfig(data=2),
    "dp8_empty": ParallelConfig(data=8),  # two ranks have nothing but padding
}


def make_trajectories() -> list[Trajectory]:
    random = np.random.default_rng(0)
    return [
        Trajectory(
            sample_id=f"sample-{index}",
            group_id="group",
            prompt_token_ids=tuple(random.integers(0, VOCAB_SIZE, 3 + index).tolist()),
            response_token_ids=tuple(random.integers(0, VOCAB_SIZE, 2 + 3 * index).tolist()),
            behavior_logprobs=random.normal(-5.0, 0.5, 2 + 3 * index).astype(np.float32),
            rollout_logprobs=np.zeros(2 + 3 * index, dtype=np.float32),
            reward=0.0,
            advantage=float(random.normal()),
            finish_reason="stop",
            policy_version=0,
            iteration=1,
        )
        for index in range(NUM_TRAJECTORIES)
    ]


@dataclass(frozen=True)
class Variant:
    """What is trained and how, whatever the layout."""

    checkpoint: str = "pangu-untied"
    objective: str = "r2vpo"
    aggregation: str = "token_mean"
    dtype: str = "float32"


R2VPO = Variant()
TIED = Variant(checkpoint="pangu-tied")  # the embedding's gradient has parts on two stages
TOPR = Variant(objective="topr", aggregation="sequence_mean")  # needs sums over sequences
GRPO = Variant(objective="grpo", aggregation="token_sum")
BF16 = Variant(dtype="bfloat16")
CASES = [(R2VPO, layout) for layout in LAYOUTS]
CASES += [(TIED, "pp2"), (TIED, "tp2_pp2"), (TOPR, "dp8_empty"), (TOPR, "tp2_pp2")]
CASES += [(GRPO, "tp2_pp2")]


def run_config(
    parallel: ParallelConfig, token_budget: int = 64, variant: Variant = R2VPO
) -> RunConfig:
    return RunConfig(
        model=ModelConfig(path="unused", dtype=variant.dtype),
        algorithm=AlgorithmConfig(
            objective=variant.objective,
            aggregation=variant.aggregation,
            ratio_penalty=RATIO_PENALTY,
        ),
        optimizer=OptimizerConfig(lr=1e-3, eps=1e-3, max_gradient_norm=0.05),
        parallel=replace(parallel, max_tokens_per_micro_batch=token_budget),
    )


def start_actor(
    rank: int, world_size: int, init_method: str, config: RunConfig, model_dir: Path
) -> tuple[Any, ParallelState]:
    """Join the process group and build this rank's learner, as LearnerWorker does."""
    from r2vpo_megatron.learner.megatron_actor import MegatronActor

    platform, parallel = get_platform("cpu"), config.parallel
    state = initialize_parallel(
        platform,
        rank=rank,
        world_size=world_size,
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        virtual_pipeline=parallel.interleaved_chunks,
        init_method=init_method,
    )
    return MegatronActor(config, model_dir, state, platform), state


def learn(
    rank: int, world_size: int, init_method: str, config: RunConfig, model_dir: Path
) -> dict[str, Any]:
    """Fresh ratios, log-probs, the metrics of two updates and the weights after them."""
    actor, state = start_actor(rank, world_size, init_method, config, model_dir)

    def pack(trajectories: list[Trajectory]) -> Any:
        return pack_trajectories(
            trajectories,
            max_tokens_per_micro_batch=config.parallel.max_tokens_per_micro_batch,
            num_data_parallel_ranks=config.parallel.data,
            pad_to_multiple_of=config.parallel.tensor if config.parallel.sequence_parallel else 1,
        )[state.data_rank]

    trajectories = make_trajectories()
    logprobs = actor.compute_logprobs(pack(trajectories))
    updates = [actor.update(pack(trajectories), RATIO_PENALTY) for _ in range(2)]
    weights = {
        name: tensor.detach().clone() for name, tensor in actor.hf_weights() if tensor is not None
    }
    destroy_parallel()
    return {"logprobs": logprobs, "updates": updates, "weights": weights}


def merged_logprobs(results: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    return {name: value for result in results for name, value in result["logprobs"].items()}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module]:
    folder = tmp_path_factory.mktemp("pangu")
    return folder, save_checkpoint("pangu-untied", folder)


@pytest.fixture(scope="module")
def folders(
    checkpoint: tuple[Path, torch.nn.Module], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    tied = tmp_path_factory.mktemp("pangu-tied")
    save_checkpoint("pangu-tied", tied)
    return {"pangu-untied": checkpoint[0], "pangu-tied": tied}


@pytest.fixture(scope="module")
def on_one_rank(folders: dict[str, Path]) -> Callable[[Variant], dict[str, Any]]:
    @functools.cache
    def learn_on_one_rank(variant: Variant) -> dict[str, Any]:
        # A single micro-batch.
        config = run_config(ParallelConfig(), token_budget=1024, variant=variant)
        return run_ranks(1, learn, config, folders[variant.checkpoint])[0]

    return learn_on_one_rank


@pytest.fixture(scope="module")
def one_rank(on_one_rank: Callable[[Variant], dict[str, Any]]) -> dict[str, Any]:
    return on_one_rank(R2VPO)


def test_logprobs_equal_transformers(checkpoint, one_rank):
    model = checkpoint[1].double()
    for trajectory in make_trajectories():
        ids = torch.tensor(trajectory.prompt_token_ids + trajectory.response_token_ids)
        with torch.no_grad():
            log_softmax = model(ids[None]).logits[0].log_softmax(-1)
        start = len(trajectory.prompt_token_ids)
        expected = log_softmax[start - 1 : -1].gather(1, ids[start:, None])[:, 0]
        ours = one_rank["logprobs"][trajectory.sample_id]
        np.testing.assert_allclose(ours, expected.numpy(), atol=1e-5)
    model.float()


def test_statistics_equal_their_definition(one_rank):
    """The first update's moments, from its own log-probs in float64."""
    excess = np.concatenate(
        [
            np.expm1(
                one_rank["logprobs"][trajectory.sample_id].astype(np.float64)
                - trajectory.behavior_logprobs
            )
            for trajectory in make_trajectories()
        ]
    )
    first = one_rank["updates"][0]
    assert first["ratio/tokens"] == len(excess)
    assert first["ratio/second_moment"] == pytest.approx(np.mean(excess**2), rel=1e-5)
    assert first["ratio/variance"] == pytest.approx(np.var(excess), rel=1e-5)
    assert first["ratio/max"] == pytest.approx(1 + excess.max(), rel=1e-5)
    assert first["optimizer/gradient_norm"] > 0.05  # so clipping is part of what is compared


@pytest.mark.parametrize(
    ("variant", "layout"),
    [
        pytest.param(variant, layout, id=f"{variant.objective}-{variant.checkpoint}-{layout}")
        for variant, layout in CASES
    ],
)
def test_update_is_the_same_at_any_layout(variant, layout, folders, on_one_rank):
    one_rank = on_one_rank(variant)
    config = run_config(LAYOUTS[layout], variant=variant)
    results = run_ranks(LAYOUTS[layout].num_ranks, learn, config, folders[variant.checkpoint])
    logprobs = merged_logprobs(results)
    assert logprobs.keys() == one_rank["logprobs"].keys()
    for sample_id, expected in one_rank["logprobs"].items():
        np.testing.assert_allclose(logprobs[sample_id], expected, atol=2e-6, rtol=1e-6)
    for result in results:  # identical on every rank, and equal to the one rank's
        assert result["updates"] == results[0]["updates"]
    for update, expected in zip(results[0]["updates"], one_rank["updates"], strict=True):
        assert update.keys() == expected.keys()
        for name, value in expected.items():
            assert update[name] == pytest.approx(value, rel=2e-5, abs=1e-6), name
    assert results[0]["weights"].keys() == one_rank["weights"].keys()
    for name, expected in one_rank["weights"].items():
        torch.testing.assert_close(results[0]["weights"][name], expected, rtol=0, atol=2e-6)


def concatenated(arrays: dict[str, Any]) -> torch.Tensor:
    """All values as one vector, in the order of the names."""
    return torch.cat([torch.as_tensor(arrays[name]).float().flatten() for name in sorted(arrays)])


def test_bf16_update_is_the_same_within_its_rounding(folders, on_one_rank):
    folder, one_rank = folders[BF16.checkpoint], on_one_rank(BF16)
    results = run_ranks(2, learn, run_config(LAYOUTS["tp2"], variant=BF16), folder)

    # The layout changes no more than bf16 does, seen against fp32; sqrt(2): both are rounded.
    logprobs = concatenated(merged_logprobs(results))
    expected = concatenated(one_rank["logprobs"])
    rounding = (expected - concatenated(on_one_rank(R2VPO)["logprobs"])).norm()
    assert 0 < (logprobs - expected).norm() < math.sqrt(2) * rounding

    for update, expected_update in zip(results[0]["updates"], one_rank["updates"], strict=True):
        for name in ("optimizer/gradient_norm", "ratio/second_moment", "policy/entropy"):
            assert update[name] == pytest.approx(expected_update[name], rel=2e-2), name
    start = concatenated(load_file(folder / "model.safetensors")).bfloat16().float()
    step = concatenated(one_rank["weights"]) - start
    # Steps of a few units in the last place of the weights, some rounded to the other side.
    assert (concatenated(results[0]["weights"]) - start - step).norm() < 0.15 * step.norm()


def first_update_on_fresh_data(
    rank: int, world_size: int, init_method: str, config: RunConfig, model_dir: Path
) -> tuple[float, float]:
    """Largest deviation of a ratio from 1, with the learner's own log-probs as denominator."""
    actor, _ = start_actor(rank, world_size, init_method, config, model_dir)
    trajectories = make_trajectories()
    budget = config.parallel.max_tokens_per_micro_batch
    batches = pack_trajectories(
        trajectories, max_tokens_per_micro_batch=budget, num_data_parallel_ranks=1
    )[0]
    gathered: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(gathered, actor.compute_logprobs(batches))
    fresh = {name: value for part in gathered for name, value in part.items()}
    # Other companions in the micro-batch than when the log-probs were computed.
    shuffled = [
        replace(trajectory, behavior_logprobs=fresh[trajectory.sample_id])
        for trajectory in trajectories[::-2] + trajectories[::2]
    ]
    batches = pack_trajectories(
        shuffled, max_tokens_per_micro_batch=4 * budget, num_data_parallel_ranks=1
    )[0]
    update = actor.update(batches, RATIO_PENALTY)
    destroy_parallel()
    return max(update["ratio/max"] - 1, 1 - update["ratio/min"]), update["ratio/tokens"]


@pytest.mark.parametrize("layout", ["tp2", "tp2_pp2"])
def test_ratio_is_one_on_fresh_data(layout, checkpoint):
    config = run_config(LAYOUTS[layout])
    results = run_ranks(
        LAYOUTS[layout].num_ranks, first_update_on_fresh_data, config, checkpoint[0]
    )
    num_tokens = sum(len(trajectory.response_token_ids) for trajectory in make_trajectories())
    for deviation, tokens in results:
        assert tokens == num_tokens
        assert deviation < 1e-5


def decay_alone(
    rank: int, world_size: int, init_method: str, config: RunConfig, model_dir: Path
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Weights before and after an update whose gradient is zero."""
    actor, _ = start_actor(rank, world_size, init_method, config, model_dir)
    before = {name: tensor.clone() for name, tensor in actor.hf_weights() if tensor is not None}
    still = [replace(trajectory, advantage=0.0) for trajectory in make_trajectories()]
    batches = pack_trajectories(still, max_tokens_per_micro_batch=64, num_data_parallel_ranks=1)[0]
    actor.update(batches, ratio_penalty=0.0)
    after = {name: tensor.clone() for name, tensor in actor.hf_weights() if tensor is not None}
    destroy_parallel()
    return {name: (before[name], after[name]) for name in before}


def test_weight_decay_spares_biases_and_norms(checkpoint):
    config = run_config(ParallelConfig())
    config = replace(config, optimizer=replace(config.optimizer, lr=0.5, weight_decay=0.2))
    (weights,) = run_ranks(1, decay_alone, config, checkpoint[0])
    for name, (before, after) in weights.items():
        spared = name.endswith(".bias") or "norm" in name
        expected = before if spared else before * (1 - 0.5 * 0.2)
        torch.testing.assert_close(after, expected, msg=name)


def update_with_poison(
    rank: int,
    world_size: int,
    init_method: str,
    config: RunConfig,
    model_dir: Path,
    advantage: float,
) -> tuple[str, bool]:
    actor, _ = start_actor(rank, world_size, init_method, config, model_dir)
    before = [tensor.clone() for _, tensor in actor.hf_weights() if tensor is not None]
    poisoned = [replace(trajectory, advantage=advantage) for trajectory in make_trajectories()]
    batches = pack_trajectories(poisoned, max_tokens_per_micro_batch=64, num_data_parallel_ranks=1)[
        0
    ]
    message = ""
    try:
        actor.update(batches, RATIO_PENALTY)
    except FloatingPointError as error:
        message = str(error)
    after = [tensor for _, tensor in actor.hf_weights() if tensor is not None]
    unchanged = all(torch.equal(*pair) for pair in zip(before, after, strict=True))
    destroy_parallel()
    return message, unchanged


@pytest.mark.parametrize(
    ("advantage", "culprit"),
    [(math.nan, "statistics"), (1e30, "gradient norm")],  # the latter's statistics are finite
)
def test_what_is_not_finite_changes_no_weight_on_any_rank(checkpoint, advantage, culprit):
    config = run_config(LAYOUTS["tp2"])
    for message, unchanged in run_ranks(2, update_with_poison, config, checkpoint[0], advantage):
        assert culprit in message
        assert "not finite" in message
        assert unchanged
