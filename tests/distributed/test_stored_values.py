"""What enters the loss is what was stored when a response was sampled, however old it is.

The loop, its collector, the replay buffer, packing and a learner's rank are the real ones; only
the engines are scripted. Between sampling and the last use of a sample the weights change many
times, and with them what the learner would compute for it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from r2vpo_megatron.config import (
    ParallelConfig,
    PipelineConfig,
    ReplayConfig,
    RolloutConfig,
    RunConfig,
    TrainConfig,
)
from r2vpo_megatron.observability import StageTimers
from r2vpo_megatron.orchestration import loop
from r2vpo_megatron.orchestration.collect import Collector
from r2vpo_megatron.orchestration.guards import UpdateGuard
from r2vpo_megatron.orchestration.progress import Progress
from r2vpo_megatron.parallel.state import ParallelState, destroy_parallel
from r2vpo_megatron.records import Generation, GenerationRequest, Prompt, Trajectory, UpdateResult
from r2vpo_megatron.replay import ReplayBuffer
from r2vpo_megatron.rewards import RewardResult
from r2vpo_megatron.rl.advantages import group_advantages
from tests.distributed.learner_runs import rank_batches, run_config, start_actor
from tests.distributed.ranks import run_ranks
from tests.distributed.tiny_checkpoints import VOCAB_SIZE, save_checkpoint

NUM_ITERATIONS = 5
CAPACITY = 3
STOP_TOKEN = VOCAB_SIZE - 1


@dataclass(frozen=True)
class InLoss:
    """One response, or its tokens of one micro-batch, as they entered the loss."""

    update: int  # from 0
    iteration: int
    sample_id: str
    token_ids: list[int]
    behavior_logprobs: bytes  # fp32
    rollout_logprobs: bytes  # fp32
    advantages: list[float]
    policy_versions: list[int]
    newest_version: int


class ScriptedEngine:
    """Responses of random tokens: half when they are asked for, the other half when they are
    waited for, with what was pushed till then.

    Attributes:
        sampled: sample id -> what it returned, in copies of its own.
    """

    is_idle = False

    def __init__(self) -> None:
        self.version = 0
        self.sampled: dict[str, Generation] = {}
        self._begun: dict[str, int] = {}
        self._finished: dict[str, Generation] = {}

    def submit(self, requests: Sequence[GenerationRequest], _: Any) -> None:
        self._begun |= {request.sample_id: self.version for request in requests}

    def wait_for(self, choose: Any) -> Any:
        while (chosen := choose(self._finished)) is None:
            sample_id = min(self._begun)
            self._finished[sample_id] = self._finish(sample_id, self._begun.pop(sample_id))
        return chosen

    def take(self, sample_ids: Sequence[str]) -> list[Generation]:
        return [self._finished.pop(sample_id) for sample_id in sample_ids]

    def metrics(self) -> dict[str, float]:
        return {}

    def _finish(self, sample_id: str, begun: int) -> Generation:
        random = np.random.default_rng([ord(letter) for letter in sample_id])
        num_tokens = int(random.integers(2, 12))
        versions = np.full(num_tokens, begun)
        versions[num_tokens // 2 :] = self.version
        values: dict[str, Any] = {
            "token_ids": tuple(random.integers(0, STOP_TOKEN, num_tokens).tolist()),
            "rollout_logprobs": random.normal(-5.0, 0.3, num_tokens).astype(np.float32),
            "policy_versions": versions,
        }
        generation = Generation(sample_id, finish_reason="stop", **values)
        copies = {name: np.copy(values[name]) for name in ("rollout_logprobs", "policy_versions")}
        self.sampled[sample_id] = replace(generation, **copies)
        return generation


class Tokenizer:
    stop_token_ids = (STOP_TOKEN,)

    def decode_response(self, token_ids: Sequence[int]) -> str:
        return " ".join(map(str, token_ids))


class Prompts:
    def __init__(self) -> None:
        self._numbers = itertools.count()

    def take(self, count: int) -> list[Prompt]:
        numbers = itertools.islice(self._numbers, count)
        return [Prompt(f"p{n}", tuple(range(n, n + 3 + n % 2)), "") for n in numbers]


def score(text: str) -> float:
    return sum(map(int, text.split())) % 11 / 11


def judge(_: Prompt, text: str) -> RewardResult:
    return RewardResult(score=score(text), acc=False, pred=None, parsed=True)


class InProcessLearner:
    """As LearnerGroup, with its one rank in this process.

    Attributes:
        computed: sample id -> the log-probs that it first computed for it, in copies of its own.
    """

    def __init__(self, actor: Any, state: ParallelState, config: RunConfig) -> None:
        self._actor, self._state, self._config = actor, state, config
        self.computed: dict[str, Any] = {}

    def compute_logprobs(
        self, trajectories: Sequence[Trajectory], temperature: float | None = None
    ) -> dict[str, Any]:
        batches = rank_batches(trajectories, self._config.parallel, self._state)
        logprobs = self._actor.compute_logprobs(batches, temperature)
        for sample_id, values in logprobs.items():
            self.computed.setdefault(sample_id, values.copy())
        return dict(logprobs)

    def update(
        self, trajectories: Sequence[Trajectory], ratio_penalty: float, policy_version: int
    ) -> UpdateResult:
        batches = rank_batches(trajectories, self._config.parallel, self._state)
        return UpdateResult(self._actor.update(batches, ratio_penalty, policy_version))


@contextmanager
def recorded_losses(progress: dict[str, int]) -> Iterator[list[InLoss]]:
    """Fill the list with what every call of the learner's loss gets, response by response."""
    from r2vpo_megatron.learner import forward_step
    from r2vpo_megatron.learner.megatron_actor import MegatronActor

    recorded: list[InLoss] = []
    micro_batches: list[Any] = []
    policy_loss, micro_batch = forward_step.policy_loss, MegatronActor._micro_batch

    def keeping_micro_batch(actor: Any, batch: Any) -> Any:
        micro_batches.append(micro_batch(actor, batch))
        return micro_batches[-1]

    def recording_loss(logprobs: Any, tokens: Any, settings: Any, *others: Any) -> Any:
        (batch,) = [each for each in micro_batches if each.tokens is tokens]
        for index, sample_id in enumerate(batch.sample_ids):
            chosen = tokens.sequence_ids == index
            recorded.append(
                InLoss(
                    update=progress["updates"],
                    iteration=progress["iterations"] + 1,
                    sample_id=sample_id,
                    token_ids=batch.target_ids[chosen].tolist(),
                    behavior_logprobs=tokens.behavior_logprobs[chosen].numpy().tobytes(),
                    rollout_logprobs=tokens.rollout_logprobs[chosen].numpy().tobytes(),
                    advantages=tokens.advantages[chosen].tolist(),
                    policy_versions=tokens.policy_versions[chosen].tolist(),
                    newest_version=settings.policy_version,
                )
            )
        return policy_loss(logprobs, tokens, settings, *others)

    with (
        mock.patch.object(MegatronActor, "_micro_batch", keeping_micro_batch),
        mock.patch.object(forward_step, "policy_loss", recording_loss),
    ):
        yield recorded


