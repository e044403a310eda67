"""Calls to several engines at once, in which those that fail are left behind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from typing import Any

from r2vpo_megatron.orchestration.cluster import WAITS_PER_DEADLINE
from r2vpo_megatron.orchestration.pool_engines import PoolEngine, describe_error

Pending = list[tuple[PoolEngine, Future[Any]]]


class TargetsLost(RuntimeError):
    """No engine is left that a weight push could go on with."""


class PushTargets:
    """The engines that take part in a weight push, or in another call to all.

    Args:
        engines: that take part.
        workers_per_engine: tensor parallel size.
        hang_seconds: what the engines may take for one call, from when it is waited for; time in
            which the driver itself was stopped does not count.
        lose: is told of an engine that failed, and why.
    """

    def __init__(
        self,
        engines: Sequence[PoolEngine],
        workers_per_engine: int,
        hang_seconds: float,
        lose: Callable[[PoolEngine, str], None],
    ) -> None:
        self.workers_per_engine = workers_per_engine
        self._engines = list(engines)
        self._hang_seconds = hang_seconds
        self._lose = lose
        self._causes: list[str] = []

    @property
    def engines(self) -> tuple[PoolEngine, ...]:
        """Those that still take part."""
        return tuple(self._engines)

    @property
    def membership(self) -> tuple[str, ...]:
        """One id per engine process that takes part; a restarted engine has another."""
        return tuple(str(engine.engine_id) for engine in self._engines)

    def start(self, method: str, *args: Any) -> Pending:
        """Call a method of `RolloutWorker` on every engine, with the same arguments."""
        return self.start_each(method, [args] * len(self._engines))

    def start_each(self, method: str, args_of_engines: Sequence[Sequence[Any]]) -> Pending:
        """Call a method of `RolloutWorker` on every engine, in the order of `membership`."""
        return [
            (engine, engine.handle.call(method, *args))
            for engine, args in zip(self._engines, args_of_engines, strict=True)
        ]

    def finish(
        self, pending: Pending, callers_errors: tuple[type[Exception], ...] = ()
    ) -> list[Any]:
        """Wait for calls; an engine that died, hung or raised takes part no longer.

        Args:
            pending: of `start` or `start_each`. Calls of engines that have been left behind since
                are passed over.
            callers_errors: types of errors that are raised here instead, as they came.

        Returns:
            The results of the engines that still take part, in their order.

        Raises:
            TargetsLost: none is left; with the causes.
        """
        waits_left = WAITS_PER_DEADLINE
        results = []
        for engine, future in pending:
            if engine not in self._engines:
                continue
            while waits_left and not wait([future], self._hang_seconds / WAITS_PER_DEADLINE).done:
                waits_left -= 1
            if not future.done():
                self._leave_behind(engine, f"no answer in {self._hang_seconds:g} s")
            elif (error := future.exception()) is None:
                results.append(future.result())
            elif isinstance(error, callers_errors):
                raise error
            else:
                self._leave_behind(engine, describe_error(error))
        if not self._engines:
            raise TargetsLost("no engine is left: " + ("; ".join(self._causes) or "none was there"))
        return results

    def _leave_behind(self, engine: PoolEngine, cause: str) -> None:
        self._engines.remove(engine)
        self._causes.append(f"{engine.engine_id}: {cause}")
        self._lose(engine, cause)
