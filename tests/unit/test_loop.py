"""The loop and its collector with stand-ins for engines and learner: what reaches an update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from r2vpo_megatron.config import (
    AlgorithmConfig,
    ModelConfig,
    ReplayConfig,
    RolloutConfig,
    RunConfig,
    TrainConfig,
)
from r2vpo_megatron.observability import StageTimers
from r2vpo_megatron.orchestration.collect import Collector
from r2vpo_megatron.orchestration.loop import Ring, make_dual, train
from r2vpo_megatron.records import Generation, GenerationRequest, Prompt, Trajectory
from r2vpo_megatron.replay import ReplayBuffer
from r2vpo_megatron.rewards import FORMAT_CHECKS, RewardFunction, RewardResult, overlong_penalty

# Responses of the two prompts' groups of four: their lengths, and which are right.
LENGTHS = [[3, 10, 8, 5], [2, 2, 2, 2]]
RIGHT = [[True, False, True, False], [True, True, True, True]]
PROMPTS = [Prompt(f"p{index}", (index + 1,), "") for index in range(2)]


class FakeRollout:
    def generate(self, requests: Sequence[GenerationRequest], _: Any) -> list[Generation]:
        generations = []
        for request in requests:
            iteration, group, response = map(int, request.sample_id.split("."))
            length = LENGTHS[group][response]
            # The first token says whether it is right; see `reward`.
            tokens = (int(RIGHT[group][response]),) * length
            logprobs = np.full(length, -1.0, dtype=np.float32)
            generations.append(
                Generation(request.sample_id, tokens, logprobs, "stop", iteration - 1)
            )
        return generations


class FakeTokenizer:
    stop_token_ids = (9,)

    def decode_response(self, token_ids: Sequence[int]) -> str:
        return "right" if token_ids[0] else "wrong"


def reward(_: Prompt, text: str) -> RewardResult:
    right = text == "right"
    return RewardResult(score=1.0 if right else -1.0, acc=right, pred=None, parsed=True)


@dataclass
class FakeLearner:
    """Keeps what it is given; its second moments are as told."""

    moments: Sequence[float] = (0.0,)
    mini_batches: list[list[Trajectory]] = field(default_factory=list)
    penalties: list[float] = field(default_factory=list)

    def compute_logprobs(self, trajectories: Sequence[Trajectory]) -> dict[str, Any]:
        return {t.sample_id: np.full(len(t.response_token_ids), -1.0) for t in trajectories}

    def update(self, mini_batch: list[Trajectory], ratio_penalty: float) -> dict[str, float]:
        moment = self.moments[len(self.penalties) % len(self.moments)]
        self.mini_batches.append(mini_batch)
        self.penalties.append(ratio_penalty)
        return {"ratio/second_moment": moment, "ratio/max": 1.0, "ratio/min": 1.0}

    def push_weights(self, _: Any, version: int) -> dict[str, float]:
        return {}


def make_config(mini_batch_samples: int = 8, **algorithm: Any) -> RunConfig:
    config = RunConfig(
        model=ModelConfig(testbed="pangu"),
        rollout=RolloutConfig(max_prompt_tokens=4, max_response_tokens=10),
        algorithm=AlgorithmConfig(**algorithm),
        replay=ReplayConfig(capacity_iterations=1, update_to_data=1.0),
        train=TrainConfig(
            num_iterations=2,
            prompts_per_iteration=2,
            responses_per_prompt=4,
            mini_batch_samples=mini_batch_samples,
        ),
    )
    config.validate()
    return config


class AllPrompts:
    def next_batch(self) -> list[Prompt]:
        return PROMPTS


def run_loop(
    config: RunConfig, learner: FakeLearner, judge: RewardFunction = reward
) -> tuple[list[Any], list[Any]]:
    """Every iteration's metrics, and every update's number and metrics."""
    rollout: Any = FakeRollout()
    tokenizer: Any = FakeTokenizer()
    acting: Any = learner
    prompts: Any = AllPrompts()
    ring = Ring(
        prompts=prompts,
        rollout=rollout,
        collector=Collector(config, tokenizer, judge, rollout, acting),
        replay=ReplayBuffer(config.replay.capacity_iterations, seed=0),
        learner=acting,
        held_out=None,
    )
    updates: list[Any] = []
    metrics = list(
        train(config, ring, StageTimers(), lambda number, update: updates.append((number, update)))
    )
    return metrics, updates


def groups_of(mini_batch: Sequence[Trajectory]) -> list[str]:
    return sorted({trajectory.group_id.rpartition(".")[2] for trajectory in mini_batch})


def test_groups_of_equal_rewards_are_left_out_where_asked() -> None:
    learner = FakeLearner()
    run_loop(make_config(), learner)
    assert [groups_of(batch) for batch in learner.mini_batches] == [["00000", "00001"]] * 2
    assert [len(batch) for batch in learner.mini_batches] == [8, 8]

    learner = FakeLearner()
    run_loop(make_config(filter_zero_advantage_groups=True), learner)
    assert [groups_of(batch) for batch in learner.mini_batches] == [["00000"]] * 2
    assert [len(batch) for batch in learner.mini_batches] == [4, 4]


def test_a_mini_batch_that_the_filter_leaves_empty_is_no_update() -> None:
    learner = FakeLearner()
    config = make_config(mini_batch_samples=1, filter_zero_advantage_groups=True)
    metrics, updates = run_loop(config, learner)
    assert [len(batch) for batch in learner.mini_batches] == [1] * 8
    assert [record["updates/num"] for record in metrics] == [4.0, 4.0]
    assert [number for number, _ in updates] == list(range(1, 9))


def test_lambda_follows_every_update_and_is_reported_as_it_was_used() -> None:
    moments = [0.0, 0.03, 0.045, 0.05]
    learner = FakeLearner(moments)
    config = make_config(mini_batch_samples=4, dual_controller="multiplicative")
    metrics, updates = run_loop(config, learner)

    dual, expected = make_dual(config.algorithm), []
    for moment in moments:
        expected.append(dual.value)
        dual.step(moment)
    assert learner.penalties == expected
    assert len(set(expected)) == 4
    assert [update["ratio/penalty"] for _, update in updates] == expected
    assert [update["ratio/second_moment"] for _, update in updates] == moments
    assert [update["iteration"] for _, update in updates] == [1, 1, 2, 2]
    assert [record["ratio/penalty"] for record in metrics] == [expected[1], expected[3]]


@pytest.mark.parametrize(
    ("num_tokens", "expected"),
    [(0, 0.0), (75, 0.0), (76, 0.0), (77, -1 / 24), (88, -0.5), (99, -23 / 24), (100, -1.0)],
)
def test_the_overlong_penalty_at_its_edges(num_tokens: int, expected: float) -> None:
    penalty = overlong_penalty(num_tokens, max_tokens=100, buffer_tokens=24)
    assert penalty == pytest.approx(expected, abs=1e-15)
    assert overlong_penalty(num_tokens, max_tokens=100, buffer_tokens=0) == 0.0
    assert overlong_penalty(1000, max_tokens=100, buffer_tokens=24) == -1.0


def test_a_buffer_as_long_as_the_limit_counts_every_token() -> None:
    assert overlong_penalty(25, max_tokens=100, buffer_tokens=100) == -0.25


def test_overlong_responses_are_worth_less_before_advantages_are_formed() -> None:
    learner = FakeLearner()
    config = make_config(overlong_buffer_tokens=4, advantage="group_centered")
    metrics, _ = run_loop(config, learner)
    # Lengths 3, 10, 8 and 5 of at most 10, with a buffer of 4: 0, -1, -0.5 and 0.
    rewards = np.array([1.0, -2.0, 0.5, -1.0])
    first = sorted(learner.mini_batches[0], key=lambda trajectory: trajectory.sample_id)
    assert [trajectory.reward for trajectory in first] == [*rewards, 1.0, 1.0, 1.0, 1.0]
    advantages = [trajectory.advantage for trajectory in first]
    assert advantages == pytest.approx([*(rewards - rewards.mean()), 0.0, 0.0, 0.0, 0.0])
    assert metrics[0]["reward/overlong_penalty"] == pytest.approx(-1.5 / 8)
    assert metrics[0]["reward/mean"] == pytest.approx((rewards.sum() + 4) / 8)
    assert metrics[0]["reward/accuracy"] == 6 / 8

    without = FakeLearner()
    metrics, _ = run_loop(
        replace(config, algorithm=replace(config.algorithm, overlong_buffer_tokens=0)), without
    )
    assert "reward/overlong_penalty" not in metrics[0]
    assert {trajectory.reward for trajectory in without.mini_batches[0]} == {1.0, -1.0}


def test_a_response_out_of_form_is_worth_less_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMAT_CHECKS, "is_right", lambda text: text == "right")
    monkeypatch.setitem(FORMAT_CHECKS, "never", lambda _: False)
    learner = FakeLearner()
    config = make_config(format_checks="is_right, never", format_penalty=0.25)
    metrics, _ = run_loop(config, learner)
    first = sorted(learner.mini_batches[0], key=lambda trajectory: trajectory.sample_id)
    # Both checks fail for a wrong response: the penalty is taken once.
    assert [trajectory.reward for trajectory in first] == [0.75, -1.25, 0.75, -1.25] + [0.75] * 4
    assert metrics[0]["reward/format_fault_fraction/is_right"] == 2 / 8
    assert metrics[0]["reward/format_fault_fraction/never"] == 1.0

    reported = FakeLearner()
    metrics, _ = run_loop(make_config(format_checks="never"), reported)
    assert metrics[0]["reward/format_fault_fraction/never"] == 1.0
    assert {trajectory.reward for trajectory in reported.mini_batches[0]} == {1.0, -1.0}


def test_what_the_grader_gave_up_on_is_counted() -> None:
    def judge(_: Prompt, text: str) -> RewardResult:
        failure = "" if text == "right" else "timeout"
        return RewardResult(-1.0, acc=False, pred="x", parsed=True, failure=failure)

    metrics, _ = run_loop(make_config(), FakeLearner(), judge)
    assert metrics[0]["reward/grader_failures"] == 2.0
    assert metrics[0]["reward/grader_failures/timeout"] == 2.0
    assert "reward/grader_failures/memory" not in metrics[0]