@dataclass(frozen=True)
class Outcome:
    """What the engine sampled, what the learner computed then, what the losses got.

    Attributes:
        drift: by iteration, how far the newest weights' log-probs of the first response are from
            those of the weights before, at most.
    """

    sampled: dict[str, Generation]
    computed: dict[str, Any]
    in_loss: list[InLoss]
    iterations: list[dict[str, float]]
    drift: list[float]


def train(
    rank: int, world_size: int, init_method: str, config: RunConfig, model_dir: Path
) -> Outcome:
    actor, state = start_actor(rank, world_size, init_method, config, model_dir)
    engine, learner = ScriptedEngine(), InProcessLearner(actor, state, config)
    progress = {"updates": 0, "iterations": 0}
    first: list[Trajectory] = []
    logprobs_of_first: list[Any] = []

    class KeepingBuffer(ReplayBuffer):
        def add(self, iteration: int, trajectories: Sequence[Trajectory]) -> None:
            first.extend(trajectories[:1])
            super().add(iteration, trajectories)

    def push_weights(_: Any, rollout: ScriptedEngine, version: int) -> dict[str, float]:
        rollout.version = version
        batches = rank_batches(first[:1], config.parallel, state)
        logprobs_of_first.extend(actor.compute_logprobs(batches).values())
        return {}

    def count_update(*_: Any) -> None:
        progress["updates"] += 1

    parts: Any = {
        "rollout": engine,
        "learner": learner,
        "held_out": None,
        "dual": loop.make_dual(config.algorithm),
        "guard": UpdateGuard(config.guard, model_dir),
        "progress": Progress(),
        "timers": StageTimers(),
    }
    tokenizer, prompts = Tokenizer(), Prompts()
    collector = Collector(config, tokenizer, judge, prompts, engine, learner)  # type: ignore[arg-type]
    buffer = KeepingBuffer(config.replay.capacity_iterations, seed=3)
    ring = loop.Ring(collector=collector, replay=buffer, **parts)
    iterations = []
    with (
        mock.patch.object(loop, "push_weights", push_weights),
        recorded_losses(progress) as recorded,
    ):
        for metrics, _ in loop.train(config, ring, count_update):
            progress["iterations"] += 1
            iterations.append(metrics)
    destroy_parallel()
    drift = [
        float(np.abs(after - before).max())
        for before, after in itertools.pairwise(logprobs_of_first)
    ]
    return Outcome(engine.sampled, learner.computed, recorded, iterations, drift)


