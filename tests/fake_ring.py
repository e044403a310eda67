"""Stand-ins for what the loop turns: engines that answer at once, a learner that keeps its data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from r2vpo_megatron.config import (
    AlgorithmConfig,
    ModelConfig,
    PipelineConfig,
    ReplayConfig,
    RolloutConfig,
    RunConfig,
    TrainConfig,
)
from r2vpo_megatron.data.prompts import PromptStream
from r2vpo_megatron.observability import StageTimers
from r2vpo_megatron.orchestration import loop
from r2vpo_megatron.orchestration.collect import Collector
from r2vpo_megatron.orchestration.guards import UpdateGuard
from r2vpo_megatron.orchestration.loop import Ring, make_dual, train
from r2vpo_megatron.orchestration.progress import Progress
from r2vpo_megatron.records import (
    Generation,
    GenerationRequest,
    Prompt,
    Trajectory,
    UpdateResult,
)
from r2vpo_megatron.replay import ReplayBuffer
from r2vpo_megatron.rewards import RewardFunction, RewardResult

# Responses of the two prompts' groups of four: their lengths, and which are right.
LENGTHS = [[3, 10, 8, 5], [2, 2, 2, 2]]
RIGHT = [[True, False, True, False], [True, True, True, True]]
PROMPTS = [Prompt(f"p{index}", (index + 1,), "") for index in range(2)]


class FakeRollout:
    """Answers at once, with the version that it was last pushed."""

    is_idle = False

    def __init__(self) -> None:
        self.version = 0
        self.finished: dict[str, Generation] = {}
        self.submitted: list[tuple[int, str]] = []

    def submit(self, requests: Sequence[GenerationRequest], _: Any) -> None:
        for request in requests:
            self.submitted.append((self.version, request.sample_id))
            _iteration, group, response = map(int, request.sample_id.split("."))
            length = LENGTHS[group][response]
            # The first token says whether it is right; see `reward`.
            tokens = (int(RIGHT[group][response]),) * length
            self.finished[request.sample_id] = Generation(
                request.sample_id,
                tokens,
                np.full(length, -1.0, dtype=np.float32),
                "stop",
                np.full(length, self.version),
            )

    def wait_for(self, condition: Any) -> Any:
        result = condition(self.finished)
        assert result is not None
        return result

    def take(self, sample_ids: Sequence[str]) -> list[Generation]:
        return [self.finished.pop(sample_id) for sample_id in sample_ids]

    def score_on_each(self, token_id_lists: Sequence[Sequence[int]]) -> list[list[Any]]:
        return [[np.full(len(ids) - 1, -1.0) for ids in token_id_lists]]

    def metrics(self) -> dict[str, float]:
        return {}


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
    versions: list[int] = field(default_factory=list)

    def compute_logprobs(
        self, trajectories: Sequence[Trajectory], temperature: float | None = None
    ) -> dict[str, Any]:
        return {t.sample_id: np.full(len(t.response_token_ids), -1.0) for t in trajectories}

    def update(
        self, mini_batch: list[Trajectory], ratio_penalty: float, policy_version: int
    ) -> UpdateResult:
        moment = self.moments[len(self.penalties) % len(self.moments)]
        self.mini_batches.append(mini_batch)
        self.penalties.append(ratio_penalty)
        self.versions.append(policy_version)
        if np.isnan(moment):
            return UpdateResult({}, "something is not finite", (mini_batch[0].sample_id,))
        return UpdateResult({"ratio/second_moment": moment, "ratio/max": 1.0, "ratio/min": 1.0})


def make_config(
    mini_batch_samples: int = 8, pipeline: PipelineConfig | None = None, **algorithm: Any
) -> RunConfig:
    config = RunConfig(
        model=ModelConfig(testbed="pangu"),
        rollout=RolloutConfig(max_prompt_tokens=4, max_response_tokens=10),
        algorithm=AlgorithmConfig(**algorithm),
        replay=ReplayConfig(capacity_iterations=1, update_to_data=1.0),
        pipeline=pipeline or PipelineConfig(),
        train=TrainConfig(
            num_iterations=2,
            prompts_per_iteration=2,
            responses_per_prompt=4,
            mini_batch_samples=mini_batch_samples,
        ),
    )
    config.validate()
    return config


@pytest.fixture(autouse=True)
def push(monkeypatch: pytest.MonkeyPatch) -> None:
    def push_weights(_: Any, rollout: FakeRollout, version: int) -> dict[str, float]:
        rollout.version = version
        return {}

    monkeypatch.setattr(loop, "push_weights", push_weights)


def make_ring(
    config: RunConfig, learner: Any, rollout: Any, judge: RewardFunction, run_dir: Path
) -> Ring:
    tokenizer: Any = FakeTokenizer()
    prompts = PromptStream(PROMPTS, 0, config.train.prompts_per_iteration)
    return Ring(
        rollout=rollout,
        collector=Collector(config, tokenizer, judge, prompts, rollout, learner),
        replay=ReplayBuffer(config.replay.capacity_iterations, seed=0),
        learner=learner,
        held_out=None,
        dual=make_dual(config.algorithm),
        guard=UpdateGuard(config.guard, run_dir),
        progress=Progress(),
        timers=StageTimers(),
    )


def run_loop(
    config: RunConfig,
    learner: FakeLearner,
    judge: RewardFunction = reward,
    rollout: Any = None,
    run_dir: Path = Path("unused"),
) -> tuple[list[Any], list[Any]]:
    """Every iteration's metrics, and every update's number and metrics."""
    ring = make_ring(config, learner, rollout or FakeRollout(), judge, run_dir)
    updates: list[Any] = []
    turns = train(config, ring, lambda number, update: updates.append((number, update)))
    metrics = [record for record, _ in turns]
    return metrics, updates
