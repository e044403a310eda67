"""The thread in the driver that keeps the engines at work, and replaces those that are lost."""

from __future__ import annotations

import enum
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from r2vpo_megatron.orchestration.pool_engines import (
    EngineCall,
    EngineHandle,
    EngineState,
    PoolEngine,
    describe_error,
    discard,
)
from r2vpo_megatron.rollout.dispatch import Additions, Dispatcher, EngineId
from r2vpo_megatron.rollout.engine import EngineReport

JOIN_SECONDS = 5.0  # for the thread to end; it waits for nothing but news
SLICES_AHEAD = 2  # queued per engine: it begins the next while the driver reads the last report


class Pace(enum.Enum):
    """What engines that have requests are given to do."""

    RUNNING = "running"
    DRAINING = "draining"  # slices, but no new requests
    PAUSED = "paused"


@dataclass(frozen=True)
class LoopSettings:
    """When engines report, and how long they may take; see `RolloutConfig`."""

    slice_seconds: float
    hang_seconds: float
    start_seconds: float
    max_restarts: int


@dataclass
class LoopCounts:
    """What the engines have done since it was last asked."""

    since: float  # time.monotonic, seconds
    busy_seconds: float = 0.0
    num_tokens: int = 0
    num_restarts: int = 0
    num_resent: int = 0