REGIMES = {
    "in_turn": (PipelineConfig(), "learner"),
    "side_by_side": (PipelineConfig(mode="asynchronous", max_staleness=1), "rollout"),
}


@pytest.fixture(scope="module", params=REGIMES)
def outcome(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    folder = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint("pangu-untied", folder)
    pipeline, denominator = REGIMES[request.param]
    config = run_config(ParallelConfig(), token_budget=40)
    config = replace(
        config,
        algorithm=replace(config.algorithm, behavior_logprobs=denominator),
        rollout=RolloutConfig(temperature=0.8, max_prompt_tokens=4, max_response_tokens=12),
        replay=ReplayConfig(capacity_iterations=CAPACITY, update_to_data="2/1"),
        train=TrainConfig(
            num_iterations=NUM_ITERATIONS,
            prompts_per_iteration=3,
            responses_per_prompt=2,
            mini_batch_samples=4,
        ),
        optimizer=replace(config.optimizer, lr=5e-3),
        pipeline=pipeline,
        runtime=replace(config.runtime, parity_samples=0),
    )
    (result,) = run_ranks(1, train, config, folder)
    assert isinstance(result, Outcome)
    return result


def test_the_loss_gets_what_was_stored(outcome: Outcome) -> None:
    computes_first = outcome.computed.keys() >= outcome.sampled.keys()
    rewards = {
        name: score(Tokenizer().decode_response(generation.token_ids))
        for name, generation in outcome.sampled.items()
    }
    for entry in outcome.in_loss:
        generation = outcome.sampled[entry.sample_id]
        reported = generation.rollout_logprobs
        expected = outcome.computed[entry.sample_id] if computes_first else reported
        assert entry.token_ids == list(generation.token_ids)
        assert entry.behavior_logprobs == expected.tobytes()
        assert entry.rollout_logprobs == reported.tobytes()
        assert entry.policy_versions == generation.policy_versions.tolist()

        group, _, response = entry.sample_id.rpartition(".")
        advantages = group_advantages([rewards[f"{group}.{n:03d}"] for n in range(2)])
        advantage = float(np.float32(advantages[int(response)]))
        assert entry.advantages == [advantage] * len(generation.token_ids)


def test_samples_of_all_ages_were_used_while_the_weights_changed(outcome: Outcome) -> None:
    """Or the test above would show nothing."""
    updates = {entry.update for entry in outcome.in_loss}
    assert updates == set(range(3 * NUM_ITERATIONS))  # 2 x 6 / 4 an iteration
    # No sample twice within an update.
    uses = {(entry.update, entry.sample_id) for entry in outcome.in_loss}
    assert len(uses) == len(outcome.in_loss) == 4 * len(updates)
    # By id, of the batch of prompts that a sample is of: its iteration.
    ages = {entry.iteration - int(entry.sample_id.split(".")[0]) for entry in outcome.in_loss}
    assert ages == set(range(CAPACITY))
    assert {entry.newest_version - (entry.iteration - 1) for entry in outcome.in_loss} == {0}
    assert min(outcome.drift) > 1e-3
    assert outcome.iterations[-1]["replay/realized_utd"] == 2.0


def test_the_oldest_tokens_are_told_apart(outcome: Outcome) -> None:
    """The staleness that the last iteration reports is that of the tokens in its losses."""
    last = [entry for entry in outcome.in_loss if entry.iteration == NUM_ITERATIONS]
    behind = np.concatenate(
        [entry.newest_version - np.array(entry.policy_versions) for entry in last]
    )
    for age, name in enumerate(("0", "1", "2", "3", "4_or_more")):
        expected = float(np.mean(np.minimum(behind, 4) == age))
        reported = outcome.iterations[-1].get(f"staleness_{name}/token_fraction", 0.0)
        assert reported == pytest.approx(expected), name
    is_mixed = [len(set(entry.policy_versions)) > 1 for entry in last]
    assert any(is_mixed) == (behind.max() == CAPACITY)  # side by side, one version more
