"""Stand-ins for runs that are written to checkpoints and taken up again."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from r2vpo_megatron.config import PipelineConfig, ReplayConfig, RunConfig
from r2vpo_megatron.evaluation.held_out import HeldOutSet
from r2vpo_megatron.orchestration.checkpoints import RunCheckpoints
from r2vpo_megatron.orchestration.interrupts import StopRequested
from r2vpo_megatron.orchestration.loop import Ring, train
from r2vpo_megatron.records import Generation, GenerationRequest
from tests.fake_ring import (
    PROMPTS,
    FakeLearner,
    FakeRollout,
    make_config,
    make_ring,
    reward,
)

MOMENTS = [0.0, 0.03, 0.045, 0.05, 0.01, 0.2, 0.07]
INCIDENTAL = ("time/", "throughput/", "pipeline/learner_wait_fraction", "memory/")


@dataclass
class SavedLearner(FakeLearner):
    """Its state is how many updates it has made; it writes that in the background."""

    num_before: int = 0
    release: threading.Event = field(default_factory=threading.Event)
    thread: threading.Thread | None = None
    may_write: bool = True
    error: OSError | None = None

    def update(self, *args: Any, **kwargs: Any) -> Any:
        result = super().update(*args, **kwargs)
        moment = MOMENTS[(self.num_before + len(self.penalties) - 1) % len(MOMENTS)]
        return replace(result, metrics=result.metrics | {"ratio/second_moment": moment})

    def begin_save_state(self, folder: Path) -> None:
        state = json.dumps(self.num_before + len(self.penalties))

        def write() -> None:
            self.release.wait(10)
            (folder / "learner.json").write_text(state)

        self.thread = threading.Thread(target=write)
        self.thread.start()
        if self.may_write:
            self.release.set()

    def is_state_saved(self) -> bool:
        return self.thread is None or not self.thread.is_alive()

    def finish_save_state(self) -> None:
        if self.thread is not None:
            self.thread.join()
        if self.error is not None:
            raise self.error


class Stopping(FakeRollout):
    """Has its wait broken off once, before the responses of an iteration or of an evaluation."""

    stop_at: tuple[str, int] = ("", 0)  # what, and which one of it

    def __init__(self) -> None:
        super().__init__()
        self.num_waits = {"wait": 0, "evaluation": 0}

    def wait_for(self, condition: Any) -> Any:
        self._wait("wait")
        return super().wait_for(condition)

    def generate(self, requests: Sequence[GenerationRequest], sampling: Any) -> list[Generation]:
        """Responses that are right if the weights' version is even."""
        self._wait("evaluation")
        tokens = (int(self.version % 2 == 0),)
        none = np.zeros(0)
        return [Generation(r.sample_id, tokens, none, "stop", none) for r in requests]

    def _wait(self, kind: str) -> None:
        self.num_waits[kind] += 1
        if (kind, self.num_waits[kind]) == self.stop_at:
            raise StopRequested


def config_of(mode: str) -> RunConfig:
    config = make_config(
        mini_batch_samples=4,
        pipeline=PipelineConfig(mode=mode),
        dual_controller="multiplicative",
        behavior_logprobs="rollout",
        filter_zero_advantage_groups=mode == "asynchronous",
    )
    return replace(
        config,
        replay=ReplayConfig(capacity_iterations=2, update_to_data=2),
        train=replace(config.train, num_iterations=4),
        evaluation=replace(config.evaluation, every_iterations=2),
    )


def evaluated(config: RunConfig, learner: Any, rollout: Any, folder: Path) -> Ring:
    """A ring that is evaluated after each other iteration."""
    ring = make_ring(config, learner, rollout, reward, folder)
    tokenizer = ring.collector.tokenizer
    held_out = HeldOutSet([PROMPTS[0]], tokenizer, reward, max_response_tokens=1, seed=0)
    return replace(ring, held_out=held_out)


def parts_of(ring: Ring) -> dict[str, Any]:
    return {
        "collector": ring.collector,
        "dual": ring.dual,
        "guard": ring.guard,
        "timers": ring.timers,
    }


def checkpoints_of(
    ring: Ring,
    learner: Any,
    folder: Path,
    said: list[str],
    resumed: Path | None = None,
    **fields: Any,
) -> RunCheckpoints:
    config = replace(config_of("synchronous").checkpoint, **fields)
    return RunCheckpoints(
        config,
        folder,
        {},
        learner,
        ring.replay,
        parts_of(ring),
        ring.progress,
        said.append,
        resumed,
    )


def without(records: list[Any], prefixes: tuple[str, ...]) -> list[Any]:
    return [
        {name: value for name, value in record.items() if not name.startswith(prefixes)}
        for record in records
    ]


def turn(ring: Ring, config: RunConfig, stop_after: int = 0) -> tuple[list[Any], list[Any]]:
    """Iterations' and updates' metrics until the end, or an update's number."""
    records: list[Any] = []
    updates: list[Any] = []

    def on_update(number: int, metrics: Any) -> None:
        updates.append((number, metrics))
        if number == stop_after:
            raise StopRequested

    try:
        for record, _ in train(config, ring, on_update):
            records += without([record], INCIDENTAL)
    except StopRequested:
        pass
    return records, updates
