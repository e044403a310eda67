"""The driver's handle on the rollout engines.

`submit` returns at once and the engines sample meanwhile; `wait_for` and `take` get the results.
One request is sampled by one engine at a time, whichever is free; an engine that dies or hangs is
replaced, and what it had under way is sampled by others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import wait
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from r2vpo_megatron.config import RunConfig
from r2vpo_megatron.orchestration.cluster import NoAnswer, no_answer
from r2vpo_megatron.orchestration.engine_loop import EngineLoop, LoopCounts, LoopSettings, Pace
from r2vpo_megatron.orchestration.pool_engines import (
    EngineHandle,
    EngineState,
    PoolEngine,
    RayEngine,
    discard,
)
from r2vpo_megatron.orchestration.push_targets import PushTargets, TargetsLost
from r2vpo_megatron.records import FloatArray, Generation, GenerationRequest
from r2vpo_megatron.rollout.dispatch import Dispatcher, EngineId
from r2vpo_megatron.rollout.sampling import SamplingSettings

STOP_SECONDS = 15.0  # for engines to end their own processes
WATCH_SECONDS = 1.0  # between two looks of a waiting caller at its deadline
SUBMITTED_ROUNDS = 4  # times what all engines decode at a time; see `generate_unordered`

T = TypeVar("T")


class RolloutPool:
    """All rollout engines, data parallel. Its methods are for one thread, the driver's main one.

    Args:
        config: of the run.
        model_dir: folder of the checkpoint that engines load.
        launch: creates an engine's process; None: a Ray actor.

    Attributes:
        refresh: pushes the current weights to engines that were restarted (`pushing` with
            `only_waiting`); called within `wait_for`. None: as long as no weights were pushed, a
            restarted engine serves what the model folder holds.
        on_event: is told of every engine that is lost, in a line; within calls of the pool.
        before_look: called again and again while responses are waited for, and the rest of the
            engines before a push; may end the wait by an exception.
    """

    def __init__(
        self,
        config: RunConfig,
        model_dir: Path,
        launch: Callable[[], EngineHandle] | None = None,
    ) -> None:
        """Create the engines' processes; `begin_start` loads the model in them."""
        self.refresh: Callable[[], object] | None = None
        self.on_event: Callable[[str], None] = lambda event: None
        self.before_look: Callable[[], None] = lambda: None
        self._config, self._timeout = config, config.runtime.timeout_seconds
        self._policy_version = 0
        self._is_pushed = False
        self._lost_push: TargetsLost | None = None  # which nobody has made good since
        rollout = config.rollout
        launch = launch or (lambda: RayEngine(config, model_dir))
        now = time.monotonic()
        engines = [
            PoolEngine(EngineId(index), launch(), EngineState.SERVING, now)
            for index in range(rollout.num_engines)
        ]
        # One engine gets everything at once, so that what it samples does not depend on when the
        # driver hands it over.
        look_ahead = max(1, rollout.max_num_seqs // 4)
        limit = None if rollout.num_engines == 1 else rollout.max_num_seqs + look_ahead
        self._dispatcher = Dispatcher(limit)
        settings = LoopSettings(
            slice_seconds=rollout.slice_seconds,
            hang_seconds=rollout.hang_seconds,
            start_seconds=self._timeout,
            max_restarts=rollout.max_restarts,
        )
        self._loop = EngineLoop(engines, self._dispatcher, launch, self._needs_weights, settings)

    @property
    def policy_version(self) -> int:
        """Version of the weights that the engines serve."""
        return self._policy_version

    @property
    def is_idle(self) -> bool:
        """Whether no request is queued or on an engine."""
        return self._dispatcher.num_unfinished == 0

    def begin_start(self) -> list[Any]:
        """Begin loading the model in every engine; references to wait for."""
        return [engine.handle.begin_start() for engine in self._loop.engines]

    def finish_start(self) -> None:
        """Wait until every engine is ready; from now on they sample what is submitted."""
        segments = self._call_all("shared_segments")
        for engine, of_engine in zip(self._loop.engines, segments, strict=True):
            engine.segments = of_engine
        self._loop.start()

    def node_ids(self) -> set[str]:
        """The nodes that engines are on."""
        return set(self._call_all("node_id"))

    def submit(self, requests: Sequence[GenerationRequest], sampling: SamplingSettings) -> None:
        """Queue requests behind all others, one response each.

        Raises:
            ValueError: a sample id is under way already, or its response has not been taken.
        """
        with self._loop.changed:
            self._dispatcher.submit(requests, sampling)
            self._loop.look()

    def wait_for(self, condition: Callable[[Collection[str]], T | None]) -> T:
        """Wait until the condition, given the sample ids that are finished, is not None.

        Raises:
            NoAnswer: the engines made no progress in `runtime.timeout_seconds`.
            ValueError: an engine refuses a request.
            RuntimeError: more engines were lost than `rollout.max_restarts`, or all in a push.
        """
        return self._wait_until(
            lambda: condition(self._dispatcher.finished), before=self._refresh_waiting
        )

    def take(self, sample_ids: Iterable[str]) -> list[Generation]:
        """Finished responses in this order; the pool forgets them.

        Raises:
            KeyError: one is not finished.
        """
        with self._loop.changed:
            return self._dispatcher.take(sample_ids)

    def generate(
        self, requests: Sequence[GenerationRequest], sampling: SamplingSettings
    ) -> list[Generation]:
        """Sample one response per request, to the end, in the order of the requests.

        The caller waits for them: they go before all submitted requests that no engine has yet.
        """
        sample_ids = [request.sample_id for request in requests]
        with self._loop.changed:
            self._dispatcher.submit(requests, sampling, first=True)
            self._loop.look()
        self.wait_for(lambda finished: True if _holds_all(finished, sample_ids) else None)
        return self.take(sample_ids)

    def generate_unordered(
        self, chunks: Iterable[Sequence[GenerationRequest]], sampling: SamplingSettings
    ) -> Iterator[list[Generation]]:
        """Give each chunk's responses, in the order of its requests, as chunks are finished.

        `chunks` is asked for the next one as long as the engines might run out of requests before
        the caller comes back; they do not wait for the longest response of a chunk.
        """
        rollout = self._config.rollout
        enough = SUBMITTED_ROUNDS * rollout.num_engines * rollout.max_num_seqs
        waiting = iter(chunks)
        under_way: list[list[str]] = []  # sample ids by chunk
        has_more = True

        def whole_chunks(finished: Collection[str]) -> list[list[str]] | None:
            """None: there is nothing to do but wait; empty: engines need more to do."""
            whole = [part for part in under_way if _holds_all(finished, part)]
            needs_more = has_more and self._dispatcher.num_unfinished < enough
            return whole if whole or needs_more else None

        while has_more or under_way:
            while has_more and (not under_way or self._dispatcher.num_unfinished < enough):
                chunk = next(waiting, None)
                has_more = chunk is not None
                if chunk is not None:
                    self.submit(chunk, sampling)
                    under_way.append([request.sample_id for request in chunk])
            if under_way and (whole := self.wait_for(whole_chunks)):
                under_way.remove(whole[0])
                yield self.take(whole[0])

    def score_on_each(self, token_id_lists: Sequence[Sequence[int]]) -> list[list[FloatArray]]:
        """Log-probs of sequences on every engine that serves; see `RolloutEngine.score`.

        Engines do this between two slices. One that fails is left out, and replaced; where none is
        left, one that was restarted is waited for.

        Raises:
            ValueError: a sequence is too long.
            NoAnswer, RuntimeError: as `wait_for`.
        """
        while True:
            engines = self._wait_until(
                lambda: self._loop.in_state(EngineState.SERVING) or None,
                before=self._refresh_waiting,
            )
            targets = self._targets(engines)
            with suppress(TargetsLost):
                return targets.finish(targets.start("score", token_id_lists), (ValueError,))

    @contextmanager
    def pushing(self, version: int, only_waiting: bool = False) -> Iterator[PushTargets]:
        """Let weights be replaced: inside the block the engines that take part are at rest.

        On leaving it, those of them that are still there serve `version`. After an exception no
        engine does, and the pool samples nothing more; only where all of them were lost may their
        replacements be pushed to, in another such block.

        Args:
            version: of the weights.
            only_waiting: to restarted engines that lack weights; the others sample meanwhile.

        Raises:
            NoAnswer: the engines did not come to rest, or none was there, in
                `runtime.timeout_seconds`.
        """
        with self._loop.changed:
            self._is_pushed = True  # what is restarted from now on needs weights
        if only_waiting:
            if version != self._policy_version:
                raise ValueError(
                    f"version={version}: engines serve {self._policy_version}, which restarted "
                    "ones must get too"
                )
            with self._loop.changed:
                targets = self._targets(self._loop.in_state(EngineState.WAITING))
        else:
            targets = self._targets(self._come_to_rest())
        try:
            yield targets
        except TargetsLost as error:
            if not only_waiting:
                self._lost_push = error
            raise
        except BaseException as error:
            self._loop.fail(error)
            raise
        self._resume(version, targets.engines)

    def metrics(self, reset: bool = True) -> dict[str, float]:
        """What the engines have done since the last reset.

        The idle fraction is the share of all engines' time in which they had no step to do, that
        of restarts and weight pushes included; tokens per second are those of all engines
        together, by the wall clock.
        """
        self._tell_events()
        with self._loop.changed:
            now, counts = time.monotonic(), self._loop.counts
            seconds = max(now - counts.since, 1e-9)
            num_engines = self._config.rollout.num_engines
            if reset:
                self._loop.counts = LoopCounts(now)
            return {
                "rollout/idle_fraction": max(
                    0.0, 1.0 - counts.busy_seconds / (seconds * num_engines)
                ),
                "rollout/tokens_per_second": counts.num_tokens / seconds,
                "rollout/num_restarts": float(counts.num_restarts),
                "rollout/num_resent": float(counts.num_resent),
                "rollout/num_unfinished": float(self._dispatcher.num_unfinished),
                "memory/rollout_bytes": float(
                    max((engine.memory_bytes for engine in self._loop.engines), default=0)
                ),
            }

    def stop(self) -> None:
        """End the engines' own processes; those that do not answer in time are killed."""
        self._loop.stop()
        stops = [(engine, engine.handle.call("stop")) for engine in self._loop.engines]
        wait([stop for _, stop in stops], timeout=STOP_SECONDS)
        for engine, stop in stops:
            if not stop.done() or stop.exception() is not None:
                discard(engine)

    def _needs_weights(self) -> bool:
        return self.refresh is not None or self._is_pushed

    def _targets(self, engines: Sequence[PoolEngine]) -> PushTargets:
        rollout = self._config.rollout
        return PushTargets(engines, rollout.tensor_parallel, rollout.hang_seconds, self._loop.lose)

    def _call_all(self, method: str) -> list[Any]:
        """Every engine's result; at start-up, when the first error ends the run."""
        calls = [engine.handle.call(method) for engine in self._loop.engines]
        if wait(calls, timeout=self._timeout).not_done:
            raise NoAnswer(no_answer(method, self._timeout))
        return [call.result() for call in calls]

    def _refresh_waiting(self) -> None:
        self.before_look()
        if self._lost_push is not None:  # nothing serves the weights that the caller counts on
            raise self._lost_push
        with self._loop.changed:
            is_due = bool(self._loop.in_state(EngineState.WAITING))
        if is_due and self.refresh is not None:
            # Where they are lost again they are replaced once more; others sample meanwhile.
            with suppress(TargetsLost):
                self.refresh()

    def _come_to_rest(self) -> list[PoolEngine]:
        """Apply `pipeline.in_flight`; the engines that weights are to be pushed to."""
        loop, in_flight = self._loop, self._config.pipeline.in_flight
        loop.set_pace(Pace.DRAINING if in_flight == "drain" else Pace.PAUSED)

        def at_rest() -> list[PoolEngine] | None:
            serving = loop.in_state(EngineState.SERVING)
            num_on = sum(self._dispatcher.num_on(engine.engine_id) for engine in serving)
            is_busy = any(engine.calls for engine in serving)
            if is_busy or (in_flight == "drain" and num_on):
                return None
            return serving + loop.in_state(EngineState.WAITING) or None

        engines = self._wait_until(at_rest, before=self.before_look)
        if in_flight == "abort":
            self._abort([engine for engine in engines if engine.state is EngineState.SERVING])
            engines = self._wait_until(at_rest)
        loop.set_pace(Pace.PAUSED)
        return engines

    def _abort(self, engines: Sequence[PoolEngine]) -> None:
        """Take all requests back from these engines, to hand them out again."""
        targets = self._targets(engines)
        try:
            results = targets.finish(targets.start("abort_requests"))
        except TargetsLost:
            return  # their requests have come back to be sampled anew
        with self._loop.changed:
            for engine, generations in zip(targets.engines, results, strict=True):
                self._dispatcher.finish(engine.engine_id, generations)
                if num_kept := self._dispatcher.num_on(engine.engine_id):
                    self._loop.lose(engine, f"it kept {num_kept} requests that were aborted")

    def _resume(self, version: int, engines: Sequence[PoolEngine]) -> None:
        with self._loop.changed:
            self._policy_version, self._lost_push = version, None
            self._loop.progressed_at = time.monotonic()
            for engine in engines:
                if engine.state is not EngineState.LOST:
                    engine.state = EngineState.SERVING
                    self._dispatcher.add_engine(engine.engine_id)
            self._loop.set_pace(Pace.RUNNING)

    def _wait_until(
        self, condition: Callable[[], T | None], before: Callable[[], None] | None = None
    ) -> T:
        """Wait for the loop's news until the condition, asked with `changed` held, is not None.

        `before` is called before each look, without it.
        """
        loop = self._loop
        began = looked_at = time.monotonic()
        while True:
            self._tell_events()
            if before is not None:
                before()
            with loop.changed:
                if loop.failure is not None:
                    raise loop.failure
                result = condition()
                if result is not None:
                    return result
                now = time.monotonic()
                if now - looked_at > max(2 * WATCH_SECONDS, self._timeout / 2):
                    began = now  # the driver itself was stopped
                looked_at = now
                if now - max(began, loop.progressed_at) > self._timeout:
                    raise NoAnswer(
                        f"no progress of the rollout in {self._timeout:g} s: {self._doings()}"
                    )
                loop.changed.wait(WATCH_SECONDS)

    def _doings(self) -> str:
        now = time.monotonic()
        parts = [
            f"{engine.engine_id} is {engine.state.value} with "
            f"{self._dispatcher.num_on(engine.engine_id)} requests, "
            f"last report {now - engine.reported_at:.0f} s ago"
            for engine in sorted(self._loop.engines, key=lambda engine: engine.engine_id)
        ]
        return "; ".join([*parts, f"{self._dispatcher.num_queued} requests are queued"])

    def _tell_events(self) -> None:
        with self._loop.changed:
            events, self._loop.events = self._loop.events, []
        for event in events:
            self.on_event(event)


def _holds_all(finished: Collection[str], sample_ids: Sequence[str]) -> bool:
    return all(sample_id in finished for sample_id in sample_ids)
