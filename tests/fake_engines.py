"""Engines that are threads, for tests of what drives them."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from r2vpo_megatron.config import (
    PipelineConfig,
    RolloutConfig,
    RunConfig,
    RuntimeConfig,
)
from r2vpo_megatron.orchestration.rollout_pool import RolloutPool
from r2vpo_megatron.records import Generation, GenerationRequest
from r2vpo_megatron.rollout.engine import EngineReport
from r2vpo_megatron.rollout.sampling import SamplingSettings

SAMPLING = SamplingSettings(max_response_tokens=40)
NUM_TOKENS = 3  # of each response, one per slice


class Died(Exception):
    """What calls of a process end with that is no more."""


@dataclass
class FakeEngine:
    """An engine process as a thread that works off its calls one by one; an `EngineHandle`.

    Each slice samples one token per request: `policy_version`, from -2 on at most.
    """

    index: int
    go: threading.Event  # cleared: `advance` does not come back
    policy_version: int = 0
    requests: dict[str, list[int]] = field(default_factory=dict)  # tokens by sample
    calls: list[tuple[str, Any]] = field(default_factory=list)  # as they were worked off
    most_queued: int = 0
    errors: dict[str, Exception] = field(default_factory=dict)  # by method
    is_dead: bool = False
    died: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._waiting: queue.Queue[Any] = queue.Queue()
        self._pending: list[Future[Any]] = []
        threading.Thread(target=self._work, daemon=True).start()

    def begin_start(self) -> Future[Any]:
        return self.call("start")

    def call(self, method: str, *args: Any) -> Future[Any]:
        future: Future[Any] = Future()
        if self.is_dead:
            future.set_exception(Died("the process is gone"))
            return future
        self._pending.append(future)
        self._waiting.put((method, args, future))
        num_queued = sum(not future.done() for future in self._pending)
        self.most_queued = max(self.most_queued, num_queued)
        return future

    def kill(self) -> None:
        self.is_dead = True
        self.died.set()
        for future in self._pending:
            if not future.done():
                future.set_exception(Died("killed"))

    def _work(self) -> None:
        while not self.died.is_set():
            method, args, future = self._waiting.get()
            self.calls.append((method, args))
            result: Any = None
            error: Exception | None = self.errors.get(method)
            try:
                result = getattr(self, f"do_{method}")(*args)
            except ValueError as raised:
                error = raised
            if future.done():
                continue
            future.set_exception(error) if error else future.set_result(result)

    def do_start(self, leftovers: tuple[str, ...] = ()) -> tuple[str, ...]:
        return self.do_shared_segments()

    def do_shared_segments(self) -> tuple[str, ...]:
        return (f"psm_r2vpo_test_{self.index}",)

    def do_node_id(self) -> str:
        return f"node {self.index}"

    def do_stop(self) -> None:
        pass

    def do_score(self, token_id_lists: Any) -> list[int]:
        return [self.index * 100 + len(token_ids) for token_ids in token_id_lists]

    def do_load(self, version: int) -> int:
        self.policy_version = version
        return version

    def do_advance(self, additions: Any, seconds: float) -> EngineReport:
        for requests, sampling in additions:
            assert sampling is SAMPLING
            for request in requests:
                assert request.sample_id not in self.requests
                if not request.prompt_token_ids:
                    raise ValueError(f"request {request.sample_id}: the prompt is empty")
                self.requests[request.sample_id] = [0] * len(request.partial_token_ids)
        while not self.go.wait(0.05) and not self.is_dead:
            pass
        time.sleep(0.001)
        finished, num_tokens = [], len(self.requests)
        for sample_id, tokens in list(self.requests.items()):
            tokens.append(self.policy_version)
            if len(tokens) == NUM_TOKENS:
                finished.append(self._take(sample_id, "length"))
        return EngineReport(finished, len(self.requests), num_tokens, 0.001, 100 + self.index)

    def do_abort_requests(self) -> list[Generation]:
        return [self._take(sample_id, "abort") for sample_id in list(self.requests)]

    def _take(self, sample_id: str, reason: str) -> Generation:
        tokens = self.requests.pop(sample_id)
        new = [token for token in tokens if token]  # what it was sent with is 0 here
        versions = np.array(new, dtype=np.int64)
        return Generation(sample_id, tuple(new), -versions.astype(np.float32), reason, versions)


@dataclass
class Engines:
    """All processes that the pool has created, in order."""

    go: threading.Event = field(default_factory=threading.Event)
    made: list[FakeEngine] = field(default_factory=list)
    errors: dict[int, dict[str, Exception]] = field(default_factory=dict)  # of those to come

    def launch(self) -> FakeEngine:
        errors = self.errors.get(len(self.made), {})
        self.made.append(FakeEngine(len(self.made), self.go, policy_version=1, errors=errors))
        return self.made[-1]


@contextlib.contextmanager
def pool_of(
    num_engines: int = 2,
    in_flight: str = "keep",
    timeout_seconds: float = 20.0,
    hang_seconds: float = 10.0,
    max_restarts: int = 3,
    max_num_seqs: int = 4,
) -> Iterator[tuple[RolloutPool, Engines]]:
    engines = Engines()
    engines.go.set()
    config = RunConfig(
        rollout=RolloutConfig(
            num_engines=num_engines,
            max_num_seqs=max_num_seqs,
            slice_seconds=0.01,
            hang_seconds=hang_seconds,
            max_restarts=max_restarts,
        ),
        pipeline=PipelineConfig(in_flight=in_flight),
        runtime=RuntimeConfig(timeout_seconds=timeout_seconds),
    )
    pool = RolloutPool(config, Path("model"), engines.launch)
    for started in pool.begin_start():
        started.result()
    pool.finish_start()
    try:
        yield pool, engines
    finally:
        engines.go.set()
        pool.stop()
        for engine in engines.made:
            engine.kill()


def requests_of(number: int, prefix: str = "") -> list[GenerationRequest]:
    return [GenerationRequest(f"{prefix}{i:03d}", (1, 2), seed=i) for i in range(number)]


def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def has(number: int) -> Callable[[Collection[str]], bool | None]:
    return lambda finished: True if len(finished) >= number else None


def advances(engine: FakeEngine) -> list[tuple[str, Any]]:
    return [call for call in engine.calls if call[0] == "advance"]
