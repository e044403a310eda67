"""Which engine samples which request, and what has come of each. It talks to no engine itself.

        submit                assign                  finish
    ---------------> queue ------------> an engine ------------> finished --> take
                       ^                     |
                       '---------------------'
              aborted, or the engine was lost

The queue is in the order of submission, with a lane for what is to go first: what comes back from
an engine takes its old place there, before all of its lane that was never handed out.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from r2vpo_megatron.records import Generation, GenerationRequest
from r2vpo_megatron.rollout.sampling import SamplingSettings

Additions = list[tuple[list[GenerationRequest], SamplingSettings]]


class EngineId(NamedTuple):
    """One process of an engine; its replacement gets another id."""

    number: int
    restart: int = 0

    def __str__(self) -> str:
        """As people read it; different for each process."""
        return f"engine {self.number}" + (f" (restart {self.restart})" if self.restart else "")


@dataclass
class _Work:
    """A request on its way: its place in the queue, and what was sampled before an abort."""

    order: tuple[bool, int]  # of two lanes, the first one False; and of submission
    request: GenerationRequest
    sampling: SamplingSettings
    segments: list[Generation] = field(default_factory=list)

    def next_request(self) -> GenerationRequest:
        """The request as an engine is to get it now."""
        if not self.segments:
            return self.request
        partial = tuple(token_id for part in self.segments for token_id in part.token_ids)
        return replace(self.request, partial_token_ids=self.request.partial_token_ids + partial)

    def complete(self, last: Generation) -> Generation:
        """All that was sampled for the request, as one generation."""
        if not self.segments:
            return last
        parts = [*self.segments, last]
        return replace(
            last,
            token_ids=tuple(token_id for part in parts for token_id in part.token_ids),
            rollout_logprobs=np.concatenate([part.rollout_logprobs for part in parts]),
            policy_versions=np.concatenate([part.policy_versions for part in parts]),
        )


class Dispatcher:
    """Hands requests to engines by load, and collects what they sample. Not thread-safe.

    Args:
        max_per_engine: requests that an engine may have at a time. More than it decodes together,
            so that it finds the next one at once; not all, so that the last ones are spread over
            the engines by how fast each was. None: no bound.

    Raises:
        ValueError: max_per_engine is below 1.
    """

    def __init__(self, max_per_engine: int | None = None) -> None:
        if max_per_engine is not None and max_per_engine < 1:
            raise ValueError(f"max_per_engine={max_per_engine}: must be at least 1, or None")
        self._max_per_engine = max_per_engine
        self._num_submitted = 0
        self._queue: list[tuple[tuple[bool, int], str]] = []  # heap of (order, sample id)
        self._work: dict[str, _Work] = {}  # all unfinished, queued and on engines
        self._engines: dict[EngineId, set[str]] = {}  # sample ids that each has
        self._finished: dict[str, Generation] = {}
        self._last_assigned: tuple[tuple[int, ...], EngineId] | None = None  # prompt, engine

    @property
    def finished(self) -> Collection[str]:
        """Sample ids that `take` would give."""
        return self._finished.keys()

    @property
    def num_unfinished(self) -> int:
        """Requests that are queued or on an engine."""
        return len(self._work)

    @property
    def num_queued(self) -> int:
        """Requests that no engine has."""
        return len(self._queue)

    def num_on(self, engine: EngineId) -> int:
        """Requests that the engine has; 0 for one that is not there."""
        return len(self._engines.get(engine, ()))

    def add_engine(self, engine: EngineId) -> None:
        """From now on the engine gets requests. One that is there already stays as it is."""
        self._engines.setdefault(engine, set())

    def lose_engine(self, engine: EngineId) -> int:
        """The engine is gone, with the tokens that it did not report: its requests go back.

        Returns:
            How many they are.
        """
        sample_ids = self._engines.pop(engine, set())
        for sample_id in sample_ids:
            self._enqueue(self._work[sample_id])
        return len(sample_ids)

    def submit(
        self,
        requests: Sequence[GenerationRequest],
        sampling: SamplingSettings,
        *,
        first: bool = False,
    ) -> None:
        """Queue requests behind all others.

        Args:
            requests: one response each.
            sampling: the distribution to draw from.
            first: queue them before all that were submitted without it.

        Raises:
            ValueError: a sample id comes twice, or is queued, on an engine or not taken yet. No
                request of the call is queued then.
        """
        new: set[str] = set()
        for request in requests:
            sample_id = request.sample_id
            if sample_id in new or sample_id in self._work or sample_id in self._finished:
                raise ValueError(f"sample_id={sample_id!r}: is under way already")
            new.add(sample_id)
        for request in requests:
            work = _Work((not first, self._num_submitted), request, sampling)
            self._num_submitted += 1
            self._work[request.sample_id] = work
            self._enqueue(work)

    def assign(self, ready: Collection[EngineId]) -> dict[EngineId, Additions]:
        """Hand out what the engines have room for, in the order of the queue.

        A request goes to the engine with the fewest; successive ones of the same prompt to one,
        which has the prompt in its cache, while that one has less than an equal share. Where the
        next request's engine is not ready the queue waits for it.

        Args:
            ready: engines that can be told of new requests now.

        Returns:
            For each engine that gets some: its requests in order, by sampling settings.
        """
        added: dict[EngineId, Additions] = {}
        while self._queue:
            work = self._work[self._queue[0][1]]
            prompt = work.request.prompt_token_ids
            engine = self._choose(prompt, ready)
            if engine is None:
                break
            heapq.heappop(self._queue)
            self._engines[engine].add(work.request.sample_id)
            self._last_assigned = (prompt, engine)
            additions = added.setdefault(engine, [])
            if not additions or additions[-1][1] != work.sampling:
                additions.append(([], work.sampling))
            additions[-1][0].append(work.next_request())
        return added

    def finish(self, engine: EngineId, generations: Iterable[Generation]) -> int:
        """Take in what an engine gives back; aborted requests go on from where they were.

        An engine that is lost says nothing any more: its requests are sampled elsewhere.

        Returns:
            How many responses are complete by this.

        Raises:
            RuntimeError: the engine does not have the request.
        """
        sample_ids = self._engines.get(engine)
        if sample_ids is None:
            return 0
        num_complete = 0
        for generation in generations:
            sample_id = generation.sample_id
            if sample_id not in sample_ids:
                raise RuntimeError(f"{engine} gave back {sample_id!r}, which it does not have")
            sample_ids.remove(sample_id)
            work = self._work[sample_id]
            if generation.finish_reason == "abort":
                if generation.token_ids:
                    work.segments.append(generation)
                self._enqueue(work)
            else:
                self._finished[sample_id] = work.complete(generation)
                del self._work[sample_id]
                num_complete += 1
        return num_complete

    def take(self, sample_ids: Iterable[str]) -> list[Generation]:
        """Give finished generations away, in the order asked for.

        Raises:
            KeyError: one is not finished; those before it are gone.
        """
        return [self._finished.pop(sample_id) for sample_id in sample_ids]

    def _enqueue(self, work: _Work) -> None:
        heapq.heappush(self._queue, (work.order, work.request.sample_id))

    def _choose(self, prompt: tuple[int, ...], ready: Collection[EngineId]) -> EngineId | None:
        """The engine of the next request, or None if it must wait."""
        if not self._engines:
            return None
        if self._last_assigned is not None and self._last_assigned[0] == prompt:
            engine = self._last_assigned[1]
            share = self.num_unfinished / len(self._engines)
            if engine in ready and self._has_room(engine) and self.num_on(engine) < share:
                return engine
        engine = min(self._engines, key=lambda engine: (self.num_on(engine), engine))
        return engine if engine in ready and self._has_room(engine) else None

    def _has_room(self, engine: EngineId) -> bool:
        if engine not in self._engines:
            return False
        return self._max_per_engine is None or self.num_on(engine) < self._max_per_engine