class EngineLoop:
    """Engines, the requests that they have, and the thread that brings them together.

    All state is guarded by `changed`, which is notified whenever something that others may wait
    for has happened: responses are complete, an engine has come to rest or changed its state. No
    engine is called while it is held.

    Args:
        engines: the first processes, ready to sample.
        dispatcher: of the requests.
        launch: creates the process of a replacement.
        needs_weights: whether a replacement may not sample what its model folder holds.
        settings: times and limits.
    """

    def __init__(
        self,
        engines: Iterable[PoolEngine],
        dispatcher: Dispatcher,
        launch: Callable[[], EngineHandle],
        needs_weights: Callable[[], bool],
        settings: LoopSettings,
    ) -> None:
        lock = threading.RLock()
        self.changed = threading.Condition(lock)
        self._news = threading.Condition(lock)  # for the thread
        self.engines = list(engines)
        self.dispatcher = dispatcher
        self.pace = Pace.RUNNING
        self.failure: BaseException | None = None
        self.progressed_at = time.monotonic()
        self.counts = LoopCounts(self.progressed_at)
        self.events: list[str] = []
        self._launch, self._needs_weights, self._settings = launch, needs_weights, settings
        self._discarded: list[PoolEngine] = []
        self._num_losses = 0
        self._is_stopping = False
        self._turned_at = self.progressed_at
        self._thread = threading.Thread(target=self._run, name="rollout-engines", daemon=True)

    def start(self) -> None:
        """Begin; requests that are submitted from now on are sampled."""
        for engine in self.engines:
            self.dispatcher.add_engine(engine.engine_id)
        self.progressed_at = self._turned_at = time.monotonic()
        self.counts = LoopCounts(self.progressed_at)
        self._thread.start()

    def stop(self) -> None:
        """End the thread, and processes that were lost. Calls that engines have stay with them."""
        with self.changed:
            self._is_stopping = True
            self._news.notify_all()
        if self._thread.is_alive():
            self._thread.join(JOIN_SECONDS)
        for engine in self._discarded:
            discard(engine)

    def set_pace(self, pace: Pace) -> None:
        """Have engines sample, finish what they have, or come to rest."""
        with self.changed:
            self.pace = pace
            self._news.notify_all()

    def look(self) -> None:
        """Have the thread look at dispatcher and calls anew, in which something has changed."""
        with self.changed:
            self._news.notify_all()

    def in_state(self, *states: EngineState) -> list[PoolEngine]:
        """The engines that are in one of these. Call with `changed` held."""
        return [engine for engine in self.engines if engine.state in states]

    def fail(self, error: BaseException) -> None:
        """End the loop; whoever waits gets the error. The first one stays."""
        with self.changed:
            self.failure = self.failure or error
            self.changed.notify_all()
            self._news.notify_all()

    def lose(self, engine: PoolEngine, cause: str) -> None:
        """Take an engine out: its requests go to others, its process is replaced.

        One that has been lost before stays as it is.
        """
        with self.changed:
            if engine.state is EngineState.LOST:
                return
            engine.state = EngineState.LOST
            self.engines.remove(engine)
            num_resent = self.dispatcher.lose_engine(engine.engine_id)
            self.counts.num_resent += num_resent
            self._num_losses += 1
            self._discarded.append(engine)
            limit = self._settings.max_restarts
            what = f"{engine.engine_id} was lost ({cause})"
            if self._num_losses > limit:
                self.fail(
                    RuntimeError(
                        f"{what}; it is number {self._num_losses} of this run, "
                        f"rollout.max_restarts = {limit}"
                    )
                )
                return
            self.events.append(
                f"{what}; {num_resent} requests are sent anew, "
                f"restart {self._num_losses} of at most {limit}"
            )
            self.progressed_at = time.monotonic()
            self.changed.notify_all()
            self._news.notify_all()

    def _run(self) -> None:
        try:
            while self._turn():
                pass
        except BaseException as error:  # whoever waits must learn of it, whatever it is
            self.fail(error)

    def _turn(self) -> bool:
        """Give engines what is due, or wait for news; False at the end."""
        with self.changed:
            for engine in list(self.engines):
                while engine.calls and engine.calls[0].is_answered:
                    self._take_in(engine, engine.calls.popleft())
            self._lose_hung()
            if self.failure is not None or self._is_stopping:
                return False
            slices = self._due_slices()
            discarded, self._discarded = self._discarded, []
            if not slices and not discarded:
                self._news.wait(self._settings.hang_seconds / 8)
        for engine, call, additions in slices:
            seconds = self._settings.slice_seconds
            self._follow(call, engine.handle.call("advance", additions, seconds))
        for engine in discarded:
            self._replace(engine)
        return True

    def _due_slices(self) -> list[tuple[PoolEngine, EngineCall, Additions]]:
        if self.pace is Pace.PAUSED:
            return []
        serving = self.in_state(EngineState.SERVING)
        ready = [engine.engine_id for engine in serving if len(engine.calls) < SLICES_AHEAD]
        added: dict[EngineId, Additions] = {}
        if self.pace is Pace.RUNNING:
            added = self.dispatcher.assign(ready)
        slices = []
        for engine in serving:
            additions = added.get(engine.engine_id, [])
            has_requests = self.dispatcher.num_on(engine.engine_id) > 0
            while has_requests and len(engine.calls) < SLICES_AHEAD:
                if not engine.calls:
                    engine.reported_at = time.monotonic()
                engine.calls.append(EngineCall(sum(len(requests) for requests, _ in additions)))
                slices.append((engine, engine.calls[-1], additions))
                additions = []
        return slices

    def _follow(self, call: EngineCall, future: Future[Any]) -> None:
        """Have the thread take in the call's result; the callback runs in any thread."""
        with self.changed:
            call.future = future
        future.add_done_callback(lambda _: self.look())

    def _take_in(self, engine: PoolEngine, call: EngineCall) -> None:
        assert call.future is not None
        if engine.state is EngineState.LOST:
            return
        now = engine.reported_at = time.monotonic()
        error = call.future.exception()
        if engine.state is EngineState.STARTING and error is None:
            self.progressed_at = now
            engine.segments = call.future.result()
            engine.state = EngineState.WAITING
            if not self._needs_weights():
                self.dispatcher.add_engine(engine.engine_id)
                engine.state = EngineState.SERVING
            self.changed.notify_all()
        elif error is None:
            self._count(engine, call.future.result())
        elif isinstance(error, ValueError) and engine.state is EngineState.SERVING:
            self.fail(error)  # a bad request, on every engine alike
        else:
            self.lose(engine, describe_error(error))

    def _count(self, engine: PoolEngine, report: EngineReport) -> None:
        num_complete = self.dispatcher.finish(engine.engine_id, report.finished)
        if num_complete or report.num_tokens:
            self.progressed_at = engine.reported_at
        if num_complete or not engine.calls:
            self.changed.notify_all()
        self.counts.busy_seconds += report.busy_seconds
        self.counts.num_tokens += report.num_tokens
        engine.memory_bytes = report.memory_bytes
        num_coming = sum(call.num_requests for call in engine.calls)
        expected = self.dispatcher.num_on(engine.engine_id) - num_coming
        if report.num_unfinished != expected:
            self.lose(engine, f"it has {report.num_unfinished} requests and was sent {expected}")

    def _lose_hung(self) -> None:
        now, settings = time.monotonic(), self._settings
        if now - self._turned_at > settings.hang_seconds / 2:  # the driver itself was stopped
            for engine in self.engines:
                engine.reported_at = now
        self._turned_at = now
        for engine in list(self.engines):
            seconds = now - engine.reported_at
            if engine.state is EngineState.STARTING and seconds > settings.start_seconds:
                self.lose(engine, f"not ready {settings.start_seconds:g} s after its start")
            is_busy = engine.calls and engine.state is EngineState.SERVING
            if is_busy and seconds > settings.hang_seconds:
                self.lose(engine, f"no report in {settings.hang_seconds:g} s")

    def _replace(self, engine: PoolEngine) -> None:
        discard(engine)
        number, restart = engine.engine_id
        replacement = PoolEngine(
            EngineId(number, restart + 1),
            self._launch(),
            EngineState.STARTING,
            time.monotonic(),
            calls=deque([EngineCall()]),
        )
        with self.changed:
            self.engines.append(replacement)
            self.counts.num_restarts += 1
        self._follow(replacement.calls[0], replacement.handle.call("start", engine.segments))
