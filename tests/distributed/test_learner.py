"""The learner's rank: log-probs, the gate at step 0, bf16, and what it does with bad numbers.

That no layout changes an update is `test_invariance`'s.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from r2vpo_megatron.config import ParallelConfig, RunConfig
from r2vpo_megatron.parallel.state import destroy_parallel
from r2vpo_megatron.records import FloatArray, Trajectory
from tests.distributed.float64 import float64_for_float32
from tests.distributed.learner_runs import (
    RATIO_PENALTY,
    copied_weights,
    learn,
    make_trajectories,
    rank_batches,
    run_config,
    start_actor,
    start_state,
)
from tests.distributed.ranks import run_ranks
from tests.distributed.reference_update import (
    Learned,
    as_vector,
    float64_model,
    reference_updates,
    relative_error,
    response_logprobs,
)
from tests.distributed.tiny_checkpoints import save_checkpoint
from tests.distributed.update_problem import make_mini_batches, save_well_conditioned

TRAJECTORIES = make_trajectories([(3 + i, 2 + 3 * i) for i in range(6)], seed=0)

LAYOUTS = {
    "one": ParallelConfig(),
    "tp2_sp": ParallelConfig(tensor=2, sequence_parallel=True),
    "tp2_pp2": ParallelConfig(tensor=2, pipeline=2),
    "pp2_vpp2": ParallelConfig(pipeline=2, virtual_pipeline=2),
    "cp2": ParallelConfig(context=2),
    "dp8_empty": ParallelConfig(data=8),  # two ranks have nothing but padding
}
BF16_LAYOUTS = {
    "tp2_sp": ParallelConfig(tensor=2, sequence_parallel=True),
    "pp2_vpp2": ParallelConfig(pipeline=2, virtual_pipeline=2),
    "cp2": ParallelConfig(context=2),
    "dp3_empty": ParallelConfig(data=3),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module]:
    folder = tmp_path_factory.mktemp("pangu")
    return folder, save_checkpoint("pangu-untied", folder)


def logprobs_in_both_precisions(
    rank: int, world_size: int, init_method: str, config: RunConfig, model_dir: Path
) -> dict[str, list[dict[str, FloatArray]]]:
    """At the temperature of sampling, and at 1."""
    results = {}
    for precision in ("float64", "float32"):
        with float64_for_float32() if precision == "float64" else nullcontext():
            actor, state = start_actor(
                rank, world_size, f"{init_method}-{precision}", config, model_dir
            )
            batches = rank_batches(TRAJECTORIES, config.parallel, state)
            results[precision] = [
                actor.compute_logprobs(batches),
                actor.compute_logprobs(batches, temperature=1.0),
            ]
            # Asking for another temperature once changes nothing for later.
            again = actor.compute_logprobs(batches)
            assert all(np.array_equal(again[n], v) for n, v in results[precision][0].items())
            destroy_parallel()
    return results


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logprobs_equal_transformers(layout: str, checkpoint: tuple[Path, torch.nn.Module]) -> None:
    folder, model = checkpoint
    config = run_config(LAYOUTS[layout])
    results = run_ranks(config.parallel.num_ranks, logprobs_in_both_precisions, config, folder)
    reference = float64_model(model)
    tolerances = {"float64": 1e-12, "float32": 5e-6}
    temperatures = (config.rollout.temperature, 1.0)
    assert temperatures[0] == 0.8
    for precision, (index, temperature) in itertools.product(tolerances, enumerate(temperatures)):
        logprobs = [item for r in results for item in r[precision][index].items()]
        assert sorted(name for name, _ in logprobs) == [t.sample_id for t in TRAJECTORIES]
        for trajectory in TRAJECTORIES:
            with float64_for_float32(), torch.no_grad():
                expected, _ = response_logprobs(reference, trajectory, temperature)
            actual = dict(logprobs)[trajectory.sample_id]
            np.testing.assert_allclose(actual, expected.numpy(), atol=tolerances[precision], rtol=0)


def learn_in_bf16(
    rank: int,
    world_size: int,
    init_method: str,
    parallel: ParallelConfig,
    model_dir: Path,
    mini_batches: list[list[Trajectory]],
) -> Learned:
    state = start_state(rank, world_size, init_method, parallel)
    learned = learn(run_config(parallel, dtype="bfloat16"), model_dir, state, mini_batches)
    destroy_parallel()
    return learned


BF16Run = Callable[[ParallelConfig], Learned]


@pytest.fixture(scope="module")
def bf16_runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Learned, BF16Run, Tensor]:
    """The float64 reference, what a layout makes of it in bf16, and the weights at the start."""
    folder = tmp_path_factory.mktemp("pangu-bf16")
    model = save_well_conditioned("pangu-untied", folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    model.save_pretrained(folder)
    mini_batches = make_mini_batches(model)
    reference = reference_updates(model, run_config(ParallelConfig()), mini_batches)

    @functools.cache
    def run(parallel: ParallelConfig) -> Learned:
        arguments = (parallel, folder, mini_batches)
        results: list[Learned] = run_ranks(parallel.num_ranks, learn_in_bf16, *arguments)
        assert all(result.metrics == results[0].metrics for result in results)
        return results[0]

    return reference, run, as_vector(dict(model.named_parameters())).detach()


@pytest.mark.parametrize("layout", BF16_LAYOUTS)
def test_bf16_update_is_the_same_within_its_rounding(
    layout: str, bf16_runs: tuple[Learned, BF16Run, Tensor]
) -> None:
    """A layout is no farther from float64 than one rank is, but for the luck of rounding."""
    reference, run, start = bf16_runs
    learned, one_rank = run(BF16_LAYOUTS[layout]), run(ParallelConfig())
    for update, gradients in enumerate(learned.gradients):
        assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}
        expected = as_vector(reference.gradients[update])
        rounding = relative_error(as_vector(one_rank.gradients[update]), expected)
        assert 1e-4 < rounding < 0.05
        assert relative_error(as_vector(gradients), expected) < 1.5 * rounding
        for name in ("optimizer/gradient_norm", "ratio/second_moment", "policy/entropy"):
            value = reference.metrics[update][name]
            assert learned.metrics[update][name] == pytest.approx(value, rel=2e-2), name
    # Steps of a few units in the last place of the weights, some rounded to the other side.
    step, one_rank_step = (as_vector(result.weights) - start for result in (learned, one_rank))
    assert relative_error(step, one_rank_step) < 0.15


def first_update_on_fresh_data(
    rank: int, world_size: int, init_method: str, config: RunConfig, model_dir: Path
) -> tuple[float, float]:
    """Largest deviation of a ratio from 1, with the learner's own log-probs as denominator."""
    actor, state = start_actor(rank, world_size, init_method, config, model_dir)
    gathered: list[dict[str, FloatArray]] = [{}] * world_size
    logprobs = actor.compute_logprobs(rank_batches(TRAJECTORIES, config.parallel, state))
    torch.distributed.all_gather_object(gathered, logprobs)
    fresh = {name: value for part in gathered for name, value in part.items()}
    # Other companions in the micro-batch than when the log-probs were computed.
    shuffled = [
        replace(trajectory, behavior_logprobs=fresh[trajectory.sample_id])
        for trajectory in TRAJECTORIES[::-2] + TRAJECTORIES[::2]
    ]
    larger = replace(config.parallel, max_tokens_per_micro_batch=1024)
    update = actor.update(rank_batches(shuffled, larger, state), RATIO_PENALTY, 0)
    destroy_parallel()
    return max(update["ratio/max"] - 1, 1 - update["ratio/min"]), update["ratio/tokens"]


