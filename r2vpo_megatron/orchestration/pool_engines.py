"""A rollout engine's process as the driver sees it: how to call it, and what it is doing."""

from __future__ import annotations

import enum
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import ray

from r2vpo_megatron.config import RunConfig
from r2vpo_megatron.orchestration.placement import ROLLOUT_GROUP, actor_options
from r2vpo_megatron.orchestration.rollout_worker import RolloutWorker
from r2vpo_megatron.rollout.dispatch import EngineId
from r2vpo_megatron.rollout.engine_settings import engine_environment
from r2vpo_megatron.rollout.shared_segments import remove_segments


class EngineHandle(Protocol):
    """A process that runs the methods of `RolloutWorker`, one after the other."""

    def begin_start(self) -> Any:
        """Begin loading the model; Ray's reference to wait for."""
        ...

    def call(self, method: str, *args: Any) -> Future[Any]:
        """Queue a call. Its future has the method's own error, or says that the process died."""
        ...

    def kill(self) -> None:
        """End the process at once, whatever it is doing."""
        ...


class RayEngine:
    """A `RolloutWorker` in a Ray actor; satisfies `EngineHandle`."""

    def __init__(self, config: RunConfig, model_dir: Path) -> None:
        """Create the process; nothing is loaded in it yet."""
        environment = engine_environment(config.runtime.device, config.rollout.threads_per_engine)
        options = actor_options(
            config, environment, config.rollout.tensor_parallel, group=ROLLOUT_GROUP
        )
        worker = ray.remote(RolloutWorker)
        self._actor = worker.options(**options).remote(config, model_dir)

    def begin_start(self) -> Any:
        """See `EngineHandle.begin_start`."""
        return self._actor.start.remote()

    def call(self, method: str, *args: Any) -> Future[Any]:
        """See `EngineHandle.call`."""
        future: Future[Any] = getattr(self._actor, method).remote(*args).future()
        return future

    def kill(self) -> None:
        """See `EngineHandle.kill`. Ray kills a process that is stopped, too."""
        ray.kill(self._actor, no_restart=True)


class EngineState(enum.Enum):
    """What an engine is good for."""

    STARTING = "starting"
    WAITING = "waiting for weights"
    SERVING = "sampling"
    LOST = "lost"


@dataclass
class EngineCall:
    """A slice, or the start, that an engine was told to do; the future comes once it was told."""

    num_requests: int = 0  # that went with it
    future: Future[Any] | None = None

    @property
    def is_answered(self) -> bool:
        """Whether its result or error is there."""
        return self.future is not None and self.future.done()


@dataclass(eq=False)
class PoolEngine:
    """One engine's process and what it is doing.

    Attributes:
        engine_id: another one for each process.
        handle: to call it by.
        state: what it is good for.
        reported_at: when it last reported, or was given something to do after it had nothing
            (time.monotonic, seconds).
        calls: whose results have not been taken in, in order. Ray may deliver a small report
            before a large one that was made earlier.
        memory_bytes: of its process, as it last reported.
        segments: what it leaves in /dev/shm if it is killed.
    """

    engine_id: EngineId
    handle: EngineHandle
    state: EngineState
    reported_at: float
    calls: deque[EngineCall] = field(default_factory=deque)
    memory_bytes: int = 0
    segments: tuple[str, ...] = ()


def discard(engine: PoolEngine) -> None:
    """End an engine's process and remove what it leaves on this host."""
    engine.handle.kill()
    remove_segments(engine.segments)


def describe_error(error: BaseException) -> str:
    """Type and first line of an error; of one that was raised in a worker, as it was there."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, BaseException):  # ray.exceptions.RayTaskError wraps it in a traceback
        error = cause
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