@pytest.mark.parametrize("layout", ["tp2_sp", "tp2_pp2", "cp2"])
def test_ratio_is_one_on_fresh_data(layout: str, checkpoint: tuple[Path, torch.nn.Module]) -> None:
    config = run_config(LAYOUTS[layout])
    results = run_ranks(
        config.parallel.num_ranks, first_update_on_fresh_data, config, checkpoint[0]
    )
    num_tokens = sum(len(trajectory.response_token_ids) for trajectory in TRAJECTORIES)
    for deviation, tokens in results:
        assert tokens == num_tokens
        assert deviation < 1e-5


def decay_alone(
    rank: int, world_size: int, init_method: str, config: RunConfig, model_dir: Path
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights before and after an update whose gradient is zero."""
    actor, state = start_actor(rank, world_size, init_method, config, model_dir)
    before = copied_weights(actor)
    still = [replace(trajectory, advantage=0.0) for trajectory in TRAJECTORIES]
    actor.update(rank_batches(still, config.parallel, state), 0.0, policy_version=0)
    after = copied_weights(actor)
    destroy_parallel()
    return before, after


def test_weight_decay_spares_biases_and_norms(
    checkpoint: tuple[Path, torch.nn.Module],
) -> None:
    config = run_config(ParallelConfig())
    optimizer = replace(config.optimizer, lr=0.5, warmup_updates=0, weight_decay=0.2)
    ((before, after),) = run_ranks(
        1, decay_alone, replace(config, optimizer=optimizer), checkpoint[0]
    )
    for name, weight in before.items():
        spared = name.endswith(".bias") or "norm" in name
        expected = weight if spared else weight * (1 - 0.5 * 0.2)
        torch.testing.assert_close(after[name], expected, msg=name)
